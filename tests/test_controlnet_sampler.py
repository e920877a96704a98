# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import CrossAttentionBlock
from torch import nn

from shared.controlnet_sampler import ControlNetSampler, UnconditionalSampler
from shared.inferers import guide, seeded_noise
from shared.networks.controlnet import ControlNetModel
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps
from tests.tiny_networks import IMAGE_SIZE, LATENT_SHAPE, controlnet_model, diffusion_model

SCHEDULE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}
SCHEDULE |= {"prediction_type": "v_prediction"}
STEPS = 3


def sampler(**options) -> ControlNetSampler:
    defaults = {
        "scheduler": DPMSolverMultistepScheduler(1000, **SCHEDULE),
        "num_inference_steps": STEPS,
        "latent_shape": LATENT_SHAPE,
        "image_size": IMAGE_SIZE,
    }
    return ControlNetSampler(**{**defaults, **options})


def unconditional(**options) -> UnconditionalSampler:
    scheduler = DPMSolverMultistepScheduler(1000, **SCHEDULE)
    return UnconditionalSampler(scheduler=scheduler, num_inference_steps=STEPS, latent_shape=LATENT_SHAPE, **options)


def volumes(count: int = 1, depth: int = 3, channels: int = 1, size: tuple[int, int] = IMAGE_SIZE) -> torch.Tensor:
    """Noise under an edge that moves with the slice: every image differs from the others in more than its grains."""
    noise = torch.rand((count, channels, *size, depth), generator=torch.Generator().manual_seed(0))
    rows, edges = torch.arange(size[0])[:, None, None], torch.linspace(4, size[0] - 4, count * channels * depth)
    return noise * (rows < edges.view(count, channels, 1, 1, depth))


def slices(count: int = 2, channels: int = 1) -> torch.Tensor:
    return volumes(1, count, channels)[0].movedim(-1, 0)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.fixture
def model() -> ControlNetModel:
    return controlnet_model()


@pytest.fixture
def calls(model) -> list[int]:
    """Batch sizes of the U-Net's forward passes."""
    seen: list[int] = []
    model.diffusion.unet.register_forward_hook(lambda net, args, output: seen.append(len(args[0])))
    return seen


