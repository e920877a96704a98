# SPDX-License-Identifier: Apache-2.0
"""`shared.pair_checks`: two volumes on one grid, and which of them to repair."""

from __future__ import annotations

import csv
import itertools

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from shared.pair_checks import check_not_mirrored, check_same_grid, grid_distance, mirror_scores, orientation_of
from tests.conftest import HANDBOOK

SHAPE = (12, 17, 9)
AFFINE = np.array([[0.9, 0.1, 0, -50], [-0.1, 0.9, 0, -60], [0, 0, 3, -20], [0, 0, 0, 1.0]])
REAL = HANDBOOK / "data" / "brain_controlnet"


def check(shape=SHAPE, affine=AFFINE, **options):
    check_same_grid(
        "b.nii", shape, affine, reference="'t1w'", reference_shape=SHAPE, reference_affine=AFFINE, **options
    )


def moved(matrix):
    return AFFINE @ matrix


def shifted(mm):
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def test_equal_grids_pass_up_to_rounding():
    check()
    check(affine=AFFINE.astype(np.float32))
    check(affine=shifted(0.009))
    check(affine=shifted(0.2), tolerance=0.25)
    check(shape=[*SHAPE, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"affine": moved(np.diag([-1, 1, 1, 1]))}, r"expected the orientation RAS of 't1w', but got LAS; reorient it"),
        ({"affine": AFFINE[:, [1, 0, 2, 3]], "shape": (17, 12, 9)}, "expected the orientation RAS .* but got ARS"),
        ({"shape": (12, 17, 8)}, r"expected the grid of 't1w' \(12, 17, 9\), but got \(12, 17, 8\); resample it"),
        (
            {"affine": moved(np.diag([1, 1, 1.1, 1]))},
            r"expected the voxel size \(0.90\d+, 0.90\d+, 3\) .* \(0.90\d+, 0.90\d+, 3.3\)",
        ),
        (
            {"affine": shifted(0.02)},
            r"expected the origin \(-50, -60, -20\) of 't1w', but got \(-49.98, -60, -20\): .* 0.02 mm apart",
        ),
    ],
)
def test_what_differs_is_named(change, message):
    with pytest.raises(ValueError, match=r"^b\.nii: " + message):
        check(**change)


def test_a_small_rotation_is_seen_at_the_far_corner():
    angle = np.deg2rad(0.2)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    distance = grid_distance(SHAPE, moved(turn), AFFINE)
    # chord of the angle at the farthest voxel of a plane with voxels of sqrt(0.82) mm
    assert distance == pytest.approx(2 * np.sin(angle / 2) * np.hypot(11, 16) * np.sqrt(0.82), rel=1e-6)
    with pytest.raises(ValueError, match=r"expected the directions of the axes .* up to 0\.0\d+ mm apart; register it"):
        check(affine=moved(turn))


def test_orientation():
    assert orientation_of(np.eye(4)) == "RAS"
    assert orientation_of(np.diag([-1, -1, 2, 1])) == "LPS"
    with pytest.raises(ValueError, match="expected a finite, invertible"):
        orientation_of(np.diag([1, 1, 0, 1]))


def heads(seed=0, shape=(44, 56, 30)):
    """A T1w-like texture in an ellipsoid, and the same anatomy with another contrast and noise."""
    rng = np.random.default_rng(seed)
    anatomy = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    anatomy /= anatomy.std()
    grid = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij")
    head = sum(g**2 for g in grid) < 1
    t1w, flair = head * (3 + np.clip(anatomy, -2, 2)), head * (4 - np.abs(anatomy))
    return tuple((v + rng.normal(0, 0.1, shape)).astype(np.float32) for v in (t1w, flair))


@pytest.mark.parametrize("axes", [axes for n in (1, 2, 3) for axes in itertools.combinations(range(3), n)])
def test_mirrored_content_is_named(axes):
    t1w, flair = heads()
    check_not_mirrored("b.nii", flair, reference="a.nii", first=t1w)
    check_not_mirrored("b.nii", -flair, reference="a.nii", first=t1w)
    names = " and ".join(("left-right", "front-back", "up-down")[axis] for axis in axes)
    with pytest.raises(ValueError, match=rf"^b\.nii: .* like that of a\.nii, .* better mirrored {names}: "):
        check_not_mirrored("b.nii", np.flip(flair, axes), reference="a.nii", first=t1w)


def test_a_symmetric_head_is_not_called_mirrored():
    t1w, flair = ((v + v[::-1]) / 2 for v in heads())
    check_not_mirrored("b.nii", flair, reference="a.nii", first=t1w)
    scores = mirror_scores(t1w, flair)
    assert scores["X"] == pytest.approx(scores[""], rel=1e-3)
    assert scores["Y"] < scores[""] / 1.1


def test_scores_do_not_depend_on_units_or_contrast_and_one_slice_works():
    t1w, flair = heads()
    scores = mirror_scores(t1w, flair)
    changed = mirror_scores(1000 * t1w + 7, -3 * flair)
    assert changed == pytest.approx(scores, rel=1e-3)
    assert all(0 <= score <= 1 for score in scores.values())
    single = mirror_scores(t1w[:, :, 15:16], flair[:, :, 15:16], spacing=(1, 1, 5))
    assert single["Z"] == single[""] > single["X"]


@pytest.mark.skipif(not REAL.is_dir(), reason="real pairs are not here")
def test_real_pairs_are_not_flagged_and_mirrored_ones_are():
    with (REAL / "manifest.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if (REAL / row["t1w"]).is_file()]
    assert len(rows) >= 30
    for row in rows[::3]:
        t1w, flair = (nibabel.load(REAL / row[key]) for key in ("t1w", "flair"))
        spacing = [float(step) for step in t1w.header.get_zooms()[:3]]
        first, second = (np.asarray(image.dataobj, np.float32) for image in (t1w, flair))
        check_not_mirrored("f", second, reference="t", first=first, spacing=spacing)
        for axes, name in ((0, "left-right"), (1, "front-back"), (2, "up-down"), ((0, 1), "left-right and front-back")):
            with pytest.raises(ValueError, match=f"better mirrored {name}:"):
                check_not_mirrored("f", np.flip(second, axes), reference="t", first=first, spacing=spacing)
