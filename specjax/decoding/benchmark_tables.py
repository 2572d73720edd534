"""Reports of `specjax.decoding.benchmark` as tables to print, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from specjax.decoding.benchmark_settings import Way
from specjax.decoding.torch_comparison import WAYS

Report = dict[str, Any]
Row = tuple[str, ...]
Table = tuple[str, list[str], list[Row]]
"""(title, all columns, rows)."""
Measure = tuple[str, Callable[[Report], str]]


def tables(reports: Mapping[str, Report]) -> list[Table]:
    """One combination of settings: a column for every data set. Several: a row for every combination and data set.

    And the comparison with PyTorch, where there is one.
    """
    names = [report["data_set"] for report in reports.values()]
    if list(reports) == names:
        shown = [("draft against autoregressive decoding", ["measure", *names], list(table(reports)))]
    else:
        grids = (("acceptance", _SHARES), ("speed", _SPEEDS), ("cost of steps", _COSTS))
        shown = [_rows(title, reports, measures) for title, measures in grids]
    compared = [row for report in reports.values() if "hf" in report for row in _against_torch(report)]
    return [*shown, ("against PyTorch, end to end", _TORCH_COLUMNS, compared)] if compared else shown


def table(reports: Mapping[str, Report]) -> Iterator[Row]:
    """The measure, then its value for every report."""
    for name, show in _MEASURES:
        yield name, *(show(report) for report in reports.values())


def markdown(shown: Sequence[Table]) -> str:
    parts = []
    for title, columns, rows in shown:
        lines = [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def way_of(report: Report) -> Way:
    names = "draft_tokens", "tree_nodes", "rule", "draft_choice", "one_pass"
    return Way(*(report[name] for name in names))


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)  # a data set may be a path
    return f"| {' | '.join(escaped)} |"


def _rows(title: str, reports: Mapping[str, Report], measures: Sequence[Measure]) -> Table:
    columns = [*_SETTINGS, *measures]
    return title, [name for name, _ in columns], [tuple(show(r) for _, show in columns) for r in reports.values()]


def _against_torch(report: Report) -> Iterator[Row]:
    for way, figures in report["hf"].items():
        low, high = figures["ratio_range"]
        yield (
            report["data_set"],
            f"{WAYS[way]} ({figures['threads']} threads)",
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['ours_tokens_per_s']:.0f}",
            f"{figures['ratio']:.2f}x ({low:.2f} to {high:.2f})",
            f"{figures['equal_outputs']} of {report['prompts']}",
        )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def _with_range(report: Report, name: str) -> str:
    if report[name] is None:
        return "-"
    low, high = report[f"{name}_range"]
    return f"{report[name]:.2f}x ({low:.2f} to {high:.2f})"


def _milliseconds(report: Report, *names: str) -> str:
    return " / ".join(_number(None if report[name] is None else 1e3 * report[name], ".2f") for name in names)


def _bound(report: Report) -> str:
    return f"{_number(report['speedup_bound'], '.2f', 'x')} / {_number(report['share_of_bound'], '.2f')}"


def _identical(report: Report) -> str:
    if report["identical"] is None:
        return "not the same draws"
    if report["identical"]:
        return "yes"
    gaps = [entry["relative_gap"] for entry in report["differences"]]
    widest = "unknown" if None in gaps else f"up to {max(gaps):.1e} of the scores' range"
    return f"NO ({report['different_prompts']} prompts differ; gaps {widest})"


_SETTINGS: tuple[Measure, ...] = (
    ("data set", lambda r: r["data_set"]),
    ("T", lambda r: f"{r['temperature']:g}"),
    ("batch", lambda r: str(r["batch_size"])),
    ("way", lambda r: way_of(r).label),
)
_SHARES: tuple[Measure, ...] = (
    ("acceptance length (tokens a round)", lambda r: _number(r["acceptance_length"], ".2f")),
    ("acceptance rate", lambda r: _number(r["acceptance_rate"], ".3f")),
    ("acceptance by position", lambda r: " ".join(f"{x:.2f}" for x in r["acceptance_by_position"])),
    ("rounds without drafts", lambda r: _number(r["rounds_without_drafts"], ".2f")),
    ("repeated 4-grams", lambda r: f"{r['repeated_4gram_fraction']:.3f}"),
    ("outputs identical", _identical),
)
_SPEEDS: tuple[Measure, ...] = (
    ("AR tokens/s, decode only", lambda r: _number(r["ar_tokens_per_s"], ".0f")),
    ("speculative tokens/s, decode only", lambda r: _number(r["speculative_tokens_per_s"], ".0f")),
    ("AR tokens/s, end to end", lambda r: f"{r['ar_end_to_end_tokens_per_s']:.0f}"),
    ("speedup, decode only", lambda r: _with_range(r, "speedup_decode")),
    ("speedup, end to end", lambda r: _with_range(r, "speedup_end_to_end")),
)
_COSTS: tuple[Measure, ...] = (
    ("AR step, ms", lambda r: _milliseconds(r, "ar_step_s")),
    ("draft / verify / whole round, ms", lambda r: _milliseconds(r, "draft_s", "verify_s", "round_s")),
    ("speedup these allow / share reached", _bound),
)
_MEASURES: tuple[Measure, ...] = (
    ("prompts / new tokens", lambda r: f"{r['prompts']} / {r['tokens']}"),
    (
        "temperature / batch size / block size / way",
        lambda r: f"{r['temperature']:g} / {r['batch_size']} / {r['block_size']} / {way_of(r).label}",
    ),
    *_SHARES[:-1],
    *_SPEEDS,
    *_COSTS,
    _SHARES[-1],
)
_TORCH_COLUMNS = ["data set", "PyTorch", "its tokens/s", "our tokens/s", "ours / its", "equal outputs"]
