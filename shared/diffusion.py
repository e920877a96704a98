# SPDX-License-Identifier: Apache-2.0
"""What a noise schedule asks the network to predict, and how a posterior is sampled."""

from __future__ import annotations

import torch
from monai.networks.schedulers import Scheduler
from monai.utils import StrEnum


class PredictionType(StrEnum):
    """Words of ``prediction_type`` in MONAI's schedulers."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V_PREDICTION = "v_prediction"


def prediction_target(
    scheduler: Scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The tensor that the network must predict under ``scheduler.prediction_type``.

    ``epsilon``: the noise; ``sample``: the clean latents; ``v_prediction``: the velocity
    ``sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents`` (arXiv:2202.00512, appendix D). Training and sampling read
    the same scheduler block, so the two cannot disagree.

    Args:
        scheduler: MONAI scheduler that has ``prediction_type``.
        latents: clean scaled latents ``(B, C, *spatial)``.
        noise: standard normal noise of the same shape.
        timesteps: integers ``(B,)``.

    Raises:
        ValueError: for a prediction type that the schedulers do not know.
    """
    prediction_type = str(scheduler.prediction_type)
    if prediction_type == PredictionType.EPSILON:
        return noise
    if prediction_type == PredictionType.SAMPLE:
        return latents
    if prediction_type == PredictionType.V_PREDICTION:
        return scheduler.get_velocity(latents, noise, timesteps)
    known = ", ".join(PredictionType)
    raise ValueError(f"prediction_type: expected one of {known}, got {prediction_type!r}; correct the scheduler block.")


def sample_posterior(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw from a diagonal Gaussian: ``mean + exp(log_variance / 2) noise`` (arXiv:1312.6114, section 2.4)."""
    return mean + torch.exp(0.5 * log_variance) * noise
