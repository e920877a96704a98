# SPDX-License-Identifier: Apache-2.0
"""`shared.intensity`: the one scaling rule and its inverse."""

from __future__ import annotations

import numpy as np
import pytest

from shared.intensity import is_scaled, robust_range, scale_intensity, unscale_intensity


def test_range_is_that_of_the_definition():
    values = np.random.default_rng(0).gamma(2.0, 100.0, size=(31, 17, 11))
    foreground = np.sort(values[values > values.mean()])
    low, high = robust_range(values)
    assert low == pytest.approx(np.quantile(values, 0.005))
    assert high == pytest.approx(np.quantile(foreground, 0.995))
    assert type(low) is float
    assert type(high) is float


def test_air_around_the_head_and_one_hot_voxel_move_the_upper_end_little():
    rng = np.random.default_rng(1)
    head = rng.uniform(400, 800, size=(20, 20, 20))
    narrow = np.pad(head, 2)
    wide = np.pad(head, ((30, 30), (20, 20), (2, 2)))
    assert robust_range(wide)[1] == pytest.approx(robust_range(narrow)[1], rel=2e-3)
    # what percentiles of all voxels would give differs by far more
    assert abs(np.percentile(wide, 99.5) - np.percentile(narrow, 99.5)) > 5
    hot = narrow.copy()
    hot[5, 5, 5] = 1e6
    assert robust_range(hot)[1] == pytest.approx(robust_range(narrow)[1], rel=2e-2)


def test_scaling_is_undone_inside_of_the_range_and_clips_outside():
    values = np.array([-50, 10, 60, 110, 400], np.int16)
    scaled = scale_intensity(values, 10, 110)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(unscale_intensity(scaled, 10, 110), [10, 10, 60, 110, 110])
    np.testing.assert_allclose(unscale_intensity(np.array([-0.1, 1.2]), 10, 110), [0, 130], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], True),
        ([0.2, 1 + 5e-7], True),
        ([0.0, 1.001], False),
        ([-1e-3, 0.5], False),
        ([0.0, np.nan], False),
        ([], False),
        ([0, 255], False),
    ],
)
def test_what_counts_as_scaled(values, expected):
    assert is_scaled(np.array(values)) is expected


def test_what_was_scaled_counts_as_scaled():
    values = np.random.default_rng(2).normal(300, 90, size=(9, 8, 7)).astype(np.float32)
    assert is_scaled(scale_intensity(values, *robust_range(values)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((3, 4), 7), r"^a\.nii: expected an image, but all voxels are 7"),
        (np.array([1.0, np.nan, np.inf]), r"^a\.nii: expected finite voxels, but 2 are NaN or infinite"),
        (np.array([1.0, 2.0, -np.inf]), r"^a\.nii: expected finite voxels, but 1 are"),
        (np.zeros((0, 3)), r"^a\.nii: expected voxels, but got the shape \(0, 3\)"),
        (np.r_[np.full(9999, 10.0), -1e6], r"^a\.nii: expected an image, but nearly all voxels are 10"),
    ],
)
def test_errors_name_file_and_fault(values, message):
    with pytest.raises(ValueError, match=message):
        robust_range(values, name="a.nii")


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, np.nan), (-np.inf, 0)])
def test_an_empty_range_is_refused(low, high):
    for function in (scale_intensity, unscale_intensity):
        with pytest.raises(ValueError, match="^intensity: expected low < high"):
            function(np.zeros(3), low, high)
