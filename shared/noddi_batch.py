# SPDX-License-Identifier: Apache-2.0
"""What a batch of patches becomes before the networks of ``dmri2noddi`` see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.networks.schedulers import Scheduler

from shared.latent_store import Encoding
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


class EstimateEncoding(Encoding):
    """Features to what the low-resolution encoder says of the latent: the condition before normalisation, since mean
    and standard deviation of latents are measured later, when the training starts.

    The encoder is frozen where the U-Net is trained, and a call of it costs as much as one of the U-Net: with
    ``LatentDataset`` it runs once for each patch.

    Args:
        model: ``shared.networks.noddi.NoddiModel``.
        transform: deterministic, from the item to ``image``, features ``(F, X, Y, Z)``.
        keys: what ``transform`` needs of an item, and ``map_id``, which the encoder is told where an item has it.
        path_keys: which of ``keys`` hold paths.
    """

    def __init__(
        self,
        model: Any,
        transform: Callable,
        *,
        keys: Sequence[str] = ("dwi", "bval", "bvec", "mask", "patch", "patch_size", "map_id"),
        path_keys: Sequence[str] = ("dwi", "bval", "bvec", "mask"),
    ) -> None:
        super().__init__(model.encoder, transform, keys=keys, path_keys=path_keys)
        self.num_maps = model.num_maps

    def inputs(self, source: Mapping[str, Any]) -> dict[str, Any]:
        named = {"map_id": source["map_id"]} if "map_id" in source else {}
        return {**super().inputs(source), **named}

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """``image (B, F, X, Y, Z)``, and ``map_id`` perhaps, to estimates ``(B, 1, C, X, Y, Z)``, float32."""
        features = self.placed(batch["image"])
        if "map_id" in batch:
            ids = torch.as_tensor(batch["map_id"]).to(features.device)
            features = with_map_id(features, ids, self.num_maps)
        return self.network(features).float()[:, None]


class NoddiBatch(LatentDiffusionBatch):
    """Patches to noisy normalised latents, timesteps and target; the condition from the encoder's cached estimate, or
    the network makes it from the features.

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
    ) -> tuple[torch.Tensor | None, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        """Returns features ``(B, F, X, Y, Z)``, the target, ``()``, and the named inputs of the network. With
        ``condition_latent`` (``EstimateEncoding``) the features are ``None``: the condition is among the inputs."""
        noisy, target, _, named = super().__call__(batchdata, device, non_blocking)
        if "condition_latent" in batchdata:
            estimate = batchdata["condition_latent"].to(device, non_blocking=non_blocking)
            return None, target, (), {"noisy": noisy, **named, "condition": self.model.normalize(estimate)}
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
