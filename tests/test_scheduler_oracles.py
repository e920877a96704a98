# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and samplers against diffusers, three schedules times three predictions; whatever configs name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.schedulers import DDPMScheduler

from shared.diffusion import PredictionType, prediction_target
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps
from tests.bundle_tools import STANDALONE, components, label, read

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # interfaces that the releases of its dependencies deprecate
    import diffusers

pytestmark = [
    pytest.mark.reliability(9),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers with numpy 2
]
SCHEDULES: dict[str, dict[str, float]] = {
    "linear_beta": {"beta_start": 1e-4, "beta_end": 2e-2},
    "scaled_linear_beta": {"beta_start": 0.0015, "beta_end": 0.0205},
    "cosine": {},
}
THEIR_NAMES = {"linear_beta": "linear", "scaled_linear_beta": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = [str(kind) for kind in PredictionType]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTIONS)


def draw(count: int = 2, *, double: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, 2, 3, 8, 6), generator=generator, dtype=torch.float64 if double else torch.float32)


def ours(kind: Any, schedule: str, prediction_type: str, **options: Any) -> Any:
    return kind(1000, schedule, prediction_type=prediction_type, **SCHEDULES[schedule], **options)


def theirs(kind: str, like: Any, **options: Any) -> Any:
    """Of the same betas: those of the schedules are compared by themselves."""
    return getattr(diffusers, kind)(trained_betas=like.betas.numpy(), prediction_type=like.prediction_type, **options)


@every_schedule
def test_schedules_are_those_of_diffusers(schedule, record_property):
    mine = DDPMScheduler(1000, schedule, **SCHEDULES[schedule])
    reference = diffusers.DDPMScheduler(1000, beta_schedule=THEIR_NAMES[schedule], **SCHEDULES[schedule])
    # diffusers cuts the last betas of the cosine at 0.999, MONAI at 0.9999.
    count = int((reference.betas < 0.9989).sum())
    assert count >= 999
    error = (mine.betas[:count] - reference.betas[:count]).abs().max()
    error = max(error, (mine.alphas_cumprod[:count] - reference.alphas_cumprod[:count]).abs().max())
    record_property("figure", f"betas and their products within {float(error):.1e}")
    assert error < 1e-4  # MONAI's cosine is computed in float32


@every_schedule
@every_prediction
def test_noise_and_target_of_training_are_those_of_diffusers(schedule, prediction_type):
    clean, noise = draw()
    for kind in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        mine = ours(kind, schedule, prediction_type)
        reference = theirs("DDPMScheduler", mine)
        for pair in ([0, 1], [250, 499], [998, 999]):
            t = torch.tensor(pair)
            torch.testing.assert_close(mine.add_noise(clean, noise, t), reference.add_noise(clean, noise, t))
            target = {"epsilon": noise, "sample": clean}.get(prediction_type)
            target = reference.get_velocity(clean, noise, t) if target is None else target
            torch.testing.assert_close(prediction_target(mine, clean, noise, t), target)


@every_schedule
@every_prediction
def test_steps_of_ddpm_are_those_of_diffusers(schedule, prediction_type, record_property):
    """In float64: the two take 1 - alpha_bar of the first levels, 1e-4, in another order of roundings."""
    mine = ours(DDPMScheduler, schedule, prediction_type, clip_sample=False)
    reference = theirs("DDPMScheduler", mine, clip_sample=False)
    for one in (mine, reference):
        one.betas = one.betas.double()
        one.alphas = 1 - one.betas
        one.alphas_cumprod = one.alphas.cumprod(0)
    sample, output = draw(double=True)
    worst = 0.0
    for t in (999, 998, 500, 20, 1, 0):
        generators = [torch.Generator().manual_seed(t) for _ in range(2)]
        found, clean = mine.step(output, t, sample, generator=generators[0])
        other = reference.step(output, t, sample, generator=generators[1])
        for a, b in ((found, other.prev_sample), (clean, other.pred_original_sample)):
            worst = max(worst, float((a - b).abs().max() / max(1.0, float(b.abs().max()))))
    record_property("figure", f"relative difference {worst:.1e}")
    assert worst < 1e-5


