"""Matrix products as precise as the compute dtype says."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> AbstractContextManager[Any]:
    """Full precision for float32 models: JAX's default multiplies fp32 in bf16 on TPU and in TF32 on recent GPUs."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")
