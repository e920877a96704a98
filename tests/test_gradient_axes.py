# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel
import numpy as np
import pytest

from shared.gradient_axes import GIVEN, AxesCheck, check_axes, rearranged
from shared.gradients import GradientTable, read_gradients
from tests.conftest import HANDBOOK

DATA = HANDBOOK / "data" / "dmri2noddi"
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="real diffusion data is not here")
SHAPE = (26, 24, 22)
VOXEL = np.array([2.0, 2.2, 2.4])
NEGATIVE = np.diag([-2.0, 2.2, 2.4, 1])  # FSL's directions are along the voxel axes
POSITIVE = np.diag([2.0, 2.2, 2.4, 1])  # x of FSL's directions is mirrored


def gradients() -> GradientTable:
    index = np.arange(30) + 0.5
    z, phi = 1 - index / 30, np.pi * (1 + 5**0.5) * index
    vectors = np.stack([np.cos(phi) * np.sqrt(1 - z**2), np.sin(phi) * np.sqrt(1 - z**2), z], 1)
    return GradientTable(np.r_[0, 0, np.full(30, 1000.0)], np.r_[np.zeros((2, 3)), vectors])


def curves() -> np.ndarray:
    """(count, 2, 3): points in mm of bundles that bend in space, and their directions."""
    t = np.linspace(0, 1, 300)[:, None]
    size = VOXEL * SHAPE
    points = []
    for start, bend, end in (
        ([0.1, 0.1, 0.2], [0.9, 0.1, 0.3], [0.8, 0.9, 0.4]),
        ([0.15, 0.5, 0.9], [0.3, 0.4, 0.1], [0.9, 0.6, 0.15]),
        ([0.1, 0.9, 0.5], [0.5, 0.5, 0.9], [0.9, 0.8, 0.85]),
        ([0.2, 0.2, 0.8], [0.6, 0.05, 0.9], [0.8, 0.3, 0.5]),
    ):
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end  # quadratic Bezier
        curve = curve * size
        points.append(np.stack([curve, np.gradient(curve, axis=0)], 1))
    return np.concatenate(points)


