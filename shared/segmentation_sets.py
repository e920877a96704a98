# SPDX-License-Identifier: Apache-2.0
"""Sets of images with masks that take the list of a data set, or the plain pairs that MONAI Label puts in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.data import Dataset

from shared.latent_cache import LatentDataset
from shared.segmentation_items import named_items, training_items


class SegmentationTrainingSet(LatentDataset):
    """Slices, classes and flips of images with masks; the masks' latents are computed once.

    `LatentDataset` with `training_items` inside: MONAI Label replaces `train#dataset#data` by pairs of an image and a
    mask, which would otherwise be neither flipped nor cut into slices.

    Args:
        data: as `training_items` takes it: `{"image": path, "label": path}`, with or without more.
        num_classes: as `training_items` has it.
        flips: as `training_items` has it.
        options: of `LatentDataset`.

    Raises:
        FileNotFoundError, ValueError: as `training_items` and `LatentDataset`.
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], *, num_classes: int = 1, flips: str = "both", **options: Any
    ) -> None:
        super().__init__(data=training_items(data, num_classes=num_classes, flips=flips), **options)


class SegmentationValidationSet(Dataset):
    """`monai.data.Dataset` of images with masks, each with a `name`, from which the seed of its noise is made.

    Args:
        data: items with `image` and `label`; those without a `name` are called after their file.
        transform: from an item to what a validation needs.

    Raises:
        ValueError: no item: nothing could be compared, and no weights would ever be saved.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None) -> None:
        if not data:
            raise ValueError(
                "validate#dataset#data: expected at least one image with its mask, got none: weights are saved by "
                "their Dice on them; add masks, or ask MONAI Label for a val_split above 0."
            )
        super().__init__(data=_with_names_where_missing(data), transform=transform)


def _with_names_where_missing(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if all(item.get("name") for item in data):
        return [dict(item) for item in data]
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(item["image"])) for item in data])
    return named_items(data, folder)
