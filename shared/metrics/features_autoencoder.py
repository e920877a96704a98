# SPDX-License-Identifier: Apache-2.0
"""Features of an autoencoder of one's own, where no pretrained network is at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shared.metrics.features import check_images


class AutoencoderFeatures:
    """Mean and standard deviation over space of each channel of a frozen autoencoder's encoding.

    The stated alternative to pretrained features for images that no public network knows. Two cautions, which the
    reader of a report needs: distances compare only with distances of the same autoencoder's features, and images that
    this autoencoder decoded lie on its own manifold, which flatters every generator that uses it.

    The weights are those the autoencoder has when images are described, not when the object is made: a bundle loads
    them at the start of a run.

    Args:
        autoencoder: ``monai.networks.nets.AutoencoderKL`` or, for ``layer="posterior_mean"``, any object with
            ``encode(x) -> (mean, sigma)``.
        layer: "feature_map": the input of the encoder's last convolution (2 K features for K channels of the deepest
            level); "posterior_mean": the mean of the latent (2 C features for C latent channels), which needs fewer
            images for a stable Fréchet distance.
        name: printed with every figure.
        device: where the images are encoded; the autoencoder is moved there. None leaves it where it is.
        batch_size: images per forward pass.

    Raises:
        ValueError: unknown layer.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        layer: str = "feature_map",
        name: str = "features of the bundle's own autoencoder",
        device: torch.device | str | None = None,
        batch_size: int = 16,
    ) -> None:
        if layer not in ("feature_map", "posterior_mean"):
            raise ValueError(f"layer: expected feature_map or posterior_mean, got {layer!r}")
        self.autoencoder: Any = autoencoder if device is None else autoencoder.to(torch.device(device))
        self.layer, self.name, self.batch_size = layer, name, batch_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, F) float32 on the CPU: all means, then all standard deviations."""
        device = next(self.autoencoder.parameters()).device
        was_training = self.autoencoder.training
        self.autoencoder.eval()
        try:
            maps = (self._map(check_images(batch.to(device))) for batch in images.split(self.batch_size))
            moments = [torch.cat((m.mean((2, 3)), m.std((2, 3), correction=0)), dim=1).float().cpu() for m in maps]
            return torch.cat(moments)
        finally:
            self.autoencoder.train(was_training)

    def _map(self, images: torch.Tensor) -> torch.Tensor:
        if self.layer == "posterior_mean":
            return self.autoencoder.encode(images)[0]
        seen: list[torch.Tensor] = []
        last = self.autoencoder.encoder.blocks[-1]
        hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self.autoencoder.encode(images)
        finally:
            hook.remove()
        return seen[0]
