# SPDX-License-Identifier: Apache-2.0
"""Images to segment: pictures in colour, DICOM files, volumes and single slices of volumes, in [0, 1]."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys

from shared.intensity import scale_intensity
from shared.transforms.pixels import DICOM_SUFFIXES, PICTURE_SUFFIXES, is_dicom, read_pixels
from shared.transforms.upright import UprightFile, is_nifti, open_upright
from shared.transforms.volumes import VOLUME_SUFFIXES, as_volume_tensor, scaling_of

SUFFIXES = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, *DICOM_SUFFIXES)


class LoadPictured(MapTransform):
    """Load a picture, a volume, or one slice of a volume: path -> float32 `MetaTensor` in [0, 1].

    - PNG, JPEG, TIFF, BMP, DICOM: `(3, H, W)`, rows down, columns right; grey is repeated, 8- and 16-bit levels are
      divided by 255 and 65535, palettes resolved, transparency laid over black, EXIF turns applied. DICOM as
      `shared.transforms.images.read_radiograph` says, and in colour.
    - NIfTI with two axes: `(3, H, W)`, turned upright by its affine (`shared.transforms.upright`).
    - NIfTI with three axes (also of 1, 2 or 3 slices): `(1, X, Y, Z)` in file orientation; `UprightVolumed` turns it.
    - The same with `item["slice"]`: only that slice, upright `(1, H, W)`, bit for bit the slice of the whole volume
      after `UprightVolumed`. A slice may be constant.

    Scaling. `window` = [low, high] in the file's units becomes [0, 1], clipped; it comes from the item (prepared data)
    or from the argument. Without one, NIfTI files are scaled by the rule of `shared.intensity` with the range of the
    *whole* volume (read once per file and process when only a slice is loaded), DICOM files by the window in their
    header, pictures by their bit range.

    The metadata are those MONAI's inversion and savers use (`affine`, `original_affine`, `spatial_shape`,
    `filename_or_obj`, ...), nothing else of a header. Why MONAI's `LoadImaged` does not fit:
    `shared.transforms.images.read_radiograph` and `shared.transforms.volumes.open_volume`.

    Args:
        keys: keys that hold paths.
        window: [low, high], low < high, for items that have no `window` of their own; None as described.
        allow_missing_keys: do not complain about absent keys.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of file, unreadable, several frames or more than one volume, colours in a volume,
            NaN or infinite values, constant, no such slice; a window for a picture without units; two windows that
            differ. The message starts with the path, or with the key.
    """

    def __init__(
        self, keys: KeysCollection, *, window: Sequence[float] | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = None if window is None else check_window(window, name="window")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            path = as_path(result[key], key=key)
            result[key] = self._load(path, self._window_of(result, path), result.get("slice"))
        return result

    def _window_of(self, item: Mapping[Hashable, Any], path: str) -> tuple[float, float] | None:
        if item.get("window") is None:
            return self.window
        window = check_window(item["window"], name=f"{path}: window")
        if self.window is not None and self.window != window:
            raise ValueError(
                f"{path}: expected one window, but the item (its data list) has {list(window)} and the configuration "
                f"{list(self.window)}; set `window` to null, so that training and test use the data set's"
            )
        return window

    def _load(self, path: str, window: tuple[float, float] | None, index: Any) -> MetaTensor:
        source = open_upright(path) if is_nifti(path) else None
        if source is not None and source.is_volume:
            return _load_slice(source, window, index) if index is not None else _load_volume(source, window)
        if index is not None:
            raise ValueError(f"{path}: expected a volume, as the item names the slice {index!r}, but got a picture")
        if source is not None:
            values = source.plane(0)
            low, high = window or scaling_of(values, name=path)
            image = np.repeat(scale_intensity(values, low, high)[None], 3, axis=0)
            return as_meta_tensor(image, path, source.affine, original_affine=source.file.affine)
        check_suffix(path)
        image = read_pixels(path, colour=True, window=window).transpose(2, 0, 1)
        return as_meta_tensor(image, path, np.eye(4))


def _load_volume(source: UprightFile, window: tuple[float, float] | None) -> MetaTensor:
    values = source.file.read()
    low, high = window or scaling_of(values, name=source.file.path)
    return as_volume_tensor(torch.from_numpy(scale_intensity(values, low, high)[None]), source.file)


def _load_slice(source: UprightFile, window: tuple[float, float] | None, index: Any) -> MetaTensor:
    plane = source.plane(index)
    path = source.file.path
    low, high = window or _range_of(path, os.stat(path).st_mtime_ns)
    return as_meta_tensor(scale_intensity(plane, low, high)[None], path, slice_affine(source.affine, int(index)))


@functools.lru_cache(maxsize=4096)
def _range_of(path: str, changed: int) -> tuple[float, float]:
    """Range of a whole volume; `changed` (the file's time) makes a new entry of a changed file."""
    return scaling_of(open_upright(path).file.read(), name=path)


def slice_affine(affine: np.ndarray, index: int) -> np.ndarray:
    """Affine of one slice along the third axis: its pixel (0, 0) is the voxel (0, 0, index)."""
    moved = affine.copy()
    moved[:3, 3] += index * affine[:3, 2]
    return moved


def as_meta_tensor(
    values: np.ndarray, path: str, affine: np.ndarray, *, original_affine: np.ndarray | None = None
) -> MetaTensor:
    """Upright picture (C, H, W) with the metadata that MONAI's inversion and savers use.

    Args:
        values: pixels.
        path: their file.
        affine: (4, 4) pixel indices to mm; the identity where a file has none.
        original_affine: of the file, where the picture was turned; None: `affine`.
    """
    meta = {
        MetaKeys.ORIGINAL_AFFINE: np.array(affine if original_affine is None else original_affine),
        MetaKeys.SPATIAL_SHAPE: np.asarray(values.shape[1:]),
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        MetaKeys.SPACE: SpaceKeys.RAS,
        "filename_or_obj": path,
    }
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return MetaTensor(tensor, affine=torch.from_numpy(np.array(affine)), meta=meta)


def check_suffix(path: str) -> None:
    """A ValueError that starts with the path of a file that is neither DICOM nor named as one of `SUFFIXES`."""
    if not path.lower().endswith(SUFFIXES) and not (os.path.isfile(path) and is_dicom(path)):
        raise ValueError(f"{path}: expected a file {', '.join(SUFFIXES)}; convert it (dcm2niix for a DICOM series)")


def as_path(value: Any, *, key: Hashable) -> str:
    """The path that an item holds, as a string; a ValueError that starts with the key where it is none."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{key}: expected the path of one file, but got {value!r:.100}; correct the item")
    return os.fspath(value)


def check_window(window: Any, *, name: str) -> tuple[float, float]:
    """[low, high] as two finite numbers, low < high; a ValueError that starts with `name` otherwise."""
    numbers = list(window) if isinstance(window, Sequence) and not isinstance(window, str) else []
    valid = len(numbers) == 2 and all(isinstance(n, int | float) and np.isfinite(n) for n in numbers)
    if not valid or not numbers[0] < numbers[1]:
        raise ValueError(f"{name}: expected [low, high] with low < high in the file's units, but got {window!r}")
    return float(numbers[0]), float(numbers[1])
