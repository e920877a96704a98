# SPDX-License-Identifier: Apache-2.0
"""Slices and whole volumes from condition images by a ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type

from shared.distributed import unwrapped
from shared.inferers import LatentSampler, Predict, flag, guide, listed_seeds, number


class ControlNetSampler(LatentSampler):
    """Translate condition images by latent diffusion steered with ControlNets, slice by slice.

    ``monai.inferers.ControlNetLatentDiffusionInferer`` does not fit: its ``sample`` has another signature than an
    engine calls, shrinks the condition to the size of the latents, and embeds it in every step.

    The condition is embedded once per slice, and the prompt read once per batch. Guidance 1 evaluates the constant
    prompt alone: the null prompt differs from it by a sentence that says nothing about the subject, and evaluating both
    doubles the cost. All slices of a volume start from the same noise, so that neighbours differ only as far as their
    conditions do. Slices without signal in the condition (air above the head) are not sampled: they become 0.

    Args:
        latent_shape: ``(C, h, w)`` of the latent of an image of ``image_size``; other sizes are scaled alike.
        image_size: ``(H, W)`` in training.
        conditioning_scale: factor of the ControlNets' residuals, one or one for each; 0 to 10.
        guidance_scale: 0 to 100, see ``shared.inferers.guide``; 1: without guidance.
        num_samples: samples per slice.
        share_noise: one noise for all slices of a volume; false gives every slice a noise of its own.
        batch_size: slices denoised at a time, ``None`` for all; the result does not depend on it.
        options: see :class:`~shared.inferers.LatentSampler`; sample ``j`` of a volume has the seed ``seed + j``.
    """

    def __init__(
        self,
        *,
        latent_shape: Sequence[int],
        image_size: Sequence[int],
        conditioning_scale: float | str | Sequence[float] = 1.0,
        guidance_scale: float | str = 1.0,
        num_samples: int | str = 1,
        share_noise: bool = True,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.latent_shape, self.image_size = tuple(latent_shape), tuple(image_size)
        scales = conditioning_scale if isinstance(conditioning_scale, list | tuple) else [conditioning_scale]
        self.conditioning_scale = [number("conditioning_scale", scale, float, 0, 10) for scale in scales]
        self.guidance_scale = number("guidance_scale", guidance_scale, float, 0, 100)
        self.num_samples = number("num_samples", num_samples, int, 1, 10000)
        self.share_noise = flag("share_noise", share_noise)
        self.batch_size = None if batch_size is None else number("batch_size", batch_size, int, 1, 2**31)

    @torch.no_grad()
    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        seeds: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Translate slices or volumes.

        Args:
            inputs: conditions in [0, 1]: slices ``(B, K, H, W)`` or volumes ``(B, K, H, W, D)``.
            network: ``shared.networks.controlnet.ControlNetModel``, bare or wrapped for several GPUs.
            seeds: ``(B,)``; ``None`` takes ``seed`` for each: the same volume gives the same result, whatever its
                neighbours in the list.

        Returns:
            Images ``(B, 1, H, W[, D])`` in [0, 1], float32; with ``num_samples > 1`` ``(B, 2, H, W[, D])``: mean and
            standard deviation (of n - 1) over the samples. A MetaTensor keeps its meta data.

        Raises:
            ValueError: for another shape, sizes that the networks cannot halve, or samples that are not finite.
        """
        if inputs.ndim not in (4, 5):
            raise ValueError(f"image: expected slices (B, K, H, W) or volumes (B, K, H, W, D), got {inputs.shape}.")
        model: Any = unwrapped(network)
        halvings = len(model.diffusion.unet.down_blocks) - 1
        step = self.image_size[0] // self.latent_shape[1] * 2**halvings
        if any(side % step for side in inputs.shape[2:4]):
            raise ValueError(
                f"image: expected sides that are multiples of {step}, got {tuple(inputs.shape[2:4])}; pad the image "
                "(DivisiblePadd in preprocessing)."
            )
        numbers = listed_seeds([self.seed] * len(inputs) if seeds is None else seeds, len(inputs))
        plain = (inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs).float()
        volumes = plain if plain.ndim == 5 else plain[..., None]
        depth = volumes.shape[-1]
        slices = volumes.movedim(-1, 1).flatten(0, 1)
        if not self.share_noise:
            numbers = [seed + z * self.num_samples for seed in numbers for z in range(depth)]
        else:
            numbers = [seed for seed in numbers for _ in range(depth)]
        images = self._translate(slices, model, numbers)
        results = images.unflatten(0, (len(inputs), depth)).movedim(1, -1)
        return convert_to_dst_type(results if plain.ndim == 5 else results[..., 0], inputs, dtype=torch.float32)[0]

    def _translate(self, slices: torch.Tensor, model: Any, seeds: Sequence[int]) -> torch.Tensor:
        """Conditions ``(N, K, H, W)`` to images ``(N, 1, H, W)``, or their mean and deviation ``(N, 2, H, W)``."""
        # Not "> 0", which is false for NaN: a damaged slice would become air.
        signal = ~(slices.flatten(1).amax(dim=1) <= 0)
        rows = [(index, j) for index in signal.nonzero()[:, 0].tolist() for j in range(self.num_samples)]
        samples = slices.new_zeros(len(slices), self.num_samples, *slices.shape[2:])
        size = self.batch_size or max(len(rows), 1)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            images = self._draw(slices, [i for i, _ in part], [seeds[i] + j for i, j in part], model)
            indices, numbers = torch.tensor(part, device=slices.device).unbind(dim=1)
            samples[indices, numbers] = images[:, 0]
        if self.num_samples == 1:
            return samples
        return torch.stack((samples.mean(dim=1), samples.std(dim=1)), dim=1)

    def _draw(self, slices: torch.Tensor, numbers: Sequence[int], seeds: Sequence[int], model: Any) -> torch.Tensor:
        # Samples of one slice share its embedding.
        unique = list(dict.fromkeys(numbers))
        embedded = model.embed_condition(slices[unique])
        embedded = [part[[unique.index(z) for z in numbers]] for part in embedded]
        channels, *latent_size = self.latent_shape
        shape = [
            side * latent // full
            for side, latent, full in zip(slices.shape[2:], latent_size, self.image_size, strict=True)
        ]
        predict = self._predictor(model, embedded)
        remedy = (
            "conditioning_scale: expected finite latents, got NaN or infinity for seeds {seeds}; try --amp False or a "
            "lower conditioning_scale, and check the weights."
        )
        return self.draw(predict, model, seeds, (channels, *shape), slices.device, remedy=remedy)

    def _predictor(self, model: Any, embedded: list[torch.Tensor]) -> Predict:
        scales = self.conditioning_scale[0] if len(self.conditioning_scale) == 1 else self.conditioning_scale
        count = len(embedded[0])
        if self.guidance_scale == 1.0:
            context = model.prompt(count)
            return lambda x, t: model(x, t, embedded=embedded, context=context, conditioning_scale=scales)
        doubled = [torch.cat((part, part)) for part in embedded]
        context = model.prompt(2 * count, torch.arange(2 * count, device=embedded[0].device) < count)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            twice = (torch.cat((x, x)), torch.cat((t, t)))
            both = model(*twice, embedded=doubled, context=context, conditioning_scale=scales)
            unconditional, conditional = both.chunk(2)
            return guide(unconditional, conditional, self.guidance_scale)

        return predict


