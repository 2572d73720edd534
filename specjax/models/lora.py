"""LoRA adapters (arXiv 2106.09685): low-rank pairs beside the projections of a frozen decoder.

An adapted projection gives `y + scale * (x @ a) @ b`, where y is the base's. The adapters are a module of their own:
the base's parameters are neither copied nor changed, and a call without adapters is the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from specjax.models.decoder import BlockConfig, Decoder, DecoderConfig, DecoderLayer
from specjax.models.layers import LayerAdapters, Linear, product
from specjax.models.sharding import SPECS, mesh_scope

# Projections that can be adapted -> their parent in a layer.
PROJECTIONS: dict[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


@dataclass(frozen=True)
class LoRAConfig:
    """What PEFT calls r, lora_alpha, lora_dropout, use_rslora and target_modules.

    dropout: probability with which an adapter's input is dropped in training.
    rslora: scales by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
    target_modules: names of PROJECTIONS, adapted in every layer; kept in the order of that table.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] = tuple(PROJECTIONS)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r {self.r} leaves no adapter; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha} must be a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        unknown = [name for name in self.target_modules if name not in PROJECTIONS]
        if unknown or not self.target_modules:
            raise ValueError(
                f"target_modules {list(self.target_modules)} must be one or more of {', '.join(PROJECTIONS)}"
            )
        ordered = tuple(name for name in PROJECTIONS if name in self.target_modules)
        object.__setattr__(self, "target_modules", ordered)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def parameters(self, block: BlockConfig) -> int:
        """Of one layer's adapters."""
        shapes = projection_shapes(block)
        return self.r * sum(sum(shapes[name]) for name in self.target_modules)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AppliedPair:
    """A pair as one call applies it to one projection: the `Adapter` of `LayerAdapters`.

    a_ir, b_ro: float32, the scale within b.
    adapted_bt: the tokens it acts on; None: all.
    dropout_key: None outside of training; b then holds the factor 1 / (1 - dropout) that keeps the mean.
    """

    a_ir: jax.Array
    b_ro: jax.Array
    adapted_bt: jax.Array | None
    dropout_key: jax.Array | None
    dropout: float = field(metadata={"static": True})

    def __call__(self, x: jax.Array, y: jax.Array, out_sharding: P) -> jax.Array:
        if self.dropout_key is not None:
            sharding = jax.typeof(x).sharding
            kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape, out_sharding=sharding)
            x = jnp.where(kept, x, 0)
        adapted = y + product(product(x, self.a_ir, SPECS.act_btr), self.b_ro, out_sharding)
        if self.adapted_bt is None:
            return adapted
        # Chosen, not multiplied: y + 0 turns -0 into 0, and y + 0 * delta keeps the NaN of an overflow.
        return jnp.where(self.adapted_bt[..., None], adapted, y)


class LoRA(nnx.Module):
    """The pair of one projection: a [in, r] uniform as in PEFT, b [r, out] zero, so that it begins without effect."""

    def __init__(self, kernel_io: jax.Array, r: int, *, rngs: nnx.Rngs):
        """kernel_io: the base's kernel, perhaps abstract; only its shape and layout count."""
        inputs, outputs = kernel_io.shape
        spec_i, spec_o = kernel_io.sharding.spec  # type: ignore[attr-defined]
        bound = inputs**-0.5  # Kaiming's for the slope sqrt(5)
        a = jax.random.uniform(rngs.params(), (inputs, r), jnp.float32, -bound, bound)
        self.a = nnx.LoRAParam(jax.reshard(a, P(spec_i, None)))
        self.b = nnx.LoRAParam(jax.reshard(jnp.zeros((r, outputs), jnp.float32), P(None, spec_o)))


class LayerLoRA(nnx.Module):
    """The pairs of one layer, by projection; None where it is not adapted."""

    def __init__(self, config: LoRAConfig, base: DecoderLayer, *, rngs: nnx.Rngs):
        for name in PROJECTIONS:
            adapted = name in config.target_modules
            setattr(
                self, name, LoRA(projection(base, name).kernel.get_value(), config.r, rngs=rngs) if adapted else None
            )

    def pairs(self) -> Iterator[tuple[str, LoRA]]:
        """(projection, its pair), of those that are adapted."""
        for name in PROJECTIONS:
            if (pair := getattr(self, name)) is not None:
                yield name, pair


