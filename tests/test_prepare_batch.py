# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from shared.prepare_batch import (
    ConditionBatch,
    ConditionedLatentDiffusionBatch,
    ImageAsTarget,
    LatentDiffusionBatch,
    PromptBatch,
    TextLatentDiffusionBatch,
)

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)


class HalvingEncoder(nn.Module):
    """Mean is the upper left quarter, sigma is constant."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x[..., ::2, ::2]
        return mean, torch.full_like(mean, 0.25)


def scheduler(prediction_type: str = "v_prediction") -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000,
        schedule="scaled_linear_beta",
        beta_start=0.0015,
        beta_end=0.0205,
        prediction_type=prediction_type,
        clip_sample=False,
    )


def model(scale_factor: float = 1.0) -> Any:
    return SimpleNamespace(scale_factor=torch.tensor(scale_factor), autoencoder=HalvingEncoder())


def batch(ids: list[int], log_variance: float = -60.0) -> dict[str, Any]:
    """Cached items; a log-variance of -60 makes the posterior a point."""
    means = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)) for index in ids]
    return {
        "latent_mean": torch.stack(means),
        "latent_log_variance": torch.full((len(ids), *SHAPE), log_variance),
        "tokens": torch.tensor([[index, 7] for index in ids]),
        "item_id": [str(index) for index in ids],
    }


def test_image_is_its_own_target():
    image, target = ImageAsTarget()({"image": torch.rand(2, 1, 4, 4)}, CPU)
    assert image is target


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_noisy_latents_and_target_fit_the_schedule(prediction_type, seed):
    """From x_t and the target, x_0 must come back: x_t = a x_0 + s n, v = a n - s x_0 (arXiv:2202.00512)."""
    schedule = scheduler(prediction_type)
    data = batch([1, 2, 3, 4, 5, 6])
    noisy, target, arguments, keywords = TextLatentDiffusionBatch(schedule, model(2.0), seed=seed)(data, CPU)
    assert arguments == ()
    assert keywords["timesteps"].shape == (6,)
    alpha_bar = schedule.alphas_cumprod[keywords["timesteps"]].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    latents = {
        "v_prediction": a * noisy - s * target,
        "epsilon": (noisy - s * target) / a,
        "sample": target,
    }[prediction_type]
    torch.testing.assert_close(latents, 2.0 * data["latent_mean"], atol=2e-4, rtol=1e-4)
    noise = (noisy - a * latents) / s
    assert noise.std().item() == pytest.approx(1.0, abs=0.2)


def test_fixed_draws_depend_on_the_item_and_seed_alone():
    prepare = TextLatentDiffusionBatch(scheduler(), model(), seed=0)
    together = prepare(batch([1, 2, 3], log_variance=0.0), CPU)
    torch.manual_seed(123)
    other = prepare(batch([3, 9, 1, 2], log_variance=0.0), CPU)
    for here, there in ((0, 2), (1, 3), (2, 0)):
        assert torch.equal(together[0][here], other[0][there])
        assert torch.equal(together[1][here], other[1][there])
        assert together[3]["timesteps"][here] == other[3]["timesteps"][there]
    other_seed = TextLatentDiffusionBatch(scheduler(), model(), seed=1)(batch([1, 2, 3], log_variance=0.0), CPU)
    assert not torch.equal(together[0], other_seed[0])
    assert len(set(together[3]["timesteps"].tolist())) == 3


def test_fixed_draws_leave_the_global_generator_and_cover_all_timesteps():
    prepare = TextLatentDiffusionBatch(scheduler(), model(), seed=0)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    _, _, _, keywords = prepare(batch(list(range(400))), CPU)
    assert torch.equal(torch.rand(1), expected)
    timesteps = keywords["timesteps"].float()
    # Uniform over 0..999: mean 499.5 with standard error 14.4 at n = 400.
    assert timesteps.mean().item() == pytest.approx(499.5, abs=60)
    assert timesteps.min() < 50
    assert timesteps.max() > 949


def test_training_draws_come_from_the_global_generator_and_differ_each_time():
    prepare = TextLatentDiffusionBatch(scheduler(), model())
    torch.manual_seed(0)
    first, second = prepare(batch([1]), CPU), prepare(batch([1]), CPU)
    torch.manual_seed(0)
    again = prepare(batch([1]), CPU)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])


def test_timesteps_of_training_cover_all_and_differ_within_a_batch():
    torch.manual_seed(0)
    timesteps = TextLatentDiffusionBatch(scheduler(), model())(batch(list(range(400))), CPU)[3]["timesteps"]
    # Uniform over 0..999, as above; of 400 draws about 330 differ.
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=60)
    assert timesteps.min() < 50
    assert timesteps.max() > 949
    assert len(timesteps.unique()) > 280


def test_posterior_is_sampled_and_scaled():
    """With log-variance log(9) around mean 0, clean latents have standard deviation 3, times the scale factor 0.5."""
    data = batch(list(range(200)))
    data["latent_mean"] = torch.zeros_like(data["latent_mean"])
    data["latent_log_variance"] = torch.full_like(data["latent_mean"], 9.0).log()
    _, latents, _, _ = TextLatentDiffusionBatch(scheduler("sample"), model(0.5), seed=0)(data, CPU)
    assert latents.std().item() == pytest.approx(1.5, rel=0.03)
    assert latents.mean().item() == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("seed", [None, 0])
def test_posterior_noise_and_diffusion_noise_are_independent(seed):
    """With mean 0 and variance 1 the clean latents are the posterior's noise: x_0 = a x_t - s v, n = s x_t + a v."""
    data = batch(list(range(100)), log_variance=0.0)
    data["latent_mean"] = torch.zeros_like(data["latent_mean"])
    schedule = scheduler()
    noisy, velocity, _, keywords = TextLatentDiffusionBatch(schedule, model(), seed=seed)(data, CPU)
    alpha_bar = schedule.alphas_cumprod[keywords["timesteps"]].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    posterior_noise, noise = a * noisy - s * velocity, s * noisy + a * velocity
    correlation = torch.corrcoef(torch.stack((posterior_noise.flatten(), noise.flatten())))[0, 1]
    # Standard error 0.013 at 6000 values.
    assert abs(correlation.item()) < 0.06


