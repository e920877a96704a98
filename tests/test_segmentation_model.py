# SPDX-License-Identifier: Apache-2.0
"""SDSeg's model: one reverse step, conditions, classes, and what it starts from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.networks.segmentation import (
    ConditionMode,
    SegmentationModel,
    probabilities,
    recompute_activations,
    start_from_pretrained,
)
from shared.networks.vision_encoder import VisionEncoder
from shared.schedulers import DDIMScheduler
from tests.tiny_networks import (
    IMAGE_SIZE,
    KL_AUTOENCODER,
    LATENT_SHAPE,
    SEGMENTATION_SCHEDULE,
    VISION_ENCODER,
    PoolingAutoencoder,
    PoolingEncoder,
    film_unet,
    oracle_model,
    pictures,
    segmentation_model,
    segmentation_scheduler,
)

BOTH = pytest.mark.parametrize("mode", ["concat", "crossattn"])


def last_level() -> tuple[float, float]:
    """``sqrt(alpha_bar)`` and ``sqrt(1 - alpha_bar)`` at T - 1 by numpy in float64 (spec sdseg 3.4)."""
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=np.float64) ** 2
    alpha_bar = float(np.prod(1.0 - betas))
    return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


def noisy_inputs(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, *LATENT_SHAPE), generator=generator), torch.tensor([999, 400, 20, 7])[:count]


def first_noise() -> torch.Tensor:
    return torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(0))[None]


class Recorder(nn.Module):
    """Takes the place of a U-Net and keeps its inputs."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **named: Any) -> torch.Tensor:
        self.seen = (x, timesteps, named)
        return x[:, :3]


def recording(mode: str, num_classes: int = 1) -> tuple[SegmentationModel, Recorder]:
    unet = Recorder(num_classes if num_classes > 1 else None)
    options: dict[str, Any] = {"num_classes": num_classes, "condition_mode": mode}
    encoder: Any = PoolingEncoder()
    model = SegmentationModel(PoolingAutoencoder(), unet, encoder, scheduler=segmentation_scheduler(), **options)
    return model.eval(), unet


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class TestOneStep:
    def test_the_last_level_is_the_published_one(self):
        model = segmentation_model()
        alpha, sigma = last_level()
        assert alpha == pytest.approx(0.02586, abs=5e-6)
        assert model.last_timestep == 999
        # Core multiplies its 1000 factors in float32: 1e-5 of alpha_bar, 5e-6 of its root.
        assert model._alpha == pytest.approx(alpha, rel=2e-5)
        assert model._sigma == pytest.approx(sigma, rel=1e-6)

    def test_it_equals_the_formula(self):
        """z = (n - sqrt(1 - ab) n~) / sqrt(ab), decoded, mean of the channels, in float64 but for the networks."""
        model, image = segmentation_model(), pictures(3)
        noise, (alpha, sigma) = first_noise(), last_level()
        for index in range(3):
            condition = model.vision_encoder(image[index : index + 1])
            predicted = model.unet(torch.cat((noise, condition), dim=1), torch.tensor([999]))
            latents = (noise.double() - sigma * predicted.double()) / alpha
            mask = model.autoencoder.decode((latents / 0.5).float()).clamp(0, 1)
            expected = 2 * mask.mean(dim=1, keepdim=True) - 1
            assert expected.std() > 0.05, "the comparison would be blind"
            # A random network amplifies what the 38.7-fold estimate has of rounding.
            torch.testing.assert_close(model(image)[index : index + 1], expected, atol=1e-4, rtol=0)

    def test_true_noise_recovers_the_latents(self):
        """n~ - n has float32's 6e-8 of |n| < 6, times sqrt((1 - ab) / ab) = 38.7: below 1e-4."""
        clean = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
        model = oracle_model(lambda x, condition, classes: clean)
        expected = model.autoencoder.decode(clean).mean(dim=1, keepdim=True)
        assert expected.std() > 0.1
        scores = model(pictures(2))
        torch.testing.assert_close((scores + 1) / 2, expected, atol=1e-4, rtol=0)
        (noisy, _, timesteps, _) = model.unet.calls[0]
        assert timesteps.tolist() == [999, 999]
        assert torch.equal(noisy, first_noise().expand(2, -1, -1, -1))

    def test_latents_are_brought_back_by_the_scale_factor(self):
        clean = 0.3 * torch.ones(1, *LATENT_SHAPE)
        model = oracle_model(lambda x, condition, classes: clean)
        model.scale_factor.fill_(0.5)
        # decode(0.3 / 0.5) = 0.6 in [-1, 1] is 0.8 in [0, 1], a score of 0.6.
        torch.testing.assert_close(model(pictures(1)), torch.full((1, 1, *IMAGE_SIZE), 0.6), atol=1e-4, rtol=0)

    def test_scores_are_clamped(self):
        model = oracle_model(lambda x, condition, classes: torch.full((2, *LATENT_SHAPE), 3.0))
        assert torch.equal(model(pictures(2)), torch.ones(2, 1, *IMAGE_SIZE))

    @BOTH
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_shape_and_range(self, mode, num_classes):
        scores = segmentation_model(num_classes, condition_mode=mode)(pictures(2))
        assert scores.shape == (2, num_classes, *IMAGE_SIZE)
        assert scores.dtype == torch.float32
        assert -1 <= scores.min() < scores.max() <= 1
        assert scores.std() > 0.05

    @BOTH
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_an_image_is_segmented_whatever_its_neighbours(self, mode, num_classes):
        model, image = segmentation_model(num_classes, condition_mode=mode), pictures(3)
        scores = model(image)
        for index in range(3):
            torch.testing.assert_close(model(image[index : index + 1]), scores[index : index + 1], atol=1e-4, rtol=0)
        assert (scores[0] - scores[1]).abs().max() > 0.1

    def test_it_is_deterministic(self):
        model, image = segmentation_model(dropout=0.5), pictures(2)
        first = model(image)
        state = torch.get_rng_state()
        assert torch.equal(model(image), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_one_channel_is_three_equal_ones(self):
        model, grey = segmentation_model(), pictures(2, channels=1)
        assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))

    def test_a_condition_replaces_the_image(self):
        model, image = segmentation_model(3), pictures(2)
        condition = model.encode_image(image)
        assert torch.equal(model(None, condition=condition), model(image))

    def test_mixed_precision_stays_near_float32(self):
        model, image = segmentation_model(3), pictures(2)
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(image)
        assert (scores.float() - expected).abs().mean() < 0.02

    def test_noise_is_not_rounded_under_mixed_precision(self):
        model, unet = recording("concat")
        with torch.autocast("cpu", torch.bfloat16):
            model(None, condition=torch.zeros(1, *LATENT_SHAPE, dtype=torch.bfloat16))
        assert torch.equal(unet.seen[0][:, :3], first_noise())


