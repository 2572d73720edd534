"""Anchor drawing: which positions of a row start a training block. NumPy, for the host side of the data pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PureContext:
    """The first part of a sequence, where no block starts: at least `length` tokens and a share of all.

    ratio: (low, high), between which the share of a sequence is drawn uniformly.
    """

    length: int = 0
    ratio: tuple[float, float] = (0.0, 0.0)

    def tokens(self, sequence: int, generator: np.random.Generator) -> int:
        low, high = self.ratio
        return max(self.length, math.ceil((low + (high - low) * generator.random()) * sequence))


NO_CONTEXT = PureContext()


def draw_anchors(
    loss_mask: np.ndarray,
    document_ids: np.ndarray,
    num_anchors: int,
    *,
    seed: int,
    epoch: int,
    sample_ids: Sequence[int],
    context: PureContext = NO_CONTEXT,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws up to N = `num_anchors` anchors of one row: (anchors int32 [N], valid bool [N]), valid ones first, sorted.

    A position p is a candidate if `loss_mask[p]` and `loss_mask[p + 1]` are set in one document, and p is not in the
    document's pure `context`. A document of s tokens in a row of S draws min(candidates, max(1, floor(N * s / S))) of
    its own, uniformly without replacement; only if the documents of a row ask for more than N together do those that
    ask for most give some up. Unused slots are 0 and invalid; a row without candidates has no valid slot.

    The order in which a document's candidates are drawn depends on (seed, epoch, its sample id) and its own mask
    alone, never on the rows around it, the process, or the steps before.

    Args:
        loss_mask: [S] bool, the tokens to learn.
        document_ids: [S] int, 0 for padding, i + 1 for the tokens of the document whose sample id is `sample_ids[i]`.

    Raises:
        ValueError: shapes differ, a document has no sample id, or a number that must not be negative is.
    """
    loss_mask, document_ids = np.asarray(loss_mask, bool), np.asarray(document_ids)
    if loss_mask.ndim != 1 or loss_mask.shape != document_ids.shape:
        raise ValueError(f"loss_mask {loss_mask.shape} and document_ids {document_ids.shape} must have one shape [S]")
    if document_ids.max(initial=0) > len(sample_ids):
        raise ValueError(f"document {document_ids.max()} has no sample id, there are {len(sample_ids)}")
    if min(num_anchors, seed, epoch, *sample_ids) < 0:
        raise ValueError(
            f"num_anchors {num_anchors}, seed {seed}, epoch {epoch}, sample ids {sample_ids}: none below 0"
        )

    same_document = document_ids[:-1] == document_ids[1:]
    candidates = np.flatnonzero(loss_mask[:-1] & loss_mask[1:] & same_document)
    places = [np.flatnonzero(document_ids == i + 1) for i in range(len(sample_ids))]
    lengths = [len(own) for own in places]
    by_document = []
    for i, (sample_id, own) in enumerate(zip(sample_ids, places, strict=True)):
        skipped = context.tokens(len(own), sample_generator(seed, epoch, sample_id, stream=2))
        first = own[0] + skipped if len(own) else 0
        by_document.append(candidates[(document_ids[candidates] == i + 1) & (candidates >= first)])
    quotas = _quotas(lengths, [len(own) for own in by_document], num_anchors, len(loss_mask))

    drawn = [
        sample_generator(seed, epoch, sample_id).permutation(own)[:quota]
        for sample_id, own, quota in zip(sample_ids, by_document, quotas, strict=True)
    ]
    chosen = np.sort(np.concatenate([np.zeros(0, np.int64), *drawn]))
    anchors, valid = np.zeros(num_anchors, np.int32), np.zeros(num_anchors, bool)
    anchors[: len(chosen)], valid[: len(chosen)] = chosen, True
    return anchors, valid


def _quotas(lengths: Sequence[int], candidates: Sequence[int], num_anchors: int, row_length: int) -> list[int]:
    """Anchors per document. The minimum of one can lift the sum above N: the (last of the) largest then give way."""
    quotas = [min(c, max(1, num_anchors * s // row_length)) for s, c in zip(lengths, candidates, strict=True)]
    for _ in range(sum(quotas) - num_anchors):
        largest = max(range(len(quotas)), key=lambda i: (quotas[i], i))
        quotas[largest] -= 1
    return quotas


def sample_generator(seed: int, epoch: int, sample_id: int, stream: int = 0) -> np.random.Generator:
    """Random numbers of a sample in an epoch; `stream` tells apart uses (0: anchors, 1: noise, 2: context).

    Counter-based: (seed, epoch) is the key, and a stream of a sample owns the 2^128 counter values below its word.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, sample_id]))
