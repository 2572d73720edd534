"""Attention of many queries over many keys, a tile of scores at a time, that never touches keys nobody sees.

The online softmax of FlashAttention (arXiv 2205.14135, 2307.08691) in XLA: scores exist for a chunk of queries and a
tile of keys, in both passes. A chunk visits the tiles from its first to its last visible key only; with sorted anchors,
packed documents, causal rows or sliding windows that is a part of the row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, so that a row without any visible key yields numbers and not NaN
Part = tuple[jax.Array, jax.Array]
"""Attention over some keys, float32: outputs [b, k, q, g, h] and the log of the softmax's normaliser [b, k, q, g]."""


class Tiling(NamedTuple):
    """How many queries and keys have scores at a time."""

    queries: int
    keys: int


class _Chunk(NamedTuple):
    """A chunk of queries [b, k, q, g, h] with the range of keys [b, q] that each sees."""

    queries: jax.Array
    start: jax.Array
    stop: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def tiled_attention(
    queries_bkqgh: jax.Array,
    keys_bksh: jax.Array,
    values_bksh: jax.Array,
    start_bq: jax.Array,
    stop_bq: jax.Array,
    scale: float,
    tiling: Tiling,
) -> Part:
    """Attention of queries, g to a key/value head, over the keys start <= i < stop of their row.

    A query that sees nothing has output 0 and a normaliser that vanishes beside any other part's.
    """
    return _forward(queries_bkqgh, keys_bksh, values_bksh, start_bq, stop_bq, scale, tiling)[0]