def compare(mine: Any, reference: Any, steps: int) -> float:
    """Largest relative difference of a step; every step starts from the same sample."""
    timesteps = diffusion_timesteps(mine, steps)
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == timesteps
    sample, worst = draw()[1], 0.0
    for timestep in timesteps:
        # Any smooth bounded function of the state does: both must agree on every network.
        prediction = torch.tanh(sample + timestep / 1000)
        there = reference.step(prediction, timestep, sample).prev_sample
        sample, _ = mine.step(prediction, timestep, sample)
        worst = max(worst, float((sample - there).abs().max() / max(1.0, float(there.abs().max()))))
    return worst


@every_schedule
@every_prediction
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_steps_of_ddim_are_those_of_diffusers(schedule, prediction_type, steps, record_property):
    mine = ours(DDIMScheduler, schedule, prediction_type)
    reference = theirs("DDIMScheduler", mine, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    worst = compare(mine, reference, steps)
    record_property("figure", f"relative difference {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("schedule", ["linear_beta", "scaled_linear_beta"])  # cosine: see test_schedulers.py
@every_prediction
@pytest.mark.parametrize(("kind", "order"), [(DDIMScheduler, 1), (DPMSolverMultistepScheduler, 2)])
@pytest.mark.parametrize("steps", [25, 40])
def test_karras_levels_are_those_of_diffusers(schedule, prediction_type, kind, order, steps, record_property):
    mine = ours(kind, schedule, prediction_type, spacing="karras")
    worst = compare(
        mine, theirs("DPMSolverMultistepScheduler", mine, solver_order=order, use_karras_sigmas=True), steps
    )
    record_property("figure", f"relative difference {worst:.1e}")
    assert worst < 1e-5


@every_schedule
@every_prediction
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_true_prediction_recovers_the_clean_sample_on_every_schedule(
    schedule, prediction_type, spacing, kind, record_property
):
    """In float64, as alpha of the cosine's last levels is 5e-5: with float32, rounding of the noise alone is 2e-3."""
    clean, noise = draw(double=True)
    worst = 0.0
    for steps in (1, 3, 25, 40):
        mine = ours(kind, schedule, prediction_type, spacing=spacing)
        timesteps = diffusion_timesteps(mine, steps)
        sample = mine.add_noise(clean, noise, torch.full((2,), timesteps[0]))
        for timestep in timesteps:
            target = prediction_target(mine, clean, noise, torch.full((2,), timestep))
            sample, estimate = mine.step(target, timestep, sample)
        worst = max(worst, float((sample - clean).abs().max()), float((estimate - clean).abs().max()))
    record_property("figure", f"x0 recovered within {worst:.1e}")
    assert worst < 1e-4


# What the configurations name

USED = [
    (path, where, dict(component))
    for path in STANDALONE
    for where, component in components(read(path))
    if str(component["_target_"]).endswith("Scheduler") and "noise_schedule" in str(component)
]


def test_every_bundle_is_compared():
    assert {path.parent.parent.name for path, *_ in USED} == {"cxr_ldm", "brain_controlnet", "dmri2noddi", "sdseg"}
    kinds = {component["_target_"].split(".")[-1] for *_, component in USED}
    assert kinds == {"DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("path", "where", "component"), USED, ids=[f"{label(path)}-{where}" for path, where, _ in USED]
)
def test_each_scheduler_of_the_configurations_is_that_of_diffusers(path, where, component, record_property):
    config = read(path)
    parser = ConfigParser({"noise_schedule": config["noise_schedule"], "it": component})
    mine = parser.get_parsed_content("it")
    stated = config["noise_schedule"]
    options = {key: value for key, value in stated.items() if key.startswith("beta_")}
    reference = diffusers.DDPMScheduler(
        stated["num_train_timesteps"], beta_schedule=THEIR_NAMES[stated["schedule"]], **options
    )
    torch.testing.assert_close(mine.alphas_cumprod, reference.alphas_cumprod, atol=1e-6, rtol=1e-5)
    assert mine.prediction_type == stated["prediction_type"]
    if isinstance(mine, DDPMScheduler):
        assert not mine.clip_sample
        return
    steps = config.get("num_inference_steps", 25)
    if isinstance(mine, DDIMScheduler):
        options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
        steps = steps if 1000 % steps == 0 else 50
        worst = compare(mine, theirs("DDIMScheduler", mine, **options), steps)
    else:
        worst = compare(mine, theirs("DPMSolverMultistepScheduler", mine, use_karras_sigmas=True), steps)
    record_property("figure", f"{steps} steps, relative difference {worst:.1e}")
    assert worst < 1e-5
