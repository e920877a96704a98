# SPDX-License-Identifier: Apache-2.0
"""Discriminator of a three-dimensional VQ-GAN: one looks at a slice, one at the volume."""

from __future__ import annotations

import torch
from torch import nn


class SliceVolumeDiscriminator(nn.Module):
    """Judges one random slice of each volume and the whole volume (handbook, spec/dmri2noddi.md, section 4.2).

    ``monai.networks.nets.MultiScalePatchDiscriminator`` does not fit: all of its parts see the same input. Published
    parts: 64 channels, three layers and padding 2, of two and of three dimensions.

    Args:
        slice_discriminator: ``monai.networks.nets.PatchDiscriminator`` with ``spatial_dims=2``.
        volume_discriminator: ``monai.networks.nets.PatchDiscriminator`` with ``spatial_dims=3``.
    """

    def __init__(self, slice_discriminator: nn.Module, volume_discriminator: nn.Module) -> None:
        super().__init__()
        self.slice_discriminator = slice_discriminator
        self.volume_discriminator = volume_discriminator

    def forward(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        """Decide where the volumes look real.

        Args:
            x: ``(B, C, X, Y, Z)``. For each volume a slice across X is drawn by torch's generator of its device.

        Returns:
            ``[[of slices (B, 1, y, z), of volumes (B, 1, x, y, z)]]``. The last entry is the list of both decisions,
            raw scores that ``shared.losses.HingeAdversarialLoss`` takes.
        """
        index = torch.randint(x.shape[2], (len(x),), device=x.device)
        slices = x[torch.arange(len(x), device=x.device), :, index]
        return [[self.slice_discriminator(slices)[-1], self.volume_discriminator(x)[-1]]]
