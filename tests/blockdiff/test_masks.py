"""Block inputs, supervised slots and context ranges against plain loops over positions; the two historical traps."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from specjax.blockdiff.masks import context_ranges, covered_tokens, document_starts, slot_mask
from specjax.blockdiff.noise import block_inputs
from specjax.models.sharding import BATCH, make_mesh, put

MASK_TOKEN = 99
B, T, N, ROWS = 5, 24, 7, 8


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents and padding, anchors everywhere, also at ends, in padding and out of turn."""
    rng = np.random.default_rng(0)
    ids = np.zeros((ROWS, T), np.int32)
    for i in range(ROWS):
        ends = np.sort(rng.choice(np.arange(3, T + 1), 3, replace=False))
        ids[i, : ends[2]], ids[i, : ends[1]], ids[i, : ends[0]] = 3, 2, 1
    anchors = rng.integers(0, T, (ROWS, N)).astype(np.int32)
    anchors[:, :3] = 0, T - 1, T - 2
    return {
        "tokens": rng.integers(0, MASK_TOKEN, (ROWS, T)).astype(np.int32),
        "loss_mask": rng.random((ROWS, T)) < 0.75,
        "document_ids": ids,
        "anchors": anchors,
        "valid": rng.random((ROWS, N)) < 0.8,
    }


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=["1x1x1", "2x2x2"])
def mesh(request: pytest.FixtureRequest) -> Iterator[None]:
    with jax.set_mesh(make_mesh(*request.param)):
        yield


def sharded(batch: dict[str, np.ndarray], *names: str) -> list[jax.Array]:
    return [put(batch[name], P(BATCH, None)) for name in names]


def expected_slot_mask(batch: dict[str, np.ndarray], cumulative: bool) -> np.ndarray:
    mask = np.zeros((ROWS, N, B), bool)
    for i in range(ROWS):
        for j, p in enumerate(batch["anchors"][i]):
            unbroken = True
            for k in range(1, B):
                if p + k >= T or batch["document_ids"][i, p + k] != batch["document_ids"][i, p]:
                    break
                unbroken = unbroken and batch["loss_mask"][i, p + k]
                learnt = unbroken if cumulative else batch["loss_mask"][i, p + k]
                mask[i, j, k] = batch["valid"][i, j] and learnt
    return mask


def test_labels_sit_at_the_slots_own_position(mesh: None, batch: dict[str, np.ndarray]):
    """Trap one: labels shifted by one train to over 70% accuracy and accept almost nothing."""
    noise, labels = jax.jit(lambda t, a: block_inputs(t, a, B, MASK_TOKEN))(*sharded(batch, "tokens", "anchors"))
    assert labels.sharding.spec[0] == BATCH
    noise, labels = np.asarray(noise), np.asarray(labels)
    compared = 0
    for i in range(ROWS):
        for j, p in enumerate(batch["anchors"][i]):
            assert noise[i, j, 0] == batch["tokens"][i, p]
            for k in range(B):
                if p + k < T:
                    assert labels[i, j, k] == batch["tokens"][i, p + k]
                    compared += 1
    assert compared > ROWS * N * B // 2
    assert (noise[:, :, 1:] == MASK_TOKEN).all()


@pytest.mark.parametrize("cumulative", [True, False])
def test_slot_mask_equals_a_loop_over_positions(mesh: None, batch: dict[str, np.ndarray], cumulative: bool):
    arguments = sharded(batch, "loss_mask", "document_ids", "anchors", "valid")
    mask = jax.jit(lambda *x: slot_mask(*x, B, cumulative=cumulative))(*arguments)
    expected = expected_slot_mask(batch, cumulative)
    np.testing.assert_array_equal(mask, expected)
    assert expected.any(axis=(0, 1)).tolist() == [False] + [True] * (B - 1)


def test_covered_tokens_are_those_of_the_supervised_slots(mesh: None, batch: dict[str, np.ndarray]):
    names = ("loss_mask", "document_ids", "anchors", "valid")
    arguments = sharded(batch, *names)

    def covered(*arrays: jax.Array) -> jax.Array:
        return covered_tokens(slot_mask(*arrays, B), arrays[2], arrays[0].shape[1])

    mask = expected_slot_mask(batch, cumulative=True)
    expected = np.zeros(batch["loss_mask"].shape, bool)
    for row, block, slot in zip(*np.nonzero(mask), strict=True):
        expected[row, batch["anchors"][row, block] + slot] = True
    np.testing.assert_array_equal(jax.jit(covered)(*arguments), expected)


def test_the_two_supervision_rules_differ(batch: dict[str, np.ndarray]):
    assert (expected_slot_mask(batch, False) != expected_slot_mask(batch, True)).any()


def test_context_is_the_anchors_document_strictly_before_it(mesh: None, batch: dict[str, np.ndarray]):
    """Trap two: with context `<=` anchor the draft reads a hidden state that inference does not have."""
    start, stop = jax.jit(context_ranges)(*sharded(batch, "document_ids", "anchors"))
    assert start.dtype == stop.dtype == jnp.int32
    assert start.sharding.spec[0] == BATCH
    start, stop = np.asarray(start), np.asarray(stop)
    for i in range(ROWS):
        for j, p in enumerate(batch["anchors"][i]):
            ids = batch["document_ids"][i]
            visible = [s for s in range(T) if ids[s] == ids[p] and s < p]
            assert list(range(start[i, j], stop[i, j])) == visible


def test_document_starts(mesh: None, batch: dict[str, np.ndarray]):
    starts = np.asarray(jax.jit(document_starts)(*sharded(batch, "document_ids")))
    for i in range(ROWS):
        ids = batch["document_ids"][i].tolist()
        assert starts[i].tolist() == [ids.index(document) for document in ids]


def test_the_drawing_in_the_docstring():
    loss_mask = jnp.array([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    ids = jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    anchors, valid = jnp.array([[3, 8]]), jnp.ones((1, 2), bool)
    assert [x.tolist() for x in context_ranges(ids, anchors)] == [[[0, 6]], [[3, 8]]]
    assert slot_mask(loss_mask, ids, anchors, valid, 4).astype(int).tolist() == [[[0, 1, 1, 0], [0, 1, 1, 0]]]
