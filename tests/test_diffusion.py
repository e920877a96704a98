# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from shared.diffusion import prediction_target, sample_posterior

SCHEDULE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}


@pytest.mark.reliability(9)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_target_and_noisy_latents_determine_the_clean_ones(prediction_type):
    scheduler = DDPMScheduler(1000, prediction_type=prediction_type, clip_sample=False, **SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 10, 500, 900])
    target = prediction_target(scheduler, clean, noise, timesteps)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    recovered = {
        "epsilon": (noisy - (1 - alpha_bar).sqrt() * target) / alpha_bar.sqrt(),
        "sample": target,
        "v_prediction": alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * target,
    }[prediction_type]
    torch.testing.assert_close(recovered, clean, atol=1e-4, rtol=1e-4)


def test_unknown_prediction_type_is_named():
    scheduler = DDPMScheduler(10, **SCHEDULE)
    scheduler.prediction_type = "score"
    with pytest.raises(ValueError, match=r"prediction_type: expected one of .*v_prediction, got 'score'"):
        prediction_target(scheduler, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_posterior_draw_has_its_mean_and_variance():
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    draw = sample_posterior(torch.tensor(2.0), torch.tensor(0.09).log(), noise)
    assert draw.mean().item() == pytest.approx(2.0, abs=3e-3)
    assert draw.std().item() == pytest.approx(0.3, abs=3e-3)
