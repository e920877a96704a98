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


class LatentDiffusionBatch(PrepareBatch):
    """Images or cached latents to noisy latents, timesteps and targets.

    ``monai.engines.DiffusionPrepareBatch`` does not fit: it draws noise in the shape of the image rather than of the
    latent, and does not know an autoencoder. What a network wants besides comes from ``extra_inputs`` of a subclass.

    Args:
        scheduler: the noise schedule, with ``prediction_type``.
        model: gives ``autoencoder`` and ``scale_factor``.
        seed: ``None`` draws from torch's global generator, for training. A number fixes noise, posterior sample and
            timestep of every item to a function of (seed, item), so that validation losses of two epochs differ only by
            the weights.
        encoded_key: key of the image to encode where latents are not cached.
    """

    def __init__(
        self, scheduler: Scheduler, model: Any, *, seed: int | None = None, encoded_key: str = "image"
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.seed = seed
        self.encoded_key = encoded_key

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        """Returns noisy latents ``(B, C, h, w)``, the target, ``()``, and timesteps ``(B,)`` with the extra inputs."""
        mean, log_variance = self._posterior(batchdata, device, non_blocking)
        posterior_noise, noise, timesteps = self._draw(mean, batchdata)
        latents = self.scaled(mean if log_variance is None else sample_posterior(mean, log_variance, posterior_noise))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        extra = self.extra_inputs(batchdata, device, non_blocking)
        return noisy, target, (), {"timesteps": timesteps, **extra}

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the diffusion model sees them: with a standard deviation of about 1."""
        return latents * self.model.scale_factor

    def extra_inputs(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> dict[str, torch.Tensor]:
        """Further named inputs of the network."""
        return {}

    def _posterior(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance of the latents; ``None`` for the variance of an autoencoder without a posterior."""
        if "latent_mean" in batchdata:
            mean = batchdata["latent_mean"].to(device, non_blocking=non_blocking)
            if "latent_log_variance" not in batchdata:
                return mean, None
            return mean, batchdata["latent_log_variance"].to(device, non_blocking=non_blocking)
        with torch.no_grad():
            images = batchdata[self.encoded_key].to(device, non_blocking=non_blocking)
            # Plain, as cached latents are: a MetaTensor would stay one through every layer of the network.
            encoded = self.model.autoencoder.encode(images.as_subclass(torch.Tensor))
        if isinstance(encoded, torch.Tensor):
            return encoded, None
        mean, sigma = encoded
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
        assert self.seed is not None
        generator = torch.Generator().manual_seed(_derived_seed(self.seed, item_id))
        posterior_noise, noise = torch.randn((2, *shape), generator=generator)
        return posterior_noise, noise, torch.randint(0, steps, (), generator=generator)


class TextLatentDiffusionBatch(LatentDiffusionBatch):
    """``LatentDiffusionBatch`` with the item's text.

    Args:
        scheduler: the noise schedule, with ``prediction_type``.
        model: ``TextToImageModel``.
        text_encoder: frozen (and usually cached) text encoder that replaces the model's; ``None`` sends the token ids
            through the network, which a trainable text encoder needs.
        seed: see ``LatentDiffusionBatch``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Any,
        *,
        text_encoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(scheduler, model, seed=seed)
        self.text_encoder = text_encoder

    def extra_inputs(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> dict[str, torch.Tensor]:
        tokens = batchdata["tokens"].to(device, non_blocking=non_blocking)
        return {"tokens": tokens} if self.text_encoder is None else {"context": self.text_encoder(tokens)}


class ConditionedLatentDiffusionBatch(LatentDiffusionBatch):
    """``LatentDiffusionBatch`` under a constant prompt, with condition images where the network takes them.

    Args:
        scheduler: the noise schedule, with ``prediction_type``.
        model: ``ConstantPromptModel`` or ``ControlNetModel``.
        condition_key: key of the condition ``(B, K, H, W)``; ``None``: the network takes none.
        null_prompt_probability: share of items whose prompt is the null prompt; with a ``seed`` none is.
        seed: see ``LatentDiffusionBatch``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Any,
        *,
        condition_key: str | None = None,
        null_prompt_probability: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(scheduler, model, seed=seed)
        self.condition_key = condition_key
        self.null_prompt_probability = null_prompt_probability

    def extra_inputs(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> dict[str, torch.Tensor]:
        extra = {}
        if self.condition_key is not None:
            condition = batchdata[self.condition_key].to(device, non_blocking=non_blocking)
            extra["condition"] = condition.as_subclass(torch.Tensor)
        if self.seed is None and self.null_prompt_probability > 0:
            count = len(next(value for value in batchdata.values() if isinstance(value, torch.Tensor)))
            extra["null_prompt"] = torch.rand(count, device=device) < self.null_prompt_probability
        return extra


class SegmentationBatch(LatentDiffusionBatch):
    """Images and masks to what ``SegmentationModel`` predicts noise from, and what ``NoiseAndLatentLoss`` compares.

    Args:
        scheduler: the noise schedule, of ``epsilon`` prediction.
        model: ``SegmentationModel``.
        encoded_key: key of the mask as a picture ``(B, 3, H, W)`` in [0, 1], where latents are not cached.
        seed: see ``LatentDiffusionBatch``.
    """

    def __init__(
        self, scheduler: Scheduler, model: Any, *, encoded_key: str = "target", seed: int | None = None
    ) -> None:
        super().__init__(scheduler, model, seed=seed, encoded_key=encoded_key)

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor]]:
        """Returns images ``(B, 1|3, H, W)``, noise and timesteps, ``()``, and the named inputs of the network."""
        noisy, noise, _, named = super().__call__(batchdata, device, non_blocking)
        image = batchdata["image"].to(device, non_blocking=non_blocking).as_subclass(torch.Tensor)
        return image, {"noise": noise, "timesteps": named["timesteps"]}, (), {"noisy": noisy, **named}

    def extra_inputs(
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> dict[str, torch.Tensor]:
        if "class_id" not in batchdata:
            return {}
        return {"class_labels": torch.as_tensor(batchdata["class_id"]).to(device, non_blocking=non_blocking)}


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


class ConditionBatch(PrepareBatch):
    """Condition images to what a sampler takes: the condition, and one seed for all slices of a subject.

    Args:
        seed: every item is drawn with a seed derived from it and the item's ``seed_keys``.
        condition_key: key of the condition ``(B, K, H, W)``.
        target_key: key of the real image ``(B, 1, H, W)``.
        seed_keys: items that agree in these share their noise: by default the slices of a subject.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        condition_key: str = "condition",
        target_key: str = "image",
        seed_keys: Sequence[str] = ("subject",),
    ) -> None:
        self.seed, self.condition_key, self.target_key = seed, condition_key, target_key
        self.seed_keys = tuple(seed_keys)

    def __call__(  # type: ignore[override]
        self, batchdata: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, list[int]]]:
        """Returns the condition, the real image, ``()`` and the seeds."""
        condition = batchdata[self.condition_key].to(device, non_blocking=non_blocking)
        target = batchdata[self.target_key].to(device, non_blocking=non_blocking)
        columns = [batchdata[key] for key in self.seed_keys]
        names = [
            " ".join(str(int(v) if isinstance(v, torch.Tensor) else v) for v in row)
            for row in zip(*columns, strict=True)
        ]
        return condition, target, (), {"seeds": [_derived_seed(self.seed, name) for name in names]}


def _derived_seed(seed: int, name: str) -> int:
    """A seed of its own for every name, below 2**63."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
