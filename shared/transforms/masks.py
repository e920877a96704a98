# SPDX-License-Identifier: Apache-2.0
"""Masks from picture and NIfTI files to class indices, on the grid of their image."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from shared.transforms.mask_levels import binary_mask, class_indices, read_levels, whole_numbers
from shared.transforms.pixels import is_dicom, picture_size
from shared.transforms.segmentation_images import as_meta_tensor, as_path, slice_affine
from shared.transforms.upright import is_nifti, open_upright
from shared.transforms.volumes import as_volume_tensor


class LoadMaskd(MapTransform):
    """Load masks: path -> float32 `MetaTensor` of class indices (binary: 0 and 1), on the grid of the image.

    `(1, H, W)` for pictures and single slices, `(1, X, Y, Z)` in file orientation for volumes, as
    `shared.transforms.segmentation_images.LoadPictured` loads the image. How levels become indices, for 1-bit, 8- and
    16-bit, RGB, RGBA, palette and JPEG files: `shared.transforms.mask_levels`. An empty mask is fine. MONAI's
    `LoadImaged` does not fit: it takes what is stored, in whatever coding, and never looks at the image.

    With `item["slice"]` one slice of a volume, upright. With `item["class_id"]` (multi-class only) one class as a
    binary mask: class c is where the label is c, class 0 where any class is (spec/sdseg.md 3.1).

    Args:
        keys: keys that hold paths.
        num_classes: 1 = binary; N >= 2: class indices 0..N-1, background 0.
        image_key: key of the image (its path, or the loaded tensor), on whose grid the mask must lie; None: unchecked.
        allow_missing_keys: do not complain about absent keys.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unreadable, NaN, fractions, levels that are no mask, an index that is not below `num_classes`,
            another size or grid than the image's, no such slice or class. The message starts with the path.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_classes: int = 1,
        image_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes: expected 1 (binary) or 2..255 with the background, but got {num_classes!r}")
        self.num_classes = num_classes
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            path = as_path(result[key], key=key)
            if self.image_key is not None:
                _check_grid(path, _path_of_file(result, self.image_key))
            mask = load_mask(path, num_classes=self.num_classes, index=result.get("slice"))
            if result.get("class_id") is not None:
                mask = self._of_class(mask, result["class_id"], path)
            result[key] = mask
        return result

    def _of_class(self, mask: MetaTensor, class_id: Any, path: str) -> MetaTensor:
        if not isinstance(class_id, int | np.integer) or not 0 <= class_id < self.num_classes or self.num_classes == 1:
            classes = f"0..{self.num_classes - 1}" if self.num_classes > 1 else "none, as num_classes is 1"
            raise ValueError(f"{path}: expected a class_id of {classes}, but got {class_id!r}; make items with "
                             "shared.segmentation_items for the same num_classes")  # fmt: skip
        chosen = torch.gt(mask, 0) if class_id == 0 else torch.eq(mask, int(class_id))
        return convert_to_dst_type(chosen, mask, dtype=torch.float32)[0]


