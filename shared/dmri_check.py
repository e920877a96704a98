# SPDX-License-Identifier: Apache-2.0
"""What is wrong with diffusion data, masks and NODDI maps of a dataset folder, found before a training meets it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from shared.gradients import read_gradients
from shared.nifti_files import verified
from shared.pair_checks import check_same_grid, orientation_of
from shared.resolution import doubled_affine
from shared.transforms.volumes import unreadable

MAPS = ("ndi", "odi", "fwf")
RANGE_TOLERANCE = 1e-3  # beyond [0, 1]: rounding of a fit or of a file


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Read a mask: (X, Y, Z) bool; a map of probabilities is cut at one half, labels and masked images at zero.

    Raises:
        ValueError: unreadable, or not 3-D. The message starts with the path.
    """
    try:
        with verified(path, nibabel.load(path).dataobj) as proxy:  # type: ignore[attr-defined]
            values = np.asarray(proxy, np.float32)
    except Exception as error:  # gzip, zlib and nibabel each raise their own kind
        raise unreadable(path, error, kind="NIfTI file") from error
    if values.ndim < 3 or any(size != 1 for size in values.shape[3:]):
        raise ValueError(f"{path}: expected a 3-D mask, but got the shape {values.shape}; extract one volume (fslroi)")
    values = np.nan_to_num(values.reshape(values.shape[:3]))
    inside: np.ndarray = values > (0.5 if values.max(initial=0) <= 1 else 0)
    return inside


def check_fractions(path: str | os.PathLike, values: np.ndarray, inside: np.ndarray) -> None:
    """Refuse a map that does not hold fractions inside the brain; outside, anything may stand.

    Args:
        path: file of the map, with which the message starts.
        values: (X, Y, Z).
        inside: (X, Y, Z) bool, the brain.

    Raises:
        ValueError: NaN or values beyond [0, 1] by more than 1e-3 inside the brain (the message gives the share of such
            voxels), or one value everywhere.
    """
    brain = values[inside]
    bad = ~np.isfinite(brain)
    if bad.any():
        raise ValueError(
            f"{path}: expected finite fractions inside the brain mask, but {int(bad.sum())} voxels ({bad.mean():.2%}) "
            "are NaN or infinite; fit again, or take the mask of the fit"
        )
    bad = (brain < -RANGE_TOLERANCE) | (brain > 1 + RANGE_TOLERANCE)
    if bad.any():
        raise ValueError(
            f"{path}: expected fractions in [0, 1] inside the brain mask, but {int(bad.sum())} voxels "
            f"({bad.mean():.2%}) are outside ({brain.min():g} to {brain.max():g}); is it another map (kappa, percent)?"
        )
    if brain.size and brain.min() == brain.max():
        raise ValueError(f"{path}: expected a map, but all voxels inside the brain mask are {brain.min():g}; fit again")


def diffusion_problems(item: Mapping[str, Any], folder: Path, *, images: bool = True) -> Iterator[str]:
    """Problems of one item with diffusion data, one line each, starting with the file.

    Found: a gradient table that `shared.gradients.read_gradients` refuses or that has not one entry per volume, and a
    series that is not 4-D; with `images` also maps that are not on exactly the doubled grid, a mask on neither of the
    two grids, an empty mask, and maps that are not fractions. Files that are missing or cannot be opened are left to
    `shared.data_check`, which names them.

    Args:
        item: of the data list, with `dwi`.
        folder: dataset folder.
        images: also read voxels of mask and maps.
    """
    files = {key: folder / str(item[key]) for key in ("dwi", "bval", "bvec", "mask", *MAPS) if item.get(key)}
    files = {key: file for key, file in files.items() if file.is_file()}
    headers = {key: header for key, file in files.items() if (header := _header(file)) is not None}
    if "dwi" not in headers:
        return
    dwi = files["dwi"]
    shape, affine = headers["dwi"]
    if len(shape) != 4:
        yield f"{dwi}: expected a series of volumes (4-D), but got the shape {shape}; merge the volumes (fslmerge -t)"
        return
    missing = [key for key in ("bval", "bvec") if not item.get(key)]
    if missing:
        yield f"{dwi}: expected a gradient table, but its item has no {' and no '.join(missing)}; add the files"
    if {"bval", "bvec"} <= set(files):
        try:
            read_gradients(files["bval"], files["bvec"], num_volumes=shape[3])
        except (ValueError, OSError) as error:
            yield str(error)
    if images:
        yield from _volume_problems(files, headers, (shape[:3], affine))


_Header = tuple[tuple[int, ...], np.ndarray]


def _header(file: Path) -> _Header | None:
    if not file.name.lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        image: Any = nibabel.load(file)
        orientation_of(image.affine)
        return tuple(image.shape), np.asarray(image.affine, float)
    except Exception:  # whatever keeps it from opening is reported where the whole file is read
        return None


def _volume_problems(files: Mapping[str, Path], headers: Mapping[str, _Header], low: _Header) -> Iterator[str]:
    high = (tuple(2 * size for size in low[0]), doubled_affine(low[1]))
    inside: np.ndarray | None = None
    if "mask" in headers:
        on_low = headers["mask"][0][:3] == low[0]
        wanted, name = (low, "'dwi'") if on_low else (high, "twice the resolution of 'dwi'")
        problem = _grid_problem(files["mask"], headers["mask"], wanted, name)
        try:
            brain = read_mask(files["mask"])
        except ValueError as error:
            problem, brain = problem or str(error), np.ones(1, bool)
        if problem is None and not brain.any():
            problem = f"{files['mask']}: expected a brain mask, but it is empty; make it anew (bet, dwi2mask)"
        if problem is not None:
            yield problem
        else:
            inside = brain.repeat(2, 0).repeat(2, 1).repeat(2, 2) if on_low else brain
    for key in MAPS:
        if key not in headers:
            continue
        problem = _grid_problem(files[key], headers[key], high, "twice the resolution of 'dwi'")
        if problem is not None:
            yield problem
            continue
        try:
            values = np.asarray(nibabel.load(files[key]).dataobj, np.float32).reshape(high[0])  # type: ignore[attr-defined]
        except Exception:  # reported where the whole file is read
            continue
        try:
            check_fractions(files[key], values, np.ones(high[0], bool) if inside is None else inside)
        except ValueError as error:
            yield str(error)


def _grid_problem(file: Path, header: _Header, wanted: _Header, name: str) -> str | None:
    if any(size != 1 for size in header[0][3:]):
        return f"{file}: expected a 3-D volume, but got the shape {header[0]}; extract one volume (fslroi)"
    try:
        check_same_grid(file, header[0], header[1], reference=name, reference_shape=wanted[0],
                        reference_affine=wanted[1])  # fmt: skip
    except ValueError as error:
        return str(error)
    return None
