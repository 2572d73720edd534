from __future__ import annotations

import math

import numpy as np
import pytest

from specjax.blockdiff.metrics import (
    accuracy_by_position,
    repeated_ngrams,
    teacher_forced_acceptance_length,
)


def test_accuracy_by_position_divides_counts_and_knows_what_was_not_measured():
    accuracy = accuracy_by_position(np.array([0, 3, 1, 0], np.float32), np.array([0, 4, 2, 5], np.float32))
    np.testing.assert_array_equal(accuracy, [np.nan, 0.75, 0.5, 0.0])


def test_teacher_forced_acceptance_length_is_a_mean_over_blocks():
    assert teacher_forced_acceptance_length(10.0, 4.0) == 2.5
    assert math.isnan(teacher_forced_acceptance_length(0.0, 0.0))


@pytest.mark.parametrize(
    ("outputs", "n", "share"),
    [
        ([[1, 1, 1, 1, 1, 1], [1, 2, 3]], 4, 2 / 3),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 4, 0),  # another prompt's answer may say the same
        ([[1, 2, 1, 2]], 2, 1 / 3),
        ([[1, 2, 3, 4, 5, 1, 2, 3, 4]], 4, 1 / 6),
        ([[1, 2], []], 4, 0),
    ],
)
def test_repeated_ngrams(outputs: list[list[int]], n: int, share: float) -> None:
    assert repeated_ngrams(outputs, n) == pytest.approx(share)
