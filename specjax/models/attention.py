"""Attention over a list of key segments, merged by one softmax.

A segment is a set of keys with a visible range per query. Causal, bidirectional, sliding-window, document-packed
and block-diffusion attention are all lists of segments:

    causal decoder      [keys of the row,     start = document or window start,  stop = own slot + 1]
    decoding            [cache,               start = 0 or window start,         stop = own slot + 1]
    DFlash draft        [context of the row,  start = document or window start,  stop = anchor       ]
                        [keys of own block,   start = 0,                         stop = block size   ]
    tree of drafts      [cache,               start = 0 or window start,         stop = root's slot  ]
                        [keys of the nodes,   mask = the node and those above it, in the window      ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import SPECS, axis_size
from specjax.models.tiled_attention import MASKED_SCORE, Part, Tiling, tiled_attention, visited_tiles

DEFAULT_QUERY_CHUNK = 1024
MAX_KEY_TILE = 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeySegment:
    """Keys and values with, per query, the half-open range of key indices it sees.

    keys, values: [b, k, s, h], seen by all blocks of a row, or [b, N, k, j, h], a block's own.
    start, stop: [b, N, q] int32; key index i is visible iff start <= i < stop.
    mask: [b, N, q, j] bool, a block's own keys only: which of the range's keys are visible; None: all.
    """

    keys: jax.Array
    values: jax.Array
    start: jax.Array
    stop: jax.Array
    mask: jax.Array | None = None

    @property
    def own(self) -> bool:
        return self.keys.ndim == 5


def attention(
    queries_bNqnh: jax.Array,
    segments: Sequence[KeySegment],
    *,
    scale: float,
    query_chunk: int = DEFAULT_QUERY_CHUNK,
) -> jax.Array:
    """Softmax attention of queries [b, N, q, n, h] over all `segments` together; returns [b, N, q, n, h].

    Scores and softmax are float32. Where a head has more than `query_chunk`^2 of them in a row, queries are taken a
    chunk at a time, each over a tile of shared keys at a time (see `tiling`), from the first to the last key that one
    of the chunk's queries sees in any row: scores of one chunk and one tile exist at once, and keys outside are never
    read. Blocks' own keys are taken all at once. Rows are split over the batch axes and heads over `tensor`; with fewer
    key/value heads than tensor shards every shard holds them all and picks its own.

    Raises:
        ValueError: a segment of shared keys has a mask.
    """
    if any(segment.mask is not None and not segment.own for segment in segments):
        raise ValueError("shared keys are seen by range; a mask needs a block's own keys [b, N, k, j, h]")
    num_kv_heads = segments[0].keys.shape[-3]
    split_kv = num_kv_heads % axis_size("tensor") == 0
    groups = queries_bNqnh.shape[3] // num_kv_heads

    def specs(segment: KeySegment) -> KeySegment:
        if segment.own:
            keys = SPECS.own_keys_bNkjh if split_kv else SPECS.shared_own_keys_bNkjh
        else:
            keys = SPECS.keys_bksh if split_kv else SPECS.shared_keys_bksh
        mask = None if segment.mask is None else SPECS.mask_bNqj
        return KeySegment(keys, keys, SPECS.act_bNB, SPECS.act_bNB, mask)  # type: ignore[arg-type]

    def local(queries: jax.Array, segments: tuple[KeySegment, ...]) -> jax.Array:
        if not split_kv:
            heads = jax.lax.axis_index("tensor") * queries.shape[3] + jnp.arange(queries.shape[3])
            segments = tuple(_pick_heads(segment, heads // groups) for segment in segments)
        return _attention(queries, segments, scale, query_chunk)

    in_specs: tuple[P, tuple[KeySegment, ...]] = (SPECS.queries_bNqnh, tuple(specs(segment) for segment in segments))
    # Reshapes of a single row lose the batch axes from the type; resharding restores them and moves nothing.
    inputs = jax.reshard((queries_bNqnh, tuple(segments)), in_specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=SPECS.queries_bNqnh)(*inputs)


def _pick_heads(segment: KeySegment, heads: jax.Array) -> KeySegment:
    axis = segment.keys.ndim - 3
    keys, values = (jnp.take(x, heads, axis=axis) for x in (segment.keys, segment.values))
    return replace(segment, keys=keys, values=values)


def _attention(queries: jax.Array, segments: Sequence[KeySegment], scale: float, query_chunk: int) -> jax.Array:
    b, blocks, q, n, h = queries.shape
    kv = segments[0].keys.shape[-3]
    # Query-major, so that a block's queries of one key/value head are neighbours in either view.
    grouped = queries.reshape(b, blocks, q, kv, n // kv, h).transpose(0, 3, 1, 2, 4, 5)
    keys = max((s.keys.shape[2] for s in segments if not s.own), default=0)
    if scores_at_once(blocks * q, keys, query_chunk):
        out, _ = _attend(grouped, segments, scale)
    else:
        parts = [_attend_tiled(grouped, segment, scale, query_chunk) for segment in segments if not segment.own]
        if own := [segment for segment in segments if segment.own]:
            parts.append(_attend(grouped, own, scale))
        out = _merged(parts)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(queries.shape).astype(queries.dtype)


def scored_pairs(start_bq: jax.Array, stop_bq: jax.Array, keys: int, query_chunk: int) -> int:
    """How many pairs of a query and one of `keys` shared keys `attention` gives a score, all rows on one device."""
    b, queries = start_bq.shape
    if scores_at_once(queries, keys, query_chunk):
        return b * queries * keys
    tiles = tiling(query_chunk, keys)
    visited = np.asarray(visited_tiles(start_bq, stop_bq, keys, tiles))
    return int(visited.sum(dtype=np.int64)) * b * tiles.queries * tiles.keys


def scores_at_once(queries: int, keys: int, query_chunk: int) -> bool:
    """Whether a row's scores are few enough to exist at once: as many as a chunk has with as many keys."""
    return queries * keys <= query_chunk**2