class TestCondition:
    def test_concat_puts_it_behind_the_noisy_latent(self):
        model, unet = recording("concat")
        (noisy, timesteps), image = noisy_inputs(), pictures(2)
        assert torch.equal(model(image, noisy, timesteps), noisy)
        x, t, named = unet.seen
        assert torch.equal(x, torch.cat((noisy, model.encode_image(image)), dim=1))
        assert torch.equal(t, timesteps)
        assert named == {"class_labels": None}

    def test_crossattn_hands_its_pixels_over_row_by_row(self):
        model, unet = recording("crossattn", num_classes=4)
        (noisy, timesteps), image, labels = noisy_inputs(), pictures(2), torch.tensor([3, 1])
        model(image, noisy, timesteps, labels)
        x, _, named = unet.seen
        assert torch.equal(x, noisy)
        assert torch.equal(named["class_labels"], labels)
        _, h, w = LATENT_SHAPE
        condition = model.encode_image(image)
        assert named["context"].shape == (2, h * w, 3)
        for row, column in ((0, 0), (0, w - 1), (3, 5), (h - 1, 2)):
            assert torch.equal(named["context"][:, row * w + column], condition[:, :, row, column])

    @BOTH
    def test_it_reaches_the_prediction(self, mode):
        model, (noisy, timesteps), image = segmentation_model(condition_mode=mode), noisy_inputs(), pictures(2)
        predicted = model(image, noisy, timesteps)
        assert predicted.shape == noisy.shape
        assert (model(image.flip(0), noisy, timesteps) - predicted).abs().max() > 0.05
        assert (model(image, noisy, timesteps.flip(0)) - predicted).abs().max() > 0.05
        assert torch.equal(model(None, noisy, timesteps, condition=model.encode_image(image)), predicted)

    def test_it_is_neither_sampled_nor_scaled(self):
        model, image = segmentation_model(), pictures(2)
        assert torch.equal(model.encode_image(image), model.vision_encoder(image))
        assert model.encode_image(image).shape == (2, *LATENT_SHAPE)


