# SPDX-License-Identifier: Apache-2.0
"""Images and masks alike as pictures, for the autoencoder that has to code both."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from shared.transforms.channels import ThreeChannelsd
from shared.transforms.in_plane import resize_in_plane
from shared.transforms.masks import LoadMaskd, MaskToPictured
from shared.transforms.segmentation_images import LoadPictured


class LoadPictureOrMaskd(MapTransform):
    """Load what ``shared.segmentation_items.autoencoder_items`` lists: ``(3, H, W)`` float32 in [0, 1].

    ``item["kind"]`` is "image" or "mask". Masks become black and white, as the diffusion stage codes them: of several
    classes that of ``item["class_id"]``, or, without one, all together.

    Args:
        keys: keys that hold paths.
        spatial_size: working size ``[H, W]``.
        window: see :class:`~shared.transforms.segmentation_images.LoadPictured`.
        num_classes: see :class:`~shared.transforms.masks.LoadMaskd`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as the two loaders say, or another kind.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        spatial_size: Sequence[int],
        window: Sequence[float] | None = None,
        num_classes: int = 1,
    ) -> None:
        super().__init__(keys)
        self.spatial_size = tuple(spatial_size)
        self.num_classes = num_classes
        self.load_picture = LoadPictured(keys, window=window)
        self.load_mask = LoadMaskd(keys, num_classes=num_classes)
        self.three_channels = ThreeChannelsd(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        kind = data.get("kind")
        if kind not in ("image", "mask"):
            raise ValueError(f"kind: expected 'image' or 'mask', got {kind!r}; use autoencoder_items.")
        if kind == "image":
            result = self.three_channels(self.load_picture(data))
            for key in self.key_iterator(result):
                result[key] = resize_in_plane(result[key], self.spatial_size, "bilinear")
            return result
        item = {"class_id": 0, **data} if self.num_classes > 1 else dict(data)
        result = self.load_mask(item)
        for key in self.key_iterator(result):
            result[key] = resize_in_plane(result[key], self.spatial_size, "nearest")
            result = MaskToPictured(key, name=key)(result)
        return result
