# SPDX-License-Identifier: Apache-2.0
"""What a batch becomes before the network sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.networks.schedulers import Scheduler

from shared.diffusion import prediction_target, sample_posterior


class ImageAsTarget(PrepareBatch):
    """Hand the image over as input and target: autoencoders learn to return what they were given."""

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = batchdata["image"].to(device, non_blocking=non_blocking)
        return image, image


class TextLatentDiffusionBatch(PrepareBatch):
    """Images or cached latents and token ids to noisy latents, timesteps and targets.

    ``monai.engines.DiffusionPrepareBatch`` does not fit: it draws noise in the shape of the image rather than of the
    latent, and knows neither an autoencoder nor a text.

    Args:
        scheduler: the noise schedule, with ``prediction_type``.
        model: ``TextToImageModel``; gives the autoencoder, the text encoder and ``scale_factor``.
        text_encoder: frozen (and usually cached) text encoder that replaces the model's; ``None`` sends the token ids
            through the network, which a trainable text encoder needs.
        seed: ``None`` draws from torch's global generator, for training. A number fixes noise, posterior sample and
            timestep of every item to a function of (seed, item), so that validation losses of two epochs differ only by
            the weights.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Any,
        *,
        text_encoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.text_encoder = text_encoder
        self.seed = seed

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        """Returns noisy latents ``(B, C, h, w)``, the target, ``()``, and timesteps ``(B,)`` with tokens or context."""
        tokens = batchdata["tokens"].to(device, non_blocking=non_blocking)
        mean, log_variance = self._posterior(batchdata, device, non_blocking)
        posterior_noise, noise, timesteps = self._draw(mean, batchdata)
        latents = sample_posterior(mean, log_variance, posterior_noise) * self.model.scale_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        text = {"tokens": tokens} if self.text_encoder is None else {"context": self.text_encoder(tokens)}
        return noisy, target, (), {"timesteps": timesteps, **text}

    def _posterior(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if "latent_mean" in batchdata:
            names = ("latent_mean", "latent_log_variance")
            mean, log_variance = (batchdata[name].to(device, non_blocking=non_blocking) for name in names)
            return mean, log_variance
        with torch.no_grad():
            mean, sigma = self.model.autoencoder.encode(batchdata["image"].to(device, non_blocking=non_blocking))
        return mean, 2.0 * sigma.log()

    def _draw(
        self, mean: torch.Tensor, batchdata: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps = self.scheduler.num_train_timesteps
        if self.seed is None:
            timesteps = torch.randint(0, steps, (mean.shape[0],), device=mean.device)
            return torch.randn_like(mean), torch.randn_like(mean), timesteps
        draws = [self._fixed_draw(mean.shape[1:], steps, name) for name in batchdata["item_id"]]
        posterior_noise, noise, timesteps = (torch.stack(parts).to(mean.device) for parts in zip(*draws, strict=True))
        return posterior_noise, noise, timesteps

    def _fixed_draw(
        self, shape: Sequence[int], steps: int, item_id: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # A CPU generator per item: equal on every device and whatever the batch size.
        digest = hashlib.sha256(f"{self.seed} {item_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        posterior_noise, noise = torch.randn((2, *shape), generator=generator)
        return posterior_noise, noise, torch.randint(0, steps, (), generator=generator)


class PromptBatch(PrepareBatch):
    """Token ids of reports to what a sampler takes: prompt and null prompt, and a seed of its own for every item.

    Args:
        tokenizer: texts to ids ``(B, L)``; gives the null prompt, so that it is the one of training.
        seed: item ``i`` is drawn with seed ``seed + i``.
    """

    def __init__(self, tokenizer: Callable[[list[str]], torch.Tensor], *, seed: int = 0) -> None:
        self.null_tokens = tokenizer([""])
        self.seed = seed

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, list[int]]]:
        """Returns ids ``(B, 2, L)``, real images ``(B, 1, H, W)``, ``()`` and the seeds."""
        tokens = batchdata["tokens"]
        pairs = torch.stack((tokens, self.null_tokens.expand_as(tokens)), dim=1)
        seeds = [self.seed + int(item_id) for item_id in batchdata["item_id"]]
        return pairs.to(device, non_blocking=non_blocking), batchdata["image"].to(device), (), {"seeds": seeds}
