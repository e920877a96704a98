# SPDX-License-Identifier: Apache-2.0
"""NIfTI files seen upright, as a viewer shows them, whole or slice by slice straight from the disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np

from shared.transforms.volumes import VOLUME_SUFFIXES, VolumeFile, open_volume, read_voxels

# Rows grow to Posterior, columns to the patient's Left, slices to Superior: the way radiologists look at axial slices.
UPRIGHT = "PLS"


def is_nifti(path: str | os.PathLike) -> bool:
    """Whether a file is NIfTI by its name."""
    return os.fspath(path).lower().endswith(VOLUME_SUFFIXES)


@dataclass(frozen=True)
class UprightFile:
    """A NIfTI file and the turn that makes it upright.

    Attributes:
        file: its checked header, in file orientation.
        orientation: (3, 2), of each file axis the upright axis it becomes and -1 where it is reversed.
        shape: (H, W, Z) upright; Z = 1 for a picture.
        affine: (4, 4), upright voxel indices to mm in RAS+.
        is_volume: the file has three axes (also with one slice); False: a picture of two.
    """

    file: VolumeFile
    orientation: np.ndarray
    shape: tuple[int, int, int]
    affine: np.ndarray
    is_volume: bool

    def plane(self, index: int) -> np.ndarray:
        """Slice `index` of the upright axis 3 as float32 (H, W) in the units of the file.

        Of an uncompressed file only the slice is read. A compressed one has to be decompressed from its beginning;
        the two read last (an image and its label) are kept per process, so that slices in order cost it once.

        Raises:
            ValueError: no such slice, damaged, or NaN or infinite voxels in it. Starts with the path.
        """
        if not isinstance(index, int | np.integer) or isinstance(index, bool) or not 0 <= index < self.shape[2]:
            raise ValueError(
                f"{self.file.path}: expected a slice of 0..{self.shape[2] - 1}, but got {index!r}; "
                "correct `num_slices` in the data list (python -m tools.prepare writes it)"
            )
        axis = int(np.argmax(self.orientation[:, 0] == 2))
        position = int(index) if self.orientation[axis, 1] > 0 else self.shape[2] - 1 - int(index)
        where: list[int | slice] = [slice(None)] * 3
        where[axis] = position
        path = self.file.path
        if path.lower().endswith(".gz"):
            voxels = _compressed_voxels(path, os.stat(path).st_mtime_ns)[tuple(where)]
        else:
            dimensions = len(self.file.proxy.shape)  # further axes have length 1; a picture lacks the third
            voxels = read_voxels(path, self.file.proxy, tuple([*where, *[0] * dimensions][:dimensions]))
        return self.turn(np.expand_dims(voxels.reshape([n for i, n in enumerate(self.file.shape) if i != axis]), axis))[
            ..., 0
        ]

    def turn(self, values: np.ndarray) -> np.ndarray:
        """(X, Y, Z) in file orientation -> (H, W, Z) upright."""
        return nibabel.orientations.apply_orientation(values, self.orientation)

    def turn_back(self, values: np.ndarray) -> np.ndarray:
        """(H, W, Z), or (H, W) of a picture, upright -> (X, Y, Z) in file orientation."""
        upright = np.asarray(values).reshape(self.shape)
        axes = self.orientation[:, 0].astype(int)
        turned = upright.transpose(axes)
        return np.flip(turned, tuple(axis for axis in range(3) if self.orientation[axis, 1] < 0))


@functools.lru_cache(maxsize=2)
def _compressed_voxels(path: str, changed: int) -> np.ndarray:
    """Voxels (X, Y, Z) of a compressed file; `changed` (its time) makes a new entry of a changed file."""
    file = open_volume(path)
    return read_voxels(path, file.proxy, ...).reshape(file.shape)


def open_upright(path: str | os.PathLike) -> UprightFile:
    """Read the header of a NIfTI file; errors as `shared.transforms.volumes.open_volume`.

    Three axes are turned to `UPRIGHT`, whatever their order in the file. Of a file with two axes only these are turned:
    up is superior, in an axial picture anterior; the patient's left is on the right, in a sagittal one posterior.
    """
    file = open_volume(path)
    is_volume = len(file.proxy.shape) > 2
    source = nibabel.orientations.io_orientation(file.affine)
    codes = nibabel.orientations.ornt2axcodes(source)
    target = UPRIGHT if is_volume else _picture_axes(codes)
    orientation = nibabel.orientations.ornt_transform(source, nibabel.orientations.axcodes2ornt(target))
    shape = [0, 0, 0]
    for axis, (to, _) in enumerate(orientation):
        shape[int(to)] = file.shape[axis]
    affine = file.affine @ nibabel.orientations.inv_ornt_aff(orientation, file.shape)
    return UprightFile(file, orientation, (shape[0], shape[1], shape[2]), affine, is_volume)


def _picture_axes(codes: Sequence[str]) -> tuple[str, str, str]:
    down = {"S": "I", "I": "I", "A": "P", "P": "P"}
    across = {"R": "L", "L": "L", "A": "P", "P": "P"}
    first, second, third = codes
    rows = next(code for code in ("S", "I", "A", "P") if code in (first, second))
    columns = second if rows == first else first
    return down[rows], across[columns], third
