# SPDX-License-Identifier: Apache-2.0
"""A small classifier of chest findings, the independent judge of prompt agreement on phantoms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import DenseNet
from torch import nn


class FindingClassifier(nn.Module):
    """MONAI's DenseNet with two coordinate channels and access to its penultimate features.

    The findings differ by side (left or right effusion), which the average over space at the end hides from a plain
    convolutional network: two constant channels with the row and column position in [-1, 1] make it visible (Liu et
    al., arXiv:1807.03247). The core network is used as it is; only its last layers are called in two parts.

    Args:
        num_classes: number of findings K.
        init_features: channels after the first convolution.
        growth_rate: channels that each dense layer adds.
        block_config: dense layers per resolution; the image is halved before the first and between blocks.
        dropout_prob: dropout in each dense layer.
    """

    def __init__(
        self,
        *,
        num_classes: int = 7,
        init_features: int = 32,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 6, 8, 6),
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = DenseNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=num_classes,
            init_features=init_features,
            growth_rate=growth_rate,
            block_config=block_config,
            bn_size=4,
            dropout_prob=dropout_prob,
        )
        self.min_size = 2 ** (len(block_config) + 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features: images (B, 1, H, W) in [0, 1] -> (B, F), >= 0.

        Raises:
            ValueError: another shape, or a side smaller than the network's stride.
        """
        if images.ndim != 4 or images.shape[1] != 1 or min(images.shape[-2:]) < self.min_size:
            raise ValueError(
                f"images: expected (B, 1, H, W) with every side >= {self.min_size}, got {tuple(images.shape)}"
            )
        rows = torch.linspace(-1, 1, images.shape[-2], device=images.device, dtype=images.dtype)
        columns = torch.linspace(-1, 1, images.shape[-1], device=images.device, dtype=images.dtype)
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(images), -1, -1, -1)
        # [0, 1] -> [-1, 1], the range of the position channels
        x = self.network.features(torch.cat([2 * images - 1, position], dim=1))
        for layer in self.network.class_layers[:-1]:
            x = layer(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [0, 1] -> logits (B, K)."""
        return self.network.class_layers[-1](self.features(images))