def test_images_are_encoded_where_latents_are_not_cached():
    image = torch.rand(2, 1, 8, 8)
    data = {"image": image, "tokens": torch.zeros(2, 2, dtype=torch.long), "item_id": ["0", "1"]}
    _, latents, _, _ = TextLatentDiffusionBatch(scheduler("sample"), model(), seed=0)(data, CPU)
    residual = (latents - image[..., ::2, ::2]) / 0.25
    assert residual.std().item() == pytest.approx(1.0, abs=0.35)


def test_text_goes_through_the_network_or_through_a_frozen_encoder():
    data = batch([1, 2])
    assert torch.equal(TextLatentDiffusionBatch(scheduler(), model())(data, CPU)[3]["tokens"], data["tokens"])
    prepare = TextLatentDiffusionBatch(scheduler(), model(), text_encoder=lambda tokens: tokens * 10.0)
    keywords = prepare(data, CPU)[3]
    assert torch.equal(keywords["context"], data["tokens"] * 10.0)
    assert "tokens" not in keywords


def test_prompts_come_with_the_null_prompt_and_a_seed_per_item():
    data = [
        {"image": torch.full((1, 2, 2), float(i)), "tokens": torch.tensor([i, 9]), "item_id": str(i)} for i in range(3)
    ]
    batchdata = next(iter(DataLoader(Dataset(data), batch_size=3)))
    tokens, images, arguments, keywords = PromptBatch(lambda texts: torch.tensor([[0, 1]] * len(texts)), seed=10)(
        batchdata, CPU
    )
    assert tokens.tolist() == [[[i, 9], [0, 1]] for i in range(3)]
    assert images[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert arguments == ()
    assert keywords == {"seeds": [10, 11, 12]}


def test_without_extra_inputs_there_are_timesteps_alone():
    data = batch([1, 2])
    plain = LatentDiffusionBatch(scheduler(), model(), seed=0)(data, CPU)
    text = TextLatentDiffusionBatch(scheduler(), model(), seed=0)(data, CPU)
    assert set(plain[3]) == {"timesteps"}
    assert torch.equal(plain[0], text[0])
    assert torch.equal(plain[1], text[1])


def test_condition_comes_along_as_a_plain_tensor():
    condition = MetaTensor(torch.rand(2, 3, 16, 20), affine=2 * torch.eye(4))
    data = {**batch([1, 2]), "flair": condition}
    keywords = ConditionedLatentDiffusionBatch(scheduler(), model(), condition_key="flair")(data, CPU)[3]
    assert set(keywords) == {"timesteps", "condition"}
    assert torch.equal(keywords["condition"], condition.as_tensor())
    assert type(keywords["condition"]) is torch.Tensor
    assert set(ConditionedLatentDiffusionBatch(scheduler(), model())(data, CPU)[3]) == {"timesteps"}


def test_null_prompt_has_its_share_in_training_and_none_in_validation():
    data = batch(list(range(3000)))
    prepare = ConditionedLatentDiffusionBatch(scheduler(), model(), null_prompt_probability=0.1)
    null = prepare(data, CPU)[3]["null_prompt"]
    assert null.dtype == torch.bool
    assert null.shape == (3000,)
    # Standard error 0.0055 at n = 3000.
    assert null.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert not torch.equal(prepare(data, CPU)[3]["null_prompt"], null)
    always = ConditionedLatentDiffusionBatch(scheduler(), model(), null_prompt_probability=1.0)
    assert always(data, CPU)[3]["null_prompt"].all()
    for options in ({"null_prompt_probability": 0.0}, {"null_prompt_probability": 0.5, "seed": 0}):
        prepare = ConditionedLatentDiffusionBatch(scheduler(), model(), **options)
        assert "null_prompt" not in prepare(data, CPU)[3]


def test_slices_of_a_subject_share_a_seed_and_subjects_do_not():
    names = ["sub-1", "sub-2", "sub-1", "sub-10"]
    data = {"flair": torch.rand(4, 2, 8, 12), "t1w": torch.rand(4, 1, 8, 12), "subject": names}
    prepare = ConditionBatch(seed=3, condition_key="flair", target_key="t1w")
    condition, target, arguments, keywords = prepare(data, CPU)
    assert torch.equal(condition, data["flair"])
    assert torch.equal(target, data["t1w"])
    assert arguments == ()
    assert list(keywords) == ["seeds"]
    seeds = keywords["seeds"]
    assert seeds[0] == seeds[2]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A function of seed and name: neither of the batch nor of the session.
    alone = prepare({key: value[3:] for key, value in data.items()}, CPU)
    assert alone[3]["seeds"] == seeds[3:]
    other = ConditionBatch(seed=4, condition_key="flair", target_key="t1w")(data, CPU)[3]["seeds"]
    assert not set(other) & set(seeds)


def test_slices_have_noise_of_their_own_where_their_number_counts():
    items = [
        {"flair": torch.rand(1, 8, 12), "t1w": torch.rand(1, 8, 12), "subject": name, "slice": k}
        for name in ("1", "11")
        for k in (1, 11)
    ]
    data = next(iter(DataLoader(Dataset(items), batch_size=4)))
    keys = {"condition_key": "flair", "target_key": "t1w"}
    seeds = ConditionBatch(seed=3, seed_keys=("subject", "slice"), **keys)(data, CPU)[3]["seeds"]
    assert len(set(seeds)) == 4
    plain = [{**item, "slice": int(item["slice"])} for item in items[2:]]
    again = ConditionBatch(seed=3, seed_keys=["subject", "slice"], **keys)(
        next(iter(DataLoader(Dataset(plain), batch_size=2))), CPU
    )
    assert again[3]["seeds"] == seeds[2:]
    shared = ConditionBatch(seed=3, **keys)(data, CPU)[3]["seeds"]
    assert shared[0] == shared[1] != shared[2] == shared[3]
