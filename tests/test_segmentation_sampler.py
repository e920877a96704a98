# SPDX-License-Identifier: Apache-2.0
"""Masks of pictures and volumes: steps, seeds, samples, classes, slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from shared.inferers import sample_latents, seeded_noise
from shared.networks.segmentation import SegmentationModel, probabilities
from shared.schedulers import diffusion_timesteps
from shared.segmentation_sampler import SegmentationSampler, agreement
from shared.transforms.segmentation_images import LoadPictured
from shared.weights import load_weights
from tests.sdseg_runs import SDSEG
from tests.tiny_networks import (
    IMAGE_SIZE,
    LATENT_SHAPE,
    oracle_model,
    pictures,
    segmentation_model,
    segmentation_scheduler,
)
from tools.phantoms.sdseg import make_dataset


def sampler(**options: Any) -> SegmentationSampler:
    return SegmentationSampler(**{"scheduler": segmentation_scheduler(), **options})


def volumes(count: int = 1, depth: int = 3, channels: int = 1) -> torch.Tensor:
    """Volumes ``(count, channels, H, W, depth)`` whose slices all differ."""
    return pictures(count * depth, channels).unflatten(0, (count, depth)).movedim(1, -1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Batches of another size sum in another order, which 1 / sqrt(ab) = 38.7 amplifies."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-4)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() > 0.05


@pytest.fixture
def model() -> SegmentationModel:
    return segmentation_model()


@pytest.fixture
def three() -> SegmentationModel:
    return segmentation_model(3)


class TestSteps:
    def test_one_step_is_the_last_timestep_alone(self, model):
        assert diffusion_timesteps(segmentation_scheduler(), 1) == [999]
        seen = []
        model.unet.register_forward_pre_hook(lambda net, args, kwargs: seen.append(args[1].tolist()), with_kwargs=True)
        sampler()(pictures(2), model)
        assert seen == [[999, 999]]

    @pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
    def test_true_noise_recovers_the_latents(self, steps):
        """x_T = sqrt(ab) z + sqrt(1 - ab) n, and a network that always says n: z after any number of DDIM steps.

        In float32 one step rounds 6e-8 of |x| < 6 and multiplies it by 1 / sqrt(ab) = 38.7.
        """
        scheduler = segmentation_scheduler()
        clean, noise = (torch.randn((4, *LATENT_SHAPE), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        noisy = scheduler.add_noise(clean, noise, torch.full((4,), 999))
        assert (noisy - clean).abs().max() > 3
        timesteps = diffusion_timesteps(scheduler, steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        found = sample_latents(lambda x, t: noise, scheduler, noisy, timesteps)
        torch.testing.assert_close(found, clean, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("steps", [1, 20])
    def test_an_oracle_segments_from_any_noise(self, steps):
        """The oracle finds the picture itself, so the mask is the picture, averaged over 4 x 4 pixels, as decoded."""
        model = oracle_model(lambda x, condition, classes: 2 * condition - 1)
        image = pictures(2)
        expected = nn.functional.interpolate(nn.functional.avg_pool2d(image, 4), scale_factor=4.0).mean(1, keepdim=True)
        assert expected.std() > 0.1
        for seed in (0, 9):
            result = sampler(num_inference_steps=steps, seed=seed)(image, model)
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("mode", ["concat", "crossattn"])
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_one_step_is_the_models_forward(self, num_classes, mode):
        model, image = segmentation_model(num_classes, condition_mode=mode), pictures(3)
        with torch.no_grad():
            expected = probabilities(model(image))
        result = sampler()(image, model)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        assert result.std() > 0.05, "the comparisons would be blind"

    def test_several_steps_are_plain_ddim(self, three):
        image, scheduler = pictures(1), segmentation_scheduler()
        alpha_bar = scheduler.alphas_cumprod.double()
        plan = [999, 749, 499, 249]
        levels = [alpha_bar[t].item() for t in plan]
        with torch.no_grad():
            condition, labels = three.encode_image(image).expand(3, -1, -1, -1), torch.arange(3)
            x = seeded_noise([4], LATENT_SHAPE).expand(3, -1, -1, -1).double()
            for timestep, now, then in zip(plan, levels, [*levels[1:], 1.0], strict=True):
                predicted = three.unet(
                    torch.cat((x.float(), condition), dim=1), torch.full((3,), timestep), class_labels=labels
                )
                clean = (x - (1 - now) ** 0.5 * predicted.double()) / now**0.5
                x = then**0.5 * clean + (1 - then) ** 0.5 * predicted.double()
            scores = 2 * three.decode(x.float()).clamp(0, 1).mean(dim=1) - 1
        scores[0] *= -1
        result = sampler(num_inference_steps=4, seed=4)(image, three)
        torch.testing.assert_close(result[0], scores.softmax(dim=0), atol=2e-4, rtol=0)
        assert (result - sampler(seed=4)(image, three)).abs().max() > 1e-3, "the comparison would be blind"


class TestResult:
    def test_probabilities_are_in_range(self, model, three):
        one, several = sampler()(pictures(2), model), sampler()(pictures(2), three)
        assert one.shape == (2, 1, *IMAGE_SIZE)
        assert several.shape == (2, 3, *IMAGE_SIZE)
        for result in (one, several):
            assert result.dtype == torch.float32
            assert 0 <= result.min() < result.max() <= 1
            assert not result.requires_grad
        torch.testing.assert_close(several.sum(dim=1), torch.ones(2, *IMAGE_SIZE))

    def test_one_channel_is_three_equal_ones(self, model):
        grey = pictures(2, channels=1)
        assert torch.equal(sampler()(grey, model), sampler()(grey.expand(-1, 3, -1, -1), model))
        volume = volumes()
        assert torch.equal(sampler()(volume, model), sampler()(volume.expand(-1, 3, -1, -1, -1), model))

    def test_other_numbers_than_float32(self, model):
        image = pictures(1).round()
        assert torch.equal(sampler()(image.to(torch.uint8), model), sampler()(image, model))
        assert torch.equal(sampler()(image.double(), model), sampler()(image, model))

    def test_meta_data_survives_and_plain_stays_plain(self, model):
        affine = torch.tensor([[-2.0, 0, 0, 90], [0, 2, 0.1, -126], [0, 0, 3, -72], [0, 0, 0, 1]])
        inputs = MetaTensor(volumes()[0], affine=affine, meta={"filename_or_obj": "ct.nii"})[None]
        result = sampler(num_samples=2)(inputs, model)
        assert isinstance(result, MetaTensor)
        assert result.shape == (1, 2, *IMAGE_SIZE, 3)
        assert torch.equal(result[0].affine, inputs[0].affine)
        assert result.meta["filename_or_obj"] == "ct.nii"
        assert not isinstance(sampler()(volumes(), model), MetaTensor)

    def test_wrapped_networks_are_unwrapped(self, model):
        assert torch.equal(sampler()(pictures(), nn.DataParallel(model)), sampler()(pictures(), model))

    def test_mixed_precision_stays_near_float32(self, three):
        options = {"num_samples": 2, "output": "samples"}
        expected = sampler(**options)(pictures(), three)
        with torch.autocast("cpu", torch.bfloat16):
            result = sampler(**options)(pictures(), three)
        assert result.dtype == torch.float32
        assert (result - expected).abs().mean() < 0.02

    def test_the_image_is_encoded_once(self, three):
        encoded = []
        three.vision_encoder.register_forward_hook(lambda net, args, output: encoded.append(len(args[0])))
        sampler(num_samples=4, num_inference_steps=3)(pictures(2), three)
        assert encoded == [2]


class TestSeeds:
    def test_the_same_seed_gives_the_same_bytes(self, model):
        first = sampler(seed=3)(pictures(), model)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert torch.equal(sampler(seed=3)(pictures(), model), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(sampler()(pictures(), model, seeds=[3, 3]), first)
        assert torch.equal(sampler(seed=5)(pictures(), model, seeds=torch.tensor([3, 3])), first)

    def test_another_seed_gives_another_mask(self, model):
        first = sampler(seed=3)(pictures(), model)
        assert differ(sampler(seed=4)(pictures(), model), first)
        mixed = sampler()(pictures(), model, seeds=[3, 4])
        assert close(mixed[:1], first[:1])
        assert differ(mixed[1:], first[1:])

    def test_without_seeds_all_images_have_the_samplers(self, model):
        image = pictures(1).expand(2, -1, -1, -1)
        first, second = sampler(seed=6)(image, model)
        assert close(first, second)
        assert close(first[None], sampler()(image[:1], model, seeds=[6]))

    @pytest.mark.parametrize("num_classes", [1, 3])
    @pytest.mark.parametrize("batch_size", [1, 2, 5, None])
    def test_the_result_depends_neither_on_neighbours_nor_on_the_batch(self, num_classes, batch_size):
        model, inputs = segmentation_model(num_classes), volumes(2, 3)
        expected = sampler(num_samples=2)(inputs, model, seeds=[5, 8])
        some = sampler(num_samples=2, batch_size=batch_size, decode_batch_size=3)
        assert close(some(inputs, model, seeds=[5, 8]), expected)
        assert close(some(inputs.flip(0), model, seeds=[8, 5]), expected.flip(0))
        for index, seed in enumerate((5, 8)):
            assert close(some(inputs[index : index + 1], model, seeds=[seed]), expected[index : index + 1])

    def test_seeds_may_be_as_large_as_a_digest(self, model):
        largest = 2**63 - 1
        result = sampler(num_samples=2, share_noise=False)(pictures(), model, seeds=[largest, 3])
        assert result.shape == (2, 2, *IMAGE_SIZE)

    def test_noise_comes_from_seed_plus_sample(self):
        def started(inputs: torch.Tensor, **options: Any) -> torch.Tensor:
            model = oracle_model(num_classes=2)
            sampler(seed=7, **options)(inputs, model)
            return torch.cat([call[0] for call in model.unet.calls])

        def expected(seeds: list[int]) -> torch.Tensor:
            return seeded_noise([seed for seed in seeds for _ in range(2)], LATENT_SHAPE)

        assert torch.equal(started(pictures(2), num_samples=3), expected([7, 8, 9, 7, 8, 9]))
        volume = volumes(depth=2)
        assert torch.equal(started(volume), expected([7, 7]))
        assert torch.equal(started(volume, num_samples=2), expected([7, 8, 7, 8]))
        assert torch.equal(started(volume, share_noise=False), expected([7, 8]))
        assert torch.equal(started(volume, share_noise=False, num_samples=2), expected([7, 8, 9, 10]))


class TestVolumes:
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_they_are_their_slices_one_by_one(self, num_classes):
        model, volume = segmentation_model(num_classes), volumes(2, 3)
        result = sampler(seed=2)(volume, model)
        assert result.shape == (2, num_classes, *IMAGE_SIZE, 3)
        for index, z in ((i, z) for i in range(2) for z in range(3)):
            alone = sampler(seed=2)(volume[index : index + 1, ..., z], model)
            assert close(result[index : index + 1, ..., z], alone)
        assert differ(result[..., 0], result[..., 1])
        assert differ(result[0], result[1])

    def test_seeds_of_slices(self, model):
        volume = volumes()
        result = sampler(seed=2, share_noise=False)(volume, model)
        for z in range(3):
            assert close(result[..., z], sampler(seed=2 + z)(volume[..., z], model))

    def test_equal_slices_become_equal_masks_only_with_shared_noise(self, model):
        volume = volumes(depth=1).expand(-1, -1, -1, -1, 3)
        shared = sampler()(volume, model)
        assert close(shared[..., 0], shared[..., 2])
        own = sampler(share_noise=False)(volume, model)
        assert close(own[..., 0], shared[..., 0])
        assert all(differ(own[..., a], own[..., b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    def test_three_slices_are_not_colours(self, model):
        volume = volumes(depth=3)
        assert sampler()(volume, model).shape == (1, 1, *IMAGE_SIZE, 3)
        assert sampler()(volume[..., :1], model).shape == (1, 1, *IMAGE_SIZE, 1)

    @pytest.mark.parametrize("batch_size", [1, 4, 7, None])
    def test_no_more_latents_at_a_time_than_asked(self, three, batch_size):
        sizes: list[int] = []
        three.unet.register_forward_hook(lambda net, args, output: sizes.append(len(args[0])))
        sampler(num_samples=2, batch_size=batch_size)(volumes(1, 3), three)
        assert sum(sizes) == 3 * 2 * 3
        assert max(sizes) <= (batch_size or 18)
        assert batch_size is not None or sizes == [18]


class TestClasses:
    def test_each_class_lands_in_its_channel_of_its_image_and_sample(self):
        """Latents that name their image, sample and class; the first noise value identifies the sample."""
        first = seeded_noise([20, 21], LATENT_SHAPE)[:, 0, 0, 0]

        def latents(x: torch.Tensor, condition: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            sample = (x[:, 0, 0, 0] == first[1]).float()
            return condition + (0.02 * sample + 0.1 * classes).view(-1, 1, 1, 1)

        image = torch.tensor([0.2, 0.4]).view(2, 1, 1, 1).expand(2, 3, *IMAGE_SIZE)
        model = oracle_model(latents, num_classes=3)
        result = sampler(num_samples=2, seed=20, output="samples")(image, model)
        assert result.shape == (2, 2 * 3, *IMAGE_SIZE)
        for index, base in enumerate((0.2, 0.4)):
            for j, shift in enumerate((0.0, 0.02)):
                scores = torch.tensor([-(base + shift), base + shift + 0.1, base + shift + 0.2])
                expected = scores.softmax(dim=0).view(3, 1, 1).expand(3, *IMAGE_SIZE)
                torch.testing.assert_close(result[index, 3 * j : 3 * j + 3], expected, atol=1e-4, rtol=0)

    def test_all_foreground_found_by_class_0_is_no_background(self):
        """Class 0 is trained on all organs; an organ pixel must not become background, an empty one must."""

        def latents(x: torch.Tensor, condition: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            columns = torch.arange(x.shape[-1])
            organ = {0: columns < 6, 1: columns < 3, 2: (columns >= 3) & (columns < 6)}
            rows = torch.stack([organ[int(c)] for c in classes]).float() * 2 - 1
            return rows[:, None, None].expand_as(x)

        labels = sampler()(pictures(2), oracle_model(latents, num_classes=3)).argmax(dim=1)
        expected = torch.tensor([1] * 12 + [2] * 12 + [0] * 24)
        assert torch.equal(labels, expected.expand(2, *IMAGE_SIZE))


def masks_by_sample(masks: torch.Tensor, seed: int) -> Any:
    """Latents of an oracle for ``masks (K, N, h, w)``, one of each sample and class, in [0, 1]."""
    first = seeded_noise(range(seed, seed + len(masks)), LATENT_SHAPE)[:, 0, 0, 0].tolist()

    def latents(x: torch.Tensor, condition: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        labels = [0] * len(x) if classes is None else classes.tolist()
        chosen = [masks[first.index(row[0, 0, 0].item()), c] for row, c in zip(x, labels, strict=True)]
        return (2 * torch.stack(chosen) - 1)[:, None].expand(-1, 3, -1, -1)

    return latents


class TestSamples:
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_they_are_single_runs_one_after_the_other(self, num_classes):
        model, volume = segmentation_model(num_classes), volumes(2, 2)
        runs = [sampler(seed=seed)(volume, model) for seed in (5, 6, 7)]
        result = sampler(seed=5, num_samples=3, output="samples")(volume, model)
        assert result.shape == (2, 3 * num_classes, *IMAGE_SIZE, 2)
        assert close(result, torch.cat(runs, dim=1))
        assert differ(runs[0], runs[1])
        mean = sampler(seed=5, num_samples=3)(volume, model)
        assert mean.shape == (2, num_classes + 1, *IMAGE_SIZE, 2)
        assert close(mean[:, :-1], torch.stack(runs).mean(dim=0))

    def test_a_single_sample_has_no_agreement(self, model):
        assert torch.equal(sampler(output="samples")(pictures(), model), sampler()(pictures(), model))

    def test_mean_and_agreement_of_hand_made_masks(self):
        """Five samples; the columns of the first row have 0 to 5 votes."""
        masks = torch.zeros(5, 1, *LATENT_SHAPE[1:])
        for votes in range(6):
            masks[:votes, 0, 0, votes] = 0.9
        masks[:, 0, 1, 0] = torch.tensor([0.6, 0.6, 0.6, 0.0, 0.0])
        model = oracle_model(masks_by_sample(masks, seed=3))
        mean, share = sampler(num_samples=5, seed=3)(pictures(1), model)[0, :, ::4, ::4]
        torch.testing.assert_close(mean[0, :6], 0.9 * torch.arange(6) / 5, atol=1e-4, rtol=0)
        assert share[0, :6].tolist() == pytest.approx([1.0, 0.8, 0.6, 0.6, 0.8, 1.0])
        # Most say foreground, the mean does not: agreement is of the masks.
        assert mean[1, 0].item() == pytest.approx(0.36, abs=1e-4)
        assert share[1, 0].item() == pytest.approx(0.6)
        assert share[2:].eq(1).all()
        assert share.min() >= 0.5

    def test_agreement_of_several_classes_is_the_share_of_the_most_frequent(self):
        """Winners by pixel: 1 1 2 | 0 1 2 | 2 2 2."""
        masks = torch.zeros(3, 3, *LATENT_SHAPE[1:])
        # Class 0 holds all foreground: 1 where any organ is.
        for column, winners in enumerate(([1, 1, 2], [0, 1, 2], [2, 2, 2])):
            for j, winner in enumerate(winners):
                masks[j, 0, 0, column] = float(winner > 0)
                if winner:
                    masks[j, winner, 0, column] = 1.0
        model = oracle_model(masks_by_sample(masks, seed=11), num_classes=3)
        result = sampler(num_samples=3, seed=11)(pictures(1), model)[0, :, ::4, ::4]
        assert result.shape == (4, *LATENT_SHAPE[1:])
        torch.testing.assert_close(result[3, 0, :3], torch.tensor([2 / 3, 1 / 3, 1.0]))
        high, low = torch.tensor([-1.0, -1.0, 1.0]).softmax(dim=0)[[2, 0]].tolist()
        assert result[:3, 0, 2].tolist() == pytest.approx([low, low, high], abs=1e-4)
        assert result[:3, 0, 1].tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)

    def test_agreement_is_that_of_the_masks_which_the_threshold_draws(self, model):
        samples = torch.tensor([0.2, 0.4, 0.6, 0.8]).reshape(1, 4, 1, 1, 1)
        assert agreement(samples, threshold=0.5).item() == 0.5
        assert agreement(samples, threshold=0.3).item() == 0.75
        image = pictures(1)
        low = sampler(num_samples=4, threshold="0.05")(image, model)[:, 1]
        assert not torch.equal(low, sampler(num_samples=4, threshold=0.5)(image, model)[:, 1])
        with pytest.raises(ValueError, match="^threshold: expected a number from 0 to 1, got 1.5"):
            sampler(threshold=1.5)

    def test_agreement_counts_masks_not_probabilities(self):
        samples = torch.tensor([0.5, 0.51, 0.49, 1.0]).view(1, 4, 1, 1, 1)
        assert agreement(samples).item() == 0.5
        assert agreement(samples.expand(2, 4, 1, 3, 5)).shape == (2, 1, 3, 5)
        tied = torch.eye(4).view(1, 4, 4, 1, 1)
        assert agreement(tied).item() == 0.25


class TestOptions:
    def test_clients_send_strings_and_lists(self):
        result = sampler(
            num_inference_steps="5", num_samples=["3", "1"], seed="9", share_noise=[False, True], batch_size="4",
            output=["mean", "samples"],
        )  # fmt: skip
        assert (result.num_inference_steps, result.num_samples, result.seed, result.batch_size) == (5, 3, 9, 4)
        assert (result.share_noise, result.output) == (False, "mean")
        assert sampler(output=["samples"]).output == "samples"

    def test_one_step_is_the_default(self):
        result = sampler()
        assert (result.num_inference_steps, result.num_samples, result.share_noise) == (1, 1, True)
        assert (result.batch_size, result.output) == (None, "mean")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"num_samples": 0}, r"^num_samples: expected a whole number from 1 to 10000, got 0"),
            ({"num_samples": "1.5"}, r"^num_samples: expected a whole number"),
            ({"num_inference_steps": 1001}, r"^num_inference_steps: expected a whole number from 1 to 1000"),
            ({"batch_size": 0}, r"^batch_size: expected a whole number from 1"),
            ({"seed": -1}, r"^seed: expected a whole number from 0"),
            ({"share_noise": "False"}, r"^share_noise: expected true or false, got 'False'"),
            ({"output": "median"}, r"^output: expected mean or samples, got 'median'"),
            ({"output": []}, r"^output: expected mean or samples, got \[\]"),
            ({"scheduler": "pndm"}, r"^scheduler: expected a scheduler object, got 'pndm'"),
        ],
        ids=str,
    )
    def test_bad_ones_name_the_key(self, option, message):
        with pytest.raises(ValueError, match=message):
            sampler(**option)


class TestErrors:
    @pytest.mark.parametrize(
        "shape", [(1, *IMAGE_SIZE), (1, 1, 1, *IMAGE_SIZE, 3), (1, 2, *IMAGE_SIZE), (1, 4, 4, 4, 4)]
    )
    def test_shape(self, model, shape):
        message = r"^image: expected pictures \(B, 1\|3, H, W\) or volumes \(B, 1\|3, H, W, D\), got .*; load it"
        with pytest.raises(ValueError, match=message):
            sampler()(torch.rand(shape), model)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((33, 48), r"^image: expected 3 channels \(or 1\) and sizes divisible by 4, got \(1, 3, 33, 48\)"),
            ((32, 44), r"^latent: expected sizes divisible by 2 .* set image_size"),
        ],
    )
    def test_sizes_that_the_networks_cannot_halve(self, model, size, message):
        with pytest.raises(ValueError, match=message):
            sampler()(pictures(1, size=size), model)

    def test_number_of_seeds(self, model):
        with pytest.raises(ValueError, match=r"^seeds: expected one per sample \(2\), got 1"):
            sampler()(pictures(2), model, seeds=[1])

    def test_weights_that_are_not_finite(self, three):
        with torch.no_grad():
            three.unet.conv_out.bias[0] = float("nan")
        message = (
            r"^amp: expected finite latents, got NaN or infinity for seeds \[3, 4\]; try False and check the weights"
        )
        with pytest.raises(ValueError, match=message):
            sampler(num_samples=2, seed=3)(pictures(), three)

    def test_an_image_that_is_not_finite(self, model):
        image = pictures(2)
        image[1, 0, 3, 4] = float("nan")
        with pytest.raises(ValueError, match=r"^amp: expected finite latents, got NaN or infinity for seeds \[8\]"):
            sampler()(image, model, seeds=[7, 8])


class TestMixedPrecision:
    """On any device: MONAI's engines know autocast on GPUs alone."""

    def decoded_as(self, model: SegmentationModel) -> list[torch.dtype]:
        seen: list[torch.dtype] = []
        last: nn.Module = model.autoencoder.decoder.blocks[-1]
        last.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        return seen

    def test_the_switch_reaches_the_decoder(self, model):
        seen = self.decoded_as(model)
        image = pictures(2)
        exact, half = sampler()(image, model), sampler(amp=True)(image, model)
        assert seen == [torch.float32, torch.bfloat16]
        assert half.dtype == torch.float32
        assert not torch.equal(exact, half)

    def test_so_does_an_autocast_outside(self, model):
        seen = self.decoded_as(model)
        with torch.autocast("cpu", dtype=torch.float16):
            sampler()(pictures(1), model)
        assert seen == [torch.float16]

    def test_masks_of_the_shipped_weights_stay(self, tmp_path):
        """The tolerance that the sampler states: 0.07 % of the pixels change, next to none by the decoder."""
        with SDSEG.loaded("inference", "tiny", device="$torch.device('cpu')") as workflow:
            network = workflow.parser.get_parsed_content("network_def").eval()
        load_weights(network, SDSEG.folder / "models/tiny/model.pt")
        make_dataset(str(tmp_path), num_images=18, size=(96, 96), seed=1)
        paths = sorted((tmp_path / "images").iterdir())[:8]
        image = torch.stack([LoadPictured("image")({"image": str(path)})["image"].as_tensor() for path in paths])
        exact, half = (sampler(amp=amp)(image, network)[:, 0] > 0.5 for amp in (False, True))
        assert 0.02 < exact.float().mean() < 0.5, "the comparison would be blind"
        assert (exact != half).float().mean() < 2e-3
        overlap = 2 * (exact & half).sum() / (exact.sum() + half.sum())
        assert overlap > 0.99

    def test_another_value_is_named(self):
        with pytest.raises(ValueError, match=r"^amp: expected true or false, got 'yes'"):
            sampler(amp="yes")