class TestClasses:
    def test_passes_are_image_major_and_class_minor(self):
        model, _ = recording("concat", num_classes=3)
        condition = torch.arange(2.0).view(2, 1, 1, 1)
        repeated, classes = model.class_passes(condition)
        assert repeated.flatten().tolist() == [0, 0, 0, 1, 1, 1]
        assert classes.tolist() == [0, 1, 2, 0, 1, 2]
        alone, none = recording("concat")[0].class_passes(condition)
        assert alone is condition
        assert none is None

    def test_scores_negate_class_0_and_average_the_channels(self):
        model, _ = recording("concat", num_classes=3)
        masks = torch.rand((6, 3, 4, 5), generator=torch.Generator().manual_seed(0))
        scores = model.scores(masks, 2)
        assert scores.shape == (2, 3, 4, 5)
        for image, label in ((i, c) for i in range(2) for c in range(3)):
            expected = 2 * masks[3 * image + label].double().mean(dim=0) - 1
            expected = -expected if label == 0 else expected
            torch.testing.assert_close(scores[image, label].double(), expected, atol=1e-6, rtol=0)

    def test_one_class_is_not_negated(self):
        model, _ = recording("concat")
        masks = torch.rand((2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.scores(masks, 2), 2 * masks.mean(dim=1, keepdim=True) - 1)

    def test_each_class_lands_in_its_channel_of_its_image(self):
        """Latents that say which image and which class they are."""
        grey = torch.tensor([0.2, 0.4]).view(2, 1, 1, 1).expand(2, 3, *IMAGE_SIZE)

        def latents(x: torch.Tensor, condition: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            return condition + 0.1 * classes.view(-1, 1, 1, 1)

        scores = oracle_model(latents, num_classes=4)(grey)
        expected = torch.tensor([[-0.2, 0.3, 0.4, 0.5], [-0.4, 0.5, 0.6, 0.7]])
        torch.testing.assert_close(scores, expected.view(2, 4, 1, 1).expand(2, 4, *IMAGE_SIZE), atol=1e-4, rtol=0)

    def test_all_classes_start_from_the_same_noise(self):
        model = oracle_model(num_classes=3)
        model(pictures(2))
        ((noisy, _, timesteps, classes),) = model.unet.calls
        assert torch.equal(noisy, first_noise().expand(6, -1, -1, -1))
        assert timesteps.tolist() == [999] * 6
        assert classes.tolist() == [0, 1, 2] * 2

    def test_class_embedding_tells_the_passes_apart(self):
        model, (noisy, timesteps), image = segmentation_model(3), noisy_inputs(), pictures(2)
        first, second = (model(image, noisy, timesteps, torch.tensor(labels)) for labels in ([0, 1], [2, 1]))
        assert (first[0] - second[0]).abs().max() > 0.01
        assert torch.equal(first[1], second[1])


class TestProbabilities:
    def test_one_class_is_linear(self):
        scores = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(1, 1, 2, 2)
        assert probabilities(scores).flatten().tolist() == [0.0, 0.25, 0.5, 1.0]

    def test_several_classes_are_a_softmax_that_is_at_most_049_for_nine(self):
        scores = -torch.ones(1, 9, 2, 2)
        scores[:, 4] = 1
        values = probabilities(scores)
        torch.testing.assert_close(values.sum(dim=1), torch.ones(1, 2, 2))
        assert values[:, 4].max().item() == pytest.approx(math.e**2 / (math.e**2 + 8))
        assert 0.48 < values.max() < 0.49
        assert torch.equal(values.argmax(dim=1), scores.argmax(dim=1))


class TestErrors:
    def test_unknown_mode(self):
        with pytest.raises(ValueError, match=r"^condition_mode: expected concat or crossattn, got 'film'\."):
            segmentation_model(condition_mode="film")

    def test_modes_are_words(self):
        assert [str(mode) for mode in ConditionMode] == ["concat", "crossattn"]

    @pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
    def test_other_predictions(self, prediction_type):
        scheduler = DDIMScheduler(**{**SEGMENTATION_SCHEDULE, "prediction_type": prediction_type})
        encoder = VisionEncoder(**VISION_ENCODER)
        with pytest.raises(ValueError, match=rf"^prediction_type: expected epsilon, got '{prediction_type}'; the late"):
            SegmentationModel(PoolingAutoencoder(), film_unet(), encoder, scheduler=scheduler)

    @pytest.mark.parametrize(
        ("embedded", "num_classes", "message"),
        [
            (3, 1, "with no embedded classes, got 3"),
            (1, 3, "with 3 embedded .* got None"),
            (2, 3, "with 3 embedded .* got 2"),
        ],
    )
    def test_a_unet_with_another_number_of_classes(self, embedded, num_classes, message):
        parts: list[Any] = [PoolingAutoencoder(), film_unet(embedded), VisionEncoder(**VISION_ENCODER)]
        with pytest.raises(ValueError, match=rf"^num_classes: expected a U-Net {message}; give unet_def the same"):
            SegmentationModel(*parts, scheduler=segmentation_scheduler(), num_classes=num_classes)

    def test_neither_image_nor_condition(self):
        with pytest.raises(ValueError, match=r"^image: expected an image or its condition, got neither"):
            segmentation_model()(None)

    def test_noisy_latents_without_timesteps(self):
        with pytest.raises(ValueError, match=r"^timesteps: expected one per noisy latent, got none"):
            segmentation_model()(pictures(2), noisy_inputs()[0])

    # The autoencoder divides by 4, the U-Net once more by 2.
    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (
                (33, 48),
                r"^image: expected 3 channels \(or 1\) and sizes divisible by 4, got \(1, 3, 33, 48\); set image_",
            ),
            ((32, 46), r"^image: expected 3 channels \(or 1\) and sizes divisible by 4, got \(1, 3, 32, 46\)"),
            ((36, 48), r"^latent: expected sizes divisible by 2 .* got \(1, 6, 9, 12\); set image_size"),
        ],
    )
    def test_sizes_that_cannot_be_halved(self, size, message):
        with pytest.raises(ValueError, match=message):
            segmentation_model()(pictures(1, size=size))

    def test_sizes_that_another_encoder_rounds(self):
        with pytest.raises(ValueError, match=r"^image: expected sides that are multiples of 4, got \(33, 48\); resize"):
            oracle_model()(pictures(1, size=(33, 48)))

    def test_four_channels(self):
        with pytest.raises(ValueError, match=r"^image: expected 3 channels \(or 1\)"):
            segmentation_model()(pictures(1, channels=4))

    def test_class_labels_go_with_several_classes(self):
        (noisy, timesteps), image = noisy_inputs(), pictures(2)
        with pytest.raises(ValueError, match=r"^class_labels: expected one with num_classes 3, got none"):
            segmentation_model(3)(image, noisy, timesteps)
        with pytest.raises(ValueError, match=r"^class_labels: expected none"):
            segmentation_model()(image, noisy, timesteps, torch.tensor([0, 1]))