class TestResult:
    def test_images_are_in_range(self, model):
        images = sampler()(slices(3), model)
        assert images.shape == (3, 1, *IMAGE_SIZE)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.05, "the comparisons would be blind"
        assert not images.requires_grad

    def test_it_equals_a_plain_loop(self, model):
        scheduler, condition = DDIMScheduler(1000, **SCHEDULE), slices(1)
        x = torch.randn((1, *LATENT_SHAPE), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            for timestep in diffusion_timesteps(scheduler, STEPS):
                velocity = model(x, torch.tensor([timestep]), condition, conditioning_scale=0.6)
                x, _ = scheduler.step(velocity, timestep, x)
            expected = model.decode(x).clamp(0, 1)
        options = {"scheduler": DDIMScheduler(1000, **SCHEDULE), "seed": 4, "conditioning_scale": 0.6}
        assert close(sampler(**options)(condition, model), expected)

    def test_slices_and_volumes_are_equivalent(self, model):
        flat = slices(3)
        images = sampler()(flat, model)
        volume = sampler()(flat.movedim(0, -1)[None], model)
        assert volume.shape == (1, 1, *IMAGE_SIZE, 3)
        assert close(volume[0].movedim(-1, 0), images)

    def test_the_same_seed_gives_the_same_volume(self, model):
        first = sampler(seed=3)(volumes(), model)
        torch.manual_seed(99)
        assert torch.equal(sampler(seed=3)(volumes(), model), first)
        assert torch.equal(sampler()(volumes(), model, seeds=[3]), first)
        assert torch.equal(sampler()(volumes(), model, seeds=torch.tensor([3])), first)
        assert (sampler(seed=4)(volumes(), model) - first).abs().max() > 0.01

    def test_swapping_the_condition_changes_the_sample(self, model):
        condition = slices(2)
        images = sampler()(condition, model)
        swapped = sampler()(condition.flip(0), model)
        assert (images - swapped).abs().max() > 0.01
        assert close(images, swapped.flip(0))

    @pytest.mark.parametrize("batch_size", [1, 2, 5, None])
    def test_the_result_depends_neither_on_neighbours_nor_on_the_batch(self, model, batch_size):
        inputs = volumes(2, 3)
        expected = sampler()(inputs, model, seeds=[5, 8])
        assert close(sampler(batch_size=batch_size, decode_batch_size=2)(inputs, model, seeds=[5, 8]), expected)
        for index, seed in enumerate((5, 8)):
            alone = sampler(batch_size=batch_size)(inputs[index : index + 1], model, seeds=[seed])
            assert close(alone, expected[index : index + 1])

    def test_other_sizes_get_latents_in_proportion(self, model):
        inputs = volumes(size=(48, 32))
        assert sampler()(inputs, model).shape == (1, 1, 48, 32, 3)

    def test_meta_data_survives_and_plain_stays_plain(self, model):
        affine = torch.tensor([[-2.0, 0, 0, 90], [0, 2, 0.1, -126], [0, 0, 3, -72], [0, 0, 0, 1]])
        inputs = MetaTensor(volumes()[0], affine=affine, meta={"filename_or_obj": "flair.nii"})[None]
        images = sampler(num_samples=2)(inputs, model)
        assert isinstance(images, MetaTensor)
        assert images.shape == (1, 2, *IMAGE_SIZE, 3)
        assert torch.equal(images[0].affine, inputs[0].affine)
        assert images.meta["filename_or_obj"] == "flair.nii"
        assert not isinstance(sampler()(volumes(), model), MetaTensor)

    def test_several_controlnets_have_a_scale_each(self):
        two = controlnet_model([1, 1], condition_channels=[[0], [1]])
        inputs = slices(1, channels=2)
        first = sampler(conditioning_scale=[1.0, 0.0])(inputs, two)
        without = inputs.clone()
        without[:, 1] = 0
        assert torch.equal(sampler(conditioning_scale=[1.0, 0.0])(without, two), first)
        assert (sampler(conditioning_scale=[0.0, 1.0])(inputs, two) - first).abs().max() > 0.01

    def test_scale_zero_is_the_diffusion_model_alone(self, model):
        images = sampler(conditioning_scale=0, seed=6)(slices(1), model)
        assert close(images, unconditional().sample(model, [6]))

    def test_mixed_precision_stays_near_float32(self, model):
        expected = sampler(guidance_scale=2, num_samples=2)(slices(), model)
        with torch.autocast("cpu", torch.bfloat16):
            images = sampler(guidance_scale=2, num_samples=2)(slices(), model)
        assert images.dtype == torch.float32
        assert (images - expected).abs().mean() < 0.02

    def test_seeds_may_be_as_large_as_a_digest(self, model):
        largest = 2**63 - 1
        images = sampler(num_samples=2, share_noise=False)(slices(), model, seeds=[largest, 3])
        assert images.shape == (2, 2, *IMAGE_SIZE)

    def test_wrapped_networks_are_unwrapped(self, model):
        assert torch.equal(sampler()(slices(), nn.DataParallel(model)), sampler()(slices(), model))


class TestNoise:
    def noises(self, model, monkeypatch, **options) -> torch.Tensor:
        """Noise from which each slice of a volume started."""
        seen = []
        step = DPMSolverMultistepScheduler.step

        def watch(self, output, timestep, x):
            seen.append(x.clone())
            return step(self, output, timestep, x)

        monkeypatch.setattr(DPMSolverMultistepScheduler, "step", watch)
        sampler(seed=7, **options)(volumes(depth=3), model)
        return seen[0]

    def test_all_slices_share_it(self, model, monkeypatch):
        assert torch.equal(self.noises(model, monkeypatch), seeded_noise([7, 7, 7], LATENT_SHAPE))

    def test_or_have_one_each(self, model, monkeypatch):
        independent = self.noises(model, monkeypatch, share_noise=False)
        assert torch.equal(independent, seeded_noise([7, 8, 9], LATENT_SHAPE))

    def test_samples_of_a_slice_never_share_it(self, model, monkeypatch):
        shared = self.noises(model, monkeypatch, num_samples=2)
        assert torch.equal(shared, seeded_noise([7, 8] * 3, LATENT_SHAPE))
        independent = self.noises(model, monkeypatch, num_samples=2, share_noise=False)
        assert torch.equal(independent, seeded_noise(range(7, 13), LATENT_SHAPE))

    def test_equal_slices_become_equal_images_only_with_shared_noise(self, model):
        inputs = volumes(depth=1).expand(-1, -1, -1, -1, 2)
        first, second = sampler()(inputs, model).unbind(-1)
        assert close(first, second)
        first, second = sampler(share_noise=False)(inputs, model).unbind(-1)
        assert (first - second).abs().max() > 0.01


class TestSamples:
    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_mean_and_deviation_are_those_of_single_runs(self, model, batch_size):
        inputs = volumes(depth=2)
        runs = torch.cat([sampler(seed=seed)(inputs, model) for seed in (5, 6, 7)])
        result = sampler(seed=5, num_samples=3, batch_size=batch_size)(inputs, model)
        assert result.shape == (1, 2, *IMAGE_SIZE, 2)
        assert close(result[0, 0], runs.mean(dim=0)[0])
        assert close(result[0, 1], runs.std(dim=0, correction=1)[0])
        assert result[0, 1].max() > 0.01

    def test_the_condition_is_embedded_once_per_slice(self, model):
        embedded = []
        model.embeddings[0].register_forward_hook(lambda net, args, output: embedded.append(len(args[0])))
        sampler(num_samples=3)(volumes(depth=2), model)
        assert embedded == [2]

    def test_slices_have_no_more_than_they_need(self, model):
        assert sampler(num_samples=2)(slices(3), model).shape == (3, 2, *IMAGE_SIZE)


class TestEmptySlices:
    def test_they_become_0_and_are_not_sampled(self, model, calls):
        inputs = volumes(depth=4)
        inputs[..., 0] = 0
        inputs[..., 2] = 0
        images = sampler()(inputs, model)
        assert calls == [2] * STEPS
        assert not images[..., [0, 2]].any()
        full = sampler()(volumes(depth=4), model)
        assert close(images[..., [1, 3]], full[..., [1, 3]])

    def test_mean_and_deviation_are_0_as_well(self, model):
        inputs = volumes(depth=2)
        inputs[..., 1] = 0
        images = sampler(num_samples=2)(inputs, model)
        assert not images[..., 1].any()
        assert images[:, 0, ..., 0].any()

    def test_nothing_but_air(self, model, calls):
        assert not sampler()(torch.zeros_like(volumes()), model).any()
        assert calls == []

    def test_one_contrast_with_signal_is_enough(self):
        inputs = slices(1, channels=2)
        inputs[:, 0] = 0
        assert sampler()(inputs, controlnet_model([2])).any()


class TestGuidance:
    def test_guidance_1_evaluates_the_prompt_alone(self, model, calls):
        sampler()(volumes(depth=2), model)
        assert calls == [2] * STEPS

    @pytest.mark.parametrize("scale", [0.0, 3.0])
    def test_any_other_doubles_the_batch_and_equals_the_formula(self, model, calls, scale):
        condition = slices(2)
        options = {"scheduler": DDIMScheduler(1000, **SCHEDULE), "seed": 4, "conditioning_scale": 0.8}
        images = sampler(**options, guidance_scale=scale)(condition, model)
        assert calls == [4] * STEPS
        scheduler = DDIMScheduler(1000, **SCHEDULE)
        x = seeded_noise([4, 4], LATENT_SHAPE)
        with torch.no_grad():
            for timestep in diffusion_timesteps(scheduler, STEPS):
                t = torch.full((2,), timestep)
                null = {"null_prompt": torch.ones(2, dtype=torch.bool)}
                unconditional = model(x, t, condition, conditioning_scale=0.8, **null)
                conditional = model(x, t, condition, conditioning_scale=0.8)
                velocity = unconditional + scale * (conditional - unconditional)
                assert torch.equal(velocity, guide(unconditional, conditional, scale))
                x, _ = scheduler.step(velocity, timestep, x)
            expected = model.decode(x).clamp(0, 1)
        assert close(images, expected)
        assert (sampler(**options)(condition, model) - images).abs().max() > 0.01


class TestUnconditional:
    def test_a_sample_depends_on_its_seed_alone(self):
        model = diffusion_model()
        images = unconditional().sample(model, [3, 9])
        assert images.shape == (2, 1, *IMAGE_SIZE)
        assert images.min() >= 0
        assert images.max() <= 1
        assert close(unconditional().sample(model, torch.tensor([9])), images[1:])
        assert (images[0] - images[1]).abs().max() > 0.01
        assert torch.equal(unconditional().sample(nn.DataParallel(model), [3, 9]), images)

    def test_inputs_only_say_how_many(self):
        model = diffusion_model()
        images = unconditional(seed=3)(torch.zeros(2, 5), model)
        assert torch.equal(images, unconditional()(torch.ones(2, 1, 7, 7), model, seeds=[3, 4]))
        assert torch.equal(images, unconditional().sample(model, [3, 4]))

    def test_controlnets_are_left_out(self, model):
        expected = unconditional().sample(model.diffusion, [3])
        assert torch.equal(unconditional().sample(model, [3]), expected)
        assert torch.equal(unconditional().sample(nn.DataParallel(model), [3]), expected)

    def test_it_equals_a_plain_loop(self):
        model, scheduler = diffusion_model(), DDIMScheduler(1000, **SCHEDULE)
        x = seeded_noise([4], LATENT_SHAPE)
        with torch.no_grad():
            for timestep in diffusion_timesteps(scheduler, STEPS):
                x, _ = scheduler.step(model(x, torch.tensor([timestep])), timestep, x)
            expected = model.decode(x).clamp(0, 1)
        sample = UnconditionalSampler(
            scheduler=DDIMScheduler(1000, **SCHEDULE), num_inference_steps=STEPS, latent_shape=LATENT_SHAPE
        )
        assert close(sample.sample(model, [4]), expected)

    def test_latents_that_are_not_finite(self):
        model = diffusion_model()
        with torch.no_grad():
            model.unet.out[2].conv.bias[0] = float("nan")
        with pytest.raises(ValueError, match=r"^amp: expected finite latents, got NaN or infinity for seeds \[3, 9\]"):
            unconditional().sample(model, [3, 9])


class TestOptions:
    def test_clients_send_strings_and_lists(self):
        schedulers = {"dpm": DPMSolverMultistepScheduler(1000, **SCHEDULE), "ddim": DDIMScheduler(1000, **SCHEDULE)}
        sample = sampler(
            scheduler=["ddim", "dpm"],
            schedulers=schedulers,
            num_inference_steps="4",
            conditioning_scale="0.5",
            guidance_scale=["2.5", "7"],
            num_samples="2",
            seed="9",
            share_noise=[False, True],
            batch_size="3",
        )
        assert sample.scheduler is schedulers["ddim"]
        assert (sample.num_inference_steps, sample.num_samples, sample.seed, sample.batch_size) == (4, 2, 9, 3)
        assert (sample.conditioning_scale, sample.guidance_scale, sample.share_noise) == ([0.5], 2.5, False)
        assert sampler(conditioning_scale=["0.5", 1]).conditioning_scale == [0.5, 1.0]

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"conditioning_scale": -1}, r"^conditioning_scale: expected a number from 0 to 10, got -1"),
            ({"conditioning_scale": [1, "much"]}, r"^conditioning_scale: expected a number from 0 to 10, got 'much'"),
            ({"guidance_scale": float("nan")}, r"^guidance_scale: expected a number from 0 to 100"),
            ({"num_samples": 0}, r"^num_samples: expected a whole number from 1 to 10000, got 0"),
            ({"num_samples": "1.5"}, r"^num_samples: expected a whole number"),
            ({"num_inference_steps": 1001}, r"^num_inference_steps: expected a whole number from 1 to 1000"),
            ({"batch_size": 0}, r"^batch_size: expected a whole number from 1"),
            ({"seed": -1}, r"^seed: expected a whole number from 0"),
            ({"share_noise": "False"}, r"^share_noise: expected true or false, got 'False'"),
            ({"scheduler": "pndm"}, r"^scheduler: expected a scheduler object, got 'pndm'"),
        ],
    )
    def test_bad_ones_name_the_key(self, option, message):
        with pytest.raises(ValueError, match=message):
            sampler(**option)


