# SPDX-License-Identifier: Apache-2.0
"""NODDI maps of a volume: the published sampler patch by patch, and the bundle's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.schedulers import DDIMScheduler

from shared.inferers import sample_latents, seeded_noise
from shared.noddi_sampler import NoddiSampler
from shared.patches import patch_starts
from shared.schedulers import DeterministicScheduler, diffusion_timesteps
from shared.weights import load_weights
from tools.benchmarks.bundle_config import BUNDLES, bundle_config
from tools.benchmarks.dmri2noddi_networks import (
    in_words,
    noddi_config,
    random_features,
    random_model,
    with_default_attention,
)
from tools.benchmarks.workload import Setting, Workload, relative_difference

PUBLISHED_STEPS = 100
SCHEDULE: dict[str, Any] = {
    "schedule": "scaled_linear_beta", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon",
}  # fmt: skip
# Rounding changes the nearest code of single voxels: of the latent, and so of the maps around them.
SHARE_OF_VOXELS, BF16_TOLERANCE = 1e-2, 5e-2


@torch.no_grad()
def published_sampling(
    model: Any, features: torch.Tensor, noise: torch.Tensor, steps: int, *, patch: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """The published way to the maps of a volume (spec dmri2noddi 4.6), with the loop run forwards to the end.

    One patch after the other: the condition from the encoder, DDIM, nearest codes, decoder; then the mean of all
    patches that cover a voxel. Published, each patch has a noise of its own. Here it is cut from one volume of noise,
    which costs the same and lets results be compared.

    Args:
        model: ``NoddiModel``.
        features: ``(1, F, X, Y, Z)``.
        noise: ``(1, C, X, Y, Z)``.
        steps: of DDIM, a divisor of 1000.
        patch: sides of a patch.
        stride: voxels from a patch to the next.

    Returns:
        ``(1, M, 2X, 2Y, 2Z)`` in [0, 1].
    """
    # What MONAI core's scheduler needs to end at the clean latent in all its versions.
    scheduler = DDIMScheduler(
        1000,
        schedule="scaled_linear_beta",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    timesteps = [1000 * (steps - i) // steps - 1 for i in range(steps)]
    total = torch.zeros(1, model.num_maps, *(2 * side for side in features.shape[2:]), device=features.device)
    count = torch.zeros_like(total[:, :1])
    for start in patch_starts(features.shape[2:], patch, stride):
        place, doubled = _block(start, patch), _block(start, patch, factor=2)
        condition = model.condition(features[place])
        x = noise[place]
        for timestep in timesteps:
            t = torch.full((1,), timestep, device=x.device)
            x = scheduler.step(model.unet(torch.cat((x, condition), dim=1), t), timestep, x)[0]
        total[doubled] += model.decode(x).clamp(0.0, 1.0)
        count[doubled] += 1
    return total / count


def _block(start: Sequence[int], sides: Sequence[int], *, factor: int = 1) -> tuple[Any, ...]:
    """Index of a patch within a volume with leading axes; ``factor`` 2 on the grid of the maps."""
    return (..., *(slice(factor * a, factor * (a + n)) for a, n in zip(start, sides, strict=True)))


def patch_sampling(setting: Setting) -> Workload:
    """Everything from features to maps; the last way is what ``configs/inference.json`` says, in float32."""
    share, side = setting.pick((1 / 16, 8), (1 / 16, 16), (1.0, 32))
    # A GPU takes the published volume; elsewhere two patches that overlap as there.
    shape = setting.pick((8, 8, 12), (16, 16, 25), (68, 86, 68))
    steps = setting.pick(10, PUBLISHED_STEPS, PUBLISHED_STEPS)
    parser = noddi_config(setting, ["inference"], share=share, patch=[side] * 3)
    own_steps, solver, overlap = parser["num_inference_steps"], parser["scheduler"], parser["overlap"]
    model = random_model(parser, setting)
    features = random_features(setting, shape)
    noise = seeded_noise([0], (model.latent_channels, *shape)).to(setting.device)
    stride = [int(side * (1 - overlap))] * 3
    published = partial(
        published_sampling, features=features, noise=noise, steps=steps, patch=[side] * 3, stride=stride
    )
    parser["network_def"] = model
    sampler: NoddiSampler = parser.get_parsed_content("inferer")
    plain = NoddiSampler(
        scheduler=parser.get_parsed_content("noise_schedulers")["ddim"],
        **{"patch_size": [side] * 3, "overlap": overlap, "fusion": "maps", "blend": "constant"},
        num_inference_steps=steps,
    )
    baseline = f"{steps} steps of DDIM, a patch at a time, MONAI's default attention"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        baseline: partial(published, with_default_attention(model)),
        "+ scaled-dot-product attention": partial(published, model),
        "the bundle's sampler, blending as published": partial(plain, features, model),
        f"dmri2noddi: {own_steps} steps of {solver}": partial(sampler, features, model),
    }

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        same = voxels_equal(
            {name: maps for name, maps in results.items() if "blending" in name or name in list(ways)[:2]}
        )
        last = list(results)[-1]
        if results[last].shape != results[baseline].shape or not results[last].isfinite().all():
            raise ValueError(f"{last}: expected finite maps {tuple(results[baseline].shape)}, got others.")
        return f"{same}; {quality(setting, last, solver, own_steps, steps)}"

    return Workload(
        name="NODDI maps of a volume in patches",
        sizes=(
            f"volume {' x '.join(map(str, shape))} in {len(patch_starts(shape, [side] * 3, stride))} patches of "
            f"{side}^3, {in_words(share)}" + ("" if side == 32 else "; attention weighs less than at 32^3")
        ),
        ways=ways,
        equal=equal,
        target=5.0,
        repeats=setting.pick(1, 2, 2),
    )


def voxels_equal(results: Mapping[str, torch.Tensor]) -> str:
    """What share of the voxels differs from the first result by more than 1e-3.

    Raises:
        ValueError: for more than ``SHARE_OF_VOXELS``; the message starts with the way's name.
    """
    names, shares = list(results), []
    first = results[names[0]]
    for name in names[1:]:
        if results[name].shape != first.shape:
            raise ValueError(f"{name}: expected maps {tuple(first.shape)}, got {tuple(results[name].shape)}.")
        shares.append(((results[name] - first).abs() > 1e-3).float().mean().item())
        if not shares[-1] <= SHARE_OF_VOXELS:
            raise ValueError(f"{name}: expected at most {SHARE_OF_VOXELS:.1%} other voxels, got {shares[-1]:.2%}.")
    return f"{max(shares):.3%} of the voxels differ by more than 1e-3 with the same noise and blending"


@torch.no_grad()
def quality(setting: Setting, way: str, solver: str, steps: int, published_steps: int) -> str:
    """How far the bundle's solver and the published one end from many steps, with the demo weights and equal noise.

    Raises:
        ValueError: when the bundle's ends farther; the message starts with ``way``.
    """
    parser = bundle_config("dmri2noddi", ["inference", "tiny"], {"device": torch.device("cpu")})
    model: Any = load_weights(parser.get_parsed_content("network_def"), BUNDLES / "dmri2noddi/models/tiny/model.pt")
    condition = model.eval().condition(random_features(Setting(seed=setting.seed), (8, 8, 8)).square())
    noise = seeded_noise([setting.seed], condition.shape[1:])
    schedulers = parser.get_parsed_content("noise_schedulers")

    def end(scheduler: DeterministicScheduler, count: int) -> torch.Tensor:
        timesteps = diffusion_timesteps(scheduler, count)
        return sample_latents(lambda x, t: model(None, x, t, condition=condition), scheduler, noise, timesteps)

    if (solver, steps) == ("ddim", published_steps):
        return "solver and steps as published"
    # The second-order solver comes near the limit sooner: its 100 steps are 0.0007 from 1000 of DDIM.
    reference_steps = setting.pick(50, 250, 1000)
    reference = end(schedulers["dpm"], reference_steps)
    own = relative_difference(end(schedulers[solver], steps), reference)
    published = relative_difference(end(schedulers["ddim"], published_steps), reference)
    if own > published:
        raise ValueError(
            f"{way}: expected latents as near to those of {reference_steps} steps as {published_steps} steps of DDIM, "
            f"{published:.4f}, got {own:.4f}; take more steps."
        )
    return (
        f"demo weights: latents {own:.4f} from those of {reference_steps} steps, those of {published_steps} steps of "
        f"DDIM {published:.4f}"
    )


def denoising(setting: Setting) -> Workload:
    """The steps alone, at the published size of a patch, where attention shows: equal steps, so a few stand for all.

    Encoder and decoder, which are the same in all ways, take as long as 2.4 steps of the published channels.
    """
    share, side = setting.pick((1 / 16, 8), (1 / 4, 32), (1.0, 32))
    timed = setting.pick(2, 2, 10)
    parser: ConfigParser = noddi_config(setting, ["inference"], share=share, patch=[side] * 3)
    solver, own_steps = parser["scheduler"], parser["num_inference_steps"]
    model = random_model(parser, setting)
    condition = random_features(setting, [side] * 3)
    noise = seeded_noise([0], condition.shape[1:]).to(setting.device)

    @torch.no_grad()
    def steps(network: Any, name: str = "ddim", count: int = PUBLISHED_STEPS, *, half: bool = False) -> torch.Tensor:
        scheduler = parser.get_parsed_content("noise_schedulers")[name]
        timesteps = diffusion_timesteps(scheduler, count)[:timed]
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=half):
            return sample_latents(lambda x, t: network(None, x, t, condition=condition), scheduler, noise, timesteps)

    plain, exact = "MONAI's default attention", "scaled-dot-product attention"
    lower, own = f"{exact}, bfloat16 (default on GPUs)", f"dmri2noddi: {exact}, {own_steps} steps of {solver}"
    published = (solver, own_steps) == ("ddim", PUBLISHED_STEPS)
    half_precision = setting.device.type == "cuda"

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        limits = {exact: 1e-4, lower: BF16_TOLERANCE}
        if published:
            limits[own] = BF16_TOLERANCE if half_precision else 1e-4
        differences = {name: relative_difference(results[name], results[plain]) for name in limits}
        for name, limit in limits.items():
            if not differences[name] <= limit:
                raise ValueError(f"{name}: expected latents within {limit:g} of {plain}, got {differences[name]:.3g}.")
        if not results[own].isfinite().all() or results[own].shape != results[plain].shape:
            raise ValueError(f"{own}: expected finite latents {tuple(results[plain].shape)}, got others.")
        return (
            f"latents after {timed} steps equal within {differences[exact]:.1e} (relative), in bfloat16 "
            f"{differences[lower]:.1e}; {quality(setting, own, solver, own_steps, PUBLISHED_STEPS)}"
        )

    ways = {
        plain: partial(steps, with_default_attention(model)),
        exact: partial(steps, model),
        lower: partial(steps, model, half=True),
        own: partial(steps, model, solver, own_steps, half=half_precision),
    }
    return Workload(
        name=f"denoising of a patch, {PUBLISHED_STEPS} steps of DDIM as published",
        sizes=f"patch {side}^3, {in_words(share)}; {timed} steps timed, without encoder and decoder",
        ways=ways,
        equal=equal,
        target=5.0,
        factors=dict.fromkeys(ways, PUBLISHED_STEPS / timed) | {own: own_steps / timed},
        repeats=setting.pick(1, 3, 5),
    )