def tiling(query_chunk: int, keys: int) -> Tiling:
    """Tiles are as long as chunks, so that both follow the visible range equally well, up to `MAX_KEY_TILE` keys."""
    return Tiling(query_chunk, min(query_chunk, keys, MAX_KEY_TILE))


def _merged(parts: Sequence[Part]) -> jax.Array:
    """One softmax over the keys of all parts."""
    total = reduce(jnp.logaddexp, [log_total for _, log_total in parts])
    return reduce(jnp.add, [jnp.exp(log_total - total)[..., None] * out for out, log_total in parts])


def _attend_tiled(grouped: jax.Array, segment: KeySegment, scale: float, query_chunk: int) -> Part:
    b, k, blocks, q, g, h = grouped.shape
    start, stop = (x.reshape(b, blocks * q) for x in (segment.start, segment.stop))
    rows = grouped.reshape(b, k, blocks * q, g, h)
    tiles = tiling(query_chunk, segment.keys.shape[2])
    out, log_total = tiled_attention(rows, segment.keys, segment.values, start, stop, scale, tiles)
    return out.reshape(grouped.shape), log_total.reshape(grouped.shape[:-1])


def _attend(grouped: jax.Array, segments: Sequence[KeySegment], scale: float) -> Part:
    """One softmax over the keys of all segments, whose scores exist at once.

    Scores live as [b, k, keys, N, r], r = q * g being a block's queries of one key/value head. Keys come first because
    they are the left operand of the product as they lie in the cache; as the right one XLA transposes all of them
    on CPU, every step.
    """
    b, k, blocks, q, g, h = grouped.shape
    rows = grouped.reshape(b, k, blocks, q * g, h)
    scores = [jnp.where(_visible(segment, g), _scores(rows, segment) * scale, MASKED_SCORE) for segment in segments]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, [s.max(2, keepdims=True) for s in scores]))
    weights = [jnp.exp(s - peak) for s in scores]
    total = reduce(jnp.add, [w.sum(2) for w in weights])
    out = reduce(jnp.add, [_combine(w, segment) for w, segment in zip(weights, segments, strict=True)])
    log_total = peak[:, :, 0] + jnp.log(total)
    return (out / total[..., None]).reshape(grouped.shape), log_total.reshape(grouped.shape[:-1])


def _scores(grouped: jax.Array, segment: KeySegment) -> jax.Array:
    """[b, k, keys, N, r], float32."""
    keys = segment.keys.astype(grouped.dtype)
    equation = "bNkjh,bkNrh->bkjNr" if segment.own else "bkjh,bkNrh->bkjNr"
    return jnp.einsum(equation, keys, grouped, preferred_element_type=jnp.float32)


def _combine(weights: jax.Array, segment: KeySegment) -> jax.Array:
    """[b, k, N, r, h], float32."""
    values = segment.values
    equation = "bkjNr,bNkjh->bkNrh" if segment.own else "bkjNr,bkjh->bkNrh"
    return jnp.einsum(equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _visible(segment: KeySegment, groups: int) -> jax.Array:
    """[b, 1, keys, N, r], every query repeated for its group."""
    index = jnp.arange(segment.keys.shape[-2])[:, None, None]
    start, stop = (jnp.repeat(x, groups, axis=2)[:, None, None] for x in (segment.start, segment.stop))
    visible = (start <= index) & (index < stop)
    if segment.mask is None:
        return visible
    return visible & jnp.repeat(segment.mask, groups, axis=2).transpose(0, 3, 1, 2)[:, None]
