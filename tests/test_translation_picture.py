# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel
import numpy as np
import pytest

from shared.translation_picture import comparison_panels, on_same_grid


def write(path, values, affine):
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)
    return path


def test_panels_show_the_slice_of_the_condition(tmp_path):
    values = np.random.default_rng(0).random((6, 9, 4)) * np.array([0.1, 0.2, 1.0, 0.3])
    values[0, 0, 0] = 1.0
    flair = write(tmp_path / "f.nii", values, np.eye(4))
    generated = np.arange(values.size, dtype=np.float32).reshape(values.shape) / values.size
    panels = comparison_panels(flair, generated, true=flair)
    assert list(panels) == ["FLAIR", "generated", "true", "difference x 2"]
    assert panels["generated"].shape == (1, 9, 6)
    np.testing.assert_allclose(panels["generated"][0], generated[::-1, ::-1, 2].T, atol=1e-7)
    np.testing.assert_allclose(panels["FLAIR"][0], values[::-1, ::-1, 2].T, atol=1e-6)
    difference = 2 * (panels["generated"] - panels["FLAIR"]).abs()
    np.testing.assert_allclose(panels["difference x 2"], difference, atol=1e-6)


@pytest.mark.parametrize(("spacing", "size"), [((1, 1, 5), (9, 6)), ((1, 2, 1), (18, 6)), ((3, 1, 1), (9, 18))])
def test_pixels_are_square(tmp_path, spacing, size):
    flair = write(tmp_path / "f.nii", np.random.default_rng(0).random((6, 9, 4)), np.diag([*spacing, 1.0]))
    assert comparison_panels(flair, np.zeros((6, 9, 4), np.float32))["FLAIR"].shape[1:] == size


def test_grids_are_compared_by_positions(tmp_path):
    values = np.random.default_rng(0).random((6, 9, 4))
    moved = np.eye(4)
    moved[0, 3] = 2.0
    one, same, other = (
        write(tmp_path / f"{name}.nii", values, affine)
        for name, affine in (("one", np.eye(4)), ("same", np.eye(4) + 1e-5), ("other", moved))
    )
    assert on_same_grid(one, same)
    assert not on_same_grid(one, other)
    assert not on_same_grid(one, write(tmp_path / "short.nii", values[:5], np.eye(4)))
    with pytest.raises(ValueError, match=f"^{other}: expected the origin"):
        comparison_panels(one, values.astype(np.float32), true=other)
