# SPDX-License-Identifier: Apache-2.0
"""FLAIR to T1w with ``brain_controlnet``: the published sampler and the bundle's, and one step of both.

The published sampler takes one slice at a time through 200 DDIM steps. Each step embeds the condition anew and
evaluates the null prompt beside the prompt, whatever the guidance scale (spec brain_controlnet 2.6).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler

from shared.inferers import guide, seeded_noise
from shared.intensity import robust_range, scale_intensity
from shared.networks.fixed_context import fixed_context
from shared.weights import load_weights
from tools.benchmarks.brain_controlnet_networks import (
    BUNDLE,
    CONTEXT_LENGTH,
    Networks,
    attention,
    brain_config,
    image_size,
    published_networks,
    random_model,
    random_pairs,
    width_in_words,
)
from tools.benchmarks.bundle_config import BUNDLES, bundle_config
from tools.benchmarks.workload import Setting, Size, Workload, relative_difference
from tools.phantoms.brain_controlnet import make_subject

SLICES = 5
PUBLISHED_STEPS = 200
REFERENCE_STEPS = 1000
STEP_TOLERANCE, BF16_STEP_TOLERANCE = 1e-4, 5e-2


@torch.no_grad()
def published_sampler(
    networks: Networks,
    scheduler: DDPMScheduler,
    context: torch.Tensor,
    condition: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """The published sampler, restated: DDIM without clipping, from the velocity.

    Args:
        networks: of monai-generative.
        scheduler: the noise levels.
        context: ``(2, L, D)`` of the null prompt and the prompt.
        condition: ``(1, 1, H, W)`` in [0, 1].
        noise: ``(1, C, h, w)``.
        steps: a divisor of the 1000 of training.
        guidance_scale: 1 is the prompt alone.

    Returns:
        Image ``(1, 1, H, W)`` in [0, 1].
    """
    stride = scheduler.num_train_timesteps // steps
    alpha_bars = scheduler.alphas_cumprod.tolist()
    x, twice = noise, torch.cat((condition, condition))
    for timestep in reversed(range(0, scheduler.num_train_timesteps, stride)):
        x_twice, t = torch.cat((x, x)), torch.full((2,), timestep, device=x.device)
        down, middle = networks.controlnet(x_twice, t, controlnet_cond=twice, conditioning_scale=1.0, context=context)
        both = networks.unet(
            x_twice,
            timesteps=t,
            context=context,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        )
        unconditional, conditional = both.chunk(2)
        velocity = guide(unconditional, conditional, guidance_scale)
        now, then = alpha_bars[timestep], alpha_bars[timestep - stride] if timestep >= stride else 1.0
        clean = now**0.5 * x - (1 - now) ** 0.5 * velocity
        eps = now**0.5 * velocity + (1 - now) ** 0.5 * x
        x = then**0.5 * clean + (1 - then) ** 0.5 * eps
    return networks.autoencoder.decode(x / networks.scale_factor).clamp(0, 1)


def flair_slab(seed: int) -> torch.Tensor:
    """Middle slices ``(1, 1, 80, 112, SLICES)`` of the FLAIR of a phantom head, scaled as by the bundle."""
    volume = np.asarray(make_subject(1, size=(80, 112, 24), seed=seed)["FLAIR"].dataobj, dtype=np.float32)
    scaled = scale_intensity(volume, *robust_range(volume))
    first = (volume.shape[2] - SLICES) // 2
    return torch.from_numpy(np.ascontiguousarray(scaled[..., first : first + SLICES]))[None, None]


def slab_sampling(setting: Setting) -> Workload:
    """A slab of five slices with the shipped demo weights; the published sampler at the middle slice."""
    published_steps, reference_steps, few = setting.pick((10, 50, 5), *[(PUBLISHED_STEPS, REFERENCE_STEPS, 25)] * 2)

    def sampler(**changes: Any) -> Any:
        values = {"inferer#progress": False, "device": str(setting.device), **changes}
        if setting.size == Size.TINY and "num_inference_steps" not in changes:
            values["num_inference_steps"] = 10
        return bundle_config(BUNDLE, ["inference", "tiny"], values).get_parsed_content("inferer")

    parser = bundle_config(BUNDLE, ["inference", "tiny"])
    model: Any = parser.get_parsed_content("network_def").eval()
    load_weights(model, BUNDLES / BUNDLE / "models" / "tiny" / "model.pt")
    scheduler = DDPMScheduler(**{k: v for k, v in parser["noise_schedule"].items() if not k.startswith("_")})
    published = published_networks(model, parser).to(setting.device)
    model.to(setting.device)
    context = model.diffusion.prompt.embeddings.detach()
    slab = flair_slab(setting.seed).to(setting.device)
    one = slab[..., SLICES // 2]
    ours = sampler()
    noise = seeded_noise([ours.seed], parser["latent_shape"]).to(setting.device)
    default = f"bundle, {ours.num_inference_steps} steps, all slices at once"
    slow = f"bundle, {ours.num_inference_steps} steps, slice by slice"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        f"published sampler, {published_steps} steps": lambda: published_sampler(
            published, scheduler, context, one, noise, published_steps
        ),
        slow: functools.partial(ours, one, model),
    }
    for steps in (few, 2 * few):
        if steps != ours.num_inference_steps:
            other = sampler(num_inference_steps=steps)
            ways[f"bundle, {steps} steps, all slices at once"] = functools.partial(other, slab, model)
    ways[default] = functools.partial(ours, slab, model)

    @functools.cache
    def reference() -> torch.Tensor:
        return sampler(num_inference_steps=reference_steps, scheduler="ddim")(one, model)

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        distances = {
            name: relative_difference(image[..., SLICES // 2] if image.ndim == 5 else image, reference())
            for name, image in results.items()
        }
        baseline, *others = distances
        # Fewer steps than the default are shown, and named with what they cost.
        for name in others:
            if name in (default, slow) and not distances[name] <= distances[baseline]:
                raise ValueError(
                    f"{name}: expected an image as near to {reference_steps} steps as the published sampler "
                    f"({distances[baseline]:.3g}), got {distances[name]:.3g}."
                )
            if not distances[name] <= 10 * distances[baseline]:
                raise ValueError(f"{name}: expected the same image, got one {distances[name]:.3g} off.")
        found = ", ".join(f"{name} {distance:.4f}" for name, distance in distances.items() if name != slow)
        return f"distance of the images to {reference_steps} steps (relative): {found}"

    return Workload(
        name=f"FLAIR to T1w of a {SLICES}-slice slab",
        sizes=f"80x112, demo weights (tiny.json), guidance 1, a phantom head; slice by slice: one, times {SLICES}",
        ways=ways,
        equal=equal,
        target=12.0,
        factors=dict.fromkeys((next(iter(ways)), slow), SLICES),
        repeats=3,
    )


def denoising_step(setting: Setting) -> Workload:
    """One step of ControlNet and U-Net, not the first: what is kept between steps is there."""
    share = setting.pick(Fraction(1, 32), Fraction(3, 8), Fraction(1))
    slices = setting.pick(2, SLICES, SLICES)
    device = setting.device

    def network(fused: bool | None) -> tuple[Any, Any]:
        parser = brain_config(setting, "train", share, {} if fused is None else attention("train", fused))
        model = random_model(parser, setting).eval().requires_grad_(False)
        with torch.no_grad():
            model.diffusion.prompt.embeddings.copy_(context)
        return model, parser

    context = seeded_noise([setting.seed, setting.seed + 1], (CONTEXT_LENGTH, int(1024 * share)))
    plain, parser = network(False)
    published = published_networks(plain, parser).to(device)
    sdpa, keeping, lower, ours = (network(fused)[0].to(device) for fused in (True, True, True, None))
    plain.to(device)
    for model in (keeping, lower, ours):
        # Open for good: these networks are used for nothing else.
        fixed_context(model).__enter__()
    size = image_size(setting)
    x = seeded_noise(range(slices), (3, size[0] // 8, size[1] // 8)).to(device)
    condition = random_pairs(setting, slices)[1]
    timesteps = torch.full((slices,), 500, device=device)
    contexts = context.to(device)

    @torch.no_grad()
    def published_step(rows: slice, guided: bool) -> torch.Tensor:
        count = 2 if guided else 1
        given = x[rows].repeat(count, 1, 1, 1), timesteps[rows].repeat(count)
        words = (contexts if guided else contexts[1:]).repeat_interleave(len(x[rows]), dim=0)
        hint = condition[rows].repeat(count, 1, 1, 1)
        down, middle = published.controlnet(*given, controlnet_cond=hint, context=words)
        residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        result = published.unet(given[0], timesteps=given[1], context=words, **residuals)
        return guide(result[: len(result) // 2], result[len(result) // 2 :], 1.0) if guided else result

    def step(model: Any, bf16: bool = False) -> Callable[[], torch.Tensor]:
        with torch.no_grad():
            embedded = model.embed_condition(condition)

        @torch.no_grad()
        def run() -> torch.Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
                return model(x, timesteps, embedded=embedded).float()

        return run

    on_gpu = device.type == "cuda"  # where the bundle's config turns autocast on
    last = "bundle, bf16" if on_gpu else "bundle"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "published step, slice by slice": functools.partial(published_step, slice(0, 1), True),
        "monai-generative, one branch, all slices": functools.partial(published_step, slice(None), False),
        "MONAI core, condition embedded before": step(plain),
        "+ SDPA": step(sdpa),
        "+ keys and values of the prompt kept": step(keeping),
        "+ bf16 autocast": step(lower, True),
        last: step(ours, on_gpu),
    }

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        first, *others = results
        plainest = others[0]
        worst = {True: 0.0, False: relative_difference(results[first], results[plainest][:1])}
        for name in others[1:]:
            half = "bf16" in name
            worst[half] = max(worst[half], relative_difference(results[name], results[plainest]))
        for half, limit in ((False, STEP_TOLERANCE), (True, BF16_STEP_TOLERANCE)):
            if not worst[half] <= limit:
                kind = "bf16" if half else "float32"
                raise ValueError(f"{kind} ways: expected predictions within {limit:g}, got {worst[half]:.3g}.")
        return f"predictions equal within {worst[False]:.1e}, in bf16 within {worst[True]:.1e} (relative)"

    return Workload(
        name=f"denoising step of {slices} slices, ControlNet and U-Net",
        sizes=f"{size[0]}x{size[1]}, {width_in_words(share)}, random weights; slice by slice: one, times {slices}",
        ways=ways,
        equal=equal,
        factors={"published step, slice by slice": slices},
        repeats=3,
    )
