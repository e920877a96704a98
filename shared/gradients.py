# SPDX-License-Identifier: Apache-2.0
"""Gradient tables of diffusion MRI: b-values and directions from FSL files, their shells, and what is wrong with them.

dipy's `read_bvals_bvecs` and `gradient_table` do not fit: their errors do not name the file, they take a table whose
b-values are in ms/um2, and they know nothing of the number of volumes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

B0_MAX = 50.0  # s/mm2; volumes up to here count as not diffusion-weighted (scanners write 0, 5, 10, ...)
NORM_TOLERANCE = 0.02  # longer or shorter vectors encode a b-value, or are damaged
_UNIT_RANGE = (50.0, 50_000.0)  # s/mm2; a largest b-value outside is in another unit


@dataclass(frozen=True)
class Shell:
    """Volumes of about the same b-value.

    Attributes:
        b: mean b-value, s/mm2.
        indices: (n,) int64, positions of the volumes in the series, ascending.
    """

    b: float
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class GradientTable:
    """b-values and directions of a series of N volumes; made by `read_gradients`, which checks them.

    The directions are as FSL writes them: relative to the axes of the voxel grid of the file, with x mirrored where the
    determinant of its affine is positive. Quantities that do not depend on the rotation need not care.

    Attributes:
        bvals: (N,) float64, s/mm2.
        bvecs: (N, 3) float64, unit vectors; zero rows where `b0`.
    """

    bvals: np.ndarray
    bvecs: np.ndarray

    @property
    def b0(self) -> np.ndarray:
        """(N,) bool: volumes without diffusion weighting (b of at most 50 s/mm2)."""
        return self.bvals <= B0_MAX

    def shells(self, tolerance: float = 100.0) -> list[Shell]:
        """Diffusion-weighted volumes grouped by b-value, the lowest shell first.

        A shell ends where the next larger b-value is more than `tolerance` away, or lies more than twice that above the
        shell's lowest: 995, 1000 and 1005 are one shell, and the grid of a DSI scheme falls into many small ones
        instead of a single one that spans everything.

        Args:
            tolerance: s/mm2.
        """
        order = np.argsort(self.bvals, kind="stable")
        groups: list[list[int]] = []
        for index in order[~self.b0[order]]:
            b = self.bvals[index]
            if (
                groups
                and b - self.bvals[groups[-1][-1]] <= tolerance
                and b - self.bvals[groups[-1][0]] <= 2 * tolerance
            ):
                groups[-1].append(int(index))
            else:
                groups.append([int(index)])
        return [Shell(float(self.bvals[group].mean()), np.sort(np.asarray(group, np.int64))) for group in groups]


def _read_rows(path: str | os.PathLike, what: str) -> list[list[float]]:
    """Rows of numbers, separated by spaces, tabs or commas; empty lines are skipped."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file of {what}, but it does not exist; correct the path")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        rows = [[float(word) for word in line.split()] for line in lines if line.strip()]
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(
            f"{path}: expected {what} as plain numbers, but got ({error}); export the file anew"
        ) from error
    if not rows:
        raise ValueError(f"{path}: expected {what}, but the file is empty; copy it anew")
    return rows


def _read_bvals(path: str | os.PathLike) -> np.ndarray:
    rows = _read_rows(path, "b-values")
    if len(rows) > 1 and any(len(row) != 1 for row in rows):
        raise ValueError(
            f"{path}: expected b-values in one row or one column, but got {len(rows)} rows of up to "
            f"{max(map(len, rows))}; is this the file of the directions?"
        )
    bvals = np.asarray([value for row in rows for value in row], np.float64)
    if not np.isfinite(bvals).all():
        raise ValueError(
            f"{path}: expected finite b-values, but {int((~np.isfinite(bvals)).sum())} are NaN or infinite; "
            "export the file anew"
        )
    if bvals.min() < 0:
        raise ValueError(f"{path}: expected b-values of at least 0, but got {bvals.min():g}; correct the file")
    low, high = _UNIT_RANGE
    if not low <= bvals.max() <= high:
        remedy = "multiply values in ms/um2 by 1000" if bvals.max() < low else "divide values in s/m2 by 1e6"
        raise ValueError(
            f"{path}: expected b-values in s/mm2, the largest of {low:g} to {high:g}, but the largest is "
            f"{bvals.max():g}; {remedy}, or use a series with diffusion weighting"
        )
    if bvals.min() > B0_MAX:
        raise ValueError(
            f"{path}: expected at least one b0 volume (b of at most {B0_MAX:g} s/mm2), but the smallest b-value is "
            f"{bvals.min():g}; add the b0 image to the series (fslmerge) with b-value 0"
        )
    return bvals


