# SPDX-License-Identifier: Apache-2.0
"""How SDSeg trains: its loss, its batches with and without cached latents, and which weights change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import Compose
from PIL import Image
from torch import nn

from shared.handlers.ema import TrainedWeightsAverage
from shared.latent_cache import LatentDataset, measure_scale_factor
from shared.losses import NoiseAndLatentLoss
from shared.networks.segmentation import SegmentationModel
from shared.prepare_batch import SegmentationBatch
from shared.transforms.in_plane import FlipByItemd, ResizeInPlaned
from shared.transforms.masks import LoadMaskd, MaskToPictured
from shared.transforms.segmentation_images import LoadPictured
from tests.tiny_networks import (
    IMAGE_SIZE,
    LATENT_SHAPE,
    SEGMENTATION_SCHEDULE,
    pictures,
    segmentation_model,
    segmentation_scheduler,
)

CPU = torch.device("cpu")


def training_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**SEGMENTATION_SCHEDULE, clip_sample=False)


def alphas_bar() -> torch.Tensor:
    """The published schedule in float64, by numpy."""
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


def random_pair(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((count, *LATENT_SHAPE), generator=generator)
    # Every item has an error of its own size: weights of the wrong item would show.
    sizes = torch.linspace(0.05, 1, count).view(-1, 1, 1, 1)
    return noise + sizes * torch.randn(noise.shape, generator=generator), noise


class TestLoss:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("timesteps", [[0, 1, 17, 400, 850, 999], [999] * 6, [63, 999, 2, 500, 500, 300]])
    def test_it_equals_the_explicit_formula(self, weight, timesteps):
        """|n~ - n| + w |z~ - z| with z~ from x_t, in float64 (arXiv:2406.18361, section 2.3)."""
        predicted, noise = random_pair()
        steps = torch.tensor(timesteps)
        z = torch.randn(noise.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        alpha_bar = alphas_bar()[steps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise.double()
        estimated = (noisy - (1 - alpha_bar).sqrt() * predicted.double()) / alpha_bar.sqrt()
        expected = (predicted.double() - noise.double()).abs().mean() + weight * (estimated - z).abs().mean()
        loss = NoiseAndLatentLoss(training_scheduler(), latent_weight=weight)
        value = loss(predicted, {"noise": noise, "timesteps": steps})
        assert value.shape == ()
        # Core's alphas_cumprod is float32.
        assert value.item() == pytest.approx(expected.item(), rel=3e-5)

    def test_factors_are_the_published_ones(self):
        """Spec sdseg 3.3: median 2.4, mean 6.13, 38.66 at t = 999."""
        ratios = NoiseAndLatentLoss(training_scheduler()).ratios
        assert ratios.shape == (1000,)
        assert ratios.median().item() == pytest.approx(2.4, abs=0.05)
        assert ratios.mean().item() == pytest.approx(6.13, abs=0.005)
        assert ratios[999].item() == pytest.approx(38.66, abs=0.005)
        expected = ((1 - alphas_bar()) / alphas_bar()).sqrt()
        torch.testing.assert_close(ratios.double(), expected, rtol=3e-5, atol=0)

    def test_the_latent_term_is_on_by_default(self):
        predicted, noise = random_pair()
        target = {"noise": noise, "timesteps": torch.full((6,), 999)}
        with_latents = NoiseAndLatentLoss(training_scheduler())(predicted, target)
        assert (with_latents / (predicted - noise).abs().mean()).item() == pytest.approx(39.66, abs=0.01)

    def test_weight_0_is_the_mean_absolute_error_of_the_noise(self):
        predicted, noise = random_pair()
        loss = NoiseAndLatentLoss(training_scheduler(), latent_weight=0.0)
        value = loss(predicted, {"noise": noise, "timesteps": torch.tensor([999, 0, 1, 2, 3, 4])})
        torch.testing.assert_close(value, nn.functional.l1_loss(predicted, noise))

    def test_nothing_is_clamped_at_the_last_timestep(self):
        """Twice the error is twice the loss, however large."""
        loss = NoiseAndLatentLoss(training_scheduler())
        target = {"noise": torch.zeros(2, *LATENT_SHAPE), "timesteps": torch.tensor([999, 999])}
        one = loss(torch.ones(2, *LATENT_SHAPE), target).item()
        for size in (1e-3, 100.0, 1e6):
            assert loss(torch.full((2, *LATENT_SHAPE), -size), target).item() == pytest.approx(size * one, rel=1e-5)

    def test_true_noise_costs_nothing(self):
        _, noise = random_pair()
        assert NoiseAndLatentLoss(training_scheduler())(noise, {"noise": noise, "timesteps": torch.arange(6)}) == 0

    @pytest.mark.parametrize("autocast", [False, True])
    def test_half_precision_is_computed_in_float32(self, autocast):
        predicted, noise = random_pair()
        target = {"noise": noise, "timesteps": torch.tensor([999, 3, 500, 20, 999, 60])}
        loss, half = NoiseAndLatentLoss(training_scheduler()), predicted.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(half, target)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(half.float(), target))

    def test_gradient(self):
        """sign(n~ - n) (1 + ratio) / number of elements."""
        predicted, noise = random_pair()
        predicted.requires_grad_()
        steps = torch.tensor([999, 3, 500, 20, 998, 60])
        loss = NoiseAndLatentLoss(training_scheduler(), latent_weight=0.5)
        loss(predicted, {"noise": noise, "timesteps": steps}).backward()
        factor = 1 + 0.5 * ((1 - alphas_bar()) / alphas_bar()).sqrt()[steps]
        expected = (predicted.detach() - noise).sign() * factor.view(-1, 1, 1, 1).float() / predicted.numel()
        torch.testing.assert_close(predicted.grad, expected, rtol=1e-4, atol=0)

    def test_it_has_no_state(self):
        loss = NoiseAndLatentLoss(training_scheduler())
        assert list(loss.parameters()) == []
        assert loss.state_dict() == {}


def batch_of(count: int = 4, num_classes: int = 1, seed: int = 0) -> dict[str, Any]:
    """As a loader gives it without a cache."""
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand((count, 1, *IMAGE_SIZE), generator=generator) > 0.5).float()
    batch: dict[str, Any] = {"image": pictures(count), "target": masks.expand(-1, 3, -1, -1)}
    batch["item_id"] = [str(index) for index in range(count)]
    if num_classes > 1:
        batch["class_id"] = torch.arange(count) % num_classes
    return batch


class TestBatch:
    @pytest.mark.parametrize("seed", [None, 0])
    def test_it_gives_what_model_and_loss_take(self, seed):
        model, scheduler = segmentation_model(3), training_scheduler()
        image, target, arguments, named = SegmentationBatch(scheduler, model, seed=seed)(batch_of(num_classes=3), CPU)
        assert torch.equal(image, pictures(4))
        assert set(target) == {"noise", "timesteps"}
        assert arguments == ()
        assert set(named) == {"noisy", "timesteps", "class_labels"}
        assert torch.equal(target["timesteps"], named["timesteps"])
        assert named["class_labels"].tolist() == [0, 1, 2, 0]
        predicted = model(image, *arguments, **named)
        assert predicted.shape == target["noise"].shape
        assert NoiseAndLatentLoss(scheduler)(predicted, target) > 0.1

    def test_the_mask_comes_back_from_the_noisy_latents(self):
        """x_t = a z + s n of the scaled posterior of the mask: z within the posterior's sigma of its mean."""
        model, scheduler, batch = segmentation_model(), training_scheduler(), batch_of()
        with torch.no_grad():
            model.autoencoder.quant_conv_log_sigma.conv.weight.zero_()
            model.autoencoder.quant_conv_log_sigma.conv.bias.fill_(-20.0)
        _, target, _, named = SegmentationBatch(scheduler, model, seed=1)(batch, CPU)
        alpha_bar = scheduler.alphas_cumprod[named["timesteps"]].view(-1, 1, 1, 1)
        z = (named["noisy"] - (1 - alpha_bar).sqrt() * target["noise"]) / alpha_bar.sqrt()
        with torch.no_grad():
            mean, _ = model.autoencoder.encode(batch["target"])
        torch.testing.assert_close(z, 0.5 * mean, atol=1e-3, rtol=0)

    def test_another_key_of_the_mask(self):
        model, batch = segmentation_model(), batch_of()
        expected = SegmentationBatch(training_scheduler(), model, seed=0)(batch, CPU)
        batch["mask"] = batch.pop("target")
        found = SegmentationBatch(training_scheduler(), model, seed=0, encoded_key="mask")(batch, CPU)
        assert torch.equal(found[3]["noisy"], expected[3]["noisy"])

    def test_without_classes_the_network_gets_no_labels(self):
        assert "class_labels" not in SegmentationBatch(training_scheduler(), segmentation_model())(batch_of(), CPU)[3]

    def test_tensors_are_plain_and_take_no_gradient(self):
        batch = batch_of()
        batch = {**batch, "image": MetaTensor(batch["image"]), "target": MetaTensor(batch["target"])}
        image, target, _, named = SegmentationBatch(training_scheduler(), segmentation_model())(batch, CPU)
        tensors = [image, *target.values(), *named.values()]
        assert not any(isinstance(tensor, MetaTensor) or tensor.requires_grad for tensor in tensors)

    def test_training_draws_anew_and_validation_does_not(self):
        model, batch = segmentation_model(), batch_of()
        training, fixed = (SegmentationBatch(training_scheduler(), model, seed=seed) for seed in (None, 4))
        torch.manual_seed(0)
        assert not torch.equal(training(batch, CPU)[1]["noise"], training(batch, CPU)[1]["noise"])
        assert torch.equal(fixed(batch, CPU)[1]["noise"], fixed(batch, CPU)[1]["noise"])


