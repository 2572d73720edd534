"""The files beside a model's config and weights, and the fields of its config that do not shape it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from specjax.weights.config_fields import IGNORED, read_json
from specjax.weights.fingerprint import FINGERPRINT_FILE

# What belongs to a model beside its config and weights, and travels with it.
SIDE_FILES = (
    FINGERPRINT_FILE,
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


def copy_side_files(source: Path, out: Path) -> None:
    """Copies those of SIDE_FILES that `source` has into `out`."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)


def unshaping_fields(config_file: Path) -> dict[str, Any]:
    """The fields of a config.json that travel with a model without shaping it, such as `eos_token_id`."""
    dropped = {"_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version"}
    return {name: value for name, value in read_json(config_file).items() if name in IGNORED and name not in dropped}
