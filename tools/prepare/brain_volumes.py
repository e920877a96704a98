# SPDX-License-Identifier: Apache-2.0
"""Brain volumes on the way to a dataset folder: read in RAS, find the head, resample, cut with the affine, write."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy import ndimage

from shared.data_check import read_volume
from shared.files import atomic_path

BRAIN_HEIGHT = 150.0  # mm from the top of the scalp that hold the whole brain of an adult, without the neck
_HEAD_LEVEL = 0.1  # of the robust range; air stays below it, scalp and brain above


@dataclass(frozen=True)
class Volume:
    """One contrast of one visit.

    Attributes:
        path: file it was read from, for messages.
        values: (X, Y, Z) in RAS order.
        affine: (4, 4), voxel indices to world millimetres.
        code: NIfTI code of the world (1 scanner, 2 aligned, 3 Talairach, 4 MNI); 0: the header has no position at all.
    """

    path: Path
    values: np.ndarray
    affine: np.ndarray
    code: int

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_ras(path: str | os.PathLike, *, constant_ok: bool = False) -> Volume:
    """Read a 3-D NIfTI file and turn its axes to the nearest RAS order; voxels are moved, never interpolated.

    Raises:
        ValueError: what `shared.data_check.read_volume` finds, or not 3-D; the message starts with the path.
    """
    values, image = read_volume(path, constant_ok=constant_ok)
    shape = values.shape
    if len(shape) > 3 and set(shape[3:]) == {1}:  # some converters write (X, Y, Z, 1)
        values = values.reshape(shape[:3])
    if values.ndim != 3:
        raise ValueError(f"{path}: expected a 3-D volume, but got the shape {shape}; extract one volume (fslroi)")
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values.astype(np.float32), image.affine))
    code = int(image.header["sform_code"]) or int(image.header["qform_code"])
    return Volume(Path(path), np.asarray(turned.dataobj), np.asarray(turned.affine, float), code)


def find_head(scaled: np.ndarray) -> np.ndarray:
    """Voxels of the head (or brain, where the skull is stripped), without speckle in the air.

    Args:
        scaled: (X, Y, Z) in [0, 1], from the robust range.

    Returns:
        (X, Y, Z) bool: the largest connected part above a tenth of the range. Dark parts inside may be missing; it is
        meant for bounding boxes.
    """
    in_plane = np.ones((3, 3, 1), bool)  # thick slices would vanish under a 3-D element
    parts, count = ndimage.label(ndimage.binary_opening(scaled > _HEAD_LEVEL, in_plane))
    if count == 0:
        return scaled > _HEAD_LEVEL
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def find_brain(volumes: Sequence[Volume]) -> np.ndarray:
    """Brain mask of skull-stripped volumes: where all are non-zero, the largest connected part, holes filled.

    Raises:
        ValueError: they are not skull-stripped: no or hardly any voxel is zero (or all are).
    """
    both = np.logical_and.reduce([volume.values != 0 for volume in volumes])
    if not 0 < both.mean() < 0.9:
        raise ValueError(
            f"{volumes[0].path}: expected a skull-stripped volume for --mask nonzero, but {both.mean():.0%} of the "
            "voxels are non-zero; give a brain mask (--mask PATTERN) or leave --mask out"
        )
    parts, _ = ndimage.label(both)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes(parts == sizes.argmax())


def bounding_box(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the true voxels per axis.

    Raises:
        ValueError: there is none.
    """
    if not mask.any():
        raise ValueError("mask: expected at least one voxel, but it is empty")
    box = []
    for axis in range(mask.ndim):
        (inside,) = np.nonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append((int(inside[0]), int(inside[-1]) + 1))
    return box


def resample(volume: Volume, spacing: float, *, mode: str = "bilinear") -> Volume:
    """Give a volume another in-plane voxel size (axes 0 and 1); slices are kept as they are.

    Args:
        volume: to resample; the axes keep their directions and the first voxel its place.
        spacing: mm.
        mode: `bilinear`, `bspline` (cubic; what it overshoots is clipped) or `nearest` (masks).
    """
    values = volume.values
    if mode != "nearest":
        # MONAI's Spacing takes single points: without a blur, fine detail would become a false coarse pattern.
        factors = np.maximum(spacing / volume.spacing[:2], 1.0)
        values = ndimage.gaussian_filter(values, [*((factors - 1) / 2), 0.0], mode="nearest")
    pixdim = [spacing, spacing, -1.0]
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None]
    image = MetaTensor(tensor, affine=torch.from_numpy(volume.affine))
    if mode == "bspline":
        out: Any = Spacing(pixdim, mode=3, padding_mode="nearest")(image)
    else:
        out = Spacing(pixdim, mode=mode, padding_mode="border")(image)
    kept = np.clip(np.asarray(out[0]), volume.values.min(), volume.values.max())
    return replace(volume, values=kept, affine=np.asarray(out.affine, float))


def cut(volume: Volume, start: Sequence[int], shape: Sequence[int]) -> Volume:
    """Take a box of voxels, with zeros where it reaches beyond the volume; every voxel keeps its world position.

    MONAI has centre crops and pads only, or a crop that cannot reach outside.

    Args:
        volume: to cut.
        start: first voxel of the box per axis, may be negative.
        shape: voxels of the box per axis.
    """
    values = np.zeros(tuple(shape), volume.values.dtype)
    old, new = [], []
    for first, length, n in zip(start, shape, volume.values.shape, strict=True):
        low, high = max(first, 0), max(min(first + length, n), max(first, 0))
        old.append(slice(low, high))
        new.append(slice(low - first, high - first))
    values[tuple(new)] = volume.values[tuple(old)]
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.asarray(start, float)
    return replace(volume, values=values, affine=affine)


def write_volume(path: Path, volume: Volume, *, mask: bool = False) -> None:
    """Write uncompressed NIfTI, atomically: a slice can be read without the rest.

    Values in [0, 1] become uint16 with the slope 1/65535; a mask becomes uint8 without a slope. sform and qform are
    both set (a qform cannot hold shear; readers prefer the sform).
    """
    levels = volume.values.astype(np.uint8) if mask else np.rint(volume.values * 65535.0).astype(np.uint16)
    image = nibabel.Nifti1Image(levels, volume.affine)
    image.header.set_slope_inter(*((1, 0) if mask else (1 / 65535, 0)))
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, volume.code or 2)
    image.set_qform(volume.affine, volume.code or 2)
    stream = io.BytesIO()
    image.to_stream(stream)
    with atomic_path(path) as temporary:
        temporary.write_bytes(stream.getvalue())