class TestStart:
    @pytest.fixture
    def autoencoder(self, tmp_path) -> str:
        path = tmp_path / "autoencoder.pt"
        torch.save(segmentation_model(seed=5).autoencoder.state_dict(), path)
        return str(path)

    def test_the_vision_encoder_is_the_autoencoders_encoder(self, autoencoder):
        model = segmentation_model(seed=1)
        head = {name: value.clone() for name, value in model.vision_encoder.head.state_dict().items()}
        assert start_from_pretrained(model, autoencoder) is model
        expected = torch.load(autoencoder, weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in model.autoencoder.state_dict().items())
        encoder = model.vision_encoder.encoder.state_dict()
        assert set(encoder) == {name.removeprefix("encoder.") for name in expected if name.startswith("encoder.")}
        assert all(torch.equal(value, expected[f"encoder.{name}"]) for name, value in encoder.items())
        assert all(torch.equal(value, head[name]) for name, value in model.vision_encoder.head.state_dict().items())
        image = pictures(2)
        torch.testing.assert_close(model.vision_encoder.encoder(image), model.autoencoder.encoder(image))
        # Copies: training the one must not train the other.
        shared = {p.data_ptr() for p in model.vision_encoder.parameters()}
        assert not shared & {p.data_ptr() for p in model.autoencoder.parameters()}

    @BOTH
    @pytest.mark.parametrize("num_classes", [1, 3])
    def test_an_unconditional_unet_is_what_it_was_whatever_the_condition(
        self, mode, num_classes, autoencoder, tmp_path
    ):
        """Spec sdseg 3.2: zeros for the channels of the condition; the class embedding, random, is switched off."""
        pretrained = film_unet(in_channels=3, seed=8).eval()
        torch.save(pretrained.state_dict(), tmp_path / "unet.pt")
        model = segmentation_model(num_classes, condition_mode=mode, silent=True)
        if num_classes > 1:
            own = model.unet.class_embedding.weight.clone()
        start_from_pretrained(model, autoencoder, unet=tmp_path / "unet.pt")
        labels = None
        if num_classes > 1:
            assert torch.equal(model.unet.class_embedding.weight, own)
            model.unet.class_embedding.weight.zero_()
            labels = torch.tensor([2, 0])
        noisy, timesteps = noisy_inputs()
        alone = pretrained(noisy, timesteps)
        assert alone.std() > 0.05, "the comparison would be blind"
        for image in (pictures(2), 1 - pictures(2, seed=4)):
            predicted = model(image, noisy, timesteps, labels)
            # The wider convolution sums in another order.
            torch.testing.assert_close(predicted, alone, atol=1e-5, rtol=1e-5)

    def test_a_binary_model_goes_on_with_several_classes(self, autoencoder, tmp_path):
        binary, model = segmentation_model(seed=6), segmentation_model(3, seed=1)
        binary.scale_factor.fill_(0.7)
        torch.save(binary.state_dict(), tmp_path / "model.pt")
        own = model.unet.class_embedding.weight.clone()
        start_from_pretrained(model, autoencoder, model=tmp_path / "model.pt")
        assert torch.equal(model.unet.class_embedding.weight, own)
        state = model.state_dict()
        assert set(state) - set(binary.state_dict()) == {"unet.class_embedding.weight"}
        assert all(torch.equal(state[name], value) for name, value in binary.state_dict().items())
        model.unet.class_embedding.weight.zero_()
        (noisy, timesteps), image = noisy_inputs(), pictures(2)
        assert torch.equal(model(image, noisy, timesteps, torch.tensor([1, 2])), binary(image, noisy, timesteps))

    @pytest.mark.parametrize(("classes", "kept"), [(3, False), (4, True)])
    def test_a_class_embedding_is_loaded_when_it_fits(self, classes, kept, autoencoder, tmp_path):
        other, model = segmentation_model(4, seed=6), segmentation_model(classes, seed=1)
        torch.save({"model": other.state_dict()}, tmp_path / "model.pt")
        own = model.unet.class_embedding.weight.clone()
        start_from_pretrained(model, autoencoder, model=str(tmp_path / "model.pt"))
        expected = other.unet.class_embedding.weight if kept else own
        assert torch.equal(model.unet.class_embedding.weight, expected)
        assert torch.equal(model.unet.conv_in.weight, other.unet.conv_in.weight)

    def test_several_classes_become_one(self, autoencoder, tmp_path):
        torch.save(segmentation_model(3, seed=6).state_dict(), tmp_path / "model.pt")
        model = start_from_pretrained(segmentation_model(), autoencoder, model=tmp_path / "model.pt")
        assert torch.equal(model.unet.conv_in.weight, segmentation_model(3, seed=6).unet.conv_in.weight)

    @pytest.mark.parametrize("nothing", [None, ""])
    def test_without_further_files_the_unet_keeps_its_weights(self, nothing, autoencoder):
        model = segmentation_model(seed=2)
        before = {name: value.clone() for name, value in model.unet.state_dict().items()}
        start_from_pretrained(model, autoencoder, unet=nothing, model=nothing)
        assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())

    def test_missing_files(self, autoencoder, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"^{tmp_path}/none.pt: expected .* found no file\. Train it first"
        ):
            start_from_pretrained(segmentation_model(), tmp_path / "none.pt", remedy="Train it first.")
        for option in ("unet", "model"):
            with pytest.raises(
                FileNotFoundError, match=rf"^{tmp_path}/none.pt: expected trained weights, found no file"
            ):
                start_from_pretrained(segmentation_model(), autoencoder, **{option: tmp_path / "none.pt"})

    @pytest.mark.parametrize(
        ("difference", "message"),
        [
            ({"channels": [8, 24]}, r"down\S+ has shape \(24, 8, 3, 3\) instead of \(16, 8, 3, 3\)"),
            ({"in_channels": 7}, r"conv_in.weight has shape \(8, 7, 3, 3\) instead of \(8, 6, 3, 3\)"),
            ({"attention_levels": [True, True]}, r"down.0.attention\S+ is not part of the network"),
            ({"num_classes": 3}, r"class_embedding.weight is not part of the network"),
        ],
        ids=str,
    )
    def test_unets_of_another_configuration(self, difference, message, autoencoder, tmp_path):
        torch.save(film_unet(**{"in_channels": 3, **difference}).state_dict(), tmp_path / "unet.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/unet.pt: expected the weights .* got others \({message}"):
            start_from_pretrained(segmentation_model(), autoencoder, unet=tmp_path / "unet.pt")

    @pytest.mark.parametrize("option", ["unet", "model"])
    @pytest.mark.parametrize("content", [[torch.zeros(1)], {0: torch.zeros(1)}, {"conv_in.weight": 3}, {}], ids=str)
    def test_files_that_hold_something_else(self, option, content, autoencoder, tmp_path):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/other.pt: expected the weights of this configuration"):
            start_from_pretrained(segmentation_model(), autoencoder, **{option: tmp_path / "other.pt"})

    def test_a_model_of_the_other_condition_mode(self, autoencoder, tmp_path):
        torch.save(segmentation_model(condition_mode="crossattn").state_dict(), tmp_path / "model.pt")
        with pytest.raises(
            ValueError,
            match=rf"^{tmp_path}/model.pt: expected the weights .* got others \(unet.conv_in.weight has shape",
        ):
            start_from_pretrained(segmentation_model(), autoencoder, model=tmp_path / "model.pt")

    def test_a_vision_encoder_unlike_the_autoencoder(self, autoencoder):
        model = segmentation_model()
        model.vision_encoder = VisionEncoder(**{**VISION_ENCODER, "channels": [4, 8, 8]})
        with pytest.raises(
            ValueError, match=r"^vision_encoder_def: expected the channels, blocks and attention of auto"
        ):
            start_from_pretrained(model, autoencoder)

    def test_an_autoencoder_of_another_configuration(self, tmp_path):
        other = type(segmentation_model().autoencoder)(**{**KL_AUTOENCODER, "latent_channels": 4})
        torch.save(other.state_dict(), tmp_path / "autoencoder.pt")
        with pytest.raises(
            ValueError, match=rf"^{tmp_path}/autoencoder.pt: expected the weights of this configuration"
        ):
            start_from_pretrained(segmentation_model(), tmp_path / "autoencoder.pt")


