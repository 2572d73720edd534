"""The noise schedule: how many tokens of a block are shown, and that nothing else changes with them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from specjax.blockdiff.anchors import sample_generator
from specjax.blockdiff.masks import reveal
from specjax.blockdiff.noise import RevealedPrefix, block_inputs, draw_revealed

UNIFORM = (np.arange(4000) + 0.5) / 4000


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_geometric_lengths_have_their_law(probability: float) -> None:
    lengths = RevealedPrefix("geometric", probability, 6).lengths(UNIFORM)
    expected = [probability**n * (1 - probability) for n in range(4)] + [probability**4]  # the last slot stays masked
    np.testing.assert_allclose(np.bincount(lengths, minlength=5) / len(lengths), expected, atol=1e-3)


@pytest.mark.parametrize(("fraction", "block_size", "length"), [(0.5, 8, 3), (0.3, 16, 4), (0.99, 4, 2), (0.9, 2, 0)])
def test_a_fraction_is_the_same_in_every_block(fraction: float, block_size: int, length: int) -> None:
    assert set(RevealedPrefix("fraction", fraction, block_size).lengths(UNIFORM)) == {length}


def test_a_block_is_shown_the_same_whatever_stands_around_it() -> None:
    prefix = RevealedPrefix("geometric", 0.7, 8)
    alone = np.r_[np.ones(20, int), np.zeros(12, int)]
    packed = np.r_[np.ones(6, int), np.full(20, 2), np.zeros(6, int)]
    anchors = np.array([0, 3, 4, 9, 17])

    def drawn(anchors: np.ndarray, documents: np.ndarray, samples: list[int], epoch: int = 2) -> list[int]:
        return draw_revealed(prefix, anchors, documents, seed=5, epoch=epoch, sample_ids=samples).tolist()

    expected = drawn(anchors, alone, [42])
    assert len(set(expected)) > 1
    assert drawn(np.r_[1, anchors[1:] + 6], packed, [7, 42])[1:] == expected[1:]
    assert drawn(anchors, alone, [42], epoch=3) != expected
    assert drawn(anchors, alone, [43]) != expected
    assert drawn(np.zeros(3, int), np.zeros(32, int), []) == [0, 0, 0]  # padding


def test_lengths_do_not_follow_from_the_numbers_that_drew_the_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def lengths(self: RevealedPrefix, uniform: np.ndarray) -> np.ndarray:
        taken.extend(uniform)
        return np.zeros(uniform.shape, np.int32)

    monkeypatch.setattr(RevealedPrefix, "lengths", lengths)
    prefix, documents = RevealedPrefix("geometric", 0.7, 8), np.ones(20, int)
    draw_revealed(prefix, np.arange(20), documents, seed=5, epoch=2, sample_ids=[42])
    assert len(taken) == len(set(taken)) == 20
    assert not set(taken) & set(sample_generator(5, 2, 42).random(20))


def test_shown_slots_hold_their_tokens_and_only_those_behind_them_are_supervised() -> None:
    tokens = np.arange(10, 22)[None]
    anchors, revealed = np.array([[0, 5, 8]]), np.array([[2, 0, 3]])
    mask = np.array([[[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]], bool)  # the last block's turn ends
    shown, supervised = jax.jit(reveal)(mask, revealed)
    noise, labels = block_inputs(tokens, anchors, 5, 99, shown)
    assert np.asarray(noise).tolist() == [[[10, 11, 12, 99, 99], [15, 99, 99, 99, 99], [18, 19, 20, 99, 99]]]
    assert np.asarray(supervised).astype(int).tolist() == [[[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]]
    assert np.asarray(labels).tolist() == np.asarray(block_inputs(tokens, anchors, 5, 99)[1]).tolist()
