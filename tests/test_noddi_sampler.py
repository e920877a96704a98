# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler as CoreDDIM
from torch import nn
from torch.nn.functional import interpolate

from shared.inferers import seeded_noise
from shared.networks.low_resolution_encoder import LowResolutionEncoder
from shared.networks.noddi import NoddiModel, start_from_stages, with_map_id
from shared.networks.vq_autoencoder import VQAutoencoder
from shared.noddi_sampler import NoddiSampler
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler

SCHEDULE = {"schedule": "scaled_linear_beta", "beta_start": 1e-4, "beta_end": 0.02}


class Oracle(nn.Module):
    """Knows the noise: the clean latent is the condition, which is the features; decoding doubles the voxels."""

    num_maps, one_map, latent_channels = 3, False, 3

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.alpha_bar = DDIMScheduler(1000, **SCHEDULE).alphas_cumprod.double()
        self.error = error
        self.calls: list[tuple[int, ...]] = []

    def condition(self, features: torch.Tensor) -> torch.Tensor:
        return features.clone()  # MONAI's sliding window writes into what a predictor returns

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return interpolate(latents, scale_factor=2)

    def estimate(self, features: torch.Tensor) -> torch.Tensor:
        return self.decode(features)

    def forward(self, features: None, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(x.shape))
        alpha_bar = self.alpha_bar[t][:, None, None, None, None]
        noise = (x.double() - alpha_bar.sqrt() * condition.double()) / (1 - alpha_bar).sqrt()
        if self.error:  # depends on the place within the patch, as a network's error at the border of its view does
            ramp = torch.linspace(-1, 1, x.shape[2], dtype=torch.float64)[:, None, None]
            noise = noise + self.error * ramp
        return noise.float()


def sampler(**options) -> NoddiSampler:
    scheduler = options.pop("scheduler", DDIMScheduler(1000, **SCHEDULE))
    return NoddiSampler(scheduler=scheduler, **{"patch_size": (8, 6, 4), "num_inference_steps": 10, **options})


