# SPDX-License-Identifier: Apache-2.0
"""NODDI maps at twice the resolution of diffusion MRI: the three networks under one state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from shared.weights import load_weights


def with_map_id(features: torch.Tensor, map_ids: torch.Tensor, num_maps: int) -> torch.Tensor:
    """Say which map is wanted: constant channels, 1 for the wanted map and 0 for the others, after the features.

    Args:
        features: ``(B, F, X, Y, Z)``.
        map_ids: integers ``(B,)``.
        num_maps: number of maps.

    Returns:
        ``(B, F + num_maps, X, Y, Z)``.
    """
    one_hot = torch.nn.functional.one_hot(map_ids.long(), num_maps).to(features)
    channels = one_hot[:, :, None, None, None].expand(-1, -1, *features.shape[2:])
    return torch.cat((features, channels), dim=1)


class NoddiModel(nn.Module):
    """VQ-GAN of the maps, low-resolution encoder and denoising U-Net.

    The encoder estimates the latent of the high-resolution maps from the features of low-resolution diffusion MRI. On
    its own, decoded, that is the deterministic result; normalised and put beside the noisy latent it conditions the
    diffusion model. ``shared.networks.latent_diffusion.LatentDiffusionModel`` does not fit: these latents have a mean
    and a standard deviation of their own in every channel instead of one scale factor.

    The autoencoder is always frozen and in evaluation mode, the encoder as well (it is trained in a stage of its own,
    outside this module).

    Args:
        autoencoder: ``shared.networks.vq_autoencoder.VQAutoencoder``.
        encoder: ``shared.networks.low_resolution_encoder.LowResolutionEncoder``.
        unet: 3-D ``monai.networks.nets.DiffusionModelUNet`` with twice the latent's channels as input.
        num_maps: maps: NDI, ODI, FWF.
        one_map: one map at a time, as published: the autoencoder has one channel, and the encoder is told which map
            by :func:`with_map_id`. False models all maps jointly as channels.
        quantize: decode the nearest codes, as published; false decodes the continuous latent.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor

    def __init__(
        self,
        autoencoder: Any,
        encoder: nn.Module,
        unet: nn.Module,
        *,
        num_maps: int = 3,
        one_map: bool = False,
        quantize: bool = True,
    ) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder.requires_grad_(False)
        self.encoder = encoder.requires_grad_(False)
        self.unet = unet
        self.num_maps, self.one_map, self.quantize = num_maps, one_map, quantize
        channels = self.autoencoder.codebook.embedding_dim
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.autoencoder.eval()
        self.encoder.eval()
        return self

    @property
    def trained(self) -> nn.ModuleDict:
        """What a checkpoint of the diffusion stage holds; the frozen parts lie in files of their own."""
        return nn.ModuleDict({"unet": self.unet})

    @property
    def latent_channels(self) -> int:
        return len(self.latent_mean)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, C, X, Y, Z)`` to mean 0 and standard deviation 1 in every channel, float32."""
        return (latents.float() - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`normalize`."""
        return latents.float() * _per_channel(self.latent_std) + _per_channel(self.latent_mean)

    @torch.no_grad()
    def condition(self, features: torch.Tensor, map_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised estimate of the latent ``(B, C, X, Y, Z)`` from features ``(B, F, X, Y, Z)``.

        Args:
            features: in [0, 1].
            map_ids: integers ``(B,)`` with ``one_map``, else ``None``.
        """
        if self.one_map:
            if map_ids is None:
                raise ValueError("map_id: expected one per item with one_map, got none; give the items a map_id.")
            features = with_map_id(features, map_ids, self.num_maps)
        return self.normalize(self.encoder(features))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents ``(B, C, X, Y, Z)`` to maps ``(B, 3 | 1, 2X, 2Y, 2Z)``; nominal [0, 1], not clamped."""
        return self.autoencoder.decode(self.denormalize(latents), quantize=self.quantize)

    def forward(
        self,
        features: torch.Tensor | None,
        noisy: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        map_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Estimate the maps without diffusion; or, given noisy latents, predict their noise.

        Args:
            features: ``(B, F, X, Y, Z)`` in [0, 1]; ``None`` with ``condition``.
            noisy: noisy normalised latents ``(B, C, X, Y, Z)``; ``None`` estimates the maps.
            timesteps: integers ``(B,)`` for ``noisy``.
            condition: ``condition(features)``, when it is at hand.
            map_ids: integers ``(B,)`` for ``noisy`` with ``one_map``.

        Returns:
            Without ``noisy`` the maps ``(B, num_maps, 2X, 2Y, 2Z)`` in [0, 1], deterministic. With ``noisy`` its noise
            ``(B, C, X, Y, Z)``.

        Raises:
            ValueError: without features and condition, or for noisy latents without timesteps.
        """
        if features is None and condition is None:
            raise ValueError("image: expected features or their condition, got neither; pass one of the two.")
        if noisy is None:
            assert features is not None, "the deterministic estimate starts from features"
            return self.estimate(features)
        if timesteps is None:
            raise ValueError("timesteps: expected one per noisy latent, got none; pass the level of the noise.")
        if condition is None:
            assert features is not None
            condition = self.condition(features, map_ids)
        return self.unet(torch.cat((noisy, condition.to(noisy.dtype)), dim=1), timesteps)

    def estimate(self, features: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, num_maps, 2X, 2Y, 2Z)`` in [0, 1] from the encoder alone."""
        if not self.one_map:
            return self.decode(self.condition(features)).clamp(0.0, 1.0)
        ids = range(self.num_maps)
        wanted = [torch.full((len(features),), m, device=features.device) for m in ids]
        return torch.cat([self.decode(self.condition(features, m)) for m in wanted], dim=1).clamp(0.0, 1.0)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def start_from_stages(
    network: NoddiModel,
    *,
    autoencoder: str | Path,
    encoder: str | Path,
    model: str | Path | None = None,
    remedy: str = "",
) -> NoddiModel:
    """Load what the diffusion stage starts from; returns the network.

    Args:
        network: the model to fill.
        autoencoder: weights of the VQ-GAN.
        encoder: weights of the low-resolution encoder.
        model: a whole model to go on from, whose autoencoder and encoder replace those of the stages; ``None`` or ""
            starts with a random U-Net.
        remedy: what the user can do when a file is missing.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is of another configuration.
    """
    load_weights(network.autoencoder, autoencoder, remedy)
    load_weights(network.encoder, encoder, remedy)
    if model:
        load_weights(network, model)
    return network
