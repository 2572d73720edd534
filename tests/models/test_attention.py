"""Segment attention against one dense mask in float64, its gradients included."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from specjax.models.attention import KeySegment, attention, scored_pairs
from specjax.models.sharding import SPECS, axis_size, make_mesh, put

SCALE = 0.3
ROWS, BLOCKS, QUERIES, CONTEXT, OWN, HEAD_DIM = 2, 5, 3, 17, 4, 8


class Case(NamedTuple):
    """Host arrays: the context's and the blocks' own keys, values and ranges, as `KeySegment` wants them.

    mask: which of the range's own keys are seen.
    """

    queries: np.ndarray
    shared: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    own: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    mask: np.ndarray | None = None

    def masked(self, seed: int) -> Case:
        return self._replace(mask=np.random.default_rng(seed).random((ROWS, BLOCKS, QUERIES, OWN)) < 0.5)


def random_case(seed: int, heads: int = 4, kv_heads: int = 2) -> Case:
    """Random keys and random, partly empty ranges; query (0, 0, 0) sees nothing at all."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def ranges(size: int) -> tuple[np.ndarray, np.ndarray]:
        pair = rng.integers(-2, size + 3, (2, ROWS, BLOCKS, QUERIES), dtype=np.int32)
        pair[1, 0, 0, 0] = pair[0, 0, 0, 0]
        return pair[0], pair[1]

    context, own = (ROWS, kv_heads, CONTEXT, HEAD_DIM), (ROWS, BLOCKS, kv_heads, OWN, HEAD_DIM)
    return Case(
        draw(ROWS, BLOCKS, QUERIES, heads, HEAD_DIM),
        (draw(*context), draw(*context), *ranges(CONTEXT)),
        (draw(*own), draw(*own), *ranges(OWN)),
    )


def visible(size: int, start: np.ndarray, stop: np.ndarray) -> torch.Tensor:
    mask = np.zeros((*start.shape, size), bool)
    for query in np.ndindex(*start.shape):
        for key in range(size):
            mask[(*query, key)] = start[query] <= key < stop[query]
    return torch.tensor(mask)


def reference(case: Case) -> tuple[np.ndarray, list[np.ndarray], torch.Tensor]:
    """Output, gradients (queries, shared keys and values, own keys and values) of its sum of sines, and the mask."""
    arrays = [case.queries, *case.shared[:2], *case.own[:2]]
    q, ck, cv, ok, ov = leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    groups = q.shape[3] // ck.shape[1]
    ck, cv = (x.repeat_interleave(groups, 1)[:, None].expand(-1, BLOCKS, -1, -1, -1) for x in (ck, cv))
    keys, values = (torch.cat([c, o.repeat_interleave(groups, 2)], 3) for c, o in ((ck, ok), (cv, ov)))
    own = visible(OWN, *case.own[2:]) & torch.tensor(True if case.mask is None else case.mask)
    mask = torch.cat([visible(CONTEXT, *case.shared[2:]), own], -1)
    scores = torch.einsum("bNqnh,bNnsh->bNnqs", q, keys) * SCALE
    weights = scores.masked_fill(~mask[:, :, None], -1e30).softmax(-1)
    out = torch.einsum("bNnqs,bNnsh->bNqnh", weights, values)
    seen = mask.any(-1)[..., None, None]
    torch.where(seen, out.sin(), 0).sum().backward()
    return out.detach().numpy(), [x.grad.numpy() for x in leaves], seen  # type: ignore[union-attr]


def on_mesh(case: Case) -> tuple[jax.Array, tuple[KeySegment, KeySegment]]:
    ranges = [tuple(put(x, SPECS.act_bNB) for x in part[2:]) for part in (case.shared, case.own)]
    split = case.own[0].shape[2] % axis_size("tensor") == 0
    shared = tuple(put(x, SPECS.keys_bksh if split else SPECS.shared_keys_bksh) for x in case.shared[:2])
    own = tuple(put(x, SPECS.own_keys_bNkjh if split else SPECS.shared_own_keys_bNkjh) for x in case.own[:2])
    mask = None if case.mask is None else put(case.mask, SPECS.mask_bNqj)
    segments = KeySegment(*shared, *ranges[0]), KeySegment(*own, *ranges[1], mask)
    return put(case.queries, SPECS.queries_bNqnh), segments