class TestRecomputedActivations:
    def gradients(self, enabled: bool | None, **options: Any) -> tuple[dict[str, torch.Tensor | None], list[int]]:
        """Gradients by name, and how often the parts ran: a stage of the U-Net, a block of the vision encoder."""
        model = segmentation_model(dropout=0.3, **options).train()
        if enabled is not None:
            assert recompute_activations(model, enabled) is model
        calls = [0, 0]
        for index, part in enumerate((model.unet.down[0].resblock, model.vision_encoder.encoder.blocks[1].norm1)):
            part.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        noisy, timesteps = noisy_inputs()
        torch.manual_seed(0)  # of the dropout
        with torch.enable_grad():
            model(pictures(2), noisy, timesteps).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, calls

    def test_gradients_are_equal(self):
        plain, once = self.gradients(None)
        twice_computed, twice = self.gradients(True)
        undone, again = self.gradients(False)
        assert (once, twice, again) == ([1, 1], [2, 2], [1, 1])
        for name, gradient in plain.items():
            for other in (twice_computed[name], undone[name]):
                if gradient is None:
                    assert other is None
                else:
                    torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)

    def test_a_frozen_encoder_keeps_nothing_anyway(self):
        _, calls = self.gradients(True, train_vision_encoder=False)
        assert calls == [2, 1]
