# SPDX-License-Identifier: Apache-2.0
"""Brain volumes from NIfTI files (2-D slices also from PNG) to tensors; their scaling; how people see a slice."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys, convert_to_dst_type
from PIL import Image

from shared.intensity import is_scaled, robust_range, scale_intensity
from shared.nifti_files import check_length, verified
from shared.pair_checks import check_same_grid, check_voxel_size
from shared.transforms.images import read_radiograph
from shared.transforms.pixels import open_picture

VOLUME_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIX = ".png"


def as_paths(value: Any, *, key: Hashable) -> list[str]:
    """A path or a list of paths (channels), as an item of a datalist holds it, as a list of strings.

    Args:
        value: what the item holds.
        key: its name, with which an error message starts.

    Raises:
        ValueError: neither a path nor a list of at least one.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(v, str | os.PathLike) and os.fspath(v) for v in values):
        raise ValueError(f"{key}: expected the path of a file or a list of paths, but got {value!r}; correct the item")
    return [os.fspath(v) for v in values]


@dataclass(frozen=True)
class VolumeFile:
    """A file whose header was read and checked; made by `open_volume`.

    Attributes:
        path: of the file.
        shape: voxels (X, Y, Z) in file orientation; Z is 1 for a 2-D file.
        affine: (4, 4) float64, voxel indices to mm in RAS+; the identity for a picture.
        proxy: nibabel's array proxy, which reads voxels when indexed; None for a picture.
    """

    path: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    proxy: Any

    def check_same_grid_as(self, other: VolumeFile) -> None:
        """Raise a ValueError that starts with this file's path where its grid is not that of ``other``."""
        check_same_grid(
            self.path,
            self.shape,
            self.affine,
            reference=other.path,
            reference_shape=other.shape,
            reference_affine=other.affine,
        )

    def read(self, *, mask: bool = False) -> np.ndarray:
        """All voxels as float32 (X, Y, Z) in file orientation, in the units of the file; a picture in [0, 1].

        Args:
            mask: the file holds labels: it may be constant, and the levels of a picture stay as they are.

        Raises:
            ValueError: damaged, NaN or infinite voxels, or (unless a mask) constant. Starts with the path.
        """
        if self.proxy is None:
            values = _read_picture_labels(self.path) if mask else read_radiograph(self.path)
            if values.shape != self.shape[:2]:
                raise ValueError(
                    f"{self.path}: expected rows and columns as stored {self.shape[:2]}, but an EXIF tag turns the "
                    "picture; save it without the tag"
                )
        else:
            values = read_voxels(self.path, self.proxy, ...)
        values = values.reshape(self.shape)
        if not mask and values.min() == values.max():
            raise ValueError(
                f"{self.path}: expected an image, but all voxels are {values.min():g}; remove the file from the data"
            )
        return values


def read_voxels(path: str, proxy: Any, index: Any) -> np.ndarray:
    """`proxy[index]` as float32, scaled by the header's slope and intercept; only those voxels are read from the disk.

    Raises:
        ValueError: damaged file, or NaN or infinite voxels among those read. Starts with the path.
    """
    try:
        # float64 in between, as nibabel applies the slope: a slice then equals the same slice of the whole volume
        with np.errstate(over="ignore"), verified(path, proxy) as checked:  # too large for float32: named below
            values = np.asarray(checked[index]).astype(np.float32)
    except Exception as error:  # gzip, zlib, struct, nibabel and numpy each raise their own kind
        raise unreadable(path, error) from error
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"{path}: expected finite voxels, but {count} are NaN or infinite; repair or remove the file")
    return values


