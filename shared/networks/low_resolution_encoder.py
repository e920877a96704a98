# SPDX-License-Identifier: Apache-2.0
"""Encoder from low-resolution features to the latent of the maps at twice the resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from torch import nn

from shared.networks.vq_autoencoder import VQEncoder, normalised, same_convolution


class LowResolutionEncoder(nn.Module):
    """Predicts, from features on the coarse grid, what the autoencoder's encoder says of the maps (handbook,
    spec/dmri2noddi.md, section 4.2).

    Trilinear upsampling by 2; parallel convolutions of several kernel sizes, concatenated (cross embedding,
    arXiv:2108.00154); the VQ-GAN's encoder of one level beside a single convolution of stride 2; a head that ends at
    the latent's channels. MONAI core has neither the parallel kernels nor this encoder. The large kernels see the
    upsampled volume: 13^3 alone costs 2 * 13^3 * F * 16 operations for each of its voxels.

    Args:
        in_channels: features F.
        num_hiddens: width of the encoder; its layers at the latent's size have twice as many channels.
        embedding_dim: channels of the latent.
        kernel_sizes: odd sizes of the parallel convolutions.
        kernel_channels: output channels of each of them.
        norm_num_groups: groups of the encoder's normalisations.
        head_num_groups: groups of the head's normalisation.

    Raises:
        ValueError: when ``kernel_sizes`` and ``kernel_channels`` do not fit together, or a size is even.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_hiddens: int = 128,
        embedding_dim: int = 8,
        kernel_sizes: Sequence[int] = (3, 5, 9, 13),
        kernel_channels: Sequence[int] = (64, 32, 16, 16),
        norm_num_groups: int = 32,
        head_num_groups: int = 8,
    ) -> None:
        super().__init__()
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(
                f"kernel_sizes: expected odd sizes, whose output keeps the grid, got {list(kernel_sizes)}; add 1 to "
                "the even ones."
            )
        if len(kernel_sizes) != len(kernel_channels):
            raise ValueError(
                f"kernel_channels: expected {len(kernel_sizes)} numbers, one for each of kernel_sizes "
                f"{list(kernel_sizes)}, got {list(kernel_channels)}; change both together."
            )
        self.in_channels = in_channels
        self.upsample = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.kernels = nn.ModuleList(
            Convolution(3, in_channels, channels, kernel_size=size, conv_only=True)
            for size, channels in zip(kernel_sizes, kernel_channels, strict=True)
        )
        self.encoder = VQEncoder(
            in_channels=sum(kernel_channels), num_hiddens=num_hiddens, num_levels=1, norm_num_groups=norm_num_groups
        )
        width = self.encoder.out_channels
        self.shortcut = Convolution(3, sum(kernel_channels), width, strides=2, kernel_size=3, conv_only=True)
        self.head = nn.Sequential(normalised(width, head_num_groups), same_convolution(width, embedding_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Predict the latent before quantisation.

        Args:
            features: ``(B, F, X, Y, Z)`` in [0, 1], any sides.

        Returns:
            ``(B, embedding_dim, X, Y, Z)``, the latent of the maps ``(B, 3, 2X, 2Y, 2Z)``.

        Raises:
            ValueError: for another number of features.
        """
        if features.shape[1] != self.in_channels:
            raise ValueError(
                f"in_channels: expected {self.in_channels} features, got {features.shape[1]}; the weights belong to "
                "the features they were trained on, so use the same shells, orders or directions."
            )
        upsampled = self.upsample(features)
        embedded = torch.cat([kernel(upsampled) for kernel in self.kernels], dim=1)
        return self.head(self.encoder(embedded) + self.shortcut(embedded))
