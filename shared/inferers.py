# SPDX-License-Identifier: Apache-2.0
"""Sampling from latent diffusion models: the reverse process, guidance, and one seed per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_dst_type, optional_import

from shared.distributed import is_main_process, unwrapped
from shared.networks.fixed_context import fixed_context
from shared.schedulers import diffusion_timesteps

tqdm, has_tqdm = optional_import("tqdm", name="tqdm")

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sample_latents(
    predict: Predict, scheduler: Scheduler, noise: torch.Tensor, timesteps: Iterable[int]
) -> torch.Tensor:
    """Run the reverse process from ``noise`` to clean latents.

    Args:
        predict: ``predict(x, t)`` for noisy latents ``x (B, C, *spatial)`` and timesteps ``t (B,)`` returns what the
            scheduler calls the prediction, same shape as ``x``.
        scheduler: its ``step(prediction, timestep, x)`` returns ``x`` at the next noise level first.
        noise: standard normal ``(B, C, *spatial)``.
        timesteps: from ``shared.schedulers.diffusion_timesteps``, which must have prepared ``scheduler``.

    Returns:
        Latents of the shape of ``noise``, float32. Under autocast too the step is taken in float32: errors of half
        precision would add up over the steps.
    """
    x = noise.float()
    for timestep in timesteps:
        batch = torch.full((x.shape[0],), timestep, dtype=torch.long, device=x.device)
        x = scheduler.step(predict(x, batch).float(), timestep, x)[0]  # type: ignore[operator]
    return x


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise ``(len(seeds), *shape)``, float32 on the CPU; row ``i`` depends on ``seeds[i]`` alone.

    Each sample has a CPU generator of its own, so neither its neighbours in the batch nor the device change it.
    """
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    """Classifier-free guidance ``u + scale (c - u)`` (arXiv:2207.12598, equation 6 with ``scale = 1 + w``) in float32.

    Args:
        unconditional: prediction for the negative prompt, ``(B, C, *spatial)``.
        conditional: prediction for the prompt, same shape.
        scale: 0 is the negative prompt alone, 1 the prompt alone.
        rescale: 0 to 1, how far the standard deviation of each sample is brought back to that of ``conditional``
            (arXiv:2305.08891, equations 14 to 16), against the overexposure that large scales cause.
    """
    unconditional, conditional = unconditional.float(), conditional.float()
    guided = unconditional + scale * (conditional - unconditional)
    if rescale:
        axes = tuple(range(1, guided.ndim))
        ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        guided = guided * (rescale * ratio + (1.0 - rescale))
    return guided


def chosen(value: Any) -> Any:
    """The value a client chose: MONAI Label hands a list of choices over with the chosen one first."""
    return value[0] if isinstance(value, list | tuple) and value else value


def number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """``value`` as ``kind`` within ``[low, high]``; text fields of clients send numbers as strings."""
    value = chosen(value)
    try:
        number = float(value)
        valid = low <= number <= high and not isinstance(value, bool) and number == kind(number)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}: expected {what} from {low:g} to {high:g}, got {value!r}.")
    return kind(number)


def flag(name: str, value: Any, *, words: bool = False) -> bool:
    """``value`` as true or false; with ``words`` also as text, which fields of clients send."""
    value = chosen(value)
    if words and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {value!r}.")
    return value


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of the ``known`` words."""
    value = chosen(value)
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}.")
    return value


class LatentSampler(Inferer):
    """What samplers of latent diffusion models share: options, seeded noise, the reverse process, decoding.

    Options may come as strings and as lists whose first entry counts: clients of MONAI Label send them so.

    Args:
        scheduler: a scheduler (see ``shared.schedulers``), or the name of one in ``schedulers``.
        schedulers: schedulers by name, when ``scheduler`` is a name (a client option).
        num_inference_steps: denoising steps, 1 to T.
        seed: seed of the first sample when a call gives no seeds, 0 to 2**53.
        decode_batch_size: latents decoded at a time, since decoding needs far more memory per sample than denoising.
        progress: show a bar of the steps on stderr.

    Raises:
        ValueError: for an option outside its range; the message starts with its name.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler | str | Sequence[str],
        schedulers: Mapping[str, Scheduler] | None = None,
        num_inference_steps: int | str = 50,
        seed: int | str = 0,
        decode_batch_size: int = 4,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.scheduler = _pick(chosen(scheduler), schedulers or {})
        steps = self.scheduler.num_train_timesteps
        self.num_inference_steps = number("num_inference_steps", num_inference_steps, int, 1, steps)
        self.seed = number("seed", seed, int, 0, 2**53)
        self.decode_batch_size = number("decode_batch_size", decode_batch_size, int, 1, 2**31)
        self.progress = progress

    def draw(
        self,
        predict: Predict,
        model: Any,
        seeds: Sequence[int],
        latent_shape: Sequence[int],
        device: torch.device,
        *,
        remedy: str,
    ) -> torch.Tensor:
        """Denoise one latent per seed and decode it.

        Cross-attention computes keys and values of the context in the first step only, as long as ``predict`` gives the
        network the same tensor, or a view of it, in every step (``shared.networks.fixed_context``).

        Returns:
            Images ``(len(seeds), 1, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: when a latent is not finite; the message starts with ``remedy``'s option and names the seeds.
        """
        # Equal seeds give equal noise: slices of one volume share theirs, drawn once.
        unique = list(dict.fromkeys(seeds))
        noise = seeded_noise(unique, latent_shape)[[unique.index(seed) for seed in seeds]].to(device)
        timesteps: Iterable[int] = diffusion_timesteps(self.scheduler, self.num_inference_steps)
        if self.progress and has_tqdm and is_main_process():
            timesteps = tqdm(timesteps, desc=f"{len(seeds)} samples", unit="step")
        with fixed_context(model):
            latents = sample_latents(predict, self.scheduler, noise, timesteps)
        finite = latents.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            bad = list(dict.fromkeys(seed for seed, ok in zip(seeds, finite.tolist(), strict=True) if not ok))
            raise ValueError(remedy.format(seeds=bad[:8]))
        with torch.autocast(device.type, enabled=False):
            images = [model.decode(part).float().clamp(0.0, 1.0) for part in latents.split(self.decode_batch_size)]
        return torch.cat(images)