def unreadable(path: str | os.PathLike, error: Exception, *, kind: str = "file") -> ValueError:
    """What to raise, in one line, for a file that its decoder refused; each raises its own kind of error."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{path}: expected a readable {kind}, but got ({reason}); copy it anew or remove it")


def _read_picture_labels(path: str) -> np.ndarray:
    """Levels of a picture as stored: labels are not brightness, so palettes and constants are fine."""
    try:
        values = np.asarray(open_picture(path))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise unreadable(path, error) from error
    if values.ndim != 2:
        raise ValueError(f"{path}: expected a picture of one channel, but got the shape {values.shape}; export it anew")
    return values.astype(np.float32)


def open_volume(path: str | os.PathLike) -> VolumeFile:
    """Read and check the header of a volume; of voxels nothing is read (a picture is decoded).

    MONAI's `NibabelReader` does not fit: it takes a fourth axis for channels without a word, it stacks files without
    a look at their grids, it keeps the whole header (which may name the patient), its errors do not name the file, and
    it always reads everything.

    Args:
        path: NIfTI (`.nii`, `.nii.gz`) of 3 or 2 dimensions (further ones of length 1 are dropped), or a grey PNG whose
            rows are X (left to right) and whose columns are Y (posterior to anterior), as the published export has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, unreadable, more than one volume, no grey values, or an affine that is not
            finite and invertible. The message starts with the path.
    """
    name = os.fspath(path)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name}: expected a NIfTI or PNG file, but it does not exist; correct the path")
    if name.lower().endswith(PICTURE_SUFFIX):
        return VolumeFile(name, (*_picture_shape(name), 1), np.eye(4), None)
    if not name.lower().endswith(VOLUME_SUFFIXES):
        raise ValueError(f"{name}: expected a file .nii, .nii.gz or .png; convert it (dcm2niix for DICOM)")
    image, shape = open_header(name)
    if len(shape) < 2 or 0 in shape or any(n != 1 for n in shape[3:]):
        raise ValueError(
            f"{name}: expected a 3-D volume, but got the shape {shape}; "
            "write the one volume that is meant into a file of its own (fslroi, mrconvert -coord)"
        )
    return grey_file(name, image, (*shape, 1)[:3])


def open_header(path: str) -> tuple[Any, tuple[int, ...]]:
    """A nibabel image, of which no voxel is read, and its shape.

    Raises:
        ValueError: unreadable.
    """
    try:
        image: Any = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        # Not every format has them.
        np.asarray(image.affine, dtype=np.float64)
        np.dtype(image.dataobj.dtype)
        check_length(path, image.dataobj)
    except Exception as error:
        raise unreadable(path, error) from error
    return image, shape


def grey_file(path: str, image: Any, shape: Sequence[int]) -> VolumeFile:
    """Of an image from `open_header`, with the shape (X, Y, Z) of one of its volumes.

    Raises:
        ValueError: no grey values, or an affine that is not finite and invertible.
    """
    kind, affine = np.dtype(image.dataobj.dtype), np.asarray(image.affine, dtype=np.float64)
    if kind.kind not in "iuf":
        raise ValueError(f"{path}: expected grey values, but got voxels of the type {kind}; convert the file")
    try:
        check_voxel_size(affine)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair the header or export the file anew") from error
    return VolumeFile(path, (shape[0], shape[1], shape[2]), affine, image.dataobj)


def _picture_shape(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except Exception as error:
        raise unreadable(path, error) from error


class LoadVolumed(MapTransform):
    """Load volumes: path, or list of paths (one channel each), -> `MetaTensor` (C, X, Y, Z) float32.

    The axes stay as in the file (`Orientationd` reorients), the values in the units of the file (`RobustScaled`
    scales); a 2-D file gets Z = 1. The metadata hold `affine`, `original_affine`, `spatial_shape`,
    `original_channel_dim`, `space` and `filename_or_obj` (of the first file), which MONAI's spatial transforms, their
    inversion and the savers use, and nothing else of the header. Why MONAI's `LoadImaged` does not fit: `open_volume`.

    Args:
        keys: keys that hold paths.
        allow_missing_keys: do not complain about absent keys.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unreadable, more than one volume in a file, NaN or infinite voxels, constant, singular affine, or
            files of a list that lie on different grids. The message starts with the path.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            files = [open_volume(path) for path in as_paths(result[key], key=key)]
            first = files[0]
            for other in files[1:]:
                other.check_same_grid_as(first)
            result[key] = as_volume_tensor(torch.from_numpy(np.stack([file.read() for file in files])), first)
        return result


def as_volume_tensor(voxels: torch.Tensor, file: VolumeFile) -> MetaTensor:
    """Voxels (C, X, Y, Z) in file orientation with the metadata that `LoadVolumed` describes."""
    meta = {
        MetaKeys.ORIGINAL_AFFINE: file.affine.copy(),
        MetaKeys.SPATIAL_SHAPE: np.asarray(file.shape),
        # "none", as MONAI's reader says for 3-D files: with a number, MONAI 1.6's NIfTI writer takes a volume
        # of one channel for a 2-D image
        MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": file.path,
    }
    return MetaTensor(voxels, affine=torch.from_numpy(file.affine.copy()), meta=meta)


class RobustScaled(MapTransform):
    """Scale each channel of a volume to [0, 1] by the rule of `shared.intensity`.

    MONAI's `ScaleIntensityRangePercentilesd` does not fit: it takes both percentiles over all voxels, so that the
    amount of air around the head moves them, it scales what is scaled already, and it does not tell the range it used.

    `<key>_range` gets one `[low, high]` per channel: the intensities that became 0 and 1, plain floats; `[0.0, 1.0]`
    for a channel that was scaled already. Not inverted by `Invertd`: an output is in another contrast.

    Args:
        keys: keys that hold whole volumes (C, ...), unpadded (air that was added would move the mean).
        allow_missing_keys: do not complain about absent keys.

    Raises:
        ValueError: constant or non-finite channel. The message starts with the file, where it is known, or the key.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            meta = image.meta if isinstance(image, MetaTensor) else {}
            name = str(meta.get("filename_or_obj", key))
            scaled, ranges = [], []
            for channel in torch.as_tensor(image).detach().cpu().numpy():
                low, high = scaling_of(channel, name=name)
                scaled.append(scale_intensity(channel, low, high))
                ranges.append([low, high])
            result[key] = convert_to_dst_type(np.stack(scaled), dst=image, dtype=torch.float32)[0]
            result[f"{key}_range"] = ranges
        return result


def scaling_of(values: np.ndarray, *, name: str) -> tuple[float, float]:
    """Intensities of a whole volume that become 0 and 1: (0, 1) if it is scaled already, else its robust range.

    Args:
        values: all voxels of one contrast.
        name: what an error message starts with.

    Raises:
        ValueError: see `shared.intensity.robust_range`.
    """
    return (0.0, 1.0) if is_scaled(values) else robust_range(values, name=name)


def for_display(image: torch.Tensor) -> torch.Tensor:
    """Turn an axial slice in RAS the way radiologists look at it: anterior up, the patient's right on the left.

    In RAS x grows towards the patient's right and y towards anterior, rows of a picture grow downwards and columns
    to the right; hence transpose and flip both.

    Args:
        image: (..., X, Y).

    Returns:
        Plain tensor (..., Y, X): rows from anterior to posterior, columns from the patient's right to left. An affine
        is dropped: it would no longer be true.
    """
    plain = image.as_tensor() if isinstance(image, MetaTensor) else image
    return plain.transpose(-1, -2).flip((-2, -1))
