# SPDX-License-Identifier: Apache-2.0
"""Geometry of 2-D pictures and of volumes seen slice by slice: upright axes, in-plane resizing, flips."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta
from monai.transforms import InvertibleTransform, MapTransform, Orientation
from monai.transforms.utils import scale_affine
from monai.utils import TraceKeys

from shared.transforms.upright import UPRIGHT

_MODES = ("bilinear", "nearest")


def resize_in_plane(image: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """Resize the first two spatial axes; slices stay apart, the aspect ratio is not kept.

    MONAI's `Resize` does not fit: it resizes all axes of a volume at once, blurs by a Gaussian of its own instead of
    the antialiasing filter that PIL and the published loaders have, and its "nearest" is off by half a pixel.

    Args:
        image: `(C, H, W)` or `(C, H, W, Z)`, any real type; Z is treated as a batch.
        size: new `(H, W)`.
        mode: "bilinear" (averages when it shrinks, so thin lines do not vanish) or "nearest" (pixel centres:
            PyTorch's "nearest-exact"), for class indices.

    Returns:
        `(C, *size)` or `(C, *size, Z)` on the same device. Bilinear: float32 (float64 stays); nearest: the type of
        `image`. A `MetaTensor` keeps its metadata; its affine says where the new pixels lie.

    Raises:
        ValueError: another number of axes, size or mode.
    """
    if image.ndim not in (3, 4):
        raise ValueError(f"image: expected (C, H, W) or (C, H, W, Z), but got the shape {tuple(image.shape)}")
    mode = "nearest" if mode == "nearest-exact" else mode
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {', '.join(_MODES)}, but got {mode!r}")
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"spatial_size: expected [height, width] of at least 1 pixel each, but got {list(size)}")
    target = [int(n) for n in size]
    plain = image.as_tensor() if isinstance(image, MetaTensor) else image
    resized = plain if list(plain.shape[1:3]) == target else _interpolate(plain, target, mode)
    if mode == "bilinear" and resized.dtype != torch.float64:
        resized = resized.float()
    if not isinstance(image, MetaTensor):
        return resized
    return _with_metadata_of(image, resized, _scaled_affine(image.affine, image.shape[1:3], target))


def _with_metadata_of(image: MetaTensor, values: torch.Tensor, affine: torch.Tensor) -> MetaTensor:
    result = MetaTensor(values, meta=deepcopy(image.meta), applied_operations=deepcopy(image.applied_operations))
    result.affine = affine
    return result


def _interpolate(image: torch.Tensor, size: list[int], mode: str) -> torch.Tensor:
    # class indices are exact in float32; bilinear weights in half precision are not
    values = image if image.dtype == torch.float64 else image.float()
    slices = values.movedim(-1, 0) if image.ndim == 4 else values[None]
    if mode == "bilinear":
        out = torch.nn.functional.interpolate(slices, size, mode="bilinear", antialias=True, align_corners=False)
    else:
        out = torch.nn.functional.interpolate(slices, size, mode="nearest-exact").to(image.dtype)
    return out.movedim(0, -1).contiguous() if image.ndim == 4 else out[0]


def _scaled_affine(affine: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """The affine whose pixels are those of `new` over the same field of view; borders stay where they are."""
    depth = affine.shape[-1] - 3  # an axis that keeps its size, where the affine has three
    scale = scale_affine((*(int(n) for n in old), *[1] * depth), (*new, *[1] * depth))
    return affine @ torch.as_tensor(scale, dtype=affine.dtype, device=affine.device)


class ResizeInPlane(InvertibleTransform):
    """`resize_in_plane` as a transform that MONAI's `Invertd` can undo, with any number of channels.

    Args:
        spatial_size: new `(H, W)`.
        mode: "bilinear" or "nearest"; the inverse uses the same, or nearest where `Invertd(nearest_interp=True)`.
    """

    def __init__(self, spatial_size: Sequence[int], mode: str = "bilinear") -> None:
        self.spatial_size = [int(n) for n in spatial_size]
        self.mode = mode
        # MONAI adds this attribute at the first use; the key of a latent cache must not depend on whether there was one
        self._init_trace_threadlocal()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        result = resize_in_plane(image, self.spatial_size, self.mode)
        if isinstance(result, MetaTensor) and get_track_meta():
            info = {**self.get_transform_info(), TraceKeys.ORIG_SIZE: tuple(int(n) for n in image.shape[1:])}
            info[TraceKeys.EXTRA_INFO] = {"mode": self.mode}
            result.push_applied_operation(info)
        return result

    def inverse(self, image: torch.Tensor) -> torch.Tensor:
        """Back to the height and width that the image had, which the trace holds."""
        transform = self.pop_transform(image)
        return resize_in_plane(image, transform[TraceKeys.ORIG_SIZE][:2], transform[TraceKeys.EXTRA_INFO]["mode"])


class ResizeInPlaned(MapTransform, InvertibleTransform):
    """Dictionary form of `ResizeInPlane`.

    Args:
        keys: keys that hold `(C, H, W)` or `(C, H, W, Z)`.
        spatial_size: new `(H, W)`.
        mode: "bilinear" for images, "nearest" for masks; one for all keys.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        mode: str = "bilinear",
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.resize = ResizeInPlane(spatial_size, mode)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.resize(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.resize.inverse(result[key])
        return result


class UprightVolumed(MapTransform, InvertibleTransform):
    """Turn volumes to the axes `UPRIGHT`; pictures and single slices, which are upright already, stay as they are.

    MONAI's `Orientationd` does the turning; alone it does not fit, as it would turn pictures by two of the letters.

    Args:
        keys: keys that hold `(C, X, Y, Z)` as a `MetaTensor` in file orientation, or `(C, H, W)`.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(self, keys: KeysCollection, *, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.orientation = Orientation(axcodes=UPRIGHT, labels=None)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if image.ndim == 4:
                if not isinstance(image, MetaTensor):
                    raise ValueError(
                        f"{key}: expected a volume with its affine (MetaTensor), but got a {type(image).__name__}; "
                        "load it with shared.transforms.segmentation_images.LoadPictured"
                    )
                result[key] = self.orientation(image)
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            if result[key].ndim == 4:
                result[key] = self.orientation.inverse(result[key])
        return result


class FlipByItemd(MapTransform):
    """Flip upright pictures as the item says: bit 1 of `item["flip"]` reverses the columns, bit 2 the rows.

    MONAI's `RandFlipd` does not fit: latents are computed once and kept, so a flip is a property of the item
    (`shared.segmentation_items`) and every variant has latents of its own. An item without `flip` stays as it is.

    Args:
        keys: keys that hold upright `(C, H, W)` or `(C, H, W, Z)`.
        allow_missing_keys: do not complain about absent keys.

    Raises:
        ValueError: `flip` is not 0, 1, 2 or 3.
    """

    def __init__(self, keys: KeysCollection, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        flip = result.get("flip", 0)
        if flip not in (0, 1, 2, 3):
            raise ValueError(f"flip: expected 0 (none), 1 (columns), 2 (rows) or 3 (both), but got {flip!r}")
        axes = [axis for bit, axis in ((1, 2), (2, 1)) if int(flip) & bit]
        for key in self.key_iterator(result):
            if axes:
                result[key] = _flipped(result[key], axes)
        return result


def _flipped(image: torch.Tensor, axes: list[int]) -> torch.Tensor:
    if not isinstance(image, MetaTensor):
        return image.flip(axes)
    mirror = torch.eye(len(image.affine), dtype=image.affine.dtype)
    for axis in axes:
        mirror[axis - 1, axis - 1], mirror[axis - 1, -1] = -1, image.shape[axis] - 1
    return _with_metadata_of(image, image.as_tensor().flip(axes), image.affine @ mirror)
