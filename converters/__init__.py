"""Command-line converters between Hugging Face folders and Orbax checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

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
