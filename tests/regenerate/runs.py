"""Calls of `specjax.regenerate` on a folder of models and data, and what these hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specjax.regenerate import main

NEW, SHARD, PROMPTS, FAILED = 12, 3, 11, 3
TEXTS = ("How many?", "Tom has 3 apples.", "Why?", "A shelf holds 12 books, and 5 more come.", "He buys 7 pens.")
TOKENS = [7, 8, 9, 10]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def told(text: str = "from the data") -> dict[str, str]:
    return {"role": "assistant", "content": text}


# The messages of each prompt that can be answered, or its tokens: the conversations of both files, in order.
ANSWERED: list[Any] = [
    [user(TEXTS[0])],
    [user(TEXTS[1]), told()],
    [user(TEXTS[2]), told(), user(TEXTS[3]), told()],
    TOKENS,
    [{"role": "system", "content": "Count."}, *[m for text in TEXTS for m in (user(text), told())]],
    [user(TEXTS[3]), told()],
    [user(TEXTS[4]), told(), user(TEXTS[0])],
    [user(TEXTS[2])],
]
PLACES = (0, 1, 2, 4, 5, 7, 9, 10)  # of these in both files
SHAREGPT = {"human": "user", "gpt": "assistant"}


def call(folder: Path, out: Path, *arguments: str, **options: Any) -> None:
    given = {
        "target": folder / "target",
        "out": out,
        "max_new_tokens": NEW,
        "batch_size": 2,
        "shard_prompts": SHARD,
    } | options
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    main([*flags, "--data", str(folder / "a.jsonl"), str(folder / "[b].jsonl"), *arguments])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