def volume(shape: tuple[int, ...] = (3, 14, 9, 7), seed: int = 0) -> torch.Tensor:
    return torch.rand((1, *shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.reliability(9)
@pytest.mark.parametrize("fusion", ["maps", "steps"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_an_oracle_gives_the_clean_latent(fusion: str, steps: int) -> None:
    features = volume()
    maps = sampler(fusion=fusion, num_inference_steps=steps, overlap=0.25)(features, Oracle())
    assert maps.shape == (1, 3, 28, 18, 14)
    assert (maps - interpolate(features, scale_factor=2)).abs().max() < 1e-4


@pytest.mark.reliability(9)
def test_an_oracle_gives_the_clean_latent_with_few_steps_of_another_solver() -> None:
    features = volume()
    solver = DPMSolverMultistepScheduler(1000, **SCHEDULE)
    maps = sampler(scheduler=solver, num_inference_steps=7)(features, Oracle())
    assert (maps - interpolate(features, scale_factor=2)).abs().max() < 1e-4


@pytest.mark.parametrize("fusion", ["maps", "steps"])
def test_a_start_on_the_way_begins_at_the_estimate_with_noise(fusion: str) -> None:
    """A network that predicts no noise keeps what it is given: the estimate, and of the noise the level's share."""

    class Silent(Oracle):
        def forward(self, features, x, t, condition):  # type: ignore[no-untyped-def]
            self.times = [*getattr(self, "times", []), int(t[0])]
            return torch.zeros_like(x)

    model, features = Silent(), 0.4 + 0.2 * volume((3, 8, 6, 4))
    # One patch; 10 steps are 999, 899, ..., 99, of which 199 and 99 lie below 0.25 * 1000.
    maps = sampler(fusion=fusion, start=0.25)(features, model)
    assert model.times == [199, 99]
    alpha_bar = model.alpha_bar[199]
    noise = seeded_noise([0], (3, 8, 6, 4))
    expected = (
        features + noise * ((1 - alpha_bar) / alpha_bar).sqrt()
    )  # zero noise predicted: x / alpha is the clean one
    torch.testing.assert_close(maps, interpolate(expected.float(), scale_factor=2).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_a_start_on_the_way_ends_at_the_data_too() -> None:
    features = volume()
    maps = sampler(start=0.3, num_inference_steps=20)(features, Oracle())
    assert (maps - interpolate(features, scale_factor=2)).abs().max() < 1e-4
    one_step = Oracle()
    sampler(start=0.001)(features, one_step)
    assert one_step.calls  # at least one step is left


@pytest.mark.parametrize("fusion", ["maps", "steps"])
def test_a_constant_field_has_no_seam(fusion: str) -> None:
    features = torch.full((1, 3, 20, 9, 7), 0.4)
    maps = sampler(fusion=fusion)(features, Oracle())
    jumps = maps.diff(dim=2).abs().amax(dim=(0, 1, 3, 4))
    assert jumps.max() < 1e-4


def seam_ratio(maps: torch.Tensor, truth: torch.Tensor, starts: list[int]) -> float:
    """Largest mean jump of the error between neighbouring voxels at a border of patches over the largest elsewhere."""
    jumps = (maps - truth)[:, :, ::2].diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    borders = {start - 1 for start in starts}
    elsewhere = [float(jump) for index, jump in enumerate(jumps) if index not in borders]
    return max(float(jumps[index]) for index in borders) / max(elsewhere)


@pytest.mark.parametrize("fusion", ["maps", "steps"])
def test_errors_that_depend_on_the_place_in_a_patch_leave_no_seam(fusion: str) -> None:
    # Patches of 8 at 0, 4, 8, 12: they begin at 4, 8, 12 and end at 8, 12, 16 (in front of 20).
    features, borders = torch.full((1, 3, 20, 6, 4), 0.5), [4, 8, 12, 16]
    truth = interpolate(features, scale_factor=2)
    blended = sampler(fusion=fusion, overlap=0.5)(features, Oracle(error=0.05))
    assert seam_ratio(blended, truth, borders) < 1.25
    published = sampler(fusion="maps", overlap=0.0, blend="constant")(features, Oracle(error=0.05))
    assert seam_ratio(published, truth, [8, 12]) > 3  # the measure finds a seam where there is one


@pytest.mark.parametrize(("fusion", "order"), [("steps", [999, 999, 499, 499]), ("maps", [999, 499, 999, 499])])
def test_fusion_says_whether_steps_or_patches_come_first(fusion: str, order: list[int]) -> None:
    times = []

    class Watched(Oracle):
        def forward(self, features, x, t, condition):  # type: ignore[no-untyped-def]
            times.append(int(t[0]))
            return super().forward(features, x, t, condition)

    # Two patches, of 8 at 0 and 4.
    sampler(fusion=fusion, num_inference_steps=2, overlap=0.5)(volume((3, 12, 6, 4)), Watched())
    assert times == order


@pytest.mark.parametrize("fusion", ["maps", "steps"])
def test_overshoot_of_a_patch_does_not_weigh_on_the_next(fusion: str) -> None:
    class Overshooting(Oracle):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            maps = torch.zeros_like(interpolate(latents, scale_factor=2))
            maps[:, :, 8:] = 2.0
            return maps

    maps = sampler(fusion=fusion, overlap=0.5, blend="constant")(volume((3, 12, 6, 4)), Overshooting())
    # The far half of the first patch, 2 clipped to 1, and the near half of the second, 0.
    torch.testing.assert_close(maps[:, :, 8:16], torch.full_like(maps[:, :, 8:16], 0.5))


def test_the_noise_is_shared_where_patches_overlap() -> None:
    """A network that predicts no noise leaves the noise itself, scaled: overlapping patches must agree on it."""

    class Silent(Oracle):
        def forward(self, features, x, t, condition):  # type: ignore[no-untyped-def]
            return torch.zeros_like(x)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return 0.5 + 1e-3 * interpolate(latents, scale_factor=2)

    features = torch.zeros(1, 3, 14, 9, 7)
    overlapping = sampler(fusion="maps", overlap=0.5, seed=3)(features, Silent())
    apart = sampler(fusion="maps", overlap=0.0, seed=3)(features, Silent())
    torch.testing.assert_close(overlapping, apart, rtol=0, atol=1e-5)
    noise = seeded_noise([3], (3, 14, 9, 7))
    whole = interpolate(noise, scale_factor=2)
    scaled = (overlapping - 0.5).flatten()
    assert torch.corrcoef(torch.stack((scaled, whole.flatten())))[0, 1] > 0.9999


def tiny_model(one_map: bool = False) -> NoddiModel:
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(
        in_channels=1 if one_map else 3, num_hiddens=4, num_embeddings=16, embedding_dim=4, norm_num_groups=2
    )
    autoencoder.train()(torch.rand(1, 1 if one_map else 3, 8, 8, 8))  # codes start from data
    encoder = LowResolutionEncoder(
        in_channels=5 + 3 * one_map,
        num_hiddens=4,
        embedding_dim=4,
        kernel_sizes=(3, 5),
        kernel_channels=(2, 2),
        norm_num_groups=2,
        head_num_groups=2,
    )
    unet = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=8,
        out_channels=4,
        channels=[4, 8],
        attention_levels=[False, False],
        num_head_channels=4,
        num_res_blocks=1,
        norm_num_groups=2,
    )
    nn.init.normal_(unet.out[-1].conv.weight, std=0.1)
    model = NoddiModel(autoencoder, encoder, unet, one_map=one_map).eval()
    model.latent_mean.uniform_(-1, 1)
    model.latent_std.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("one_map", [False, True])
def test_samples_depend_on_their_seed_alone(one_map: bool) -> None:
    model, features = tiny_model(one_map), torch.rand(2, 5, 10, 9, 7)
    draw = sampler(num_inference_steps=2, num_samples=3, output="samples")
    both = draw(features, model, seeds=[5, 8])
    assert both.shape == (2, 9, 20, 18, 14)
    assert both.min() >= 0
    assert both.max() <= 1
    alone = sampler(num_inference_steps=2)(features[1:], model, seeds=[9])
    torch.testing.assert_close(both[1:, 3:6], alone)
    assert not torch.allclose(both[:, :3], both[:, 3:6])
    one_by_one = sampler(num_inference_steps=2, num_samples=3, output="samples", decode_batch_size=1)
    torch.testing.assert_close(one_by_one(features[:1], model, seeds=[5]), both[:1])


def test_several_samples_become_mean_and_standard_deviation() -> None:
    model, features = tiny_model(), torch.rand(1, 5, 8, 6, 4)
    samples = sampler(num_inference_steps=2, num_samples=4, output="samples")(features, model)
    summary = sampler(num_inference_steps=2, num_samples=4)(features, model)
    parts = samples.unflatten(1, (4, 3))
    torch.testing.assert_close(summary, torch.cat((parts.mean(dim=1), parts.std(dim=1)), dim=1))


@pytest.mark.parametrize("one_map", [False, True])
def test_the_deterministic_mode_is_the_encoder_alone(one_map: bool) -> None:
    model, features = tiny_model(one_map), torch.rand(1, 5, 8, 6, 4)
    estimate = sampler(deterministic=True)(features, model)
    torch.testing.assert_close(estimate, model(features))
    assert estimate.shape == (1, 3, 16, 12, 8)
    if not one_map:
        expected = model.autoencoder.decode(model.encoder(features)).clamp(0, 1)
        torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-5)


def test_one_map_at_a_time_tells_the_encoder_which() -> None:
    features = torch.rand(2, 5, 4, 3, 2)
    marked = with_map_id(features, torch.tensor([2, 0]), 3)
    assert marked[0, 5:].amax(dim=(1, 2, 3)).tolist() == [0, 0, 1]
    assert marked[1, 5:].amin(dim=(1, 2, 3)).tolist() == [1, 0, 0]
    torch.testing.assert_close(marked[:, :5], features)
    with pytest.raises(ValueError, match=r"^map_id: expected one per item"):
        tiny_model(True).condition(features)


def test_volumes_smaller_than_a_patch_are_padded_and_cut_back() -> None:
    features = torch.rand(1, 3, 5, 3, 2)
    maps = sampler()(features, Oracle())
    assert maps.shape == (1, 3, 10, 6, 4)
    assert (maps - interpolate(features, scale_factor=2)).abs().max() < 1e-4


def test_meta_data_stay() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    features = MetaTensor(torch.rand(1, 3, 8, 6, 4), affine=affine)
    maps = sampler()(features, Oracle())
    assert isinstance(maps, MetaTensor)
    torch.testing.assert_close(maps.affine, affine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (8, 8)}, r"^patch_size: expected one side or three"),
        ({"patch_size": 0}, r"^patch_size: expected a whole number from 1"),
        ({"start": 0}, r"^start: expected a number from 0.001 to 1"),
        ({"start": 0.5, "scheduler": CoreDDIM(1000)}, r"^start: expected 1 with DDIMScheduler"),
        ({"overlap": 1.0}, r"^overlap: expected a number from 0 to 0.99"),
        ({"blend": "linear"}, r"^blend: expected gaussian or constant, got 'linear'"),
        ({"fusion": "end"}, r"^fusion: expected maps or steps, got 'end'"),
        ({"output": "all"}, r"^output: expected mean or samples, got 'all'"),
        ({"deterministic": "yes"}, r"^deterministic: expected true or false, got 'yes'"),
        ({"deterministic": True, "num_samples": 2}, r"^num_samples: expected 1 with deterministic"),
        ({"num_samples": 0}, r"^num_samples: expected a whole number from 1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_clients_options_may_be_text_and_lists() -> None:
    chosen = sampler(deterministic=["False", "True"], num_samples="2", fusion=["maps", "steps"], overlap="0.5")
    assert (chosen.deterministic, chosen.num_samples, chosen.fusion, chosen.overlap) == (False, 2, "maps", 0.5)


def test_samples_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    model.latent_std.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^amp: expected finite latents, got NaN or infinity"):
        sampler(num_inference_steps=1)(torch.rand(1, 5, 8, 6, 4), model)
    with pytest.raises(ValueError, match=r"^image: expected features of volumes"):
        sampler()(torch.rand(5, 8, 6, 4), model)


def test_normalisation_is_undone() -> None:
    model, latents = tiny_model(), torch.randn(2, 4, 3, 4, 5)
    torch.testing.assert_close(model.denormalize(model.normalize(latents)), latents, rtol=1e-5, atol=1e-5)
    shifted = model.normalize(model.latent_mean[None, :, None, None, None].expand(2, -1, 3, 4, 5))
    assert shifted.abs().max() == 0


def test_decoding_takes_the_nearest_codes_or_the_latent_itself() -> None:
    model, latents = tiny_model(), torch.randn(1, 4, 3, 4, 5)
    plain = model.denormalize(latents)
    for quantize in (True, False):
        model.quantize = quantize
        assert torch.equal(model.decode(latents), model.autoencoder.decode(plain, quantize=quantize))
    codes = model.autoencoder.codebook.embed(model.autoencoder.codebook.nearest(plain))
    assert (model.autoencoder.decode(codes, quantize=False) - model.decode(latents)).abs().max() > 1e-3


@pytest.mark.reliability(8)
def test_only_the_unet_is_trained_and_the_frozen_parts_stay_in_evaluation_mode() -> None:
    model = tiny_model().train()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"unet"}
    assert model.unet.training
    assert not model.autoencoder.training
    assert not model.encoder.training
    codes = model.autoencoder.state_dict()
    before = {name: value.clone() for name, value in codes.items()}
    noisy = torch.randn(1, 4, 8, 6, 4)
    model(torch.rand(1, 5, 8, 6, 4), noisy, torch.tensor([10])).sum().backward()
    after = model.autoencoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.unet.out[-1].conv.weight.grad is not None


def test_the_noise_is_predicted_beside_the_condition() -> None:
    model, features, noisy = tiny_model(), torch.rand(2, 5, 8, 6, 4), torch.randn(2, 4, 8, 6, 4)
    times = torch.tensor([7, 900])
    given = model(None, noisy, times, condition=model.condition(features))
    torch.testing.assert_close(model(features, noisy, times), given)
    assert not torch.allclose(model(features.flip(0), noisy, times), given)
    with pytest.raises(ValueError, match=r"^timesteps: expected one per noisy latent"):
        model(features, noisy)
    with pytest.raises(ValueError, match=r"^image: expected features or their condition"):
        model(None)


def test_training_starts_from_the_stages(tmp_path) -> None:
    source, target = tiny_model(), tiny_model()
    for parameter in source.parameters():
        parameter.data.add_(0.1)
    torch.save(source.autoencoder.state_dict(), tmp_path / "a.pt")
    torch.save(source.encoder.state_dict(), tmp_path / "e.pt")
    start_from_stages(target, autoencoder=tmp_path / "a.pt", encoder=tmp_path / "e.pt")
    torch.testing.assert_close(target.encoder.state_dict(), source.encoder.state_dict())
    torch.testing.assert_close(target.autoencoder.state_dict(), source.autoencoder.state_dict())
    whole = tiny_model()
    for parameter in whole.parameters():
        parameter.data.sub_(0.1)
    torch.save(whole.state_dict(), tmp_path / "m.pt")
    start_from_stages(target, autoencoder=tmp_path / "a.pt", encoder=tmp_path / "e.pt", model=tmp_path / "m.pt")
    torch.testing.assert_close(target.state_dict(), whole.state_dict())
    with pytest.raises(FileNotFoundError, match=r"none.pt: expected trained weights, found no file. Train it"):
        start_from_stages(target, autoencoder=tmp_path / "none.pt", encoder=tmp_path / "e.pt", remedy="Train it")
