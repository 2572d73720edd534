"""Attention over a list of key segments, merged by one softmax.

A segment is a set of keys with a visible range per query. Causal, bidirectional, sliding-window, document-packed
and block-diffusion attention are all lists of segments:

    causal decoder      [keys of the row,     start = document or window start,  stop = own slot + 1]
    decoding            [cache,               start = 0 or window start,         stop = own slot + 1]
    DFlash draft        [context of the row,  start = document or window start,  stop = anchor       ]
                        [keys of own block,   start = 0,                         stop = block size   ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from specjax.models.sharding import SPECS, axis_size

MASKED_SCORE = -1e30  # finite, so that a row without any visible key yields numbers and not NaN
DEFAULT_QUERY_CHUNK = 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeySegment:
    """Keys and values with, per query, the half-open range of key indices it sees.

    keys, values: [b, k, s, h], seen by all blocks of a row, or [b, N, k, j, h], a block's own.
    start, stop: [b, N, q] int32; key index i is visible iff start <= i < stop.
    """

    keys: jax.Array
    values: jax.Array
    start: jax.Array
    stop: jax.Array

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

    Scores and softmax are float32. Blocks are processed in chunks of about `query_chunk` queries and recomputed in
    the backward pass, so memory is bounded by one chunk's scores. Rows are split over the batch axes and heads over
    `tensor`; with fewer key/value heads than tensor shards every shard holds them all and picks its own.
    """
    num_kv_heads = segments[0].keys.shape[-3]
    split_kv = num_kv_heads % axis_size("tensor") == 0
    groups = queries_bNqnh.shape[3] // num_kv_heads

    def specs(segment: KeySegment) -> KeySegment:
        if segment.own:
            keys = SPECS.own_keys_bNkjh if split_kv else SPECS.shared_own_keys_bNkjh
        else:
            keys = SPECS.keys_bksh if split_kv else SPECS.shared_keys_bksh
        return KeySegment(keys, keys, SPECS.act_bNB, SPECS.act_bNB)  # type: ignore[arg-type]

    def local(queries: jax.Array, segments: tuple[KeySegment, ...]) -> jax.Array:
        if not split_kv:
            heads = jax.lax.axis_index("tensor") * queries.shape[3] + jnp.arange(queries.shape[3])
            segments = tuple(_pick_heads(segment, heads // groups) for segment in segments)
        return _chunked_attention(queries, segments, scale, query_chunk)

    in_specs: tuple[P, tuple[KeySegment, ...]] = (SPECS.queries_bNqnh, tuple(specs(segment) for segment in segments))
    # Reshapes of a single row lose the batch axes from the type; resharding restores them and moves nothing.
    inputs = jax.reshard((queries_bNqnh, tuple(segments)), in_specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=SPECS.queries_bNqnh)(*inputs)


def _pick_heads(segment: KeySegment, heads: jax.Array) -> KeySegment:
    axis = segment.keys.ndim - 3
    keys, values = (jnp.take(x, heads, axis=axis) for x in (segment.keys, segment.values))
    return KeySegment(keys, values, segment.start, segment.stop)


def _chunked_attention(
    queries: jax.Array, segments: tuple[KeySegment, ...], scale: float, query_chunk: int
) -> jax.Array:
    b, blocks, q, n, h = queries.shape
    if blocks * q <= query_chunk:
        return _attend(queries, segments, scale)
    if blocks == 1 and not any(segment.own for segment in segments):
        length = min(query_chunk, q)
        chunks = -(-q // length)
        split = lambda x: _pad(x, 2, chunks * length).reshape(b, chunks, length, *x.shape[3:])  # noqa: E731
        segments = tuple(KeySegment(s.keys, s.values, split(s.start), split(s.stop)) for s in segments)
        return _scan_blocks(split(queries), segments, scale, 1).reshape(b, 1, chunks * length, n, h)[:, :, :q]
    return _scan_blocks(queries, segments, scale, max(1, query_chunk // q))


def _scan_blocks(queries: jax.Array, segments: tuple[KeySegment, ...], scale: float, size: int) -> jax.Array:
    """Attention, `size` blocks at a time: the block axis becomes [chunks, size] and is mapped over."""
    b, blocks = queries.shape[:2]
    chunks = -(-blocks // size)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(_pad(x, 1, chunks * size).reshape(b, chunks, size, *x.shape[2:]), 1, 0)

    def body(xs: tuple[jax.Array, list[tuple[jax.Array, ...]]]) -> jax.Array:
        chunk_queries, chunk_segments = xs
        joined = [
            KeySegment(*chunk) if segment.own else KeySegment(segment.keys, segment.values, *chunk)
            for segment, chunk in zip(segments, chunk_segments, strict=True)
        ]
        return _attend(chunk_queries, joined, scale)

    per_chunk = [
        tuple(split(x) for x in ((s.keys, s.values, s.start, s.stop) if s.own else (s.start, s.stop))) for s in segments
    ]
    out = jax.lax.map(jax.checkpoint(body), (split(queries), per_chunk))
    return jnp.moveaxis(out, 0, 1).reshape(b, chunks * size, *queries.shape[2:])[:, :blocks]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _attend(queries: jax.Array, segments: Sequence[KeySegment], scale: float) -> jax.Array:
    """One softmax over the keys of all segments.

    Scores live as [b, k, keys, N, r], r = g * q being a block's queries of one key/value head. Keys come first because
    they are the left operand of the product as they lie in the cache; as the right one XLA transposes all of them
    on CPU, every step.
    """
    b, blocks, q, n, h = queries.shape
    kv = segments[0].keys.shape[-3]
    grouped = queries.reshape(b, blocks, q, kv, n // kv, h).transpose(0, 3, 1, 4, 2, 5)
    grouped = grouped.reshape(b, kv, blocks, n // kv * q, h)
    scores = [
        jnp.where(_visible(segment, n // kv), _scores(grouped, segment) * scale, MASKED_SCORE) for segment in segments
    ]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, [s.max(2, keepdims=True) for s in scores]))
    weights = [jnp.exp(s - peak) for s in scores]
    total = reduce(jnp.add, [w.sum(2) for w in weights])
    out = reduce(jnp.add, [_combine(w, segment) for w, segment in zip(weights, segments, strict=True)])
    out = (out / total[..., None]).reshape(b, kv, blocks, n // kv, q, h)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, blocks, q, n, h).astype(queries.dtype)


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
    """[b, 1, keys, N, r], the queries repeated for every group."""
    index = jnp.arange(segment.keys.shape[-2])[:, None, None]
    start, stop = (jnp.tile(x, (1, 1, groups))[:, None, None] for x in (segment.start, segment.stop))
    return (start <= index) & (index < stop)
