"""Test-wide environment: eight virtual CPU devices, full fp32 products, compiled programs kept between runs.

The variables are set before jax is imported, and reach the processes that tests start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

COMPILATION_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"


def xla_flags(devices: int) -> str:
    """Virtual CPU devices, no optimisation by LLVM, which saves more than it costs, and patience when busy."""
    timeout = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # after 40 the process would be aborted
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 {timeout}"


os.environ["JAX_PLATFORMS"] = "cpu"  # else an installed libtpu is started
os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}"  # the last of a kind holds
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILATION_CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the default skips programs compiled in under 1 s
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Drops compiled programs after each file.

    Each takes several memory maps, of which Linux grants a process 65,530; without room for more LLVM crashes.
    """
    yield
    import jax

    jax.clear_caches()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "tests/decoding/test_fuzz.py")
    group.addoption("--fuzz-cases", type=int, default=120, help="random cases over all combinations (default: 120)")
    group.addoption("--fuzz-case", type=int, help="run this case of every combination alone")