class TestErrors:
    @pytest.mark.parametrize("shape", [(1, *IMAGE_SIZE), (1, 1, 1, *IMAGE_SIZE, 3)])
    def test_shape(self, model, shape):
        with pytest.raises(
            ValueError, match=r"^image: expected slices \(B, K, H, W\) or volumes \(B, K, H, W, D\), got"
        ):
            sampler()(torch.rand(shape), model)

    # The autoencoder divides by 4 and the U-Net halves once more.
    @pytest.mark.parametrize("size", [(33, 48), (32, 44), (36, 48)])
    def test_sizes_that_the_networks_cannot_halve(self, model, size):
        with pytest.raises(
            ValueError, match=rf"^image: expected sides that are multiples of 8, got \({size[0]}, {size[1]}\); pad the"
        ):
            sampler()(volumes(size=size), model)

    def test_number_of_seeds(self, model):
        with pytest.raises(ValueError, match=r"^seeds: expected one per sample \(2\), got 1"):
            sampler()(slices(2), model, seeds=[1])

    def test_number_of_scales_and_channels(self, model):
        with pytest.raises(
            ValueError, match=r"^conditioning_scale: expected one number, or one for each of 1 .* got 2"
        ):
            sampler(conditioning_scale=[1, 1])(slices(), model)
        with pytest.raises(ValueError, match=r"^condition_keys: expected a condition of 1 channels .* got 2"):
            sampler()(slices(channels=2), model)

    def test_latents_that_are_not_finite(self, model):
        with torch.no_grad():
            model.diffusion.unet.out[2].conv.bias[0] = float("nan")
        message = (
            r"^conditioning_scale: expected finite latents, got NaN or infinity for seeds \[3, 4\]; try --amp False"
        )
        with pytest.raises(ValueError, match=message):
            sampler(num_samples=2, seed=3)(slices(), model)

    def test_a_nan_in_the_condition_is_not_taken_for_air(self, model):
        inputs = volumes()
        inputs[0, 0, 4, 5, 1] = float("nan")
        with pytest.raises(ValueError, match="expected finite latents, got NaN"):
            sampler()(inputs, model)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_keys_and_values_of_the_prompt_are_computed_once_per_sample(model, guidance, monkeypatch):
    layers = {
        layer: 0
        for block in model.modules()
        if isinstance(block, CrossAttentionBlock)
        for layer in (block.to_k, block.to_v)
    }
    plain = nn.Linear.forward

    def forward(self, x):
        if self in layers:
            layers[self] += 1
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    sampler(guidance_scale=guidance)(slices(2), model)
    assert set(layers.values()) == {1}
    unconditional()(torch.zeros(2), model)
    unet = [layer for name, layer in model.diffusion.unet.named_modules() if layer in layers]
    assert {layers[layer] for layer in unet} == {2}
    assert not any("forward" in layer.__dict__ for layer in layers)
