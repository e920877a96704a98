# SPDX-License-Identifier: Apache-2.0
"""What a segmentation has to beat: a plain U-Net trained on the same data, and the mean of the training masks.

A baseline is a callable ``image (1|3, h, w[, Z]) in [0, 1] -> probabilities (N, h, w[, Z])`` on the CPU, or None where
it cannot be had, with a ``note`` that goes into the table. None of them sees the label it is scored against.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from shared.metrics.baselines import LateWeights
from shared.transforms.in_plane import resize_in_plane


class Segmenter(Protocol):
    """Image -> probabilities, or None and a note that says why."""

    note: str

    def __call__(self, image: torch.Tensor) -> torch.Tensor | None: ...


class SegmentationBaseline:
    """A network that segments pictures directly, and volumes slice by slice.

    Args:
        network: (B, channels, h, w) -> scores (B, N, h, w), of which this takes the sigmoid (N = 1) or the softmax.
        weights_path: its state dict, read at the first call.
        num_classes: N: 1 for one foreground class, else the number of classes including background 0.
        channels: of the network's input; a grey image is repeated to 3.
        device: where it runs.
        batch_size: slices per forward pass.
        required: True: missing weights are an error, at once. False: they are a row without a value that says so.
        remedy: how to get the weights.

    Raises:
        FileNotFoundError: ``required`` and no such file.
        ValueError: (first call) the file holds other weights; the network returns another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        weights_path: str | os.PathLike[str],
        *,
        num_classes: int = 1,
        channels: int = 3,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        required: bool = False,
        remedy: str = "Train it with configs/train_baseline.json.",
    ) -> None:
        self.network, self.num_classes, self.channels = network, num_classes, channels
        self.device, self.batch_size = torch.device(device), batch_size
        self.weights = LateWeights(
            network, weights_path, what="the segmentation baseline", device=device, required=required, remedy=remedy
        )
        self.note = "direct segmentation trained on the same data"

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor | None:
        if not self.weights.loaded():
            self.note = self.weights.absence
            return None
        plain = image.detach().as_subclass(torch.Tensor).float()
        slices = plain.movedim(-1, 0) if plain.ndim == 4 else plain[None]
        if slices.shape[1] == 1:
            slices = slices.expand(-1, self.channels, -1, -1)
        scores = torch.cat([self.network(part.to(self.device)).float() for part in slices.split(self.batch_size)])
        expected = (len(slices), self.num_classes, *slices.shape[2:])
        if scores.shape != expected:
            raise ValueError(f"network: expected scores {expected} of the baseline, got {tuple(scores.shape)}")
        probabilities = (scores.sigmoid() if self.num_classes == 1 else scores.softmax(dim=1)).cpu()
        return probabilities.movedim(0, -1) if plain.ndim == 4 else probabilities[0]


class MeanTrainingMask:
    """The mean of the training masks, the same answer for every image: what the place in the picture alone tells.

    Fitted at the first call; masks of other sizes are resized to the first image's.

    Args:
        training_data: map-style dataset of items with ``label_key``; read lazily.
        num_classes: 1 for one foreground class, else the number of classes including background 0.
        label_key: class index (1, H, W[, Z]) upright; each slice counts as a mask.
        max_items: the most items read, spread evenly over the dataset; None reads all.

    Raises:
        ValueError: (first call) the dataset is empty.
    """

    def __init__(
        self, training_data: Any, *, num_classes: int = 1, label_key: str = "label", max_items: int | None = 1000
    ) -> None:
        self.training_data: Any = training_data
        self.num_classes, self.label_key, self.max_items = num_classes, label_key, max_items
        self._mean: torch.Tensor | None = None
        self.note = "mean of the training masks, whatever the image"

    def _fit(self, size: torch.Size) -> torch.Tensor:
        count = len(self.training_data)
        if not count:
            raise ValueError("training_data: expected items for MeanTrainingMask, got none; check the training section")
        used = count if self.max_items is None else min(count, self.max_items)
        total, slices = torch.zeros(max(2, self.num_classes), *size), 0
        for row in np.linspace(0, count - 1, used).round().astype(int):
            label = torch.as_tensor(self.training_data[int(row)][self.label_key]).as_subclass(torch.Tensor)
            masks = torch.stack([(label[0] == index).float() for index in range(len(total))])
            resized = resize_in_plane(masks, size, "bilinear")
            total += resized if resized.ndim == 3 else resized.sum(-1)
            slices += 1 if resized.ndim == 3 else resized.shape[-1]
        self.note = f"mean of {slices} training masks, whatever the image"
        return (total / slices)[1:] if self.num_classes == 1 else total / slices

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self._mean is None or self._mean.shape[1:] != image.shape[1:3]:
            self._mean = self._fit(image.shape[1:3])
        return self._mean if image.ndim == 3 else self._mean[..., None].expand(*self._mean.shape, image.shape[-1])
