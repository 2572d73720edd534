"""The one way from device to host, so that a test can count every blocking copy."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")

count = 0


def fetch(tree: Tree) -> Any:
    """Copies a tree of arrays to NumPy, waiting for them; counted in `specjax.fetch.count`.

    What other processes hold a part of is gathered first: all processes must fetch it together.
    """
    global count
    count += 1
    return jax.device_get(jax.tree.map(_whole, tree))


def _whole(x: Any) -> Any:
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return x if here else multihost_utils.process_allgather(x, tiled=True)
