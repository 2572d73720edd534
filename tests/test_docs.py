"""The documentation against the code: its config table, its commands, its Python and the files it names."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from specjax import benchmark
from specjax.config import RunConfig, parse_config, validated
from specjax.recipes import Spec

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SMALLEST = {"output_dir": "x", "target": {"path": "x"}, "data": {"train": ["x"]}}
SMALLEST_SPEC = validated(Spec, {"base": "x", "prompts": ["x"], "variants": [{"name": "x"}]}, "docs")
MODULE = re.compile(r"python -m ((?:specjax|converters)[.\w]*)")
FILE = re.compile(r"\b(?:configs|scripts|docs|tests)/[\w.-]+\.(?:yaml|sh|py|md)\b")
SHELL = {"&", "&&", "|", ";", ">"}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def config_rows(model: type[BaseModel] = RunConfig, prefix: str = "", values: Any = None) -> Iterator[str]:
    """The rows of a table in docs/train.md: setting, default, meaning."""
    values = parse_config(SMALLEST, "docs") if values is None else values
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from config_rows(field.annotation, f"{prefix}{name}.", getattr(values, name))
        else:
            yield f"| `{prefix}{name}` | {shown_default(field, getattr(values, name))} | {field.description} |"


def shown_default(field: Any, value: Any) -> str:
    if field.is_required():
        return "required"
    text = f"`{value if isinstance(value, str) else json.dumps(value)}`"
    others = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return ", ".join([text, *(f"or `{other}`" for other in others if other != value)])


def code(page: Path) -> tuple[list[str], list[str]]:
    """(shell lines, Python snippets) of a page's fenced and indented blocks; continued lines are joined."""
    shell, snippets = [], []
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            snippets.append(block)
        elif language in ("", "sh", "bash"):
            shell += block.replace("\\\n", " ").splitlines()
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    shell += [line for line in outside.splitlines() if line.startswith("    ")]
    return shell, snippets


def commands() -> list[tuple[str, str]]:
    return [(page.name, line.strip()) for page in PAGES for line in code(page)[0] if MODULE.search(line)]


def snippets() -> list[tuple[str, str]]:
    return [(page.name, snippet) for page in PAGES for snippet in code(page)[1]]


@pytest.mark.parametrize("row", [*config_rows(), *config_rows(Spec, values=SMALLEST_SPEC)])
def test_a_table_of_settings_is_that_of_the_schema(row: str) -> None:
    assert row in (ROOT / "docs" / "train.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    at = words.index("-m")
    end = next((i for i, word in enumerate(words) if word in SHELL), len(words))
    arguments = words[at + 2 : end]
    main = importlib.import_module(words[at + 1]).main
    if words[at + 1] == "specjax.train":
        main([*arguments, "--print-config"])  # reads the config and every override too
        return

    def stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def parse_and_stop(*args: Any) -> None:
            parse(*args)  # exits with 2 where it refuses
            raise SystemExit(0)

        return parse_and_stop

    parsers = [(argparse.ArgumentParser, "parse_args"), (argparse.ArgumentParser, "parse_intermixed_args")]
    for owner, name in (*parsers, (benchmark, "_parse")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0


@pytest.mark.parametrize(("page", "snippet"), snippets())
def test_python_imports_what_exists(page: str, snippet: str) -> None:
    for node in ast.walk(ast.parse(snippet)):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module = importlib.import_module(node.module if isinstance(node, ast.ImportFrom) else alias.name)
            assert isinstance(node, ast.Import) or hasattr(module, alias.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in FILE.findall(text):
        assert (ROOT / name).is_file(), name
    for name in LINK.findall(text):
        assert (page.parent / name).exists(), name
    for name in MODULE.findall(text):
        importlib.import_module(name)
