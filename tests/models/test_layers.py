"""Rotary frequencies against transformers; norms, products and their gradients; the embedding's lookup."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specjax.models.layers import Embedding, Linear, RMSNorm, RopeConfig, rope_frequencies, rotary_tables
from specjax.models.precision import matmul_precision
from specjax.models.sharding import SPECS
from tests.models.ropes import ROPES, hf_rope

RELEASED = {
    "llama-3.1-8b": {
        "theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn-of-the-models-own-length": {"theta": 1e6, "rope_type": "yarn", "factor": 4.0},
    "qwen3-8b-yarn": {"theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


@pytest.mark.parametrize("name", [*ROPES, *RELEASED])
def test_rotary_tables_equal_transformers(name: str) -> None:
    rope: dict[str, Any] = (ROPES | RELEASED)[name]
    positions, head_dim, limit = np.array([[0, 1, 63, 1000]]), 64, 131072
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=limit, rope_parameters=hf_rope(rope))
    theirs = LlamaRotaryEmbedding(config)
    frequencies, factor = rope_frequencies(RopeConfig(**rope), head_dim, limit)
    np.testing.assert_allclose(frequencies, theirs.inv_freq, rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-7)
    cos, sin = theirs(torch.zeros(1), torch.tensor(positions))
    ours = rotary_tables(RopeConfig(**rope), head_dim, limit, jnp.asarray(positions))
    for table, expected in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(table, expected[..., : head_dim // 2], atol=1e-4)


def test_an_unknown_rope_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_type 'dynamic' is not one of default, linear, llama3, yarn"):
        rope_frequencies(RopeConfig(rope_type="dynamic"), 64, 128)  # type: ignore[arg-type]


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(4, 1e-6, param_dtype=jnp.float32)
    x = np.array([3e3, -1e3, 2e3, 5e2], np.float64)  # squares overflow float16
    expected = x / np.sqrt((x**2).mean() + 1e-6)
    normed = norm(jnp.asarray(x, jnp.float16))
    assert normed.dtype == jnp.float16
    np.testing.assert_allclose(normed, expected, rtol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_product_are_not_rounded_to_the_compute_dtype(dtype: jnp.dtype) -> None:
    linear = Linear(6, 4, use_bias=True, spec=SPECS.column_io, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, dy = (jax.random.normal(jax.random.key(i), (16, 64, n)).astype(dtype) for i, n in ((0, 6), (1, 4)))
    with matmul_precision(dtype):
        y, pull = jax.vjp(lambda m, x: m(x, SPECS.act_btf), linear, x)
        grads, dx = pull(jax.reshard(dy, SPECS.act_btf))
    x64, dy64 = (np.asarray(a, np.float64) for a in (x, dy))
    kernel = np.asarray(linear.kernel[...].astype(dtype), np.float64)
    rounding = {"rtol": float(jnp.finfo(dtype).eps), "atol": 1e-5}
    assert (y.dtype, dx.dtype, grads.kernel[...].dtype) == (dtype, dtype, jnp.float32)
    np.testing.assert_allclose(np.asarray(y, np.float64), x64 @ kernel, **rounding)
    np.testing.assert_allclose(np.asarray(dx, np.float64), dy64 @ kernel.T, **rounding)
    np.testing.assert_allclose(grads.kernel[...], np.einsum("bti,bto->io", x64, dy64), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(grads.bias[...], dy64.sum((0, 1)), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_norm_are_summed_in_float32() -> None:
    norm, x = RMSNorm(6, 1e-6, param_dtype=jnp.float32), jax.random.normal(jax.random.key(0), (16, 64, 6), jnp.bfloat16)
    gradient = jax.grad(lambda norm: norm(x).astype(jnp.float32).sum())(norm).scale[...]
    normed = np.asarray(RMSNorm(6, 1e-6, param_dtype=jnp.float32)(x), np.float64)
    np.testing.assert_allclose(gradient, normed.sum((0, 1)), rtol=1e-5, atol=1e-4)


def test_embedding_rows_of_any_token_shape() -> None:
    table = Embedding(10, 4, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = np.array([[[0, 9], [3, 3]]], np.int32)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(table, tokens), np.asarray(table.weight[...])[tokens])
