# SPDX-License-Identifier: Apache-2.0
"""Batches of patches before the networks of ``dmri2noddi``; the model's linear parts make the arithmetic plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from torch import nn

from shared.networks.noddi import NoddiModel
from shared.noddi_batch import EstimateEncoding, FeaturesBatch, MapsAsTarget, NoddiBatch
from shared.schedulers import DDIMScheduler

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, -2.0]), torch.tensor([0.25, 3.0])


class Halving(nn.Module):
    """Two latents of a volume: its block averages, of the first channel and of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Module()
        self.codebook.embedding_dim = 2
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, maps: torch.Tensor) -> torch.Tensor:
        assert type(maps) is torch.Tensor, "a MetaTensor would stay one through every layer"
        return self.weight * nn.functional.avg_pool3d(maps, 2)[:, [0, -1]]


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        self.seen = x
        return self.weight * x[:, :2]


def model(one_map: bool = False) -> NoddiModel:
    result = NoddiModel(Halving(), Recording(), Recording(), one_map=one_map)
    result.latent_mean.copy_(MEAN)
    result.latent_std.copy_(STD)
    return result


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    schedule: dict[str, Any] = {"schedule": "scaled_linear_beta", "beta_start": 1e-4, "beta_end": 0.02}
    return DDIMScheduler(1000, prediction_type=prediction_type, **schedule)


def batch(channels: int = 3, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 5, 4, 3, 2, generator=generator)
    maps = torch.rand(4, channels, 8, 6, 4, generator=generator)
    return {"image": MetaTensor(image), "maps": MetaTensor(maps), "item_id": ["0", "1", "2", "3"], **more}


def cached(data: dict[str, Any]) -> dict[str, Any]:
    latents = Halving().encode(data["maps"].as_tensor()).detach()
    return {key: value for key, value in data.items() if key != "maps"} | {"latent_mean": latents}


def test_maps_are_input_and_target_of_the_autoencoder():
    data = batch()
    maps, target = MapsAsTarget()(data, CPU)
    assert maps is target
    assert type(maps) is torch.Tensor
    assert torch.equal(maps, data["maps"].as_tensor())


def test_target_of_the_baseline_are_the_maps():
    data = batch()
    features, target = FeaturesBatch()(data, CPU)
    assert torch.equal(features, data["image"].as_tensor())
    assert torch.equal(target, data["maps"].as_tensor())
    assert type(features) is type(target) is torch.Tensor


def test_target_of_the_encoder_is_the_continuous_latent_cached_or_not():
    data, prepare = batch(), FeaturesBatch(Halving())
    for one in (data, cached(data)):
        features, target = prepare(one, CPU)
        assert torch.equal(features, data["image"].as_tensor())
        assert torch.equal(target, Halving().encode(data["maps"].as_tensor()))
        assert not target.requires_grad
    # Without an autoencoder the maps are the target, also where latents are at hand.
    assert torch.equal(FeaturesBatch()(data | cached(data), CPU)[1], data["maps"].as_tensor())


@pytest.mark.parametrize("given", [[2, 0, 1, 1], torch.tensor([2, 0, 1, 1])], ids=["list", "tensor"])
def test_encoder_is_told_which_map(given):
    features, _ = FeaturesBatch(Halving())(batch(channels=1, map_id=given), CPU)
    assert features.shape == (4, 8, 4, 3, 2)
    assert features[:, 5:, 0, 0, 0].argmax(dim=1).tolist() == [2, 0, 1, 1]
    assert features[:, 5:].sum(dim=1).unique().tolist() == [1.0]
    assert features[:, 5:].std(dim=(2, 3, 4)).max() == 0
    _, _, _, named = NoddiBatch(scheduler(), model(one_map=True))(batch(channels=1, map_id=given), CPU)
    assert named["map_ids"].tolist() == [2, 0, 1, 1]


