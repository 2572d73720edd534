"""Verifying and drafting in one pass: the target runs a chain of tokens, and beside it the LoRA draft's next blocks.

How many of the chain's drafts are right is known only after the pass, so a block is drafted for every outcome: block j
continues tokens 0 ... j. Its first token, the target's choice after token j, is not known yet and MASK like the rest:

    position    length | length+1 | length+2 | length+3
    tokens      known  | d1       | d2                      adapters off; written to the cache
    block 0            | MASK     | MASK     | ...          adapters on; sees the cache up to the known token
    block 1                       | MASK     | MASK ...     ... up to d1
    block 2                                  | MASK ...     ... up to d2
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.models.attention import DEFAULT_QUERY_CHUNK, KeySegment, attention
from specjax.models.block_stream import Ranges, attend_blocks, visible_ranges
from specjax.models.decoder import Decoder, DecoderLayer
from specjax.models.kv_cache import KVCache, write_slots
from specjax.models.layers import LayerAdapters
from specjax.models.lora_draft import LoRADraft
from specjax.models.sharding import SPECS


class OnePass(NamedTuple):
    """Hidden states after the final norm of the tokens, [b, t, d], and of a block after each, [b, t, B, d]; the cache
    with the tokens."""

    hidden: jax.Array
    blocks: jax.Array
    cache: KVCache


def run_one_pass(
    target: Decoder, draft: LoRADraft, tokens_bt: jax.Array, length_b: jax.Array, slots_bt: jax.Array, cache: KVCache
) -> OnePass:
    """Runs tokens [b, t] int32 at positions `length_b`, ..., as the target does alone, and t blocks beside them.

    The tokens' keys and values are written to `slots_bt`: their positions, or outside the cache. A slot of block j sees
    the cache's slots up to token j's, in a sliding layer within the window, and its own block, as it does where the
    draft runs alone.
    """
    b, t = tokens_bt.shape
    size = draft.config.block_size
    positions = jax.reshard(length_b[:, None] + jnp.arange(t, dtype=jnp.int32), SPECS.act_bt)
    first = positions + 1  # of the blocks
    of_blocks = (first[..., None] + jnp.arange(size, dtype=jnp.int32)).reshape(b, t * size)
    # Resharded: of a single row, reshapes lose the batch axes.
    blocks = jax.reshard(draft.unknown_blocks(target, b, t).reshape(b, t * size, -1), SPECS.act_btd)
    x = jnp.concatenate([target.embed(tokens_bt), blocks], axis=1)
    rotary = target.rotary(jnp.concatenate([positions, of_blocks], axis=1))
    adapted = jnp.broadcast_to(jnp.arange(t + t * size) >= t, (b, t + t * size))
    written = []
    for i, (layer, adapters) in enumerate(zip(target.layers, draft.adapters.applied(adapted), strict=True)):
        start = jnp.zeros_like(positions)
        window = target.config.windows[i]
        ranges = visible_ranges(start, first, size, window)
        if window is not None:
            start = jnp.maximum(start, first - window)
        cached = cache.keys[i], cache.values[i]
        x, kept = _layer_step(layer, x, rotary, cached, slots_bt, (start, first), ranges, adapters)
        written.append(kept)
    hidden = target.norm(x)
    after = jax.reshard(hidden[:, t:].reshape(b, t, size, -1), SPECS.act_bNBd)
    return OnePass(hidden[:, :t], after, KVCache(*map(tuple, zip(*written, strict=True))))


def _layer_step(
    layer: DecoderLayer,
    x_btd: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    cached: tuple[jax.Array, jax.Array],
    slots_bt: jax.Array,
    visible: tuple[jax.Array, jax.Array],
    ranges: Ranges,
    adapters: LayerAdapters,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer, and its cache with the tokens' keys and values.

    The projections and the MLP run once over all, and so are their weights read once. Attention runs apart: no value of
    an adapted slot, were it infinite, may meet the tokens', even with a weight of 0.
    """
    attn, t = layer.self_attn, slots_bt.shape[1]
    scale = attn.head_dim**-0.5
    normed = layer.input_layernorm(x_btd)
    queries = attn.queries(normed, rotary, adapters)
    keys, values = attn.keys_values(normed, rotary, adapters)
    kept = write_slots(cached[0], keys[:, :, :t], slots_bt), write_slots(cached[1], values[:, :, :t], slots_bt)
    start, stop = (x[:, None] for x in visible)
    of_tokens = attention(queries[:, None, :t], [KeySegment(*kept, start, stop)], scale=scale)[:, 0]
    own = keys[:, :, t:], values[:, :, t:]
    of_blocks = attend_blocks(queries[:, t:], own, kept, ranges, scale, DEFAULT_QUERY_CHUNK)
    attended = jnp.concatenate([of_tokens, of_blocks], axis=1)
    return layer.residual(x_btd, attended, adapters), kept
