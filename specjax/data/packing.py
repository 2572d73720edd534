"""Which samples share a row: a plan computed once from their lengths, the same on every process and at every resume.

Example of rows of 8 tokens, samples of 5, 3, 4, 2 and 2 tokens (a to e):

    row 0    a a a a a b b b
    row 1    c c c c d d e e
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowPlan:
    """Row r holds, in this order, the samples `samples[first[r] : first[r + 1]]`; every sample is in exactly one row.

    samples: int64 [samples]. first: int64 [rows + 1].
    """

    samples: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.first[row] : self.first[row + 1]]


def one_sample_a_row(count: int) -> RowPlan:
    """Row r holds sample r."""
    return RowPlan(np.arange(count), np.arange(count + 1))


def pack(lengths: np.ndarray, capacity: int, *, seed: int) -> RowPlan:
    """Samples of `lengths` tokens (longer ones count as `capacity`) in few rows of `capacity` tokens.

    Best fit decreasing: the longest sample first, each into the fullest row that still holds it. Which of the samples
    of one length goes where is drawn from `seed`. A million samples take seconds: the free space of the open rows is a
    bit set, so that the best row is its lowest set bit at or above the length.
    """
    lengths = np.minimum(lengths, capacity)
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # open rows by the tokens that they still take
    spaces = 0  # bit s is set where with_space[s] is not empty
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            rows[row].append(sample)
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([sample])
        with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    samples = np.fromiter((sample for row in rows for sample in row), np.int64, len(order))
    return RowPlan(samples, np.cumsum([0, *map(len, rows)]))