@partial(jax.jit, static_argnames="query_chunk")
def output_and_gradients(
    queries: jax.Array, segments: tuple[KeySegment, KeySegment], seen: jax.Array, query_chunk: int
) -> tuple[jax.Array, list[jax.Array]]:
    def loss(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        queries, *kv = arrays
        shared, own = (replace(segment, keys=kv[2 * i], values=kv[2 * i + 1]) for i, segment in enumerate(segments))
        out = attention(queries, [shared, own], scale=SCALE, query_chunk=query_chunk)
        return jnp.where(seen, jnp.sin(out), 0).sum(), out

    arrays = [queries, *(x for segment in segments for x in (segment.keys, segment.values))]
    gradients, out = jax.grad(loss, has_aux=True)(arrays)
    return out, gradients


def check(case: Case, query_chunk: int) -> None:
    expected, expected_gradients, seen = reference(case)
    out, gradients = output_and_gradients(*on_mesh(case), put(seen.numpy(), SPECS.shared_own_keys_bNkjh), query_chunk)
    np.testing.assert_allclose(np.where(seen, out, 0), np.where(seen, expected, 0), rtol=0, atol=2e-6)
    assert np.isfinite(out).all()
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("query_chunk", [1024, 6], ids=["whole", "chunked"])
def test_own_and_shared_segments_equal_a_dense_mask(seed: int, query_chunk: int) -> None:
    check(random_case(seed), query_chunk)


@pytest.mark.parametrize("query_chunk", [1024, 6], ids=["whole", "chunked"])
def test_a_mask_picks_from_the_range_of_own_keys(query_chunk: int) -> None:
    check(random_case(0).masked(0), query_chunk)


def test_a_mask_of_shared_keys_is_refused() -> None:
    queries, (shared, own) = on_mesh(random_case(0).masked(0))
    with pytest.raises(ValueError, match="shared keys are seen by range"):
        attention(queries, [replace(shared, mask=own.mask)], scale=SCALE)


@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads"),
    [((1, 1, 8), 8, 2), ((1, 1, 8), 16, 1), ((1, 1, 2), 4, 2), ((2, 1, 4), 4, 2), ((1, 2, 1), 4, 2)],
)
def test_rows_and_heads_split_over_the_mesh(shape: tuple[int, int, int], heads: int, kv_heads: int) -> None:
    with jax.set_mesh(make_mesh(*shape)):
        check(random_case(7, heads, kv_heads).masked(7), query_chunk=6)


def test_one_long_block_is_split_along_its_queries() -> None:
    """The decoder's case: one block of many queries, whose last chunk is not full."""
    rng = np.random.default_rng(8)
    queries = rng.standard_normal((1, 1, 23, 2, HEAD_DIM)).astype(np.float32)
    keys, values = rng.standard_normal((2, 1, 1, 23, HEAD_DIM)).astype(np.float32)
    stop = np.arange(1, 24, dtype=np.int32)[None, None]
    segment = KeySegment(
        *(put(x, SPECS.keys_bksh) for x in (keys, values)), *(put(x, SPECS.act_bNB) for x in (stop - 5, stop))
    )
    run = jax.jit(lambda q, s, chunk: attention(q, [s], scale=SCALE, query_chunk=chunk), static_argnums=2)
    whole, chunked = (run(put(queries, SPECS.queries_bNqnh), segment, chunk) for chunk in (23, 5))
    np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-6)
    scores = np.einsum("qnh,sh->nqs", queries[0, 0].astype(np.float64), keys[0, 0]) * SCALE
    for i in range(23):
        seen = slice(max(0, i - 4), i + 1)
        weights = np.exp(scores[:, i, seen])
        expected = weights @ values[0, 0, seen] / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(whole[0, 0, i], expected, rtol=0, atol=2e-6)


def test_a_row_that_sees_nothing_is_finite_forward_and_backward() -> None:
    case = random_case(9)
    nothing = np.zeros((ROWS, BLOCKS, QUERIES), np.int32)
    blind = Case(case.queries, (*case.shared[:2], nothing, nothing), (*case.own[:2], nothing, nothing))
    queries, segments = on_mesh(blind)
    everywhere = put(np.ones((ROWS, BLOCKS, QUERIES, 1, 1), bool), SPECS.shared_own_keys_bNkjh)
    out, gradients = output_and_gradients(queries, segments, everywhere, 1024)
    assert all(np.isfinite(x).all() for x in (out, *gradients))