class LoRAAdapters(nnx.Module):
    """The adapters of every layer of a decoder; float32, applied in the base's compute dtype.

    Parameters are `nnx.LoRAParam`s, created on the mesh in force and split like the kernels they stand beside.
    """

    def __init__(self, config: LoRAConfig, base: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        like = nnx.eval_shape(
            lambda: DecoderLayer(base.block, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        self.layers = nnx.List(LayerLoRA(config, like, rngs=rngs) for _ in range(base.num_hidden_layers))

    def applied(self, adapted_bt: jax.Array | None = None, dropout_key: jax.Array | None = None) -> list[LayerAdapters]:
        """For each layer what its methods take, for tokens `adapted_bt` (None: all); a key turns dropout on."""
        config = self.config
        if adapted_bt is not None:
            adapted_bt = jax.reshard(adapted_bt, SPECS.act_bt)
        training = dropout_key is not None and config.dropout > 0
        factor = config.scale / (1 - config.dropout) if training else config.scale
        result = []
        for i, layer in enumerate(self.layers):
            keys: dict[str, jax.Array] = {}
            if dropout_key is not None and training:
                drawn = jax.random.split(jax.random.fold_in(dropout_key, i), len(PROJECTIONS))
                keys = dict(zip(PROJECTIONS, drawn, strict=True))
            # In float32: a factor that is first rounded to the compute dtype would be off for every token alike.
            pairs = {
                name: AppliedPair(pair.a[...], factor * pair.b[...], adapted_bt, keys.get(name), config.dropout)
                for name, pair in layer.pairs()
            }
            result.append(LayerAdapters(**pairs))
        return result


def projection_shapes(block: BlockConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each of PROJECTIONS."""
    d, inner = block.hidden_size, block.intermediate_size
    queries, keys = block.num_attention_heads * block.head_dim, block.num_key_value_heads * block.head_dim
    shapes = {"q_proj": (d, queries), "k_proj": (d, keys), "v_proj": (d, keys), "o_proj": (queries, d)}
    return shapes | {"gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d)}


def matrix_parameters(block: BlockConfig) -> int:
    """Of all PROJECTIONS of one layer, without biases."""
    return sum(inputs * outputs for inputs, outputs in projection_shapes(block).values())


def projection(layer: DecoderLayer, name: str) -> Linear:
    """The projection `name` (of PROJECTIONS) of a layer."""
    return getattr(getattr(layer, PROJECTIONS[name]), name)


def merge(base: Decoder, adapters: LoRAAdapters) -> Decoder:
    """A decoder that computes alone what `base` computes with `adapters`; what is not adapted is shared, not copied.

    Kernels are summed in float32 and rounded to the base's parameter dtype.
    """
    return _shifted(base, adapters, adapters.config.scale)


def unmerge(merged: Decoder, adapters: LoRAAdapters) -> Decoder:
    """The decoder that `merge` was given, up to the rounding of both sums."""
    return _shifted(merged, adapters, -adapters.config.scale)


def _shifted(base: Decoder, adapters: LoRAAdapters, factor: float) -> Decoder:
    result: Decoder = jax.tree.map(lambda x: x, base)
    with mesh_scope():
        for layer, pairs in zip(result.layers, adapters.layers, strict=True):
            for name, pair in pairs.pairs():
                linear = projection(layer, name)
                linear.kernel = nnx.Param(_shifted_kernel(linear.kernel[...], pair.a[...], pair.b[...], factor))
    return result


@jax.jit
def _shifted_kernel(kernel_io: jax.Array, a_ir: jax.Array, b_ro: jax.Array, factor: float) -> jax.Array:
    out_sharding = jax.typeof(kernel_io).sharding
    delta = jnp.einsum("ir,ro->io", a_ir, b_ro, precision="highest", out_sharding=out_sharding)
    return (kernel_io.astype(jnp.float32) + factor * delta).astype(kernel_io.dtype)
