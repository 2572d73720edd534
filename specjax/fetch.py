"""The one way from device to host, so that a test can count every blocking copy."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")

count = 0


def fetch(tree: Tree) -> Any:
    """Copies a tree of arrays to NumPy, waiting for them; counted in `specjax.fetch.count`."""
    global count
    count += 1
    return jax.device_get(tree)