def bundles(table: GradientTable, *, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Signal of tubes around the curves; the table is along the voxel axes."""
    centres = (np.stack(np.indices(SHAPE), -1) + 0.5) * VOXEL
    along = curves()
    distance = np.linalg.norm(centres[..., None, :] - along[::4, 0], axis=-1)
    nearest = distance.argmin(-1)
    inside = distance.min(-1) < 4.5
    fibres = along[::4, 1][nearest]
    fibres /= np.linalg.norm(fibres, axis=-1, keepdims=True)
    cosine = (fibres @ table.bvecs.T) ** 2
    parallel, across = np.where(inside, 1.6e-3, 0.8e-3)[..., None], np.where(inside, 0.4e-3, 0.8e-3)[..., None]
    signal = np.exp(-table.bvals * (across + (parallel - across) * cosine))
    rng = np.random.default_rng(0)
    return np.hypot(signal + noise * rng.normal(size=signal.shape), noise * rng.normal(size=signal.shape)), inside


MASK = np.ones(SHAPE, bool)


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    return bundles(gradients())[0]


def same_lines(first: GradientTable, second: GradientTable) -> bool:
    """Equal but for one sign for all."""
    return any(np.allclose(first.bvecs, sign * second.bvecs) for sign in (1, -1))


def test_right_axes_are_confirmed(signal: np.ndarray):
    result = check_axes(signal, gradients(), MASK, affine=NEGATIVE)
    assert (result.best, result.clearly_right, result.clearly_wrong, result.reason) == (GIVEN, True, False, "")
    assert len(result.scores) == 24
    assert result.voxels > 1000


def test_fsl_mirrors_x_where_the_determinant_is_positive(signal: np.ndarray):
    mirrored = rearranged(gradients(), "-x, y, z")
    assert check_axes(signal, mirrored, MASK, affine=POSITIVE).clearly_right
    wrong = check_axes(signal, gradients(), MASK, affine=POSITIVE)
    assert (wrong.best, wrong.clearly_wrong) == ("-x, y, z", True)


@pytest.mark.parametrize("planted", ["-x, y, z", "x, -y, z", "x, y, -z", "y, x, z", "z, -x, y", "-y, z, x"])
def test_planted_arrangement_is_found_and_corrected(signal: np.ndarray, planted: str):
    result = check_axes(signal, rearranged(gradients(), planted), MASK, affine=NEGATIVE)
    assert result.clearly_wrong
    assert not result.clearly_right
    assert result.best_score > 1.2 * result.given_score
    assert same_lines(result.corrected(rearranged(gradients(), planted)), gradients())


def test_scores_follow_the_arrangement(signal: np.ndarray):
    given = check_axes(signal, gradients(), MASK, affine=NEGATIVE)
    planted = check_axes(signal, rearranged(gradients(), "z, x, -y"), MASK, affine=NEGATIVE)
    np.testing.assert_allclose(sorted(planted.scores.values()), sorted(given.scores.values()), rtol=1e-6)


def test_a_straight_bundle_cannot_tell():
    table = gradients()
    inside = np.zeros(SHAPE, bool)
    inside[4:20, 4:20, 3:19] = True
    fibre = np.ones(3) / np.sqrt(3)
    cosine = np.where(inside[..., None], (table.bvecs @ fibre) ** 2, 1 / 3)
    signal = np.exp(-table.bvals * (0.3e-3 + 1.4e-3 * cosine))
    result = check_axes(signal, table, MASK, affine=np.diag([-2.0, 2, 2, 1]))
    assert not result.clearly_right
    assert not result.clearly_wrong
    assert result.reason.startswith("no clear winner: ")
    # two voxels along the diagonal are 2 / sqrt(3) per axis; what steps out of the block of 16 finds nothing
    assert result.given_score == pytest.approx((1 - 2 / np.sqrt(3) / 16) ** 3, abs=0.01)


def test_noise_and_few_voxels_decide_nothing(signal: np.ndarray):
    table = gradients()
    noise = np.random.default_rng(1).uniform(0.3, 0.7, (12, 13, 14, 32))
    result = check_axes(noise, table, np.ones((12, 13, 14), bool), affine=NEGATIVE)
    assert not result.clearly_wrong
    assert result.reason
    few = np.zeros(SHAPE, bool)
    few[10:13, 10:14, 9:12] = True
    result = check_axes(signal, table, few, affine=NEGATIVE)
    assert isinstance(result, AxesCheck)
    assert result.reason.startswith("too few voxels with fibres: ")
    assert not result.clearly_wrong


def test_a_table_without_tensor_is_named():
    table = GradientTable(np.r_[0, np.full(3, 1000.0)], np.r_[np.zeros((1, 3)), np.eye(3)])
    with pytest.raises(ValueError, match="gradient table: too few directions"):
        check_axes(np.ones((4, 5, 6, 4)), table, np.ones((4, 5, 6), bool), affine=NEGATIVE)


@NEEDS_DATA
@pytest.mark.parametrize("name", ["mrtrix_msmt", "small_64D"])
def test_real_crops_are_accepted_as_given(name: str):
    image = nibabel.load(DATA / name / "dwi.nii.gz")
    mask = nibabel.load(DATA / name / "mask.nii.gz").get_fdata() > 0
    table = read_gradients(DATA / name / "dwi.bval", DATA / name / "dwi.bvec")
    result = check_axes(image.get_fdata(dtype=np.float32), table, mask, affine=image.affine)
    assert not result.clearly_wrong
    assert result.best == GIVEN


@NEEDS_DATA
def test_flipped_real_crop_is_doubted():
    folder = DATA / "mrtrix_msmt"
    image = nibabel.load(folder / "dwi.nii.gz")
    mask = nibabel.load(folder / "mask.nii.gz").get_fdata() > 0
    table = read_gradients(folder / "dwi.bval", folder / "dwi.bvec")
    flipped = rearranged(table, "x, -y, z")
    result = check_axes(image.get_fdata(dtype=np.float32), flipped, mask, affine=image.affine)
    assert same_lines(result.corrected(flipped), table)
    assert not result.clearly_right
