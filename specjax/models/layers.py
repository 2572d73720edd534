"""Building blocks shared by the target and the draft: linear, RMSNorm, embedding, SwiGLU MLP, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import BATCH, SPECS

INIT_STDDEV = 0.02  # the `initializer_range` of every supported family

# What a projection of input x and output y is adapted by: (x, y, layout of y) -> its output instead of y.
Adapter = Callable[[jax.Array, jax.Array, P], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer's projections in one call; a projection without one is the base's own."""

    q_proj: Adapter | None = None
    k_proj: Adapter | None = None
    v_proj: Adapter | None = None
    o_proj: Adapter | None = None
    gate_proj: Adapter | None = None
    up_proj: Adapter | None = None
    down_proj: Adapter | None = None


NO_ADAPTERS = LayerAdapters()


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, spec: P) -> nnx.Param[jax.Array]:
    value = INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(jax.reshard(value.astype(dtype), spec))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel_io: jax.Array, out_sharding: P) -> jax.Array:
    """x [..., i] @ kernel [i, o] in x's dtype; the kernel's gradient leaves the accumulator in the kernel's own dtype.

    Without this rule the gradient is first rounded to the compute dtype; it is also made as [o, i] and transposed,
    which XLA does slowly on CPU.
    """
    return jnp.einsum("...i,io->...o", x, kernel_io.astype(x.dtype), out_sharding=out_sharding)


def _product_forward(x: jax.Array, kernel_io: jax.Array, out_sharding: P) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(x, kernel_io, out_sharding), (x, kernel_io)


def _product_backward(
    out_sharding: P, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel_io = saved
    dx = jnp.einsum("...o,io->...i", dy, kernel_io.astype(x.dtype), out_sharding=jax.typeof(x).sharding)
    dkernel = jnp.einsum(
        "...i,...o->io",
        x,
        dy,
        preferred_element_type=kernel_io.dtype,
        out_sharding=jax.typeof(kernel_io).sharding,
    )
    return dx, dkernel


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """`x @ kernel + bias` with kernel [in, out]; products accumulate in float32 where the backend allows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        spec: P,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = _normal(rngs, (in_features, out_features), param_dtype, spec)
        bias_spec = SPECS.column_bias_o if spec[1] == "tensor" else SPECS.replicated_bias_o
        bias = jax.reshard(jnp.zeros((out_features,), param_dtype), bias_spec)
        self.bias = nnx.Param(bias) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, out_sharding: P, adapter: Adapter | None = None) -> jax.Array:
        x = x.astype(self.dtype)
        y = product(x, self.kernel[...], out_sharding)
        # Added and multiplied in the parameter's dtype, so that its gradient is summed over the tokens in that.
        y = y if self.bias is None else (y + self.bias[...]).astype(self.dtype)
        return y if adapter is None else adapter(x, y, out_sharding)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32 whatever the input (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, param_dtype: jnp.dtype):
        self.scale = nnx.Param(jax.reshard(jnp.ones((size,), param_dtype), SPECS.norm_d))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed.astype(x.dtype) * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding [v, d], its vocabulary split over `tensor`.

    The lookup is done shard by shard and summed, because a gather from a vocabulary-sharded table otherwise
    rematerialises the whole table on every device.
    """

    def __init__(self, num_embeddings: int, features: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = _normal(rngs, (num_embeddings, features), param_dtype, SPECS.embed_vd)
        self.dtype = dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, ...] int32 -> [b, ..., d] in the compute dtype."""
        tail = (None,) * (tokens.ndim - 1)

        def lookup(weight: jax.Array, ids: jax.Array) -> jax.Array:
            local = ids - jax.lax.axis_index("tensor") * weight.shape[0]
            held = (local >= 0) & (local < weight.shape[0])
            rows = weight[jnp.where(held, local, 0)]
            return jax.lax.psum(jnp.where(held[..., None], rows, 0), "tensor")

        weight = jax.reshard(self.weight[...], P("tensor", None)).astype(self.dtype)
        tokens = jax.reshard(tokens, P(BATCH, *tail))
        return jax.shard_map(lookup, out_specs=P(BATCH, *tail, None))(weight, tokens)

    def mean(self) -> jax.Array:
        """The mean of all rows, [d] float32, the same on every device."""
        return jax.reshard(jnp.mean(self.weight[...].astype(jnp.float32), axis=0), P(None))


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        use_bias: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def linear(i: int, o: int, spec: P) -> Linear:
            return Linear(i, o, use_bias=use_bias, spec=spec, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.gate_proj = linear(hidden, intermediate, SPECS.column_io)
        self.up_proj = linear(hidden, intermediate, SPECS.column_io)
        self.down_proj = linear(intermediate, hidden, SPECS.row_io)

    def __call__(self, x: jax.Array, adapters: LayerAdapters = NO_ADAPTERS) -> jax.Array:
        gate = self.gate_proj(x, SPECS.act_btf, adapters.gate_proj)
        up = self.up_proj(x, SPECS.act_btf, adapters.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up, SPECS.act_btd, adapters.down_proj)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings, in the words of Hugging Face configs (`rope_parameters`)."""

    theta: float = 10000.0
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rope_frequencies(config: RopeConfig, head_dim: int, max_position_embeddings: int) -> tuple[jax.Array, float]:
    """Inverse frequencies [head_dim / 2] (radians a token) and the factor applied to cos and sin.

    Sources: linear, position interpolation (arXiv 2306.15595); yarn, NTK by parts (arXiv 2309.00071);
    llama3, the wavelength ramp of Llama 3.1's released configuration.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = config.theta**-exponents
    if config.rope_type == "default":
        return frequencies, 1.0
    if config.rope_type == "linear":
        return frequencies / config.factor, 1.0
    original = config.original_max_position_embeddings or max_position_embeddings
    if config.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        ramp = (original / wavelengths - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        smooth = jnp.clip(ramp, 0.0, 1.0)
        return (1 - smooth) * frequencies / config.factor + smooth * frequencies, 1.0
    if config.rope_type == "yarn":
        return _yarn(config, frequencies, head_dim, original)
    raise ValueError(f"rope_type {config.rope_type!r} is not one of default, linear, llama3, yarn")


def _yarn(config: RopeConfig, frequencies: jax.Array, head_dim: int, original: int) -> tuple[jax.Array, float]:
    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
    scaled = ramp * frequencies / config.factor + (1 - ramp) * frequencies
    return scaled, _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def rotary_tables(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [..., head_dim / 2] float32, for integer `positions` [...]."""
    frequencies, factor = rope_frequencies(config, head_dim, max_position_embeddings)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of x [..., t, heads, h] by tables [..., t, h / 2] (half-split convention), in float32."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
