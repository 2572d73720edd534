from __future__ import annotations

import math

import numpy as np

from specjax.blockdiff.metrics import accuracy_by_position, teacher_forced_acceptance_length


def test_accuracy_by_position_divides_counts_and_knows_what_was_not_measured():
    accuracy = accuracy_by_position(np.array([0, 3, 1, 0], np.float32), np.array([0, 4, 2, 5], np.float32))
    np.testing.assert_array_equal(accuracy, [np.nan, 0.75, 0.5, 0.0])


def test_teacher_forced_acceptance_length_is_a_mean_over_blocks():
    assert teacher_forced_acceptance_length(10.0, 4.0) == 2.5
    assert math.isnan(teacher_forced_acceptance_length(0.0, 0.0))
