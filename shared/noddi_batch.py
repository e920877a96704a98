# SPDX-License-Identifier: Apache-2.0
"""What a batch of patches becomes before the networks of ``dmri2noddi`` see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.networks.schedulers import Scheduler

from shared.networks.noddi import with_map_id
from shared.prepare_batch import LatentDiffusionBatch


class MapsAsTarget(PrepareBatch):
    """Hand patches of maps over as input and target of the VQ-GAN.

    Args:
        key: key of the maps ``(B, M, X, Y, Z)`` in [0, 1].
    """

    def __init__(self, key: str = "maps") -> None:
        self.key = key

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        maps = batchdata[self.key].to(device, non_blocking=non_blocking).as_subclass(torch.Tensor)
        return maps, maps


class FeaturesBatch(PrepareBatch):
    """Patches of features as input; the maps' latent, or the maps themselves, as target.

    Args:
        autoencoder: frozen; encodes the maps where latents are not cached. ``None``: the target is the maps.
        num_maps: number of maps, of which ``map_id`` names one where the items have it.
        target_key: key of the maps.
    """

    def __init__(self, autoencoder: Any = None, *, num_maps: int = 3, target_key: str = "maps") -> None:
        self.autoencoder, self.num_maps, self.target_key = autoencoder, num_maps, target_key

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features ``(B, F [+ num_maps], X, Y, Z)`` and latents ``(B, C, X, Y, Z)`` or maps."""
        features = batchdata["image"].to(device, non_blocking=non_blocking).as_subclass(torch.Tensor)
        if "map_id" in batchdata:
            features = with_map_id(features, torch.as_tensor(batchdata["map_id"]).to(device), self.num_maps)
        if self.autoencoder is not None and "latent_mean" in batchdata:
            return features, batchdata["latent_mean"].to(device, non_blocking=non_blocking)
        maps = batchdata[self.target_key].to(device, non_blocking=non_blocking).as_subclass(torch.Tensor)
        if self.autoencoder is None:
            return features, maps
        with torch.no_grad():
            return features, self.autoencoder.encode(maps)


class NoddiBatch(LatentDiffusionBatch):
    """Patches to noisy normalised latents, timesteps and target; the network makes the condition from the features.

    Args:
        scheduler: the noise schedule, with ``prediction_type``.
        model: ``shared.networks.noddi.NoddiModel``.
        seed: see ``LatentDiffusionBatch``.
        encoded_key: key of the maps, where latents are not cached.
    """

    def __init__(self, scheduler: Scheduler, model: Any, *, seed: int | None = None, encoded_key: str = "maps") -> None:
        super().__init__(scheduler, model, seed=seed, encoded_key=encoded_key)

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        """Returns features ``(B, F, X, Y, Z)``, the target, ``()``, and the named inputs of the network."""
        noisy, target, _, named = super().__call__(batchdata, device, non_blocking)
        features = batchdata["image"].to(device, non_blocking=non_blocking).as_subclass(torch.Tensor)
        return features, target, (), {"noisy": noisy, **named}

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.normalize(latents)

    def extra_inputs(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> dict[str, torch.Tensor]:
        if "map_id" not in batchdata:
            return {}
        return {"map_ids": torch.as_tensor(batchdata["map_id"]).to(device, non_blocking=non_blocking)}