class Recorder:
    """Hashes of all weights by part, to compare bits."""

    def __init__(self, model: SegmentationModel) -> None:
        self.model = model
        self.before = copy.deepcopy(model.state_dict())

    def changed(self, part: str) -> set[str]:
        state = self.model.state_dict()
        names = [name for name in state if name.startswith(f"{part}.")]
        assert names
        return {name for name in names if not torch.equal(state[name], self.before[name])}

    def trained(self, part: str) -> set[str]:
        return {name for name, _ in self.model.named_parameters() if name.startswith(f"{part}.")}


def train(model: SegmentationModel, *, num_classes: int = 1, steps: int = 3) -> TrainedWeightsAverage:
    """Some steps of the engine that the configuration uses; returns the average of the weights."""
    scheduler = training_scheduler()
    ema = TrainedWeightsAverage(model, decay=0.9999)
    groups = model.parameter_groups(1e-3, 100.0)
    SupervisedTrainer(
        device=CPU,
        max_epochs=1,
        train_data_loader=[batch_of(num_classes=num_classes, seed=index) for index in range(steps)],
        network=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        loss_function=NoiseAndLatentLoss(scheduler),
        prepare_batch=SegmentationBatch(scheduler, model),
        train_handlers=[ema],
        decollate=False,
    ).run()
    return ema


