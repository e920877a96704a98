# SPDX-License-Identifier: Apache-2.0
"""What the segmentation network makes of a few fixed images while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shared.handlers.previews import evaluating
from shared.pictures import spread_indices
from shared.segmentation_picture import comparison_row
from shared.segmentation_probability import split_agreement


class SegmentationPreview:
    """Rows image | truth | prediction | probability (| agreement) of the same few items, with the same seeds.

    For ``PreviewGrid`` with ``columns: 1``. Items stand in the middle of ``num_images`` equal parts of the dataset; a
    dataset may have fewer (the published preview divides by ``n // 8`` and stops with fewer than eight). Items with a
    ``class_id`` have a binary label: of the probabilities only that class is shown (0: any class).

    Args:
        dataset: gives items with image ``(1 or 3, H, W)`` in [0, 1] and label ``(1, H, W)``, a class index, all of one
            size.
        network: network to sample from, e.g. the moving average.
        sampler: ``sampler(images, network, seeds=...)`` gives ``(n, N, H, W)`` probabilities, N = 1 of one foreground,
            else of each class; with several samples (its ``num_samples``) the agreement is one more channel.
        num_images: most items shown.
        num_classes: N.
        image_key: key of the image.
        label_key: key of the label.
        threshold: foreground is above it.
        seed: seed of the first item; the next ones count up.
        device: where the network is; ``None`` asks the network.
    """

    def __init__(
        self,
        dataset: Any,
        network: nn.Module,
        sampler: Callable[..., torch.Tensor],
        num_images: int = 8,
        num_classes: int = 1,
        *,
        image_key: str = "image",
        label_key: str = "label",
        threshold: float = 0.5,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images: expected a whole number of at least 1, got {num_images!r}.")
        self.dataset, self.network, self.sampler = dataset, network, sampler
        self.num_images, self.num_classes = num_images, num_classes
        self.image_key, self.label_key, self.threshold = image_key, label_key, threshold
        self.seed, self.device = seed, device

    def __call__(self) -> torch.Tensor:
        """``(n, 3, H', W')`` in [0, 1], a picture for each item."""
        if len(self.dataset) == 0:
            raise ValueError("dataset: expected at least one item to show, got none; check the data list.")
        items = [self.dataset[index] for index in spread_indices(len(self.dataset), self.num_images)]
        images = torch.stack([torch.as_tensor(item[self.image_key]).as_subclass(torch.Tensor) for item in items])
        seeds = [self.seed + index for index in range(len(items))]
        device = self.device or next(self.network.parameters()).device
        with evaluating(self.network):
            results = self.sampler(images.to(device), self.network, seeds=seeds)
        num_samples = 2 if results.shape[1] > self.num_classes else 1
        return torch.stack([self._row(*pair, num_samples) for pair in zip(items, results, strict=True)])

    def _row(self, item: dict[str, Any], result: torch.Tensor, num_samples: int) -> torch.Tensor:
        probability, agreement = split_agreement(result, num_classes=self.num_classes, num_samples=num_samples)
        if self.num_classes > 1 and "class_id" in item:
            class_id = int(item["class_id"])
            probability = probability[class_id][None] if class_id else 1 - probability[:1]
        return comparison_row(
            item[self.image_key],
            item[self.label_key],
            probability,
            agreement=agreement,
            threshold=self.threshold,
        )
