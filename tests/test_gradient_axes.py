# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import nibabel
import numpy as np
import pytest
from scipy.spatial import cKDTree

from shared.gradient_axes import GIVEN, AxesCheck, check_axes, rearranged
from shared.gradients import GradientTable, read_gradients
from shared.resolution import block_average
from tests.conftest import HANDBOOK
from tools.phantoms.dmri2noddi import make_subject
from tools.phantoms.noddi_acquisition import default_table

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
    distance, nearest = cKDTree(along[:, 0]).query(centres)
    inside = distance < 4.5
    return tissue(table, inside, along[:, 1][nearest], noise=noise), inside


def tissue(table: GradientTable, inside: np.ndarray, fibres: np.ndarray, *, noise: float = 0.02) -> np.ndarray:
    """Signal of fibres along directions (X, Y, Z, 3) of any length; isotropic elsewhere."""
    fibres = fibres / np.maximum(np.linalg.norm(fibres, axis=-1, keepdims=True), 1e-9)
    cosine = (fibres @ table.bvecs.T) ** 2
    parallel, across = np.where(inside, 1.6e-3, 0.8e-3)[..., None], np.where(inside, 0.4e-3, 0.8e-3)[..., None]
    signal = np.exp(-table.bvals * (across + (parallel - across) * cosine))
    rng = np.random.default_rng(0)
    return np.hypot(signal + noise * rng.normal(size=signal.shape), noise * rng.normal(size=signal.shape))


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


def places(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels from the middle of a volume along x, y, z."""
    x, y, z = (axis - (size - 1) / 2 for axis, size in zip(np.indices(shape), shape, strict=True))
    return x, y, z


def stacked(*parts: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*parts), -1)


def slabs_across_their_fibres() -> tuple[np.ndarray, np.ndarray]:
    x, y, _ = places((30, 28, 26))
    return (np.abs(np.abs(x) - 7) < 3) & (np.abs(y) < 12), stacked(1.0, 0.0, np.zeros(x.shape))


def three_slabs() -> tuple[np.ndarray, np.ndarray]:
    inside, fibres = np.zeros((30, 29, 31), bool), np.zeros((30, 29, 31, 3))
    for axis, box in enumerate((np.s_[2:7, 1:14, 1:30], np.s_[9:28, 2:7, 1:30], np.s_[9:28, 10:28, 12:17])):
        inside[box] = True
        fibres[(*box, axis)] = 1
    return inside, fibres


def rings() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = places((30, 28, 20))
    radius = np.hypot(x, y)
    return (radius < 12.5) & (radius > 1) & (np.abs(z) < 8), stacked(-y, x, np.zeros(x.shape))


def arc() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = places((32, 34, 18))
    inside = (np.abs(np.hypot(x + 10, y + 10) - 18) < 4) & (np.abs(z) < 5) & (x > -10) & (y > -10)
    return inside, stacked(-(y + 10), x + 10, np.zeros(x.shape))


def helices() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = places((26, 28, 30))
    radius = np.hypot(x, y)
    return (radius < 12) & (radius > 3) & (np.abs(z) < 13), stacked(-y, x, 0.5 * radius)


def fan() -> tuple[np.ndarray, np.ndarray]:
    x, y, z = places((32, 34, 30))
    radius = np.sqrt(x**2 + (y / 1.1) ** 2 + (z / 0.9) ** 2)
    return (np.abs(radius - 11) < 2.5) & (z > -8), stacked(x, y / 1.21, z / 0.81)


@pytest.mark.parametrize("shape", [slabs_across_their_fibres, three_slabs, rings, arc, helices, fan])
def test_right_axes_are_never_called_wrong(shape: Callable[[], tuple[np.ndarray, np.ndarray]]):
    inside, fibres = shape()
    signal = tissue(gradients(), inside, fibres)
    result = check_axes(signal, gradients(), np.ones(inside.shape, bool), affine=np.diag([-2.0, 2, 2, 1]))
    assert result.voxels > 1000
    assert not result.clearly_wrong, result.reason
    assert result.reason.startswith("no clear winner: ")


def test_one_border_across_the_fibres_is_one_witness():
    """Fibres are more coherent along the slab, by far and in every block: the axes may still be right."""
    inside, fibres = slabs_across_their_fibres()
    signal = tissue(gradients(), inside, fibres)
    result = check_axes(signal, gradients(), np.ones(inside.shape, bool), affine=np.diag([-2.0, 2, 2, 1]))
    assert result.best_score > 1.3 * result.given_score
    assert "run along 1." in result.reason


def test_phantoms_stay_undecided_and_a_flip_in_them_is_not_made_worse():
    """Their white matter fills the space below the cortex: no arrangement is coherent beyond the others."""
    table = default_table()
    maps, volumes, affine = make_subject(1, shape=(48, 56, 44), table=table)
    mask = block_average(maps.mask) > 0.5
    for arrangement in (GIVEN, "-x, y, z"):
        result = check_axes(volumes, rearranged(table, arrangement), mask, affine=affine)
        assert not result.clearly_wrong
        assert not result.clearly_right


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