class UnconditionalSampler(LatentSampler):
    """Images from noise alone, by the diffusion model that ControlNets steer.

    Args:
        latent_shape: ``(C, h, w)`` of one latent.
        options: see :class:`~shared.inferers.LatentSampler`; without seeds in a call, samples count up from ``seed``.
    """

    def __init__(self, *, latent_shape: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.latent_shape = tuple(latent_shape)

    def __call__(
        self, inputs: torch.Tensor, network: Any, seeds: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Draw one image ``(1, H, W)`` in [0, 1] per item of ``inputs (B, ...)``, whose values are not looked at."""
        return self.sample(network, range(self.seed, self.seed + len(inputs)) if seeds is None else seeds)

    @torch.no_grad()
    def sample(self, network: Any, seeds: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Draw images ``(len(seeds), 1, H, W)`` in [0, 1].

        Args:
            network: ``ConstantPromptModel``, or a ``ControlNetModel`` whose ControlNets are left out.
            seeds: one per image.

        Raises:
            ValueError: when a latent is not finite.
        """
        model = unwrapped(network)
        model = getattr(model, "diffusion", model)
        device = next(model.parameters()).device
        remedy = "amp: expected finite latents, got NaN or infinity for seeds {seeds}; try False and check the weights."
        numbers = listed_seeds(seeds, len(seeds))
        return self.draw(lambda x, t: model(x, t), model, numbers, self.latent_shape, device, remedy=remedy)
