# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from shared.losses import AutoencoderLoss, HingeAdversarialLoss, VectorQuantizedLoss, kl_divergence


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


def test_vq_total_is_four_times_the_error_and_the_commitment():
    target = torch.zeros(2, 3, 4, 6, 8)
    output = (target + 0.5, torch.tensor(0.3), torch.tensor(700.0), torch.tensor(0.4))
    terms = VectorQuantizedLoss()(output, target)
    assert set(terms) == {"reconstruction", "commitment", "perplexity", "usage", "total"}
    assert terms["reconstruction"].item() == pytest.approx(0.5)
    assert terms["total"].item() == pytest.approx(4.0 * 0.5 + 0.3)
    assert (terms["perplexity"].item(), terms["usage"].item()) == pytest.approx((700.0, 0.4))
    assert VectorQuantizedLoss(reconstruction_weight=1.0)(output, target)["total"].item() == pytest.approx(0.8)


def test_vq_figures_pass_no_gradient():
    values = [torch.rand(1, 3, 4, 4, 4, requires_grad=True), *(torch.rand((), requires_grad=True) for _ in range(3))]
    terms = VectorQuantizedLoss()(tuple(values), torch.zeros(1, 3, 4, 4, 4))
    terms["total"].backward()
    assert [value.grad is not None for value in values] == [True, True, False, False]
    assert not terms["perplexity"].requires_grad
    assert not terms["usage"].requires_grad


def test_vq_terms_are_taken_in_single_precision():
    half = torch.full((1, 1, 8, 8, 8), 0.1, dtype=torch.bfloat16)
    terms = VectorQuantizedLoss()((half, *(torch.ones((), dtype=torch.bfloat16) for _ in range(3))), half.float())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_hinge_loss_by_hand():
    loss = HingeAdversarialLoss()
    scores = torch.tensor([-2.0, 0.5, 3.0])
    assert loss(scores, target_is_real=True, for_discriminator=True).item() == pytest.approx((3.0 + 0.5 + 0.0) / 3)
    assert loss(scores, target_is_real=False, for_discriminator=True).item() == pytest.approx((0.0 + 1.5 + 4.0) / 3)
    assert loss(scores, target_is_real=True, for_discriminator=False).item() == pytest.approx(-0.5)


def test_hinge_loss_adds_the_decisions_up():
    loss = HingeAdversarialLoss()
    slices, volumes = torch.rand(2, 1, 4, 6), torch.rand(2, 1, 3, 4, 5)
    for real, discriminator in ((True, True), (False, True), (True, False)):
        apart = loss(slices, real, discriminator) + loss(volumes, real, discriminator)
        torch.testing.assert_close(loss([slices, volumes], real, discriminator), apart)


def test_hinge_loss_pulls_a_generator_equally_hard_however_good_it_is():
    """MONAI's form ends in tanh, so that a generator far from the margin learns nothing."""
    scores = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    HingeAdversarialLoss()(scores, target_is_real=True, for_discriminator=False).backward()
    torch.testing.assert_close(scores.grad, torch.full((3,), -1.0 / 3))


def test_hinge_loss_leaves_a_discriminator_alone_that_is_sure():
    scores = torch.tensor([1.5, 20.0], requires_grad=True)
    HingeAdversarialLoss()(scores, target_is_real=True, for_discriminator=True).backward()
    assert scores.grad.tolist() == [0.0, 0.0]


def test_hinge_loss_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="^target_is_real: expected True where for_discriminator is False"):
        HingeAdversarialLoss()(torch.zeros(2), target_is_real=False, for_discriminator=False)
    with pytest.raises(ValueError, match="^decision: expected a tensor or some of them, got an empty list"):
        HingeAdversarialLoss()([], target_is_real=True, for_discriminator=True)
