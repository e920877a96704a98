# SPDX-License-Identifier: Apache-2.0
"""LPIPS distance from local weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import squeezenet1_1

from shared.assets import asset_path, get_asset, missing_asset, verify_file
from shared.networks.frozen import FrozenModule

# Layers of SqueezeNet 1.1 after which LPIPS compares features, and their channels.
_TAPS = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}
_SMALLEST_SIDE = 17


class LpipsSqueeze(FrozenModule):
    """LPIPS version 0.1 with the SqueezeNet 1.1 trunk (Zhang et al. 2018, arXiv:1801.03924): the perceptual loss of the
    autoencoder.

    ``monai.losses.PerceptualLoss(network_type="squeeze")`` does not fit: whatever its ``pretrained`` says, it downloads
    the trunk when constructed and accepts no path, it lets the loss see [0, 1] images as if they were [-1, 1], and its
    weights enter the state dict of whatever holds it. ``lpips.LPIPS`` downloads too. Here both files are local, checked
    before they are read, and read as plain tensors. Always float32: in half precision the feature norms underflow.

    Args:
        trunk_path: torchvision's ``squeezenet1_1-b8a52dc0.pth`` (asset ``squeezenet1_1``).
        linear_path: LPIPS linear layers ``squeeze.pth``; None for the file inside the installed ``lpips`` package,
            which must have the checksum of the asset table.
        trunk_sha256: expected checksum of the trunk (or its first 8 or more digits); None skips the check.
        normalize: map images from [0, 1] to the [-1, 1] LPIPS was fitted on. False feeds them unchanged, as the
            published chest X-ray training did with images in [0, 1].
        reduction: "mean" over the batch, or "none" for one distance per image.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it and how to train without it.
        ValueError: checksum differs, or the file does not hold these weights.
    """

    def __init__(
        self,
        trunk_path: str | os.PathLike,
        *,
        linear_path: str | os.PathLike | None = None,
        trunk_sha256: str | None = None,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
        trunk_path = Path(trunk_path)
        if not trunk_path.is_file():
            raise missing_asset("squeezenet1_1", trunk_path)
        linear_sha256 = None
        if linear_path is None:
            linear_path, linear_sha256 = asset_path("lpips-squeeze-linear"), get_asset("lpips-squeeze-linear").sha256
        linear_path = Path(linear_path)
        if not linear_path.is_file():
            raise missing_asset("lpips-squeeze-linear", linear_path)
        verify_file(trunk_path, trunk_sha256)
        verify_file(linear_path, linear_sha256)
        super().__init__(_SqueezeDistance(_load_trunk(trunk_path), _load_linear(linear_path)))
        self.normalize = normalize
        self.reduction = reduction

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Distance between images ``(B, 1 or 3, H, W)`` in [0, 1] (see ``normalize``), every side at least 17 pixels.

        Returns:
            Scalar, or ``(B,)`` with reduction "none"; 0 for equal images. Gradients reach the images, never the
            weights.

        Raises:
            ValueError: shapes differ, or are not of this form.
        """
        shape = tuple(input.shape)
        if shape != tuple(target.shape) or len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"input, target: expected two batches of the shape (B, 1 or 3, H, W) with sides of at least "
                f"{_SMALLEST_SIDE}, got {shape} and {tuple(target.shape)}"
            )
        with torch.autocast(input.device.type, enabled=False):
            images = [image.float().expand(-1, 3, -1, -1) for image in (input, target)]
            if self.normalize:
                images = [2 * image - 1 for image in images]
            distance = self.frozen(*images)
        return distance.mean() if self.reduction == "mean" else distance

    @torch.no_grad()
    def pairwise(self, images: torch.Tensor) -> torch.Tensor:
        """Distances (n, n) of all pairs of ``images`` (n, 1 or 3, H, W) in [0, 1] (see ``normalize``).

        The trunk sees each image once, not once for each of its pairs.

        Raises:
            ValueError: the images are not of this form.
        """
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"images: expected a batch of the shape (n, 1 or 3, H, W) with sides of at least {_SMALLEST_SIDE}, "
                f"got {shape}"
            )
        with torch.autocast(images.device.type, enabled=False):
            pictures = images.float().expand(-1, 3, -1, -1)
            network: Any = self.frozen
            return network.pairwise(2 * pictures - 1 if self.normalize else pictures)


class _SqueezeDistance(nn.Module):
    """Weighted mean squared difference of unit-length features; images in [-1, 1] (B, 3, H, W) -> (B,)."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: nn.Sequential, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features
        self.weights = nn.ParameterList(weights)
        # ImageNet mean and deviation, expressed for images in [-1, 1] (LPIPS 0.1).
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pairs = zip(self._unit_features(x), self._unit_features(y), self.weights, strict=True)
        distances = [((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2)) for a, b, weight in pairs]
        return torch.stack(distances).sum(dim=0)

    def pairwise(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) in [-1, 1] -> (n, n)."""
        total = images.new_zeros(len(images), len(images))
        for taps, weight in zip(self._unit_features(images), self.weights, strict=True):
            for row, tap in enumerate(taps):
                total[row] += ((taps - tap).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total

    def _unit_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - self.shift) / self.scale
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                # The constant sits inside the root: lpips adds it outside, whose gradient at zero features is NaN.
                taps.append(x * (x.square().sum(dim=1, keepdim=True) + 1e-20).rsqrt())
        return taps


def _load_trunk(path: Path) -> nn.Sequential:
    # Built without memory, so that no random numbers are drawn: a loss must not move the seed of the training.
    with torch.device("meta"):
        network = squeezenet1_1(weights=None)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state, strict=True, assign=True)
    except Exception as error:
        raise ValueError(f"{path}: not the weights of torchvision's SqueezeNet 1.1: {error}") from error
    return network.features.float()


def _load_linear(path: Path) -> list[torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = [state[f"lin{index}.model.1.weight"].float() for index in range(len(_TAPS))]
    except Exception as error:
        raise ValueError(f"{path}: not the LPIPS linear layers for SqueezeNet: {error}") from error
    shapes = [tuple(weight.shape) for weight in weights]
    expected = [(1, channels, 1, 1) for channels in _TAPS.values()]
    if shapes != expected:
        raise ValueError(f"{path}: expected LPIPS linear layers of the shapes {expected}, got {shapes}")
    return weights
