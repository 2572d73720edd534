"""The noise stream of block diffusion: blocks of tokens that see a context before them and their own block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.attention import KeySegment, attention
from specjax.models.decoder import Decoder, DecoderLayer
from specjax.models.layers import NO_ADAPTERS, LayerAdapters

ContextKV = tuple[tuple[jax.Array, jax.Array], ...]
"""Per layer, keys and values [b, k, t, h] of the tokens before the blocks."""
Rotary = tuple[jax.Array, jax.Array]
Ranges = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""First and last + 1 context slot, then slot of the own block, that every slot sees; each [b, N, B]."""


def run_blocks(
    layers: Iterable[DecoderLayer],
    noise_bNBd: jax.Array,
    context_kv: ContextKV,
    ranges: Sequence[Ranges],
    rotary: Callable[[jax.Array], Rotary],
    start_bN: jax.Array,
    stop_bN: jax.Array,
    *,
    adapters: Sequence[LayerAdapters] | None = None,
    remat: bool,
    query_chunk: int,
) -> jax.Array:
    """Embedded blocks [b, N, B, d] through the layers, before the final norm: [b, N, B, d].

    Slot k of a block has position stop - start + k, with `start` the first slot of its document and `stop` that of its
    anchor. ranges, adapters: one a layer. `remat` recomputes each layer in the backward pass.
    """
    b, blocks, size, d = noise_bNBd.shape
    positions = (stop_bN - start_bN)[..., None] + jnp.arange(size, dtype=jnp.int32)
    tables = rotary(positions.reshape(b, blocks * size))
    x = noise_bNBd.reshape(b, blocks * size, d)
    step = jax.checkpoint(_layer_step, static_argnums=(5,)) if remat else _layer_step
    layers = list(layers)
    applied = [NO_ADAPTERS] * len(layers) if adapters is None else adapters
    for layer, kv, visible, layer_adapters in zip(layers, context_kv, ranges, applied, strict=True):
        x = step(layer, x, tables, kv, visible, query_chunk, layer_adapters)
    return x.reshape(b, blocks, size, d)


def visible_ranges(
    start_bN: jax.Array, stop_bN: jax.Array, size: int, window: int | None, *, causal: bool = False
) -> Ranges:
    """What the slots of blocks of `size` see: the context from `start` up to `stop`, and their block.

    window: tokens that a slot sees before itself and itself; None: all. causal: inside the block, too.
    """
    k = jnp.arange(size, dtype=jnp.int32)
    start, stop = start_bN[..., None] + 0 * k, stop_bN[..., None] + 0 * k
    own_start, own_stop = jnp.zeros_like(start), jnp.full_like(start, size)
    if window is not None:
        start = jnp.maximum(start, stop + k - window + 1)
        own_start = own_start + jnp.maximum(0, k - window + 1)
    if causal:
        own_stop = jnp.zeros_like(start) + k + 1
    return start, stop, own_start, own_stop


def embed_noise(target: Decoder, noise_ids: jax.Array, mask_token_id: int, row: nnx.Param | None) -> jax.Array:
    """Embeds the slots of blocks, ids [b, ...] int32 -> [b, ..., d], for training, evaluation and decoding alike.

    row: [d], the draft's own embedding of MASK; the target's table is never asked for it then.
    """
    if row is None:
        return target.embed(noise_ids)
    masked = noise_ids == mask_token_id
    embedded = target.embed(jnp.where(masked, 0, noise_ids))
    own = row[...]
    # Chosen in the parameter's dtype, so that its gradient is summed over the slots in that.
    return jnp.where(masked[..., None], own, embedded.astype(own.dtype)).astype(embedded.dtype)


def _layer_step(
    layer: DecoderLayer,
    x_btd: jax.Array,
    rotary: Rotary,
    context_kv: tuple[jax.Array, jax.Array],
    ranges: Ranges,
    query_chunk: int,
    adapters: LayerAdapters,
) -> jax.Array:
    attn = layer.self_attn
    normed = layer.input_layernorm(x_btd)
    queries = attn.queries(normed, rotary, adapters)
    own_kv = attn.keys_values(normed, rotary, adapters)
    attended = attend_blocks(queries, own_kv, context_kv, ranges, attn.head_dim**-0.5, query_chunk)
    return layer.residual(x_btd, attended, adapters)


def attend_blocks(
    queries_btnh: jax.Array,
    own_kv: tuple[jax.Array, jax.Array],
    context_kv: tuple[jax.Array, jax.Array],
    ranges: Ranges,
    scale: float,
    query_chunk: int,
) -> jax.Array:
    """Attention [b, t, n, h] of the slots of blocks, one block after the other, with their own keys and values
    [b, k, t, h], over these and the context's."""
    start, stop, own_start, own_stop = ranges
    b, blocks, size = start.shape
    own_keys, own_values = (kv.reshape(b, kv.shape[1], blocks, size, -1).swapaxes(1, 2) for kv in own_kv)
    segments = [
        KeySegment(*context_kv, start, stop),
        KeySegment(own_keys, own_values, own_start, own_stop),
    ]
    queries = queries_btnh.reshape(b, blocks, size, *queries_btnh.shape[2:])
    return attention(queries, segments, scale=scale, query_chunk=query_chunk).reshape(queries_btnh.shape)
