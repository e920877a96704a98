# SPDX-License-Identifier: Apache-2.0
"""`shared.resolution`: both grids cover the same world, and values keep their place on the way between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from shared.resolution import block_average, doubled_affine, halved_affine, kspace_downsample, upsample

HIGH = (12, 20, 14)  # halves are even, even and odd: the Nyquist frequency is treated in both ways
LOW = (6, 10, 7)


def oblique() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag((1.25, 1.1, 2.0))
    affine[:3, 3] = -70, 31, 12.5
    return affine


AFFINES = {
    "RAS": np.array([[1.25, 0, 0, -90], [0, 1.25, 0, -126], [0, 0, 1.25, -72], [0, 0, 0, 1.0]]),
    "LPS": np.array([[-2.0, 0, 0, 90], [0, -2.0, 0, 126], [0, 0, 3.0, -72], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 1.5, 5], [-2.0, 0, 0, 1], [0, 1.0, 0, 2], [0, 0, 0, 1]]),
    "oblique": oblique(),
    "oblique, mirrored": oblique() @ np.diag((-1.0, 1, 1, 1)),
}


def places(shape, affine) -> np.ndarray:
    """(3, X, Y, Z) world coordinates of the voxel centres."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    return np.tensordot(affine[:3, :3], voxels, 1) + affine[:3, 3, None, None, None]


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_affines_are_inverse_and_as_agreed(affine):
    step = np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 0.5, -0.25], [0, 0, 0, 1]])
    np.testing.assert_allclose(doubled_affine(affine), affine @ step, rtol=1e-12)
    np.testing.assert_allclose(halved_affine(doubled_affine(affine)), affine, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(doubled_affine(torch.from_numpy(affine)), doubled_affine(affine))


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_both_grids_have_the_same_field_of_view(affine):
    """Outer corners, half a voxel beyond the first and last centres, are the same points of the world."""
    for corner in ((0, 0, 0), (1, 0, 1), (1, 1, 1)):
        low = [c * n - 0.5 for c, n in zip(corner, LOW, strict=True)]
        high = [c * n - 0.5 for c, n in zip(corner, HIGH, strict=True)]
        np.testing.assert_allclose(affine @ [*low, 1], doubled_affine(affine) @ [*high, 1], atol=1e-9)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_world_coordinates_stay_under_block_averaging_and_upsampling(affine):
    """Landmarks: fields that hold each voxel's own world position."""
    np.testing.assert_allclose(block_average(places(HIGH, affine)), places(LOW, halved_affine(affine)), atol=1e-9)
    low = torch.from_numpy(places((24, 26, 28), affine))
    high = places((48, 52, 56), doubled_affine(affine))
    linear, cubic = (upsample(low, mode=mode).numpy() for mode in ("trilinear", "cubic"))
    np.testing.assert_allclose(linear[:, 1:-1, 1:-1, 1:-1], high[:, 1:-1, 1:-1, 1:-1], atol=1e-9)
    # what a held edge does to a spline decays by 0.27 per low-resolution voxel
    inside = (slice(None), *[slice(20, -20)] * 3)
    np.testing.assert_allclose(cubic[inside], high[inside], atol=1e-4)
    assert np.abs(cubic - high)[:, :2].max() > 1e-2


def wave(shape, frequencies, phase, offset, scale=1.0):
    """Cosine over a periodic field of view, sampled at `scale * index + offset` high-resolution voxels."""
    total = phase
    for axis, (size, k) in enumerate(zip(shape, frequencies, strict=True)):
        position = (scale * np.arange(size) + offset) / (scale * size)
        total = total + np.expand_dims(2 * np.pi * k * position, tuple(a for a in range(3) if a != axis))
    return np.cos(total)


@pytest.mark.parametrize("frequencies", [(1, 0, 0), (2, 4, 3), (0, -4, 1)])
def test_band_limited_fields_keep_their_place(frequencies):
    high = wave(HIGH, frequencies, 0.7, 0.0)
    between = wave(LOW, frequencies, 0.7, 0.5, scale=2.0)  # at 2 j + 1/2, the centres on the halved grid
    np.testing.assert_allclose(kspace_downsample(high), between, atol=1e-12)
    # the mean of two neighbours only damps a wave: both methods show the same field at the same place
    damping = np.prod([np.cos(np.pi * k / n) for k, n in zip(frequencies, HIGH, strict=True)])
    np.testing.assert_allclose(block_average(high), damping * between, atol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_frequencies_beyond_the_kept_ones_vanish(axis):
    frequencies = [0, 0, 0]
    frequencies[axis] = HIGH[axis] // 2 - 1
    assert np.abs(kspace_downsample(wave(HIGH, frequencies, 0.3, 0.0))).max() < 1e-12


def test_kspace_equals_cutting_the_fourier_transform():
    high = np.random.default_rng(0).normal(size=HIGH)
    spectrum = np.fft.fftn(high)
    for axis, (n, m) in enumerate(zip(HIGH, LOW, strict=True)):
        k = np.fft.fftfreq(n, 1 / n)
        shift = np.expand_dims(np.exp(1j * np.pi * k / n), tuple(a for a in range(3) if a != axis))
        spectrum = np.moveaxis(spectrum * shift, axis, 0)
        kept = spectrum[(np.arange(-(m // 2), m - m // 2)) % n]
        if m % 2 == 0:  # the Nyquist frequency is the mean of both ends
            kept[0] = (kept[0] + spectrum[m // 2]) / 2
        spectrum = np.moveaxis(np.fft.ifftshift(kept, axes=0), 0, axis)
    expected = np.fft.ifftn(spectrum) / 8
    assert np.abs(expected.imag).max() < 1e-12
    np.testing.assert_allclose(kspace_downsample(high), expected.real, atol=1e-12)


@pytest.mark.parametrize("reduce", [block_average, kspace_downsample])
def test_constants_kinds_types_and_leading_axes(reduce):
    constant = torch.full((2, 5, *HIGH), 3.5)
    torch.testing.assert_close(reduce(constant), torch.full((2, 5, *LOW), 3.5))
    values = np.random.default_rng(1).random((3, *HIGH))
    low = reduce(values)
    assert isinstance(low, np.ndarray)
    assert (low.dtype, low.shape) == (np.float64, (3, *LOW))
    assert isinstance(reduce(torch.from_numpy(values)), torch.Tensor)
    np.testing.assert_allclose(reduce(torch.from_numpy(values)).numpy(), low)
    np.testing.assert_allclose(reduce(values[1]), low[1], atol=1e-12)
    assert np.isclose(low.mean(), values.mean())
    levels = reduce(np.arange(np.prod(HIGH), dtype=np.int16).reshape(HIGH))
    assert levels.dtype == np.float32
    assert np.isclose(levels.mean(), (np.prod(HIGH) - 1) / 2)


def test_block_average_is_the_mean_of_eight():
    high = torch.rand(1, 1, *HIGH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block_average(high), torch.nn.functional.avg_pool3d(high, 2))


@pytest.mark.parametrize("mode", ["trilinear", "cubic"])
def test_upsampling_holds_constants_and_edges(mode):
    torch.testing.assert_close(upsample(torch.full((2, *LOW), 0.25), mode=mode), torch.full((2, *HIGH), 0.25))
    ramp = torch.arange(LOW[0], dtype=torch.float32)[None, :, None, None].expand(1, *LOW).contiguous()
    high = upsample(ramp, mode=mode)
    assert (high.shape, high.dtype) == ((1, *HIGH), torch.float32)
    assert torch.allclose(high, high[:, :, :1, :1], atol=1e-5)
    if mode == "trilinear":
        assert high[0, [0, 1, -1], 0, 0].tolist() == [0.0, 0.25, 5.0]


def test_cubic_is_closer_to_a_smooth_field_than_trilinear():
    field = wave((48, 40, 44), (3, 2, 2), 0.4, 0.0)
    low = torch.from_numpy(kspace_downsample(field))[None]
    errors = [float((upsample(low, mode=mode)[0].numpy() - field)[8:-8, 8:-8, 8:-8].std())
              for mode in ("trilinear", "cubic")]  # fmt: skip
    assert errors[1] < errors[0] / 10


def test_wrong_arguments_are_named():
    for reduce in (block_average, kspace_downsample):
        with pytest.raises(ValueError, match=r"^values: expected even sizes .* \(4, 5, 6\); crop odd axes"):
            reduce(np.zeros((4, 5, 6)))
        with pytest.raises(ValueError, match=r"^values: expected even sizes of at least 2.*\(4, 0, 6\)"):
            reduce(torch.zeros(4, 0, 6))
        with pytest.raises(ValueError, match=r"^values: .*\(4, 6\)"):
            reduce(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"^values: expected the shape \(C, X, Y, Z\), but got \(4, 6, 8\)"):
        upsample(torch.zeros(4, 6, 8))
    with pytest.raises(ValueError, match="^mode: expected trilinear or cubic, but got 'nearest'"):
        upsample(torch.zeros(1, 4, 6, 8), mode="nearest")
    with pytest.raises(ValueError, match=r"^affine: expected a matrix of shape \(4, 4\), but got \(3, 3\)"):
        doubled_affine(np.eye(3))
