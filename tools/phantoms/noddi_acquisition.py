# SPDX-License-Identifier: Apache-2.0
"""What the scanner makes of the true maps: gradient table, signal of all volumes, coarser voxels, Rician noise."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from dipy.core.sphere import HemiSphere, disperse_charges

from shared.gradients import GradientTable, read_gradients
from shared.resolution import block_average
from tools.phantoms.brain_signal import add_rician_noise
from tools.phantoms.noddi_anatomy import NoddiMaps
from tools.phantoms.noddi_signal import noddi_signal

__all__ = ["acquire", "along_voxel_axes", "default_table", "read_table"]

NUM_B0 = 4
SHELLS = {1000: 20, 2000: 40}  # b in s/mm2: directions
MIN_SHARE = 0.02  # of a second bundle that is worth its signal
SLAB = 8  # high-resolution planes at a time; even


@lru_cache(maxsize=1)
def default_table() -> GradientTable:
    """4 x b 0, 20 x b 1000, 40 x b 2000: repelled charges on a half sphere per shell, b 0 spread over the scan."""
    rng = np.random.default_rng(0)
    bvals, bvecs = [], []
    for b, count in SHELLS.items():
        start = rng.normal(size=(count, 3))
        sphere, _ = disperse_charges(HemiSphere(xyz=start / np.linalg.norm(start, axis=1, keepdims=True)), 2000)
        # the sign of a gradient is free: whole-sphere tables disturb eddy-current correction less
        bvecs.append(sphere.vertices * rng.choice([-1.0, 1.0], size=(count, 1)))
        bvals.append(np.full(count, float(b)))
    order = rng.permutation(sum(SHELLS.values()))
    weighted, vectors = np.concatenate(bvals)[order], np.concatenate(bvecs)[order]
    places = np.linspace(0, len(order), NUM_B0, endpoint=False).astype(int)
    # rounded to the digits of the file, so that the signal is that of the file
    return GradientTable(np.insert(weighted, places, 0.0), np.round(np.insert(vectors, places, 0.0, axis=0), 6))


def read_table(stem: str | os.PathLike) -> GradientTable:
    """The table of `<stem>.bval` and `<stem>.bvec` in FSL layout; b up to 50 counts as 0.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: numbers that do not fit; `shared.gradients` says which.
    """
    table = read_gradients(Path(f"{stem}.bval"), Path(f"{stem}.bvec"))
    return GradientTable(np.where(table.b0, 0.0, table.bvals), table.bvecs)


def along_voxel_axes(table: GradientTable, affine: np.ndarray) -> np.ndarray:
    """Unit vectors (N, 3) along the voxel axes of an image: FSL negates the first where the determinant is positive."""
    return table.bvecs * [-1, 1, 1] if np.linalg.det(affine[:3, :3]) > 0 else table.bvecs


def acquire(
    maps: NoddiMaps, table: GradientTable, affine: np.ndarray, rng: np.random.Generator, *, snr: float | None
) -> np.ndarray:
    """Low-resolution volumes: each voxel is the mean of the signals of its eight high-resolution voxels.

    Args:
        maps: truth on the high-resolution grid.
        table: b-values and vectors.
        affine: (4, 4) of either grid, for the sign convention of the vectors.
        rng: draws the noise.
        snr: signal of white matter at b = 0 over the deviation of the noise at low resolution; None adds no noise.

    Returns:
        (X, Y, Z, N) float32, 1 in white matter at b = 0.
    """
    vectors = along_voxel_axes(table, affine)
    slabs = [
        block_average(np.moveaxis(_signal(maps, slice(start, start + SLAB), table.bvals, vectors), -1, 0))
        for start in range(0, maps.b0.shape[0], SLAB)
    ]
    coarse = np.moveaxis(np.concatenate(slabs, axis=1), 0, -1)
    return coarse if snr is None else add_rician_noise(coarse, 1.0 / snr, rng)


def _signal(maps: NoddiMaps, planes: slice, bvals: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Signal of some high-resolution planes (x, Y, Z, N)."""
    b0 = maps.b0[planes]
    signal = np.zeros((*b0.shape, len(bvals)), dtype=np.float32)
    seen = b0 > 0
    share = maps.share[planes][seen]
    density, odi, water = (array[planes][seen] for array in (maps.density, maps.bundle_odi, maps.water))
    first, second = (array[:, planes][:, seen].T for array in (maps.first, maps.second))
    values = noddi_signal(density, odi, water, first, bvals, vectors)
    cross = share > MIN_SHARE
    other = noddi_signal(density[cross], odi[cross], water[cross], second[cross], bvals, vectors)
    values[cross] += share[cross, None] * (other - values[cross])
    signal[seen] = values * b0[seen][:, None]
    return signal