def _pick(scheduler: Scheduler | str, schedulers: Mapping[str, Scheduler]) -> Scheduler:
    if isinstance(scheduler, Scheduler):
        return scheduler
    if scheduler not in schedulers:
        known = ", ".join(schedulers) or "a scheduler object"
        raise ValueError(f"scheduler: expected {known}, got {scheduler!r}.")
    return schedulers[scheduler]


def listed_seeds(seeds: torch.Tensor | Sequence[int], count: int) -> list[int]:
    """Seeds as numbers, one per sample.

    Raises:
        ValueError: for another number of seeds.
    """
    numbers = [int(seed) for seed in (seeds.tolist() if isinstance(seeds, torch.Tensor) else seeds)]
    if len(numbers) != count:
        raise ValueError(f"seeds: expected one per sample ({count}), got {len(numbers)}.")
    return numbers


class GuidedLatentSampler(LatentSampler):
    """Images from prompts: classifier-free guided latent diffusion with one seed per sample.

    ``monai.inferers.LatentDiffusionInferer`` does not fit: an engine and MONAI Label call ``inferer(inputs, network)``
    while its ``sample`` wants noise, autoencoder, U-Net and embeddings apart; it guides with a constant instead of an
    encoded negative prompt, and always evaluates both branches.

    The text is encoded once per call. Guidance 1 evaluates the prompt alone and guidance 0 the negative prompt alone;
    any other scale evaluates both halves in one forward. Text encoding and decoding run in float32 under autocast too.
    Predicted latents are not clipped: they are not bounded.

    Args:
        guidance_scale: 0 to 100; see ``guide``.
        guidance_rescale: 0 to 1; see ``guide``.
        latent_shape: ``(C, h, w)`` of one latent.
        batch_size: samples denoised at a time, ``None`` for all; the result does not depend on it.
        options: see :class:`LatentSampler`; without seeds in a call, samples count up from ``seed``.

    Raises:
        ValueError: for an option outside its range; the message starts with its name.
    """

    def __init__(
        self,
        *,
        guidance_scale: float | str = 7.0,
        guidance_rescale: float | str = 0.0,
        latent_shape: Sequence[int] = (3, 64, 64),
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.guidance_scale = number("guidance_scale", guidance_scale, float, 0, 100)
        self.guidance_rescale = number("guidance_rescale", guidance_rescale, float, 0, 1)
        self.latent_shape = tuple(latent_shape)
        self.batch_size = None if batch_size is None else number("batch_size", batch_size, int, 1, 2**31)

    @torch.no_grad()
    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        seeds: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Draw one image per item.

        Args:
            inputs: int64 token ids ``(B, 2, L)``: the prompt, then the negative (or null) prompt.
            network: ``shared.networks.TextToImageModel``, bare or wrapped for several GPUs.
            seeds: ``(B,)``; ``None`` counts up from ``seed``.

        Returns:
            Images ``(B, 1, H, W)`` in [0, 1], float32, of the type of ``inputs`` (a MetaTensor keeps its meta data).

        Raises:
            ValueError: when the inputs have another shape, the seeds another number, or the samples are not finite.
        """
        if inputs.ndim != 3 or inputs.shape[1] != 2 or inputs.is_floating_point():
            raise ValueError(
                f"image: expected integer token ids (B, 2, L) of prompt and negative prompt, got {inputs.dtype} "
                f"{tuple(inputs.shape)}; use shared.transforms.prompts.PromptToTokensd."
            )
        count = inputs.shape[0]
        numbers = listed_seeds(range(self.seed, self.seed + count) if seeds is None else seeds, count)
        model: Any = unwrapped(network)
        tokens = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size = self.batch_size or count
        images = [
            self._draw(tokens[start : start + size], model, numbers[start : start + size])
            for start in range(0, count, size)
        ]
        return convert_to_dst_type(torch.cat(images), inputs, dtype=torch.float32)[0]

    def _draw(self, tokens: torch.Tensor, model: Any, seeds: Sequence[int]) -> torch.Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            predict = self._predictor(tokens, model)
        remedy = (
            "guidance_scale: expected finite latents, got NaN or infinity for seeds {seeds} at guidance "
            f"{self.guidance_scale:g}; try --amp False or a lower guidance_scale, and check the weights."
        )
        return self.draw(predict, model, seeds, self.latent_shape, tokens.device, remedy=remedy)

    def _predictor(self, tokens: torch.Tensor, model: Any) -> Predict:
        prompt, negative = tokens.unbind(dim=1)
        if self.guidance_scale in (0.0, 1.0):
            context = model.encode_text(prompt if self.guidance_scale == 1.0 else negative)
            return lambda x, t: model(x, t, context=context)
        context = model.encode_text(torch.cat((negative, prompt)))

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            both = model(torch.cat((x, x)), torch.cat((t, t)), context=context)
            unconditional, conditional = both.chunk(2)
            return guide(unconditional, conditional, self.guidance_scale, self.guidance_rescale)

        return predict
