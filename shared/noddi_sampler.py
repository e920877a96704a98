# SPDX-License-Identifier: Apache-2.0
"""NODDI maps of whole volumes by latent diffusion in overlapping patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.utils import StrEnum, convert_to_dst_type, optional_import
from torch.nn.functional import pad

from shared.distributed import is_main_process, unwrapped
from shared.inferers import LatentSampler, Predict, flag, listed_seeds, number, one_of, sample_latents, seeded_noise
from shared.schedulers import DeterministicScheduler, diffusion_timesteps
from shared.segmentation_sampler import SampledOutput

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")


class PatchFusion(StrEnum):
    """Where overlapping patches become one volume.

    ``maps`` denoises and decodes every patch by itself, from its part of one noise volume, and blends the maps.
    ``steps`` blends the predicted noise in every step, so that one latent of the whole volume is denoised
    (arXiv:2302.08113), and the maps once more when it is decoded. Both cost the same.
    """

    MAPS = "maps"
    STEPS = "steps"


class NoddiSampler(LatentSampler):
    """Maps at twice the resolution of the features, by overlapping patches with weighted blending.

    The published code samples every patch from a noise of its own and averages uniformly. Here one noise volume is
    drawn per sample and patches take their part of it, so that they agree where they overlap, and weights fall off
    towards the borders of a patch. Patches and blending are ``monai.inferers.sliding_window_inference``; no inferer of
    MONAI core samples a conditional latent diffusion model patch by patch.

    Args:
        patch_size: side of a patch on the low-resolution grid, or three sides; that of training. Smaller volumes are
            padded with zeros and cut back.
        overlap: share of a patch that overlaps with the next one, 0 to below 1 (published: 14 of 32, 0.4375).
        blend: weights within a patch: ``gaussian`` or ``constant`` (as published).
        fusion: a ``PatchFusion``.
        start: where denoising starts, as a share of the noise levels in (0, 1]: 1 is pure noise, as published; below,
            it is the encoder's estimate with the noise of that level (arXiv:2112.05146): fewer of the
            ``num_inference_steps`` remain, and samples differ less. Needs a scheduler of ``shared.schedulers``.
        deterministic: the encoder alone, without diffusion: fast, and ``num_samples`` must be 1.
        num_samples: samples per volume, each from a noise of its own.
        patches_per_batch: patches of one volume in a forward pass (times ``num_samples``).
        output: a ``SampledOutput``.
        options: see :class:`~shared.inferers.LatentSampler`; sample ``j`` of a volume has the seed ``seed + j``.

    Raises:
        ValueError: for an option outside its range; the message starts with its name.
    """

    def __init__(
        self,
        *,
        patch_size: int | Sequence[int] = 32,
        overlap: float | str = 0.4375,
        blend: str = "gaussian",
        fusion: str = PatchFusion.STEPS,
        start: float | str = 1.0,
        deterministic: bool | str = False,
        num_samples: int | str = 1,
        patches_per_batch: int = 1,
        output: str = SampledOutput.MEAN,
        num_inference_steps: int | str = 100,
        **options: Any,
    ) -> None:
        super().__init__(num_inference_steps=num_inference_steps, **options)
        sides = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
        if len(sides) != 3:
            raise ValueError(f"patch_size: expected one side or three, got {patch_size!r}.")
        self.patch_size = tuple(number("patch_size", side, int, 1, 2**16) for side in sides)
        self.overlap = number("overlap", overlap, float, 0, 0.99)
        self.start = number("start", start, float, 0.001, 1)
        if self.start < 1 and not isinstance(self.scheduler, DeterministicScheduler):
            raise ValueError(
                f"start: expected 1 with {type(self.scheduler).__name__}, got {self.start:g}; take a scheduler of "
                "shared.schedulers."
            )
        self.patches_per_batch = number("patches_per_batch", patches_per_batch, int, 1, 2**31)
        self.num_samples = number("num_samples", num_samples, int, 1, 10000)
        self.deterministic = flag("deterministic", deterministic, words=True)
        if self.deterministic and self.num_samples != 1:
            raise ValueError(
                f"num_samples: expected 1 with deterministic, where all samples are equal, got {self.num_samples}; "
                "set deterministic to false or num_samples to 1."
            )
        self.blend = one_of("blend", blend, ("gaussian", "constant"))
        self.fusion = PatchFusion(one_of("fusion", fusion, list(PatchFusion)))
        self.output = SampledOutput(one_of("output", output, list(SampledOutput)))

    @torch.no_grad()
    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        seeds: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Draw the maps of volumes.

        Args:
            inputs: features ``(B, F, X, Y, Z)`` in [0, 1].
            network: ``shared.networks.noddi.NoddiModel``, bare or wrapped for several GPUs.
            seeds: ``(B,)``; ``None`` takes ``seed`` for each: a volume gives the same maps whatever its neighbours.

        Returns:
            float32 in [0, 1]: ``(B, M, 2X, 2Y, 2Z)`` for the model's M maps; with ``num_samples > 1`` their means and,
            as M more channels, their standard deviations (unbiased); with ``output="samples"`` all samples one after
            the other, ``(B, num_samples * M, 2X, 2Y, 2Z)``. A MetaTensor keeps its meta data (its affine too, which is
            that of the features).

        Raises:
            ValueError: for another shape, or samples that are not finite.
        """
        if inputs.ndim != 5:
            raise ValueError(
                f"image: expected features of volumes (B, F, X, Y, Z), got {tuple(inputs.shape)}; load them with "
                "shared.transforms.diffusion_mri.LoadDiffusionFeaturesd."
            )
        model: Any = unwrapped(network)
        features = (inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs).float()
        numbers = listed_seeds([self.seed] * len(inputs) if seeds is None else seeds, len(inputs))
        maps = torch.stack([self._volume(part, model, seed) for part, seed in zip(features, numbers, strict=True)])
        return convert_to_dst_type(maps, inputs, dtype=torch.float32)[0]

    def _volume(self, features: torch.Tensor, model: Any, seed: int) -> torch.Tensor:
        """Features ``(F, X, Y, Z)`` to the output's channels ``(..., 2X, 2Y, 2Z)``."""
        shape = features.shape[1:]
        missing = [max(side - length, 0) for side, length in zip(self.patch_size, shape, strict=True)]
        padded = pad(features, [n for m in reversed(missing) for n in (0, m)])[None]
        if self.deterministic:
            with torch.autocast(features.device.type, enabled=False):
                samples = self._windows(padded, lambda window: self._decoded(self._conditions(window, model), model))
        else:
            samples = self._sampled(padded, model, seed)
        cut = samples[0, :, : 2 * shape[0], : 2 * shape[1], : 2 * shape[2]].clamp(0.0, 1.0)
        if self.num_samples == 1 or self.output == SampledOutput.SAMPLES:
            return cut
        parts = cut.unflatten(0, (self.num_samples, -1))
        return torch.cat((parts.mean(dim=0), parts.std(dim=0)))

    def _sampled(self, features: torch.Tensor, model: Any, seed: int) -> torch.Tensor:
        """Padded features ``(1, F, X, Y, Z)`` to all samples ``(1, num_samples * M, 2X, 2Y, 2Z)``."""
        passes = model.num_maps if model.one_map else 1
        shape = (passes * model.latent_channels, *features.shape[2:])
        # One noise volume per sample, in the order of the whole grid: a patch has the noise of its place.
        noise = seeded_noise([seed + j for j in range(self.num_samples)], shape).flatten(0, 1)[None]
        noise = noise.to(features.device)
        if self.fusion == PatchFusion.MAPS:
            return self._windows(torch.cat((noise, features), dim=1), lambda window: self._patches(window, model))
        condition = self._windows(features, lambda window: self._conditions(window, model))
        condition = condition.repeat(1, self.num_samples, 1, 1, 1)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self._windows(torch.cat((x, condition), dim=1), lambda window: self._noises(window, t, model))

        latents = self._denoised(predict, noise, condition)
        with torch.autocast(features.device.type, enabled=False):
            return self._windows(latents, lambda window: self._decoded(window, model))

    def _patches(self, window: torch.Tensor, model: Any) -> torch.Tensor:
        """Noise and features of patches ``(W, n + F, ...)`` to maps of all samples ``(W, num_samples * M, ...)``."""
        count = self.num_samples * model.latent_channels * (model.num_maps if model.one_map else 1)
        noise, features = window[:, :count], window[:, count:]
        condition = self._conditions(features, model).repeat(1, self.num_samples, 1, 1, 1)
        latents = self._denoised(
            lambda x, t: self._noises(torch.cat((x, condition), dim=1), t, model), noise, condition
        )
        with torch.autocast(window.device.type, enabled=False):
            return self._decoded(latents, model)

    def _denoised(self, predict: Predict, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Latents from noise, or from the encoder's estimate with noise."""
        timesteps: Iterable[int] = diffusion_timesteps(self.scheduler, self.num_inference_steps)
        if isinstance(self.scheduler, DeterministicScheduler) and self.start < 1:
            noise, timesteps = self.scheduler.start_from(condition.float(), noise, self.start)
        if self.progress and has_tqdm and is_main_process():
            timesteps = tqdm(timesteps, desc="denoising", unit="step")
        return sample_latents(predict, self.scheduler, noise, timesteps)

    def _conditions(self, features: torch.Tensor, model: Any) -> torch.Tensor:
        """``(W, F, ...)`` to ``(W, C, ...)``; with one map at a time to ``(W, num_maps * C, ...)``."""
        if not model.one_map:
            return model.condition(features)
        wanted = [torch.full((len(features),), m, device=features.device) for m in range(model.num_maps)]
        return torch.cat([model.condition(features, m) for m in wanted], dim=1)

    def _noises(self, window: torch.Tensor, timesteps: torch.Tensor, model: Any) -> torch.Tensor:
        """Noisy latents and conditions, stacked as channels ``(W, 2 n, ...)``, to their noise ``(W, n, ...)``."""
        x, condition = (half.unflatten(1, (-1, model.latent_channels)) for half in window.chunk(2, dim=1))
        rows = timesteps[:1].expand(x.shape[0] * x.shape[1])
        predicted = model(None, x.flatten(0, 1), rows, condition=condition.flatten(0, 1))
        return predicted.float().unflatten(0, x.shape[:2]).flatten(1, 2)

    def _decoded(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        """Latents stacked as channels ``(W, n, ...)`` to maps ``(W, num_samples * M, ...)``."""
        if not latents.isfinite().all():  # the nearest code of NaN is finite
            raise ValueError(
                "amp: expected finite latents, got NaN or infinity; try False, and check the weights and the features."
            )
        rows = latents.unflatten(1, (-1, model.latent_channels))
        parts = [model.decode(part) for part in rows.flatten(0, 1).split(self.decode_batch_size)]
        # Blended after clipping, as the deterministic estimate is: overshoot of one patch must not weigh on the next.
        return torch.cat(parts).clamp(0.0, 1.0).unflatten(0, rows.shape[:2]).flatten(1, 2)

    def _windows(self, volume: torch.Tensor, predictor: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return sliding_window_inference(
            volume,
            roi_size=self.patch_size,
            sw_batch_size=self.patches_per_batch,
            predictor=predictor,
            overlap=self.overlap,
            mode=self.blend,
            progress=False,
        )  # type: ignore[return-value]
