# SPDX-License-Identifier: Apache-2.0
"""Diffusion series, masks and maps on the way to a dataset folder: read and checked volume by volume, written small."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from shared.dmri_check import check_fractions, read_mask
from shared.files import atomic_path
from shared.gradients import GradientTable
from shared.nifti_files import space_of, verified
from shared.pair_checks import check_same_grid
from tools.prepare.dmri_subjects import UnfitSubjectError

_QUANTISATION = 1e-3  # rms error of 16 bits, relative to the mean signal of the weakest volume


@dataclass(frozen=True)
class Grid:
    """A voxel grid; `shape` is that of 3-D volumes, `code` the NIfTI code of the world (0: no position known)."""

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray
    code: int

    def even(self) -> Grid:
        """Without the last voxel of odd axes: the first voxel and with it the affine stay."""
        return replace(self, shape=tuple(size // 2 * 2 for size in self.shape))


def open_volume(path: Path) -> tuple[Any, Grid, tuple[int, ...]]:
    """nibabel image (no voxel read yet), its 3-D grid, and its whole shape.

    Raises:
        UnfitSubjectError: no NIfTI file, or an affine that is not finite and invertible.
    """
    try:
        # Kept open, a packed file is unpacked once from front to end, and not anew for each volume.
        image: Any = nibabel.load(path, keep_file_open=True)
        affine = np.asarray(image.affine, float)
    except Exception as error:  # gzip, zlib and nibabel each raise their own kind
        raise UnfitSubjectError(
            "unreadable", f"{path}: expected a NIfTI file, but got ({type(error).__name__}: {error}); copy it anew"
        ) from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnfitSubjectError("unreadable", f"{path}: expected a finite, invertible affine, but got "
                                f"{affine.tolist()}; export it anew")  # fmt: skip
    return image, Grid(path, tuple(image.shape[:3]), affine, space_of(image)), tuple(image.shape)


def check_grid(grid: Grid, wanted: Grid, *, reference: str) -> None:
    """Refuse (UnfitSubjectError) a file that is not on the wanted grid, which the message calls `reference`."""
    try:
        check_same_grid(grid.path, grid.shape, grid.affine, reference=reference, reference_shape=wanted.shape,
                        reference_affine=wanted.affine)  # fmt: skip
    except ValueError as error:
        raise UnfitSubjectError("grids differ", str(error)) from error


@contextlib.contextmanager
def _to_its_end(path: Path, image: Any) -> Iterator[Any]:
    """What to read volumes from, one after the other; a compressed file is unpacked once, and its checksum compared."""
    try:
        with verified(path, image.dataobj) as proxy:
            yield proxy
    except UnfitSubjectError:
        raise
    except Exception as error:
        raise UnfitSubjectError(
            "unreadable",
            f"{path}: expected a whole NIfTI file, but got ({type(error).__name__}: {error}); copy it anew",
        ) from error


def _read_volume(image: Any, path: Path) -> np.ndarray:
    with _to_its_end(path, image) as proxy:
        return np.asarray(proxy, np.float32)


def crop(values: np.ndarray, grid: Grid) -> np.ndarray:
    """The first voxels of a volume (X, Y, Z) or (X, Y, Z, 1), as many as `grid` has: (2X, 2Y, 2Z)."""
    return values.reshape(values.shape[:3])[tuple(slice(size) for size in grid.shape)]


def read_mask_on(path: Path, high: Grid, low: Grid | None) -> np.ndarray:
    """Brain mask on the even part of a high-resolution grid.

    Args:
        path: file.
        high: the high-resolution grid, sizes may be odd.
        low: the grid of a measured low-resolution series, on which the mask may lie too (then its voxels are
            repeated); None: there is none.

    Returns:
        (2X, 2Y, 2Z) bool.

    Raises:
        UnfitSubjectError: on another grid, unreadable, or empty.
    """
    _, grid, _ = open_volume(path)
    wanted = low if low is not None and grid.shape == low.shape else high
    check_grid(grid, wanted, reference=str(wanted.path))
    try:
        inside = read_mask(path)
    except ValueError as error:
        raise UnfitSubjectError("mask", str(error)) from error
    if wanted is low:
        inside = inside.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    inside = crop(inside, high.even())
    if not inside.any():
        raise UnfitSubjectError("mask", f"{path}: expected a brain mask, but it is empty; make it anew (bet, "
                                "dwi2mask)")  # fmt: skip
    return inside


def read_map(path: Path, high: Grid, inside: np.ndarray) -> np.ndarray:
    """One NODDI map on the even part of the high-resolution grid.

    Args:
        path: file.
        high: the high-resolution grid, sizes may be odd.
        inside: (2X, 2Y, 2Z) bool, the brain mask.

    Returns:
        (2X, 2Y, 2Z) float32 in [0, 1], clipped by 1e-3 at most; zero outside the mask, whatever the file has there.

    Raises:
        UnfitSubjectError: on another grid, unreadable, or no fractions inside the mask.
    """
    image, grid, shape = open_volume(path)
    if any(size != 1 for size in shape[3:]):
        raise UnfitSubjectError("map", f"{path}: expected a 3-D map, but got the shape {shape}; extract one volume")
    check_grid(grid, high, reference=str(high.path))
    values = crop(_read_volume(image, path), high.even())
    try:
        check_fractions(path, values, inside)
    except ValueError as error:
        raise UnfitSubjectError("map out of range", str(error)) from error
    return np.where(inside, np.clip(values, 0, 1), 0).astype(np.float32)


def read_signal(image: Any, path: Path, count: int, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(X, Y, Z, N) float32, read and reduced one volume at a time: a whole series may not fit into memory.

    Args:
        image: from `open_volume`.
        path: its file, for messages.
        count: of the volumes, at least 1.
        reduce: what is done to each volume.

    Raises:
        UnfitSubjectError: unreadable, NaN, or a volume of zeros only.
    """
    signal: np.ndarray | None = None
    with _to_its_end(path, image) as proxy:
        for index in range(count):
            try:
                volume = np.asarray(proxy[..., index], np.float32)
            except Exception as error:
                raise UnfitSubjectError(
                    "unreadable",
                    f"{path}: expected {count} whole volumes, but volume {index} gives ({type(error).__name__}: "
                    f"{error}); copy it anew",
                ) from error
            if not np.isfinite(volume).all():
                raise UnfitSubjectError(
                    "signal",
                    f"{path}: expected a finite signal, but volume {index} (counted from 0) has "
                    f"{int((~np.isfinite(volume)).sum())} NaN or infinite voxels; repair the preprocessing",
                )
            if not volume.any():
                raise UnfitSubjectError(
                    "signal",
                    f"{path}: expected a signal in each volume, but volume {index} (counted from 0) is zero "
                    "everywhere; copy it anew",
                )
            reduced = reduce(volume)
            if signal is None:
                signal = np.empty((*reduced.shape, count), np.float32, order="F")
            signal[..., index] = reduced
    assert signal is not None
    return signal


def encode(signal: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, float]:
    """16-bit levels and their slope, or float32 and 1 where 16 bits would be too coarse for the weakest volume.

    The rms error of rounding is step / sqrt(12). A thousandth of the mean signal is far below the noise of any scan
    (a signal-to-noise ratio of 1000 in the weakest volume).
    """
    weakest = min(float(signal[..., index][inside].mean()) for index in range(signal.shape[3]))
    step = float(np.float32(signal.max() / 65535))
    if not step / np.sqrt(12) <= _QUANTISATION * weakest:
        return signal, 1.0
    levels = np.empty(signal.shape, np.uint16, order="F")
    for index in range(signal.shape[3]):
        levels[..., index] = np.clip(np.rint(signal[..., index] / step), 0, 65535)
    return levels, step


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_table(folder: Path, table: GradientTable) -> None:
    """Write `dwi.bval` and `dwi.bvec` as FSL has them: one row, and three rows; directions have unit length."""
    _write_text(folder / "dwi.bval", " ".join(f"{b:.10g}" for b in table.bvals) + "\n")
    rows = [" ".join(f"{value:.8f}" for value in row) for row in table.bvecs.T + 0.0]
    _write_text(folder / "dwi.bvec", "\n".join(rows) + "\n")
