# SPDX-License-Identifier: Apache-2.0
"""Radiographs from PNG, JPEG and DICOM files to tensors in [0, 1], checked; and their resizing."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys

from shared.transforms.pixels import read_pixels


def read_radiograph(path: str | os.PathLike) -> np.ndarray:
    """Read one radiograph as rows by columns, never transposed.

    Rules: 8-bit levels are divided by 255, 16-bit levels by 65535 (also where only 12 bits are used). Colour becomes
    Rec. 601 luma; palettes are resolved first; transparent pixels lie over black; the EXIF orientation is applied.
    DICOM: rescale slope and intercept (or modality LUT), then VOI LUT or the first window, then scaled so that the
    window's (without a window: the stored bits') range becomes [0, 1]; MONOCHROME1 is inverted, so that
    bone is bright everywhere. Of a DICOM header only the elements that describe pixels are read.

    MONAI's readers do not fit: `PILReader` swaps the axes and keeps palette indices, `PydicomReader` ignores window and
    MONOCHROME1 and keeps the whole header, and their errors do not name the file.

    Args:
        path: PNG, JPEG (or another format Pillow reads) or DICOM file; DICOM is known by `.dcm` or by its magic bytes.

    Returns:
        float32 (H, W) in [0, 1], finite, not constant.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, unknown pixel kind, empty, non-finite or constant. The message starts
            with the path.
    """
    return read_pixels(path)


class LoadRadiograph(Transform):
    """Path of a PNG, JPEG or DICOM radiograph -> float32 (1, H, W) in [0, 1]; rules and errors: `read_radiograph`.

    Args:
        track_meta: True: a `MetaTensor` whose metadata hold the file name (`filename_or_obj`, which MONAI's savers use
            to name outputs) and the shape, and nothing of a DICOM header. False: a plain tensor.
    """

    def __init__(self, *, track_meta: bool = True) -> None:
        self.track_meta = track_meta

    def __call__(self, path: str | os.PathLike) -> torch.Tensor:
        image = torch.from_numpy(read_radiograph(path)).unsqueeze(0)
        if not self.track_meta:
            return image
        meta = {
            "filename_or_obj": os.fspath(path),
            MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape[1:]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        }
        return MetaTensor(image, meta=meta)


class LoadRadiographd(MapTransform):
    """Dictionary form of `LoadRadiograph`: the path under each key becomes the image.

    There is no "skip" policy here: a data set cannot lose an item while an epoch runs, and a blank in its place would
    be learnt. `python -m tools.check_data` names every bad file beforehand.

    Args:
        keys: keys that hold paths.
        track_meta: see `LoadRadiograph`.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(self, keys: KeysCollection, *, track_meta: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadRadiograph(track_meta=track_meta)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.load(result[key])
        return result


class ResizeShorterSide(Transform):
    """Resize (C, H, W) so that the shorter side has `size` pixels; the aspect ratio is kept.

    Bilinear with anti-aliasing (`torch.nn.functional.interpolate(antialias=True)`), so the value range is kept and
    lines thinner than a new pixel are averaged instead of dropped. MONAI's `Resize` does not fit: its `size_mode`
    knows "all" and "longest" only, so the target would have to be known per image.

    Args:
        size: pixels of the shorter side; smaller images are enlarged. The longer side is rounded to the nearest pixel.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, but got {size}")
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 3:
            raise ValueError(f"image: expected (C, H, W), but got the shape {tuple(image.shape)}; add a channel")
        height, width = image.shape[1:]
        shorter = min(height, width)
        if shorter == self.size:
            return image
        target = (
            max(self.size, round(height * self.size / shorter)),
            max(self.size, round(width * self.size / shorter)),
        )
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        resized = torch.nn.functional.interpolate(plain[None], size=target, mode="bilinear", antialias=True)[0]
        return MetaTensor(resized, meta=image.meta) if isinstance(image, MetaTensor) else resized


class ResizeShorterSided(MapTransform):
    """Dictionary form of `ResizeShorterSide`.

    Args:
        keys: keys that hold (C, H, W) images.
        size: pixels of the shorter side.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(self, keys: KeysCollection, size: int, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.resize = ResizeShorterSide(size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.resize(result[key])
        return result
