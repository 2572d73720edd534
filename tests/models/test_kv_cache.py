"""The cache: what is stored where, and that decoding with it equals one pass over the whole row."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax.models.decoder import Decoder
from specjax.models.kv_cache import KVCache, key_spec
from specjax.models.sharding import SPECS, make_mesh, put
from tests.decoding.tiny import OTHER_TARGETS

CAPACITY = 24
CONFIG = OTHER_TARGETS["sliding"]
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


@pytest.fixture(scope="module")
def model() -> Decoder:
    return jax.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, CAPACITY), dtype=np.int32)


@pytest.fixture(scope="module")
def full(model: Decoder, rows: np.ndarray) -> np.ndarray:
    """Hidden states of the rows in one pass without a cache."""
    return np.asarray(jax.jit(lambda model, x: model(x).hidden)(model, put(rows, SPECS.act_bt)))


@jax.jit
def step(
    model: Decoder, cache: KVCache, tokens: jax.Array, positions: jax.Array, slots: jax.Array
) -> tuple[jax.Array, KVCache]:
    out = model(tokens, positions, cache=cache, slots_bt=slots)
    assert out.cache is not None
    return out.hidden, out.cache


def empty(batch: int = 2) -> KVCache:
    heads, head_dim = CONFIG.num_key_value_heads, CONFIG.head_dim
    return KVCache.create(CONFIG.num_hidden_layers, batch, heads, CAPACITY, head_dim, jnp.float32)


def feed(
    model: Decoder, cache: KVCache, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray | None = None
) -> tuple[np.ndarray, KVCache]:
    slots = positions if slots is None else slots
    hidden, cache = step(model, cache, *(put(x.astype(np.int32), SPECS.act_bt) for x in (tokens, positions, slots)))
    return np.asarray(hidden), cache


def test_rows_at_positions_of_their_own_equal_one_pass(model: Decoder, rows: np.ndarray, full: np.ndarray) -> None:
    """Row 0 starts with 4 tokens and row 1 with 2 (and 2 that write nothing); then both advance by 4."""
    lengths, cache = np.array([4, 2]), empty()
    positions = np.tile(np.arange(4), (2, 1))
    slots = np.where(positions < lengths[:, None], positions, CAPACITY)
    _, cache = feed(model, cache, rows[:, :4], positions, slots)
    for _ in range(5):
        positions = lengths[:, None] + np.arange(4)
        tokens = np.take_along_axis(rows, positions, axis=1)
        hidden, cache = feed(model, cache, tokens, positions)
        expected = np.take_along_axis(full, positions[..., None], axis=1)
        np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)
        lengths += 4


def test_rejected_entries_are_overwritten_before_they_are_seen(
    model: Decoder, rows: np.ndarray, full: np.ndarray
) -> None:
    """Each round feeds two right tokens and two wrong ones, and the next begins after the right ones."""
    cache = empty()
    for start in range(0, CAPACITY - 2, 2):
        positions = np.tile(start + np.arange(4), (2, 1))
        wrong = (rows[:, start : start + 2] + 1) % CONFIG.vocab_size
        hidden, cache = feed(model, cache, np.concatenate([rows[:, start : start + 2], wrong], 1), positions)
        np.testing.assert_allclose(hidden[:, :2], full[:, start : start + 2], rtol=0, atol=1e-5)


@jax.jit
def run_tree(
    model: Decoder, cache: KVCache, tokens: jax.Array, positions: jax.Array, tree: jax.Array
) -> tuple[jax.Array, KVCache]:
    out = model(tokens, positions, cache=cache, tree_btt=tree)
    assert out.cache is not None
    return out.hidden, out.cache


def test_nodes_of_a_tree_see_the_cache_and_what_is_above_them(model: Decoder) -> None:
    """Against one pass over the prefix and the path to each node; some paths are longer than the window of 6."""
    rng = np.random.default_rng(3)
    nodes, lengths = 14, np.array([7, 2])
    prefix = rng.integers(0, CONFIG.vocab_size, (2, 7))
    _, cache = feed(model, empty(), prefix, np.tile(np.arange(7), (2, 1)))  # row 1: 5 slots of rejected tokens
    tokens = rng.integers(0, CONFIG.vocab_size, (2, nodes))
    parents = [[0] + [max(0, i - rng.integers(1, 3)) for i in range(1, nodes)] for _ in range(2)]
    paths = [[[0]] for _ in range(2)]
    for row in range(2):
        for node in range(1, nodes):
            paths[row].append([*paths[row][parents[row][node]], node])
    positions = np.array([[n + len(path) - 1 for path in row] for n, row in zip(lengths, paths, strict=True)])
    tree = np.array([[[j in path for j in range(nodes)] for path in row] for row in paths])
    assert max(len(path) for row in paths for path in row) >= 8
    arguments = (put(x.astype(np.int32), SPECS.act_bt) for x in (tokens, positions))
    hidden, keys = run_tree(model, cache, *arguments, put(tree, SPECS.act_btd))
    for row, (length, node_paths) in enumerate(zip(lengths, paths, strict=True)):
        for node, path in enumerate(node_paths):
            plain = np.zeros((2, CAPACITY), np.int32)
            plain[:, : length + len(path)] = [*prefix[row, :length], *tokens[row, path]]
            expected, written = feed(model, empty(), plain, np.tile(np.arange(CAPACITY), (2, 1)))
            at = length + len(path) - 1
            np.testing.assert_allclose(hidden[row, node], expected[0, at], rtol=0, atol=1e-5)
            for ours, theirs in zip((*keys.keys, *keys.values), (*written.keys, *written.values), strict=True):
                np.testing.assert_allclose(ours[row, :, node], theirs[0, :, at], rtol=0, atol=1e-5)


def test_a_tree_needs_a_cache_and_writes_nothing_to_it(model: Decoder) -> None:
    tokens, tree = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3, 3), bool)
    for cache, slots in ((None, None), (empty(), tokens)):
        with pytest.raises(ValueError, match="give it a cache and no slots"):
            model(tokens, cache=cache, slots_bt=slots, tree_btt=tree)


def test_a_slot_outside_the_cache_writes_nothing(model: Decoder) -> None:
    rng = np.random.default_rng(1)
    new = rng.standard_normal((2, 2, 4, 8)).astype(np.float32)
    slots = np.array([[3, CAPACITY, -1, CAPACITY - 1], [CAPACITY + 7, -CAPACITY, 0, -2]], np.int32)
    write = jax.jit(lambda cache, new, slots: cache.write(1, new, 2 * new, slots))
    cache = write(empty(), put(new, SPECS.keys_bksh), put(slots, SPECS.act_bt))
    expected = np.zeros((2, 2, CAPACITY, 8), np.float32)
    for row, column in np.argwhere((slots >= 0) & (slots < CAPACITY)):
        expected[row, :, slots[row, column]] = new[row, :, column]
    np.testing.assert_array_equal(cache.keys[1], expected)
    np.testing.assert_array_equal(cache.values[1], 2 * expected)
    assert not np.any(cache.keys[0])
    assert not np.any(cache.values[0])
    assert cache.capacity == CAPACITY


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_a_write_compiles_to_no_collective(shape: tuple[int, int, int]) -> None:
    with jax.set_mesh(make_mesh(*shape)):
        cache = empty(batch=8)
        new = put(np.ones((8, 2, 3, 8), np.float32), key_spec(2))
        slots = put(np.ones((8, 3), np.int32), SPECS.act_bt)
        write = jax.jit(lambda cache, new, slots: cache.write(0, new, new, slots), donate_argnums=0)
        text = write.lower(cache, new, slots).compile().as_text() or ""
    assert "scatter" in text or "dynamic-update-slice" in text
    assert not COLLECTIVE.search(text)


def test_a_bidirectional_decoder_takes_no_cache(rows: np.ndarray) -> None:
    config = dataclasses.replace(CONFIG, causal=False)
    with pytest.raises(ValueError, match="bidirectional decoder"):
        jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))(jnp.asarray(rows), cache=empty()).hidden)
