"""Train diffusion drafters for speculative decoding in JAX.

The names below load what they need (jax among it) when they are first used.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specjax.config import RunConfig
    from specjax.decoding import generate
    from specjax.weights import load_draft, load_target

# Of transformers only tokenizers and configs are used: its advice to install PyTorch reads like a failure.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["generate", "load_draft", "load_target", "train"]

_HOMES = {"generate": "specjax.decoding", "load_draft": "specjax.weights", "load_target": "specjax.weights"}


def train(config: RunConfig | str | Path, *, resume: bool = False) -> Path:
    """Runs a training run, given as a `specjax.config.RunConfig` or the path of its YAML file; returns its folder.

    resume: continue the run in `output_dir` from its latest checkpoint (or start it, if there is none).

    Raises:
        InputError: anything wrong with config, target, data or an existing `output_dir`.
    """
    from specjax.config import load_config
    from specjax.decoding import generate
    from specjax.training import run

    config = load_config(config) if isinstance(config, str | Path) else config
    return run.train(config, generate=generate, resume=resume)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `specjax.generate` and `specjax.train` functions where the entry points of these names are imported too."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
