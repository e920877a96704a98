# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np

from shared.metrics.subjects import SliceRows


def test_the_control_takes_the_nearest_relative_position_of_the_next_subject() -> None:
    subjects = ["A"] * 5 + ["B"] * 3 + ["C"]
    slices = [10, 11, 12, 13, 14, 44, 40, 42, 7]  # B came in another order
    rows = SliceRows(subjects, None, slices).rows_of_another_subject()
    assert rows is not None
    # A at 0, 1/4, 1/2, 3/4, 1 against B at 1, 0, 1/2 (of two equally near the first); B against C, C against A's middle
    assert rows.tolist() == [6, 6, 7, 5, 5, 8, 8, 8, 2]
    without = SliceRows(subjects).rows_of_another_subject()
    assert without is not None
    assert (without[0], without[4]) == (5, 7)
    assert SliceRows(["A", "A"]).rows_of_another_subject() is None


def test_means_are_of_the_finite_values_of_each_subject() -> None:
    rows = SliceRows(["B", "A", "B", "C"])
    means = rows.subject_means(np.array([1.0, 5.0, math.nan, math.nan]))
    assert means == {"B": 1.0, "A": 5.0}
    assert list(rows.by_subject) == ["B", "A", "C"]


def test_neighbours_are_slices_of_one_session_that_follow_one_another() -> None:
    subjects, sessions, slices = ["A", "A", "A", "A", "B"], ["1", "1", "2", "1", "1"], [4, 3, 5, 6, 5]
    assert SliceRows(subjects, sessions, slices).neighbours() == {"A": [(1, 0)]}
    assert SliceRows(subjects, None, slices).neighbours() == {"A": [(1, 0), (0, 2), (2, 3)]}
    assert SliceRows(subjects, sessions).neighbours() == {}
