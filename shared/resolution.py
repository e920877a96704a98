# SPDX-License-Identifier: Apache-2.0
"""Half and double resolution: two grids over the same field of view, and values carried from one to the other.

Everywhere, voxels 2 i and 2 i + 1 of the high-resolution grid lie in voxel i of the low-resolution one, so that both
grids cover the same space and the centre of a low-resolution voxel is a corner shared by 2 x 2 x 2 high-resolution
ones. `monai.transforms.Spacing` does not fit: it keeps the centre of the first voxel, not its corner.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import ndimage

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_DOUBLED = np.diag([0.5, 0.5, 0.5, 1.0])
_DOUBLED[:3, 3] = -0.25


def doubled_affine(affine: Any) -> np.ndarray:
    """Affine of the grid with twice the resolution over the same field of view.

    Args:
        affine: (4, 4) voxel indices to world millimetres, array or tensor; any rotation, flip or shear.

    Returns:
        (4, 4) float64: `affine @ [[.5, 0, 0, -.25], [0, .5, 0, -.25], [0, 0, .5, -.25], [0, 0, 0, 1]]`.
    """
    return _as_affine(affine) @ _DOUBLED


def halved_affine(affine: Any) -> np.ndarray:
    """Affine of the grid with half the resolution over the same field of view; the inverse of `doubled_affine`.

    Args:
        affine: (4, 4) voxel indices to world millimetres, array or tensor; its grid has even sizes.

    Returns:
        (4, 4) float64.
    """
    return _as_affine(affine) @ np.linalg.inv(_DOUBLED)


def _as_affine(affine: Any) -> np.ndarray:
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (4, 4):
        raise ValueError(f"affine: expected a matrix of shape (4, 4), but got {matrix.shape}; pass that of one volume")
    return matrix


def block_average(values: Array) -> Array:
    """Mean over blocks of 2 x 2 x 2 voxels: what a larger voxel with a box profile sees.

    Args:
        values: (..., 2X, 2Y, 2Z), array or tensor; integers and booleans are averaged in float32.

    Returns:
        (..., X, Y, Z), of the kind (and device, floating type) of `values`.

    Raises:
        ValueError: fewer than three axes, or an odd or empty size.
    """
    return _like(_average(_as_tensor(values)), values)


def _average(tensor: torch.Tensor) -> torch.Tensor:
    x, y, z = tensor.shape[-3:]
    blocks = tensor.reshape(*tensor.shape[:-3], x // 2, 2, y // 2, 2, z // 2, 2)
    return blocks.mean(dim=(-5, -3, -1))


def kspace_downsample(values: Array) -> Array:
    """Keep the central half of the spatial frequencies of each axis: what a scan with half the k-space lines sees.

    The grid is that of `block_average`: each sample lies between its two high-resolution voxels (a phase of half a
    high-resolution voxel). A field without frequencies beyond the kept ones comes out exactly as its values at those
    points, a constant as itself. As a scan, it takes the field of view as periodic and rings at sharp edges
    (Gibbs): a positive volume may come out slightly negative there, which a scanner's magnitude reconstruction
    folds; take the absolute value to do the same.

    Args:
        values: (..., 2X, 2Y, 2Z), real, array or tensor; integers and booleans are taken as float32.

    Returns:
        (..., X, Y, Z), real, of the kind (and device, floating type) of `values`.

    Raises:
        ValueError: fewer than three axes, or an odd or empty size.
    """
    tensor = _as_tensor(values)
    # Cutting and shifting k-space is one real matrix per axis: cheaper than a complex FFT at these sizes, and real.
    for axis in (-3, -2, -1):
        matrix = torch.from_numpy(_kspace_matrix(tensor.shape[axis])).to(tensor)
        tensor = torch.movedim(torch.movedim(tensor, axis, -1) @ matrix.T, -1, axis)
    return _like(tensor.contiguous(), values)


@lru_cache(maxsize=16)
def _kspace_matrix(size: int) -> np.ndarray:
    """(size / 2, size) float64: Fourier transform, cut to size / 2 frequencies, half-voxel phase, inverse."""
    kept = size // 2
    frequencies = np.arange(-(kept // 2), kept // 2 + 1)
    weights = np.ones(len(frequencies))
    if kept % 2 == 0:  # both ends are the same (Nyquist) frequency of the result; halves keep the result real
        weights[[0, -1]] = 0.5
    distance = 2 * np.arange(kept)[:, None] + 0.5 - np.arange(size)[None, :]
    matrix: np.ndarray = (weights * np.cos(2 * np.pi * frequencies * distance[..., None] / size)).sum(axis=-1) / size
    return matrix


def upsample(values: torch.Tensor, *, mode: str = "trilinear") -> torch.Tensor:
    """Twice as many voxels per axis on the grid of `doubled_affine`; beyond the outer samples the edge is held.

    Args:
        values: (C, X, Y, Z).
        mode: `trilinear`, or `cubic` for the cubic spline through the samples (SciPy, order 3), which may overshoot
            the range of the values at edges.

    Returns:
        (C, 2X, 2Y, 2Z), same device and floating type.

    Raises:
        ValueError: not four axes, an unknown mode.
    """
    if values.ndim != 4:
        raise ValueError(f"values: expected the shape (C, X, Y, Z), but got {tuple(values.shape)}")
    if mode == "trilinear":
        return torch.nn.functional.interpolate(values[None], scale_factor=2, mode="trilinear", align_corners=False)[0]
    if mode == "cubic":
        # torch has cubic interpolation in 2-D only (and by convolution, not by a spline).
        channels = [
            ndimage.zoom(channel, 2, order=3, mode="nearest", grid_mode=True)
            for channel in values.detach().cpu().double().numpy()
        ]
        return torch.from_numpy(np.stack(channels)).to(values)
    raise ValueError(f"mode: expected trilinear or cubic, but got {mode!r}")


def _as_tensor(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    tensor = torch.as_tensor(values)
    if tensor.ndim < 3 or any(size % 2 or size < 2 for size in tensor.shape[-3:]):
        raise ValueError(
            f"values: expected even sizes of at least 2 in the last three axes, but got the shape "
            f"{tuple(tensor.shape)}; crop odd axes by one voxel"
        )
    return tensor if tensor.is_floating_point() else tensor.float()


def _like(tensor: torch.Tensor, values: Array) -> Array:
    return tensor.numpy() if isinstance(values, np.ndarray) else tensor
