"""What comparisons with PyTorch share: whether it is there, and on how many threads it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from specjax.errors import InputError

Result = TypeVar("Result")


def require_torch(option: str) -> None:
    """Raises InputError, naming the `option` that asked for it, where PyTorch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"{option} needs PyTorch; install the test extra: pip install 'specjax[test]'") from error


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def with_threads(threads: int, run: Callable[[], Result]) -> Callable[[], Result]:
    """`run` with PyTorch on `threads` threads, whose number is restored after every call."""
    import torch

    def limited() -> Result:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return limited
