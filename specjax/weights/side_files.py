"""The files beside a model's config and weights, and the fields of its config that do not shape it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specjax.weights.config_fields import IGNORED, read_json

# What belongs to a model beside its config and weights, and travels with it.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def copy_side_files(source: Path, out: Path, names: Iterable[str] = SIDE_FILES) -> None:
    """Copies those of `names` that `source` has into `out`."""
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, out / name)


def unshaping_fields(config_file: Path) -> dict[str, Any]:
    """The fields of a config.json that travel with a model without shaping it, such as `eos_token_id`."""
    dropped = {"_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version"}
    return {name: value for name, value in read_json(config_file).items() if name in IGNORED and name not in dropped}