def _read_bvecs(path: str | os.PathLike, count: int) -> np.ndarray:
    rows = _read_rows(path, "gradient directions")
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"{path}: expected rows of equal length, but they have {sorted({len(row) for row in rows})} numbers; "
            "export the file anew"
        )
    bvecs = np.asarray(rows, np.float64)
    if 3 not in bvecs.shape:
        raise ValueError(
            f"{path}: expected 3 rows (FSL) or 3 columns of directions, but got {bvecs.shape[0]} rows of "
            f"{bvecs.shape[1]}; export the file anew"
        )
    if bvecs.shape == (3, count) or (bvecs.shape[0] == 3 and bvecs.shape != (count, 3)):
        return bvecs.T  # a table of 3 volumes is read as FSL writes it
    return bvecs


def read_gradients(
    bval: str | os.PathLike, bvec: str | os.PathLike, *, num_volumes: int | None = None
) -> GradientTable:
    """Read and check an FSL gradient table.

    Args:
        bval: b-values in s/mm2, in one row (FSL) or one column.
        bvec: directions, 3 rows (FSL) or 3 columns; told apart by the count of b-values. At b0 any vector is fine, also
            zeros and NaN (some converters write them): it has no meaning there and becomes zero. Elsewhere lengths that
            are off by up to 2 % are rounding, and are made 1.
        num_volumes: of the series the table belongs to; None does not compare.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not numbers, NaN, negative b-values, another unit, no b0, counts that differ, or vectors that are
            not of unit length. The message starts with the path.
    """
    bvals = _read_bvals(bval)
    if num_volumes is not None and len(bvals) != num_volumes:
        raise ValueError(
            f"{bval}: expected one b-value for each of the {num_volumes} volumes of the series, but got {len(bvals)}; "
            "take the table that was written with the series"
        )
    bvecs = _read_bvecs(bvec, len(bvals))
    if len(bvecs) != len(bvals):
        raise ValueError(
            f"{bvec}: expected one direction for each of the {len(bvals)} b-values in {bval}, but got {len(bvecs)}; "
            "take both files from the same series"
        )
    weighted = bvals > B0_MAX
    bvecs = np.where(weighted[:, None], bvecs, 0.0)
    if not np.isfinite(bvecs).all():
        where = np.flatnonzero(~np.isfinite(bvecs).all(1))
        raise ValueError(
            f"{bvec}: expected finite directions, but {len(where)} are NaN or infinite (the first is volume "
            f"{where[0]}, counted from 0); export the file anew"
        )
    with np.errstate(over="ignore"):  # of numbers that are no directions; infinite is named below
        norms = np.linalg.norm(bvecs, axis=1)
    wrong = np.flatnonzero(weighted & (np.abs(norms - 1) > NORM_TOLERANCE))
    if len(wrong):
        raise ValueError(
            f"{bvec}: expected unit vectors, but {len(wrong)} of {int(weighted.sum())} are not (volume {wrong[0]}, "
            f"counted from 0, has the length {norms[wrong[0]]:.4g}); if the lengths scale the b-value, write b times "
            "length squared into the b-values and normalise the vectors"
        )
    return GradientTable(bvals, bvecs / np.where(weighted, norms, 1.0)[:, None])