def test_keys_that_no_query_of_a_chunk_sees_are_never_read() -> None:
    """A chunk of six queries reads tiles of six keys: all others may hold NaN, forward and backward."""
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((ROWS, 4, QUERIES, 2, HEAD_DIM)).astype(np.float32)
    keys, values = rng.standard_normal((2, ROWS, 1, 40, HEAD_DIM)).astype(np.float32)
    start, stop = np.zeros((2, ROWS, 4, QUERIES), np.int32)
    start[0, :2], stop[0, :2] = [[7, 8, 9]], [[10, 11, 12]]  # the first chunk: tile 1 in both rows, of which it sees
    start[1, :2], stop[1, :2] = 6, [[9], [11]]  # a part
    start[0, 2:], stop[0, 2:] = 25, 30  # the second chunk: tile 4, and nothing in the other row
    start[1, 2:], stop[1, 2:] = 40, 3
    unread = np.ones(40, bool)
    unread[6:12] = unread[24:30] = False

    def run(keys: np.ndarray, values: np.ndarray) -> tuple[jax.Array, ...]:
        def total(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(queries, [KeySegment(keys, values, *ranges)], scale=SCALE, query_chunk=6)
            return jnp.sin(out).sum(), out

        ranges = put(start, SPECS.act_bNB), put(stop, SPECS.act_bNB)
        arrays = [put(queries, SPECS.queries_bNqnh), put(keys, SPECS.keys_bksh), put(values, SPECS.keys_bksh)]
        gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    hidden = unread[:, None]
    expected = run(keys, values)
    for ours, theirs in zip(run(*(np.where(hidden, np.nan, x) for x in (keys, values))), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for gradient in expected[2:]:
        assert not np.asarray(gradient)[:, :, unread].any()
        assert np.asarray(gradient)[:, :, 6:12].any()
    assert not np.asarray(expected[0])[1, 2:].any()  # queries that see nothing


@pytest.mark.parametrize("seed", range(3))
def test_scored_pairs_are_those_of_the_tiles_from_the_first_to_the_last_visible_key(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, stop = np.sort(rng.integers(-3, 45, (2, ROWS, 20)), axis=0).astype(np.int32)
    stop[:, 12:18] = start[:, 12:18]  # a chunk that sees nothing
    expected = 0
    for first in range(0, 20, 6):
        seen = [
            key
            for row in range(ROWS)
            for query in range(first, min(first + 6, 20))
            for key in range(40)
            if start[row, query] <= key < stop[row, query]
        ]
        tiles = max(seen) // 6 - min(seen) // 6 + 1 if seen else 0
        expected += tiles * 6 * 6 * ROWS
    assert scored_pairs(jnp.asarray(start), jnp.asarray(stop), 40, query_chunk=6) == expected
    assert scored_pairs(jnp.asarray(start), jnp.asarray(stop), 40, query_chunk=29) == ROWS * 20 * 40  # at once


def test_bfloat16_rounds_weights_and_not_scores_or_sums() -> None:
    """bf16 inputs leave the size of one bf16 rounding against float64, also over many tiles.

    Values share a large part, which must cancel in the gradient of the scores.
    """
    case = random_case(5)
    case = case._replace(shared=(case.shared[0], case.shared[1] + 4, *case.shared[2:]))
    rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x, case)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x, rounded)
    expected, expected_gradients, seen = reference(exact)
    for chunk in (1024, 6, 1):
        out, gradients = output_and_gradients(*on_mesh(rounded), put(seen.numpy(), SPECS.shared_own_keys_bNkjh), chunk)
        assert out.dtype == gradients[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.where(seen, out.astype(jnp.float32), 0), np.where(seen, expected, 0), rtol=4e-3, atol=4e-3
        )
        errors = [
            np.linalg.norm(ours.astype(jnp.float32) - theirs) / np.linalg.norm(theirs)
            for ours, theirs in zip(gradients[:3], expected_gradients, strict=False)
        ]
        assert max(errors) < (0.015 if chunk == 1024 else 0.007)


def test_the_scores_of_all_blocks_never_exist() -> None:
    """Compiled memory of value and gradients stays near one chunk's scores, far below those of all queries."""
    blocks, size, context, heads, kv_heads, chunk = 256, 8, 1024, 4, 2, 64
    with jax.set_mesh(make_mesh()):
        shapes = ((1, blocks, size, heads, 8), (1, kv_heads, context, 8), (1, blocks, kv_heads, size, 8))
        queries, shared, own = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        bounds = jax.ShapeDtypeStruct((1, blocks, size), jnp.int32)

        def total(queries: jax.Array, shared: jax.Array, own: jax.Array, bounds: jax.Array) -> jax.Array:
            segments = [KeySegment(keys, keys, jnp.zeros_like(bounds), bounds) for keys in (shared, own)]
            return attention(queries, segments, scale=SCALE, query_chunk=chunk).sum()

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(queries, shared, own, bounds).compile()
    all_scores = 4 * heads * blocks * size * (context + size)
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 4
