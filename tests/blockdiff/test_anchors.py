"""Anchors against a plain loop over documents, their distribution, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from specjax.blockdiff.anchors import PureContext, draw_anchors, sample_generator

CHI_SQUARE_999_OF_19 = 43.82  # 0.999 quantile of chi-square with 19 degrees of freedom


def row(*documents: str, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(loss_mask, document_ids) of documents written as "0110", one digit a token."""
    loss_mask = [int(digit) for document in documents for digit in document] + [0] * padding
    ids = [i + 1 for i, document in enumerate(documents) for _ in document] + [0] * padding
    return np.array(loss_mask, bool), np.array(ids, np.int32)


def candidates_of(loss_mask: np.ndarray, document_ids: np.ndarray, document: int) -> set[int]:
    found = set()
    for p in range(len(loss_mask) - 1):
        if document_ids[p] == document == document_ids[p + 1] and loss_mask[p] and loss_mask[p + 1]:
            found.add(p)
    return found


def random_row(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    documents = ["".join(rng.choice(["0", "1"], int(rng.integers(1, 30)), p=[0.3, 0.7])) for _ in range(3)]
    loss_mask, ids = row(*documents, padding=int(rng.integers(0, 10)))
    # Padding with a set loss mask must not matter either.
    return loss_mask | (ids == 0), ids, len(documents)


def test_each_document_draws_its_quota_from_its_candidates():
    rng = np.random.default_rng(0)
    for trial in range(200):
        loss_mask, ids, documents = random_row(rng)
        n = int(rng.integers(4, 20))
        anchors, valid = draw_anchors(loss_mask, ids, n, seed=1, epoch=trial, sample_ids=range(documents))
        assert anchors.dtype == np.int32
        assert anchors.shape == valid.shape == (n,)
        chosen = anchors[valid].tolist()
        assert valid.tolist() == [True] * len(chosen) + [False] * (n - len(chosen))
        assert not anchors[~valid].any()
        assert chosen == sorted(set(chosen))
        expected = 0
        for document in range(1, documents + 1):
            candidates = candidates_of(loss_mask, ids, document)
            own = [p for p in chosen if ids[p] == document]
            length = sum(1 for i in ids if i == document)
            quota = min(len(candidates), max(1, (n * length) // len(ids)))
            assert set(own) <= candidates
            assert len(own) == quota
            expected += quota
        assert len(chosen) == expected


def test_the_last_position_and_the_end_of_a_document_are_no_candidates():
    loss_mask, ids = row("011", "11")
    anchors, valid = draw_anchors(loss_mask, ids, 5, seed=0, epoch=0, sample_ids=[0, 1])
    assert anchors[valid].tolist() == [1, 3]


@pytest.mark.parametrize("documents", [(), ("0000",), ("0101", "1"), ("000", "0110")])
def test_rows_without_candidates_are_no_error(documents: tuple[str, ...]):
    loss_mask, ids = row(*documents, padding=2)
    expected = set().union(*(candidates_of(loss_mask, ids, i + 1) for i in range(len(documents))))
    anchors, valid = draw_anchors(loss_mask, ids, 4, seed=0, epoch=0, sample_ids=range(len(documents)))
    assert set(anchors[valid].tolist()) == expected


def test_every_candidate_is_equally_likely():
    loss_mask, ids = row("1" * 21)
    draws, quota, cells = 3000, 5, 20
    counts = np.zeros(21)
    for epoch in range(draws):
        anchors, valid = draw_anchors(loss_mask, ids, quota, seed=7, epoch=epoch, sample_ids=[3])
        assert valid.all()
        counts[anchors] += 1
    assert counts[20] == 0
    share = quota / cells
    chi_square = ((counts[:20] - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (cells - 1) / cells
    assert chi_square < CHI_SQUARE_999_OF_19
    assert chi_square > 3  # a schedule that deals positions out in turn would be too even


def test_a_document_draws_the_same_anchors_wherever_it_lies():
    mask = "0001111111110111111111"
    rest = ["1" * 15, "0" * 4 + "1" * 9]
    alone, alone_ids = row(mask, padding=28)
    last, last_ids = row(*rest, mask)
    assert len(alone) == len(last)
    for epoch in range(20):
        anchors, valid = draw_anchors(alone, alone_ids, 16, seed=5, epoch=epoch, sample_ids=[42])
        packed, packed_valid = draw_anchors(last, last_ids, 16, seed=5, epoch=epoch, sample_ids=[1, 2, 42])
        own = packed[packed_valid & (last_ids[packed] == 3)]
        assert (own - 28).tolist() == anchors[valid].tolist()


def test_seed_epoch_and_sample_each_change_the_draw():
    loss_mask, ids = row("1" * 400)

    def draw(seed: int, epoch: int, sample: int) -> list[int]:
        return draw_anchors(loss_mask, ids, 40, seed=seed, epoch=epoch, sample_ids=[sample])[0].tolist()

    draws = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1), draw(2**40, 0, 0), draw(0, 0, 2**40)]
    assert len({tuple(d) for d in draws}) == len(draws)
    np.random.seed(123)
    assert draw(0, 0, 0) == draws[0]


@pytest.mark.parametrize("long_first", [False, True])
def test_many_short_documents_never_exceed_the_anchors(long_first: bool):
    for documents, n in ((12, 5), (5, 5), (3, 5)):
        short = ["11"] * documents
        loss_mask, ids = row("1" * 30, *short) if long_first else row(*short, "1" * 30)
        anchors, valid = draw_anchors(loss_mask, ids, n, seed=0, epoch=0, sample_ids=range(documents + 1))
        per_document = np.bincount(ids[anchors[valid]], minlength=documents + 2)[1:]
        assert valid.sum() == n
        # The minimum of one outlives the large shares: only when nothing else is left does a document go without.
        assert per_document.max() == 1 or per_document.min() == 1
        assert (per_document >= 1).sum() == min(n, documents + 1)


def test_the_first_part_of_every_document_starts_no_block():
    """Its length is the greater of both settings'; the share is each document's own, and drawn anew in each epoch."""
    loss_mask, documents = row("1" * 40, "1" * 30, "1" * 6, padding=4)
    context, starts, lengths = PureContext(8, (0.2, 0.8)), [0, 40, 70], [40, 30, 6]
    shares = []
    for epoch in range(40):
        drawn = {"seed": 3, "epoch": epoch, "sample_ids": [11, 12, 13]}
        anchors, valid = draw_anchors(loss_mask, documents, 80, **drawn, context=context)
        chosen = anchors[valid]
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            share = 0.2 + 0.6 * sample_generator(3, epoch, 11 + i, stream=2).random()
            skipped = max(8, int(np.ceil(share * length)))
            own = chosen[(chosen >= start) & (chosen < start + length)]
            candidates = list(range(start + skipped, start + length - 1))
            assert set(own.tolist()) <= set(candidates)
            assert len(own) == min(len(candidates), length)
            shares.append(skipped / length)
    assert np.ptp(shares[::3]) > 0.5


def test_inputs_that_cannot_be_meant_are_refused():
    loss_mask, ids = row("111", "111")
    with pytest.raises(ValueError, match="document 2 has no sample id, there are 1"):
        draw_anchors(loss_mask, ids, 4, seed=0, epoch=0, sample_ids=[0])
    with pytest.raises(ValueError, match="must have one shape"):
        draw_anchors(loss_mask[:-1], ids, 4, seed=0, epoch=0, sample_ids=[0, 1])
    with pytest.raises(ValueError, match="none below 0"):
        draw_anchors(loss_mask, ids, 4, seed=0, epoch=0, sample_ids=[0, -1])
