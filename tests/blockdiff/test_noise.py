"""The noise schedule: which slots of a block are shown, and that nothing else changes with them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from specjax.blockdiff.anchors import sample_generator
from specjax.blockdiff.masks import reveal
from specjax.blockdiff.noise import BlockNoise, block_inputs, draw_shown

UNIFORM = np.random.default_rng(0).random((40_000, 6))


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_geometric_lengths_have_their_law(probability: float) -> None:
    shown = BlockNoise("geometric", probability, 6).shown(UNIFORM)
    lengths = shown.argmin(-1) - 1
    assert (shown == (np.arange(6) <= lengths[:, None])).all(), "a prefix"
    expected = [probability**n * (1 - probability) for n in range(4)] + [probability**4]  # the last slot stays masked
    np.testing.assert_allclose(np.bincount(lengths, minlength=5) / len(lengths), expected, atol=0.01)


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_random_slots_are_shown_independently_of_one_another(probability: float) -> None:
    shown = BlockNoise("random", probability, 6).shown(UNIFORM)
    assert shown[:, 0].all()
    assert not shown[:, -1].any()
    inner = shown[:, 1:-1].astype(float)
    np.testing.assert_allclose(inner.mean(0), probability, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(inner.T), np.eye(4), atol=0.03)


@pytest.mark.parametrize(("fraction", "block_size", "length"), [(0.5, 8, 3), (0.3, 16, 4), (0.99, 4, 2), (0.9, 2, 0)])
def test_a_fraction_is_the_same_in_every_block(fraction: float, block_size: int, length: int) -> None:
    shown = BlockNoise("fraction", fraction, block_size).shown(np.random.default_rng(0).random((50, block_size)))
    assert (shown == (np.arange(block_size) <= length)).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_anchors_are_masked_at_their_share_whatever_else_is_shown(share: float) -> None:
    shown = BlockNoise("none", 0.0, 6, share).shown(UNIFORM)
    assert not shown[:, 1:].any()
    np.testing.assert_allclose(1 - shown[:, 0].mean(), share, atol=0.01 if 0 < share < 1 else 0)
    others = [BlockNoise("geometric", 0.7, 6, each).shown(UNIFORM)[:, 1:] for each in (0.0, share)]
    assert (others[0] == others[1]).all()
    if 0 < share < 1:
        masked = ~BlockNoise("geometric", 0.7, 6, share).shown(UNIFORM)[:, 0]
        np.testing.assert_allclose(others[1][masked].mean(0), others[1].mean(0), atol=0.015)


def test_a_block_is_shown_the_same_whatever_stands_around_it() -> None:
    noise = BlockNoise("geometric", 0.7, 8, 0.5)
    alone = np.r_[np.ones(20, int), np.zeros(12, int)]
    packed = np.r_[np.ones(6, int), np.full(20, 2), np.zeros(6, int)]
    anchors = np.array([0, 3, 4, 9, 17])

    def drawn(anchors: np.ndarray, documents: np.ndarray, samples: list[int], epoch: int = 2) -> list[list[bool]]:
        return draw_shown(noise, anchors, documents, seed=5, epoch=epoch, sample_ids=samples).tolist()

    expected = drawn(anchors, alone, [42])
    assert len(set(map(tuple, expected))) > 1
    assert drawn(np.r_[1, anchors[1:] + 6], packed, [7, 42])[1:] == expected[1:]
    assert drawn(anchors, alone, [42], epoch=3) != expected
    assert drawn(anchors, alone, [43]) != expected
    assert not np.any(drawn(np.zeros(3, int), np.zeros(32, int), []))  # padding


def test_noise_does_not_follow_from_the_numbers_that_drew_the_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def shown(self: BlockNoise, uniform: np.ndarray) -> np.ndarray:
        taken.extend(uniform.ravel())
        return np.zeros(uniform.shape, bool)

    monkeypatch.setattr(BlockNoise, "shown", shown)
    noise, documents = BlockNoise("geometric", 0.7, 8), np.ones(20, int)
    draw_shown(noise, np.arange(20), documents, seed=5, epoch=2, sample_ids=[42])
    assert len(taken) == len(set(taken)) == 20 * 8
    for stream in (0, 2):
        assert not set(taken) & set(sample_generator(5, 2, 42, stream).random(20 * 8))


def test_shown_slots_hold_their_tokens_and_the_others_are_supervised() -> None:
    tokens = np.arange(10, 22)[None]
    anchors = np.array([[0, 5, 8]])
    drawn = np.array([[[1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0]]], bool)
    mask = np.array([[[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]], bool)  # the last block's turn ends
    shown, supervised = jax.jit(reveal)(mask, drawn)
    noise, labels = block_inputs(tokens, anchors, 5, 99, shown)
    assert np.asarray(noise).tolist() == [[[10, 11, 12, 99, 99], [99, 99, 17, 99, 99], [18, 19, 20, 99, 99]]]
    assert np.asarray(supervised).astype(int).tolist() == [[[0, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]]
    assert np.asarray(labels).tolist() == np.asarray(block_inputs(tokens, anchors, 5, 99)[1]).tolist()