def tile_range(start: jax.Array, stop: jax.Array, keys: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """The half-open range of tiles that hold a key visible to any of the queries; empty where none sees any."""
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, keys)
    seen = start < stop
    first = jnp.where(seen, start, keys).min() // tile
    return first, -(-jnp.where(seen, stop, 0).max() // tile)


def visited_tiles(start_bq: jax.Array, stop_bq: jax.Array, keys: int, tiling: Tiling) -> jax.Array:
    """The number of tiles that each chunk of queries visits, [chunks] int32."""
    start, stop = (_chunks(x[:, None], tiling.queries)[:, :, 0] for x in (start_bq, stop_bq))
    first, last = jax.vmap(lambda start, stop: tile_range(start, stop, keys, tiling.keys))(start, stop)
    return jnp.maximum(last - first, 0)


def _forward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    scale: float,
    tiling: Tiling,
) -> tuple[Part, tuple[Any, ...]]:
    def attend(chunk: _Chunk) -> Part:
        def visit(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            peak, total, out = carry
            at, visible = _tile(chunk, tile, keys.shape[2], tiling.keys)
            scores = _scores(chunk.queries, _rows(keys, at, tiling.keys), scale)
            higher = jnp.maximum(peak, jnp.where(visible, scores, MASKED_SCORE).max(2))
            weights = jnp.where(visible, jnp.exp(scores - higher[:, :, None]), 0.0)
            shrink = jnp.exp(peak - higher)
            added = _product("bkjqg,bkjh->bkqgh", weights.astype(values.dtype), _rows(values, at, tiling.keys))
            return higher, total * shrink + weights.sum(2), out * shrink[..., None] + added

        zero = _zeros(chunk.queries)
        carry = zero[..., 0] + MASKED_SCORE, zero[..., 0], zero
        tiles = tile_range(chunk.start, chunk.stop, keys.shape[2], tiling.keys)
        peak, total, out = jax.lax.fori_loop(*tiles, visit, carry)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return out / total[..., None], peak + jnp.log(total)

    parts = jax.lax.map(attend, _split(queries, start, stop, tiling.queries))
    part = jax.tree.map(lambda x: _joined(x, queries.shape[2]), parts)
    return part, (queries, keys, values, start, stop, *part)


def _backward(
    scale: float, tiling: Tiling, residuals: tuple[jax.Array, ...], cotangents: Part
) -> tuple[jax.Array | None, ...]:
    queries, keys, values, start, stop, out, log_total = residuals
    out_ct, log_total_ct = cotangents
    out_ct = out_ct.astype(values.dtype)  # rounded once, or the difference below would not cancel
    # A score's gradient is its weight times (what its value gains - what the row's mean gains).
    mean = (out * out_ct).sum(-1) - log_total_ct
    chunks = _split(queries, start, stop, tiling.queries)
    rest = tuple(_chunks(x, tiling.queries) for x in (out_ct, log_total, mean))

    def pull(sums: tuple[jax.Array, ...], xs: tuple[_Chunk, tuple[jax.Array, ...]]) -> tuple[Any, jax.Array]:
        chunk, (chunk_ct, chunk_total, chunk_mean) = xs

        def visit(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            keys_ct, values_ct, queries_ct = carry
            at, visible = _tile(chunk, tile, keys.shape[2], tiling.keys)
            tile_keys, tile_values = (_rows(x, at, tiling.keys) for x in (keys, values))
            scores = _scores(chunk.queries, tile_keys, scale)
            weights = jnp.where(visible, jnp.exp(scores - chunk_total[:, :, None]), 0.0)
            gains = _product("bkjh,bkqgh->bkjqg", tile_values, chunk_ct) - chunk_mean[:, :, None]
            scores_ct = (weights * gains * scale).astype(queries.dtype)
            return (
                _add_rows(keys_ct, at, _product("bkjqg,bkqgh->bkjh", scores_ct, chunk.queries)),
                _add_rows(values_ct, at, _product("bkjqg,bkqgh->bkjh", weights.astype(values.dtype), chunk_ct)),
                queries_ct + _product("bkjqg,bkjh->bkqgh", scores_ct, tile_keys),
            )

        tiles = tile_range(chunk.start, chunk.stop, keys.shape[2], tiling.keys)
        *sums, queries_ct = jax.lax.fori_loop(*tiles, visit, (*sums, _zeros(chunk.queries)))
        return tuple(sums), queries_ct

    zeros = _zeros(keys), _zeros(values)
    (keys_ct, values_ct), queries_ct = jax.lax.scan(pull, zeros, (chunks, rest))
    queries_ct = _joined(queries_ct, queries.shape[2])
    cts = ((queries_ct, queries), (keys_ct, keys), (values_ct, values))
    return *(ct.astype(x.dtype) for ct, x in cts), None, None


tiled_attention.defvjp(_forward, _backward)


def _zeros(like: jax.Array) -> jax.Array:
    """float32 zeros that vary over the mesh's axes as `like` does, which a loop's carry must."""
    return jnp.zeros_like(like, jnp.float32)


def _scores(queries: jax.Array, keys: jax.Array, scale: float) -> jax.Array:
    """[b, k, j, q, g]."""
    return _product("bkjh,bkqgh->bkjqg", keys.astype(queries.dtype), queries) * scale


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _tile(chunk: _Chunk, tile: jax.Array, keys: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where a tile's rows lie, and which of them each query sees, [b, 1, j, q, 1].

    The last tile of a row that is no multiple of the size lies on the row's last keys, and leaves out those that the
    tile before it has.
    """
    at = jnp.minimum(tile * size, keys - size)
    index = (at + jnp.arange(size))[:, None, None]
    start, stop = (x[:, None, None, :, None] for x in (jnp.maximum(chunk.start, tile * size), chunk.stop))
    return at, (start <= index) & (index < stop)


def _rows(x_bksh: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_bksh, at, size, axis=2)


def _add_rows(x_bksh: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
    added = _rows(x_bksh, at, rows.shape[2]) + rows
    return jax.lax.dynamic_update_slice_in_dim(x_bksh, added, at, axis=2)


def _split(queries: jax.Array, start: jax.Array, stop: jax.Array, size: int) -> _Chunk:
    """Chunks of `size` queries on a leading axis; the queries that fill up the last one see nothing."""
    start, stop = (_chunks(x[:, None], size)[:, :, 0] for x in (start, stop))
    return _Chunk(_chunks(queries, size), start, stop)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[b, k, q, ...] -> [chunks, b, k, size, ...], filled up with zeros."""
    b, k, q = x.shape[:3]
    chunks = -(-q // size)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - q), *[(0, 0)] * (x.ndim - 3)])
    return jnp.moveaxis(x.reshape(b, k, chunks, size, *x.shape[3:]), 2, 0)


def _joined(x: jax.Array, queries: int) -> jax.Array:
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :queries]
