# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from shared.losses import AutoencoderLoss, kl_divergence


def test_kl_is_zero_for_the_prior_and_exact_elsewhere():
    generator = torch.Generator().manual_seed(0)
    mean, sigma = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator) + 0.1
    assert kl_divergence(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)).item() == 0.0
    expected = exact_kl(Normal(mean, sigma), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(kl_divergence(mean, sigma), expected)


def test_kl_survives_half_precision():
    mean = torch.full((1, 3, 64, 64), 40.0, dtype=torch.float16)
    assert torch.isfinite(kl_divergence(mean, torch.ones_like(mean)))


def test_total_is_the_weighted_sum_of_named_terms():
    image = torch.zeros(2, 1, 8, 8)
    reconstruction, mean, sigma = image + 0.5, torch.ones(2, 3, 1, 1), torch.ones(2, 3, 1, 1)
    loss = AutoencoderLoss(kl_weight=0.1, perceptual=lambda x, y: (x - y).square().mean(), perceptual_weight=2.0)
    terms = loss((reconstruction, mean, sigma), image)
    assert terms["reconstruction"].item() == pytest.approx(0.5)
    assert terms["kl"].item() == pytest.approx(1.5)
    assert terms["perceptual"].item() == pytest.approx(0.25)
    assert terms["total"].item() == pytest.approx(0.5 + 0.1 * 1.5 + 2.0 * 0.25)


def test_perceptual_network_is_no_part_of_the_state():
    loss = AutoencoderLoss(kl_weight=0.0, perceptual=torch.nn.Linear(2, 2), perceptual_weight=1.0)
    assert list(loss.parameters()) == []
    assert AutoencoderLoss(kl_weight=0.0, perceptual_weight=1.0).perceptual_weight == 0.0
