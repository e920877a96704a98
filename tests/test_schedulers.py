# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler as CoreDDIMScheduler
from monai.networks.schedulers import DDPMScheduler

from shared.diffusion import PredictionType, prediction_target
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps

SCHEDULES = {
    "linear_beta": {"beta_start": 1e-4, "beta_end": 2e-2},
    "scaled_linear_beta": {"beta_start": 0.0015, "beta_end": 0.0205},
    "cosine": {},
}
CHEST = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205, "prediction_type": "v_prediction"}
SPACINGS = ("trailing", "linspace", "karras")
SAMPLERS = [
    *((DDIMScheduler, {"spacing": spacing}) for spacing in SPACINGS),
    *((DPMSolverMultistepScheduler, {"spacing": spacing}) for spacing in SPACINGS),
    (CoreDDIMScheduler, {"clip_sample": False}),
]


def draw(shape=(2, 3, 8, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean, noise = torch.randn((2, *shape), generator=generator)
    return clean, noise


@pytest.mark.reliability(9)
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize("prediction_type", list(PredictionType))
@pytest.mark.parametrize(("sampler", "options"), SAMPLERS)
def test_true_prediction_recovers_the_clean_sample(sampler, options, prediction_type, steps):
    scheduler = sampler(1000, **{**CHEST, "prediction_type": str(prediction_type)}, **options)
    # float32 suffices for tens of steps; a thousand roundings add up to 1e-4 when epsilon is predicted.
    clean, noise = (t.double() if steps == 1000 else t for t in draw())
    timesteps = diffusion_timesteps(scheduler, steps)
    sample = scheduler.add_noise(clean, noise, torch.full((2,), timesteps[0]))
    for timestep in timesteps:
        batch = torch.full((2,), timestep)
        # Karras levels lie between two timesteps: the true prediction belongs to the level, not to the timestep.
        if options.get("spacing") == "karras":
            alpha, sigma = scheduler._levels[scheduler._position]
            if scheduler._position == 0:
                sample = alpha * clean + sigma * noise
            velocity = alpha * noise - sigma * clean
            prediction = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[str(prediction_type)]
        else:
            prediction = prediction_target(scheduler, clean, noise, batch)
        sample, predicted_clean = scheduler.step(prediction, timestep, sample)
    assert (sample - clean).abs().max() < 1e-4
    assert (predicted_clean - clean).abs().max() < 1e-4


@pytest.mark.reliability(9)
@pytest.mark.parametrize("steps", [7, 30, 300])
@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_step_counts_that_do_not_divide_the_training_steps(sampler, steps):
    scheduler = sampler(1000, **CHEST)
    clean, noise = draw()
    timesteps = diffusion_timesteps(scheduler, steps)
    assert len(timesteps) == steps
    sample = scheduler.add_noise(clean, noise, torch.full((2,), timesteps[0]))
    for timestep in timesteps:
        velocity = scheduler.get_velocity(clean, noise, torch.full((2,), timestep))
        sample, _ = scheduler.step(velocity, timestep, sample)
    assert (sample - clean).abs().max() < 1e-4


@pytest.mark.reliability(9)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("prediction_type", list(PredictionType))
@pytest.mark.parametrize(
    ("schedule", "spacing", "steps"),
    [
        *((schedule, "linspace", 12) for schedule in SCHEDULES),
        *((schedule, "trailing", 20) for schedule in SCHEDULES),
        # Without cosine: its sigma / alpha reaches 20 000 within one timestep, and only float32 rounding remains.
        ("linear_beta", "karras", 15),
        ("scaled_linear_beta", "karras", 15),
    ],
)
def test_dpm_solver_equals_diffusers_step_by_step(schedule, prediction_type, spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    ours = DPMSolverMultistepScheduler(
        1000, schedule, prediction_type=prediction_type, spacing=spacing, **SCHEDULES[schedule]
    )
    theirs = diffusers.DPMSolverMultistepScheduler(
        trained_betas=ours.betas.numpy(),
        prediction_type=str(prediction_type),
        timestep_spacing=spacing if spacing != "karras" else "linspace",
        use_karras_sigmas=spacing == "karras",
    )
    timesteps = diffusion_timesteps(ours, steps)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == timesteps
    sample = draw()[1]
    for timestep in timesteps:
        # Any smooth bounded function of the state does: the two solvers must agree on every network.
        prediction = torch.tanh(sample + timestep / 1000)
        # Both start each step from the same sample, else divisions by alpha multiply the rounding of earlier steps.
        theirs_sample = theirs.step(prediction, timestep, sample).prev_sample
        sample, _ = ours.step(prediction, timestep, sample)
        assert (sample - theirs_sample).abs().max() < 1e-5 * max(1.0, float(theirs_sample.abs().max()))


@pytest.mark.reliability(9)
def test_ddim_equals_core_where_core_is_consistent():
    core = CoreDDIMScheduler(1000, clip_sample=False, **CHEST)
    ours = DDIMScheduler(1000, **CHEST)
    assert diffusion_timesteps(core, 50) == diffusion_timesteps(ours, 50)
    sample = core_sample = draw()[1]
    for timestep in core.timesteps.tolist():
        prediction = torch.tanh(sample)
        core_sample, core_clean = core.step(prediction, timestep, sample)
        sample, clean = ours.step(prediction, timestep, sample)
        assert torch.allclose(sample, core_sample, atol=1e-5)
        assert torch.allclose(clean, core_clean, atol=1e-5)


@pytest.mark.reliability(9)
def test_dpm_solver_is_second_order():
    """On dx/dt of a Gaussian data set, whose denoiser is known, halving the step divides the error by about four."""

    def error(sampler, steps):
        scheduler = sampler(1000, **{**CHEST, "prediction_type": "sample"}, spacing="karras")
        timesteps = diffusion_timesteps(scheduler, steps)
        sample = torch.tensor([1.0], dtype=torch.float64)
        for timestep in timesteps:
            alpha, sigma = scheduler._levels[scheduler._position]
            std = 0.5  # data ~ N(0, std^2): E[x_0 | x_t] is linear
            clean = sample * alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            sample, _ = scheduler.step(clean, timestep, sample)
        alpha, sigma = scheduler._levels[0]
        exact = std / (alpha**2 * std**2 + sigma**2) ** 0.5
        return abs(float(sample) - exact)

    orders = {s: error(s, 20) / error(s, 40) for s in (DDIMScheduler, DPMSolverMultistepScheduler)}
    assert orders[DDIMScheduler] < 2.6
    assert orders[DPMSolverMultistepScheduler] > 3.0
    assert error(DPMSolverMultistepScheduler, 20) < 0.25 * error(DDIMScheduler, 20)


@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler, CoreDDIMScheduler])
def test_timesteps_are_explicit(sampler):
    scheduler = sampler(1000, **CHEST)
    assert diffusion_timesteps(scheduler, 1) == [999]
    assert diffusion_timesteps(scheduler, 50) == [999 - 20 * i for i in range(50)]
    assert diffusion_timesteps(scheduler, 1000) == list(range(999, -1, -1))
    assert scheduler.num_inference_steps == 1000


def test_spacings():
    plans = {s: diffusion_timesteps(DDIMScheduler(1000, **CHEST, spacing=s), 25) for s in SPACINGS}
    assert plans["linspace"][:2] == [999, 959]
    assert plans["linspace"][-1] == 40
    assert plans["karras"][0] == 999
    assert plans["karras"][-1] == 0
    assert sorted(plans["karras"], reverse=True) == plans["karras"]


def test_half_precision_is_stepped_in_float32():
    scheduler = DPMSolverMultistepScheduler(1000, **CHEST)
    diffusion_timesteps(scheduler, 2)
    sample, clean = scheduler.step(torch.zeros(1, 1, dtype=torch.bfloat16), 999, torch.ones(1, 1, dtype=torch.float16))
    assert sample.dtype == clean.dtype == torch.float32


def test_errors_name_the_key():
    with pytest.raises(ValueError, match=r"^prediction_type: expected one of epsilon, sample, v_prediction, got 'v'"):
        DDIMScheduler(prediction_type="v")
    with pytest.raises(ValueError, match=r"^spacing: expected one of trailing, linspace, karras, got 'even'"):
        DDIMScheduler(spacing="even")
    with pytest.raises(ValueError, match=r"^num_inference_steps: expected 1 to 1000, .* got 1001"):
        diffusion_timesteps(DDIMScheduler(), 1001)
    with pytest.raises(ValueError, match=r"^num_inference_steps: expected 1 to 1000, .* got 0"):
        diffusion_timesteps(DDIMScheduler(), 0)
    with pytest.raises(ValueError, match=r"^num_inference_steps: expected a divisor of 1000 for DDPMScheduler, got 30"):
        diffusion_timesteps(DDPMScheduler(), 30)


def test_steps_out_of_order_are_refused():
    scheduler = DPMSolverMultistepScheduler(1000, **CHEST)
    x = torch.zeros(1)
    diffusion_timesteps(scheduler, 2)
    with pytest.raises(ValueError, match=r"^timestep: expected 999, got 499"):
        scheduler.step(x, 499, x)
    scheduler.step(x, 999, x)
    scheduler.step(x, 499, x)
    with pytest.raises(ValueError, match=r"^timestep: expected set_timesteps before a new sample"):
        scheduler.step(x, 999, x)
