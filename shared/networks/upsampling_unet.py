# SPDX-License-Identifier: Apache-2.0
"""Baseline of super-resolution: a plain U-Net on upsampled features."""

from __future__ import annotations

import torch
from torch import nn


class UpsamplingUNet(nn.Module):
    """Trilinear upsampling, then any U-Net that keeps the grid.

    Args:
        unet: e.g. ``monai.networks.nets.UNet`` with ``spatial_dims=3``, from the features to the maps.
        scale: factor between the grids.
        divisor: what the U-Net needs the sides to be multiples of, the product of its strides; the upsampled features
            are padded behind with their outermost voxels and the result is cropped back.

    Raises:
        ValueError: for a scale or a divisor below 1.
    """

    def __init__(self, unet: nn.Module, *, scale: int = 2, divisor: int = 1) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("divisor", divisor)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}; 1 changes nothing.")
        self.unet = unet
        self.divisor = divisor
        self.upsample = nn.Upsample(scale_factor=scale, mode="trilinear", align_corners=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, X, Y, Z)`` to maps ``(B, C, scale * X, scale * Y, scale * Z)``; nominal range [0, 1], not
        clamped."""
        upsampled = self.upsample(features)
        sides = upsampled.shape[2:]
        padding = [amount for side in reversed(sides) for amount in (0, -side % self.divisor)]
        x, y, z = sides
        return self.unet(nn.functional.pad(upsampled, padding, mode="replicate"))[..., :x, :y, :z]