def test_noise_is_added_to_normalised_latents():
    data = batch()
    prepare, alpha_bar = NoddiBatch(scheduler(), model()), scheduler().alphas_cumprod
    for one in (data, cached(data)):
        torch.manual_seed(3)
        features, noise, positional, named = prepare(one, CPU)
        assert torch.equal(features, data["image"].as_tensor())
        assert type(features) is torch.Tensor
        assert positional == ()
        assert set(named) == {"noisy", "timesteps"}
        level = alpha_bar[named["timesteps"]].view(-1, 1, 1, 1, 1)
        clean = (named["noisy"] - (1 - level).sqrt() * noise) / level.sqrt()
        latents = Halving().encode(data["maps"].as_tensor())
        expected = (latents - MEAN.view(2, 1, 1, 1)) / STD.view(2, 1, 1, 1)
        torch.testing.assert_close(clean, expected, rtol=1e-3, atol=1e-2)


def test_other_predictions_have_their_target():
    torch.manual_seed(0)
    _, clean, _, _ = NoddiBatch(scheduler("sample"), model())(batch(), CPU)
    torch.testing.assert_close(clean, model().normalize(Halving().encode(batch()["maps"].as_tensor())))


def test_training_draws_anew_and_validation_does_not():
    data = batch()
    for seed, same in ((None, False), (0, True)):
        prepare = NoddiBatch(scheduler(), model(), seed=seed)
        one, two = prepare(data, CPU), prepare(data, CPU)
        assert torch.equal(one[1], two[1]) == torch.equal(one[3]["noisy"], two[3]["noisy"]) == same
        assert torch.equal(one[3]["timesteps"], two[3]["timesteps"]) == same
    # Of an item, whatever the batch; another seed, other noise.
    part = {key: value[2:3] for key, value in data.items()}
    assert torch.equal(prepare(part, CPU)[1], one[1][2:3])
    assert not torch.equal(NoddiBatch(scheduler(), model(), seed=1)(data, CPU)[1], one[1])


def test_network_takes_what_the_batch_prepares():
    """Condition beside the noisy latent: normalised like it, from the features of the batch."""
    net = model(one_map=True)
    features, noise, _, named = NoddiBatch(scheduler(), net, seed=0)(batch(channels=1, map_id=[2, 0, 1, 1]), CPU)
    predicted = net(features, **named)
    assert predicted.shape == noise.shape
    assert torch.equal(net.encoder.seen[:, 5:, 0, 0, 0].argmax(dim=1), torch.tensor([2, 0, 1, 1]))
    noisy, condition = net.unet.seen.chunk(2, dim=1)
    assert torch.equal(noisy, named["noisy"])
    torch.testing.assert_close(condition, net.normalize(features[:, :2]))


@pytest.mark.parametrize("one_map", [False, True])
def test_cached_estimate_conditions_like_the_features(one_map):
    """In whatever batches it was computed, and with the mean and deviation that are measured afterwards."""
    net, given = model(one_map), {"map_id": [2, 0, 1, 1]} if one_map else {}
    data = batch(channels=1 if one_map else 3, **given)
    encoding = EstimateEncoding(net, dict)
    items = [{"image": data["image"][i], **{key: value[i] for key, value in given.items()}} for i in range(4)]
    with torch.no_grad():
        net.latent_mean.zero_()
    estimates = torch.cat([encoding.encode(list_data_collate([encoding.inputs(item)])) for item in items])
    assert estimates.shape == (4, 1, 2, 4, 3, 2)
    assert type(estimates) is torch.Tensor
    net.latent_mean.copy_(MEAN)
    stored = {key: value for key, value in data.items() if key != "image"} | {"condition_latent": estimates[:, 0]}
    prepare = NoddiBatch(scheduler(), net, seed=0)
    (features, target, _, named), (plain, expected, _, more) = prepare(stored, CPU), prepare(data, CPU)
    assert features is None
    assert torch.equal(target, expected)
    assert torch.equal(net(features, **named), net(plain, **more))
    assert torch.equal(named["condition"], net.condition(plain, more.get("map_ids")))


def test_estimates_depend_on_the_encoder_and_every_file_of_the_features():
    encoding = EstimateEncoding(model(), dict)
    item = {key: f"a.{key}" for key in ("dwi", "bval", "bvec", "mask", "ndi")} | {"patch": [0, 1, 2], "subject": "a"}
    assert set(encoding.source(item)) == {"dwi", "bval", "bvec", "mask", "patch"}
    assert set(encoding.path_keys) == {"dwi", "bval", "bvec", "mask"}
