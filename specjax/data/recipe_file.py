"""What a folder of derived data was made from, as JSON beside it: a call that would make something else is refused."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.errors import InputError


def check_recipe(path: Path, wanted: Mapping[str, Any], *, otherwise: str, remedy: str) -> dict[str, Any]:
    """The recipe in `path`; it must agree with every entry of `wanted`.

    Raises:
        InputError: the file is no JSON object; or entries differ: `otherwise` says what the folder then is, and each is
            named with both values. Either ends with `remedy`.
    """
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); {remedy}") from error
    differing = [
        f"{name} is {reprlib.repr(found.get(name))}, now {reprlib.repr(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differing:
        raise InputError(f"{path}: {otherwise}: {'; '.join(differing)}; restore these settings, or {remedy}")
    return found


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(recipe, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all, whoever else is writing it."""
    # Processes on several hosts may have the same id.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
