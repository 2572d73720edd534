"""Seconds of a call, and how several of them are summed up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time of one call, its arrays waited for."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