class CheckMaskGridd(MapTransform):
    """Compare each mask's size and grid with its image's, from the headers alone; the item stays as it is.

    For items whose mask is not loaded beside the image, as where its latents are cached: there a mask of another size
    would be resized and trained with. Each pair of files is looked at once per process as long as they do not change.

    Args:
        keys: keys that hold a mask: its path, or the loaded tensor.
        image_key: key of the image: its path, or the loaded tensor.
        allow_missing_keys: do not complain about absent keys.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unreadable header, or another size, grid or kind than the image's. The message starts with the path.
    """

    def __init__(self, keys: KeysCollection, *, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            _check_grid(_path_of_file(data, str(key)), _path_of_file(data, self.image_key))
        return dict(data)


def load_mask(path: str, *, num_classes: int = 1, index: int | None = None) -> MetaTensor:
    """One mask as `LoadMaskd` loads it.

    Args:
        path: its file.
        num_classes: 1 = binary, else the number of classes with background.
        index: slice of a volume (upright axis 3); None: all of it.
    """
    if not is_nifti(path):
        _refuse_other_kinds(path)
        if index is not None:
            raise ValueError(f"{path}: expected a volume, as the item names the slice {index!r}, but got a picture")
        levels, palette = read_levels(path)
        return as_meta_tensor(_indices(levels, num_classes, path, label_map=palette)[None], path, np.eye(4))
    source = open_upright(path)
    if source.is_volume and index is None:
        values = source.file.read(mask=True)
        volume = _indices(whole_numbers(values, name=path), num_classes, path, label_map=True)
        return as_volume_tensor(torch.from_numpy(volume[None].astype(np.float32)), source.file)
    if index is not None and not source.is_volume:
        raise ValueError(f"{path}: expected a volume, as the item names the slice {index!r}, but got a picture")
    plane = whole_numbers(source.plane(index or 0), name=path)
    affine = slice_affine(source.affine, int(index or 0))
    return as_meta_tensor(_indices(plane, num_classes, path, label_map=True)[None], path, affine)


def _indices(levels: np.ndarray, num_classes: int, path: str, *, label_map: bool) -> np.ndarray:
    if num_classes == 1:
        return binary_mask(levels, name=path, label_map=label_map)
    return class_indices(levels, num_classes, name=path)


def classes_of_slices(path: str | os.PathLike, *, num_classes: int) -> list[list[int]]:
    """Class ids above 0 that each slice of a label file shows, along the upright axis 3; a picture has one slice.

    The whole file is read. Raises what `LoadMaskd` raises.
    """
    name = os.fspath(path)
    mask = load_mask(name, num_classes=num_classes).numpy()[0]
    if mask.ndim == 2:
        slices = [mask]
    else:
        upright = open_upright(name).turn(mask)
        slices = [upright[..., index] for index in range(upright.shape[2])]
    return [[int(value) for value in np.unique(plane) if value > 0] for plane in slices]


def _refuse_other_kinds(path: str) -> None:
    if os.path.isfile(path) and is_dicom(path):
        raise ValueError(
            f"{path}: expected a mask as PNG, TIFF, BMP or NIfTI, but got DICOM; convert it (a DICOM SEG object with "
            "dcmqi's segimage2itkimage)"
        )


def _path_of_file(item: Mapping[Hashable, Any], key: str) -> str:
    value = item.get(key)
    if isinstance(value, MetaTensor):
        value = value.meta.get("filename_or_obj")
    return as_path(value, key=key)


@functools.lru_cache(maxsize=4096)
def _grid(path: str, changed: int) -> tuple[tuple[int, int], Any]:
    """Rows and columns as seen, and for a NIfTI file its header; `changed` is the file's time."""
    if not is_nifti(path):
        return picture_size(path), None
    source = open_upright(path)
    return (source.shape[0], source.shape[1]), source


def _check_grid(path: str, image: str) -> None:
    for file in (path, image):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: expected this file, but it does not exist; correct the data list")
    size, mask_source = _grid(path, os.stat(path).st_mtime_ns)
    image_size, image_source = _grid(image, os.stat(image).st_mtime_ns)
    is_volume = mask_source is not None and mask_source.is_volume
    if is_volume != (image_source is not None and image_source.is_volume):
        got, wanted = ("a volume", "a picture") if is_volume else ("a picture", "a volume")
        raise ValueError(f"{path}: expected {wanted} like its image {image}, but got {got}; correct the data list")
    if mask_source is not None and image_source is not None:
        mask_source.file.check_same_grid_as(image_source.file)
    elif size != image_size:
        raise ValueError(
            f"{path}: expected the size of its image {image}, {image_size[0]} x {image_size[1]} (rows x columns), but "
            f"got {size[0]} x {size[1]}; export the mask at the image's size, or correct the pair"
        )


class MaskToPictured(MapTransform):
    """A binary mask as a picture that the autoencoder encodes: `(1, H, W)` -> float32 `(3, H, W)` of 0 and 1.

    Args:
        keys: key of the mask; one, as `name` is one.
        name: key of the picture; the mask stays under its own.
        allow_missing_keys: do not complain about an absent key.

    Raises:
        ValueError: another shape, or values other than 0 and 1 (class indices need a `class_id` in the item). The
            message starts with the file, where it is known, or the key.
    """

    def __init__(self, keys: KeysCollection, *, name: str = "target", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"keys: expected one key, as the picture has one name, but got {list(self.keys)}")
        self.name = name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            mask = result[key]
            where = mask.meta.get("filename_or_obj", key) if isinstance(mask, MetaTensor) else key
            if mask.ndim != 3 or mask.shape[0] != 1:
                raise ValueError(f"{where}: expected a mask (1, H, W), but got the shape {tuple(mask.shape)}")
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"{where}: expected a binary mask of 0 and 1, but got values up to {float(mask.max()):g}; give the "
                    "item a class_id (shared.segmentation_items does), or load it with num_classes 1"
                )
            result[self.name] = mask.to(torch.float32).repeat(3, 1, 1)
        return result
