"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

WIDTH = 120  # where stdout is no terminal


def print_table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]], first: str = "measure") -> None:
    """Prints rows of a measure and its value in every column. first: the title of the first column."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
