# SPDX-License-Identifier: Apache-2.0
"""Files of a diffusion-weighted series: the 4-D volume, its gradient table, and where the brain is if nobody says."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage

from shared.gradient_files import gradients_beside
from shared.gradients import GradientTable, read_gradients
from shared.nifti_files import verified
from shared.transforms.volumes import VOLUME_SUFFIXES, VolumeFile, grey_file, open_header, unreadable

_FOREGROUND = 0.1  # of the 99th percentile of b0: below tissue (about 0.3 of CSF), above the noise of air


@dataclass(frozen=True)
class Series:
    """Header of a diffusion-weighted series: `file` describes one of its volumes, `num_volumes` their number."""

    file: VolumeFile
    num_volumes: int

    @property
    def axes(self) -> np.ndarray:
        return io_orientation(self.file.affine)

    @property
    def ras_affine(self) -> np.ndarray:
        return ras_affine_of(self.file)

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        return ras_shape_of(self.file)

    def read(self) -> np.ndarray:
        """(X, Y, Z, N) float32 in RAS order: a view on the voxels as they lie in the file, never a second copy."""
        proxy = self.file.proxy
        try:
            # too large for float32: infinite, found where features look at it
            with np.errstate(over="ignore"), verified(self.file.path, proxy) as checked:
                # nibabel would scale in float64: twice the memory, 0.9 GB for a series of HCP size
                scaled = (proxy.slope, proxy.inter) != (1, 0)
                values = (np.array if scaled else np.asarray)(checked.get_unscaled(), dtype=np.float32)
                if scaled:
                    values *= np.float32(proxy.slope)
                    values += np.float32(proxy.inter)
        except Exception as error:  # gzip, zlib, struct, nibabel and numpy each raise their own kind
            raise unreadable(self.file.path, error) from error
        return apply_orientation(values, self.axes)


def ras_affine_of(file: VolumeFile) -> np.ndarray:
    return file.affine @ inv_ornt_aff(io_orientation(file.affine), file.shape)


def ras_shape_of(file: VolumeFile) -> tuple[int, int, int]:
    shape = [0, 0, 0]
    for size, axis in zip(file.shape, io_orientation(file.affine)[:, 0], strict=True):
        shape[int(axis)] = size
    return shape[0], shape[1], shape[2]


def open_series(path: str) -> Series:
    """Read and check the header of a 4-D file; of voxels nothing is read. `open_volume` takes single volumes only."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a 4-D series, but it does not exist; correct the path")
    if not path.lower().endswith(VOLUME_SUFFIXES):
        raise ValueError(f"{path}: expected a file .nii or .nii.gz; convert it (dcm2niix for DICOM)")
    image, shape = open_header(path)
    if len(shape) != 4 or 0 in shape or shape[3] < 2:
        raise ValueError(
            f"{path}: expected a 4-D diffusion-weighted series (X, Y, Z, volumes), but got the shape {shape}; merge "
            "the volumes into one file (fslmerge -t, mrcat)"
        )
    return Series(grey_file(path, image, shape[:3]), shape[3])


def path_of(item: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> str | None:
    """The path under the first of the keys that the item has; None where it has none of them."""
    for key in keys:
        if (value := item.get(key)) is None:
            continue
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{key}: expected the path of a file, but got {type(value).__name__}; correct the item")
        return os.fspath(value)
    return None


def series_of(item: Mapping[Hashable, Any]) -> Series | None:
    """The series under `dwi`, or under `image` unless features or another tensor took its place; None if neither."""
    if item.get("dwi") is None and isinstance(item.get("image"), torch.Tensor):
        return None
    path = path_of(item, ("dwi", "image"))
    return None if path is None else open_series(path)


def gradient_files_of(item: Mapping[Hashable, Any], dwi: str) -> tuple[str, str]:
    """The files of b-values and of directions that an item names, else those beside its series `dwi`."""
    files = {key: path for key in ("bval", "bvec") if (path := path_of(item, (key,)))}
    if len(files) < 2:
        files = gradients_beside(dwi) | files
    return files["bval"], files["bvec"]


def table_of(item: Mapping[Hashable, Any], series: Series) -> GradientTable:
    """The table of an item's series."""
    return read_gradients(*gradient_files_of(item, series.file.path), num_volumes=series.num_volumes)


def voxels_in_ras(file: VolumeFile) -> np.ndarray:
    """Voxels of a map or mask (X, Y, Z) float32 in RAS order."""
    return np.ascontiguousarray(apply_orientation(file.read(mask=True), io_orientation(file.affine)))


def foreground_of(b0: np.ndarray, *, name: str) -> np.ndarray:
    """Brain, or head, of the mean b0: the largest connected part above a tenth of its 99th percentile, holes filled.

    A makeshift where no mask is given; it keeps skull and eyes if the series shows them. Otsu's threshold
    (`dipy.segment.mask.median_otsu`) does not fit: in a crop without air it parts fluid from tissue.

    Args:
        b0: (X, Y, Z), in any unit; NaN counts as air.
        name: what an error message starts with.

    Returns:
        (X, Y, Z) bool.

    Raises:
        ValueError: nothing is above zero.
    """
    values = np.where(np.isfinite(b0), b0, 0)
    high = float(np.percentile(values, 99))
    if high <= 0:
        raise ValueError(
            f"{name}: expected a positive b0, but 99 % of its voxels are at most {high:g}; check the b-values and the "
            "series"
        )
    parts, count = ndimage.label(values > _FOREGROUND * high)
    largest = 1 + int(np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:]))
    return ndimage.binary_fill_holes(parts == largest)