class TestWhatTrains:
    @pytest.mark.parametrize("mode", ["concat", "crossattn"])
    @pytest.mark.parametrize("num_classes", [1, 3])
    @pytest.mark.parametrize("amp", [False, True])
    def test_unet_and_vision_encoder_change_and_the_autoencoder_does_not(self, mode, num_classes, amp):
        model = segmentation_model(num_classes, condition_mode=mode)
        recorder = Recorder(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            train(model, num_classes=num_classes)
        assert recorder.changed("autoencoder") == set()
        assert recorder.changed("unet") == recorder.trained("unet")
        assert recorder.changed("vision_encoder") == recorder.trained("vision_encoder")
        assert torch.equal(model.scale_factor, torch.tensor(0.5))

    def test_a_frozen_vision_encoder_keeps_its_bits(self):
        model = segmentation_model(train_vision_encoder=False)
        recorder = Recorder(model)
        train(model)
        assert recorder.changed("autoencoder") | recorder.changed("vision_encoder") == set()
        assert recorder.changed("unet") == recorder.trained("unet")

    @pytest.mark.parametrize("trains", [True, False])
    def test_modes(self, trains):
        model = segmentation_model(train_vision_encoder=trains, dropout=0.2)
        for mode in (True, False, True):
            assert model.train(mode) is model
            assert model.training is mode
            assert all(module.training is mode for module in model.unet.modules())
            assert all(module.training is (mode and trains) for module in model.vision_encoder.modules())
            assert not any(module.training for module in model.autoencoder.modules())
        fresh = segmentation_model(train_vision_encoder=trains)
        parts = SegmentationModel(
            fresh.autoencoder.train(), fresh.unet.train(), fresh.vision_encoder.train(),
            scheduler=segmentation_scheduler(), train_vision_encoder=trains,
        )  # fmt: skip
        assert not parts.autoencoder.training, "frozen from the first moment"
        assert parts.vision_encoder.training is trains

    def test_dropout_of_the_vision_encoder_acts_in_training_alone(self):
        model, image = segmentation_model(dropout=0.5), pictures(2)
        with torch.no_grad():
            calm = model.encode_image(image)
            assert torch.equal(model.encode_image(image), calm)
            model.train()
            torch.manual_seed(0)
            first, second = model.encode_image(image), model.encode_image(image)
            assert (first - second).abs().max() > 0.1
            frozen = segmentation_model(dropout=0.5, train_vision_encoder=False).train()
            assert torch.equal(frozen.encode_image(image), frozen.encode_image(image))
            torch.testing.assert_close(frozen.encode_image(image), calm)

    @pytest.mark.parametrize("trains", [True, False])
    def test_trained_holds_all_but_the_autoencoder(self, trains):
        model = segmentation_model(train_vision_encoder=trains)
        # Also a frozen vision encoder: the random 1 x 1 convolution at its end is in no other file.
        assert set(model.trained) == {"unet", "vision_encoder"}
        assert {id(p) for p in model.trained.parameters()} >= {id(p) for p in model.trainable_parameters()}
        assert not any(p.requires_grad for p in model.autoencoder.parameters())
        twin = segmentation_model(seed=7, train_vision_encoder=trains)
        twin.trained.load_state_dict(model.trained.state_dict())
        assert torch.equal(twin.unet.conv_in.weight, model.unet.conv_in.weight)
        assert torch.equal(twin.vision_encoder.head.weight, model.vision_encoder.head.weight)

    @pytest.mark.parametrize("trains", [True, False])
    def test_the_average_covers_unet_and_vision_encoder(self, trains):
        """After n steps the average is lerp(..., w_n) with decay (1 + n) / (10 + n), for every trained weight."""
        model = segmentation_model(train_vision_encoder=trains)
        start = copy.deepcopy(model.state_dict())
        ema = train(model, steps=1)
        average, now = ema.ema_model.state_dict(), model.state_dict()
        assert isinstance(ema.ema_model, SegmentationModel)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any(name.startswith("vision_encoder.") for name in trained) is trains
        for name, value in average.items():
            if name in trained:
                torch.testing.assert_close(value, 2 / 11 * start[name] + 9 / 11 * now[name], atol=1e-6, rtol=1e-5)
                assert not torch.equal(value, now[name]), name
                assert not torch.equal(value, start[name]), name
            else:
                assert torch.equal(value, start[name]), name

    def test_it_learns_to_follow_the_image(self):
        """Equal noisy latents, two images, two noises: only the image can tell them apart."""
        model = segmentation_model().train()
        noisy = torch.zeros(2, *LATENT_SHAPE)
        timesteps, image = torch.full((2,), 500), torch.stack((torch.zeros(3, *IMAGE_SIZE), torch.ones(3, *IMAGE_SIZE)))
        target = torch.ones_like(noisy) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        loss = NoiseAndLatentLoss(training_scheduler(), latent_weight=0.0)
        optimizer = torch.optim.AdamW(model.parameter_groups(1e-2), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model(image, noisy, timesteps), {"noise": target, "timesteps": timesteps})
            value.backward()
            optimizer.step()
        # The best prediction without the image is 0, with a loss of 1.
        assert value.item() < 0.5


class TestParameterGroups:
    @pytest.mark.parametrize("trains", [True, False])
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_every_trained_parameter_once(self, num_classes, trains):
        model = segmentation_model(num_classes, train_vision_encoder=trains)
        groups = model.parameter_groups(4e-5, 100)
        found = [id(p) for group in groups for p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
        assert not {id(p) for p in model.autoencoder.parameters()} & set(found)
        assert {id(p) for p in model.unet.parameters()} <= set(found)
        assert ({id(p) for p in model.vision_encoder.parameters()} <= set(found)) is trains
        assert groups[0]["lr"] == 4e-5

    def test_the_factor_is_of_the_class_embedding_alone(self):
        model = segmentation_model(3)
        others, classes = model.parameter_groups(4e-5, 100)
        assert [id(p) for p in classes["params"]] == [id(model.unet.class_embedding.weight)]
        assert classes["lr"] == pytest.approx(4e-3)
        assert others["lr"] == 4e-5
        assert [group["lr"] for group in model.parameter_groups(4e-5)] == [4e-5, 4e-5]
        assert len(segmentation_model().parameter_groups(4e-5, 100)) == 1

    def test_a_warm_up_scales_both(self):
        optimizer = torch.optim.AdamW(segmentation_model(3).parameter_groups(1e-3, 10), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        assert schedule.get_last_lr() == pytest.approx([5e-4, 5e-3])


SIZE = (20, 27)  # rows, columns of the files; nothing is square, nothing is even


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    """Three pictures with masks of classes 0 to 2, as items: two flips, two classes."""
    rng = np.random.default_rng(0)
    result = []
    for index in range(3):
        image, label = tmp_path / f"image{index}.png", tmp_path / f"label{index}.png"
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(image)
        classes = np.zeros(SIZE, dtype=np.uint8)
        classes[2 : 9 + index, 3:8], classes[12:17, 10 + index : 20] = 1, 2
        Image.fromarray(classes).save(label)
        item = {"image": str(image), "label": str(label), "group": str(index)}
        result += [{**item, "flip": flip, "class_id": c} for c in (0, 2) for flip in (0, 1)]
    return result


def mask_to_target() -> Compose:
    return Compose(
        [
            LoadMaskd("label", num_classes=3),
            ResizeInPlaned("label", IMAGE_SIZE, mode="nearest"),
            FlipByItemd("label"),
            MaskToPictured("label", name="target"),
        ]
    )


def load_image() -> Compose:
    return Compose([LoadPictured("image"), ResizeInPlaned("image", IMAGE_SIZE), FlipByItemd("image")])


def latents_of(items: list[dict[str, Any]], folder: Path | None, **options: Any) -> LatentDataset:
    defaults: dict[str, Any] = {
        "image_transform": mask_to_target(), "autoencoder": segmentation_model().autoencoder, "cache_dir": folder,
        "batch_size": 5, "image_keys": ["label", "slice", "flip", "class_id"], "encoded_key": "target",
    }  # fmt: skip
    return LatentDataset(items, **{**defaults, **options})


class TestCache:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_stored_posteriors_are_those_of_the_target(self, items, tmp_path, workers):
        dataset, autoencoder = latents_of(items, tmp_path, num_workers=workers), segmentation_model().autoencoder
        assert len(dataset) == 12
        for index, item in enumerate(items):
            target = mask_to_target()(item)["target"]
            assert target.shape == (3, *IMAGE_SIZE)
            with torch.no_grad():
                mean, sigma = autoencoder.encode(target[None].as_tensor())
            torch.testing.assert_close(dataset[index]["latent_mean"], mean[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(dataset[index]["latent_log_variance"], 2 * sigma[0].log(), atol=1e-4, rtol=0)

    def test_items_keep_their_image_and_lose_the_mask(self, items, tmp_path):
        item = latents_of(items, tmp_path)[1]
        assert set(item) == {
            "image", "group", "flip", "class_id", "item_id", "latent_mean", "latent_log_variance",
        }  # fmt: skip
        assert item["image"] == items[1]["image"]

    def test_without_a_cache_items_hold_the_target_and_the_image_is_untouched(self, items):
        item = latents_of(items, None)[3]
        assert torch.equal(item["target"], mask_to_target()(items[3])["target"])
        assert item["image"] == items[3]["image"]
        assert "latent_mean" not in item
        loaded = latents_of(items, None, transform=load_image())[3]
        assert torch.equal(loaded["image"], load_image()(items[3])["image"])

    def test_flips_and_classes_have_latents_of_their_own(self, items, tmp_path):
        dataset = latents_of(items, tmp_path)
        means = torch.stack([dataset[index]["latent_mean"] for index in range(12)])
        distances = (means[:, None] - means[None]).abs().flatten(2).amax(dim=2)
        assert (distances + torch.eye(12)).min() > 0.01

    @pytest.mark.parametrize("change", [{"flip": 3}, {"class_id": 1}], ids=str)
    def test_another_flip_or_class_is_another_cache(self, items, tmp_path, change):
        first = latents_of(items, tmp_path).cache_path
        assert latents_of([*items[:-1], {**items[-1], **change}], tmp_path).cache_path != first
        assert latents_of([dict(item) for item in items], tmp_path).cache_path == first

    @pytest.mark.parametrize("cached", [True, False])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_loaders_work_with_workers(self, items, tmp_path, cached, workers):
        dataset = latents_of(items, tmp_path if cached else None, transform=load_image())
        batches = list(DataLoader(dataset, batch_size=5, num_workers=workers))
        assert [len(batch["item_id"]) for batch in batches] == [5, 5, 2]
        image = torch.cat([batch["image"] for batch in batches])
        expected = DataLoader(Dataset(items, load_image()), batch_size=12)
        assert torch.equal(image, next(iter(expected))["image"])
        assert torch.cat([batch["class_id"] for batch in batches]).tolist() == [0, 0, 2, 2] * 3

    def test_scale_factor_is_that_of_the_masks(self, items, tmp_path):
        cached, encoded = latents_of(items, tmp_path), latents_of(items, None)
        assert measure_scale_factor(cached) == pytest.approx(measure_scale_factor(encoded), rel=1e-4)
        means, log_variances = zip(*(cached.posterior(index) for index in range(12)), strict=True)
        variance = torch.stack(means).double().var(correction=0) + torch.stack(log_variances).double().exp().mean()
        assert measure_scale_factor(cached) == pytest.approx(variance.item() ** -0.5, rel=1e-5)

    def test_a_fixed_seed_gives_the_same_batch_with_and_without_a_cache(self, items, tmp_path):
        model = segmentation_model(3)
        results = []
        for folder in (tmp_path, None):
            loader = DataLoader(latents_of(items, folder, transform=load_image()), batch_size=12)
            results.append(SegmentationBatch(training_scheduler(), model, seed=3)(next(iter(loader)), CPU))
        (image, target, _, named), (other_image, other_target, _, other_named) = results
        assert torch.equal(image, other_image)
        assert torch.equal(target["noise"], other_target["noise"])
        assert torch.equal(named["timesteps"], other_named["timesteps"])
        assert torch.equal(named["class_labels"], other_named["class_labels"])
        torch.testing.assert_close(named["noisy"], other_named["noisy"], atol=1e-4, rtol=0)
        assert len(set(named["timesteps"].tolist())) > 6
