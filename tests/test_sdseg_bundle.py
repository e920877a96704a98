# SPDX-License-Identifier: Apache-2.0
"""``sdseg`` as a whole, run small on phantoms: its trainings and its evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch.nn.functional import interpolate

from shared.datalist import load_datalist
from shared.handlers.time_limit import TimeLimit
from tests.bundle_runs import curve
from tests.bundle_tools import STANDALONE
from tests.sdseg_runs import (
    BASELINE,
    CROSSATTN,
    LATENT_SHAPE,
    SDSEG,
    SIZE,
    changed,
    copy_stage,
    network,
    part,
    weights,
)
from tools.phantoms.sdseg import make_dataset

TRAININGS = ("train_autoencoder", "train", "train_baseline")
CHECKPOINTS = "runs/train/checkpoints/checkpoint_epoch={}.pt"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), num_images=24)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantoms) -> Path:
    """A folder with all stages and the baseline trained for two epochs of a few steps."""
    root = tmp_path_factory.mktemp("trained")
    for stage in TRAININGS:
        SDSEG.execute(stage, phantoms, **SDSEG.folders(root, stage))
    return root


def options_of(trained: Path, stage: str, tmp_path: Path) -> dict[str, Any]:
    """Options that read what was trained and write nothing into it."""
    return SDSEG.folders(trained, stage) | {"output_dir": str(tmp_path)}


# Training


def test_every_section_has_its_use(phantoms, trained, tmp_path):
    def pictures(dataset: Any) -> set[str]:
        return {item["image"] for item in dataset.data}

    def listed(section: str, key: str = "image") -> set[str]:
        return {item[key] for item in load_datalist(phantoms, section)}

    assert len(listed("training")) > len(listed("validation")) > 0
    for stage in ("train", "train_baseline", "train evaluate"):
        with SDSEG.small(stage, phantoms, options_of(trained, "train", tmp_path)) as workflow:
            content = workflow.parser.get_parsed_content
            if stage == "train evaluate":
                assert pictures(content("validate#dataset")) == listed("test")
                assert pictures(content("training_masks")) == listed("training")
                continue
            assert pictures(content("train#dataset")) == listed("training")
            assert pictures(content("validate#dataset")) == listed("validation")
            assert len(content("train#dataset")) == 2 * len(listed("training"))
            assert len(content("validate#dataset")) == len(listed("validation"))
            if stage == "train":
                assert pictures(content("preview_dataset")) == listed("validation")
    with SDSEG.small("train_autoencoder", phantoms, options_of(trained, "train_autoencoder", tmp_path)) as workflow:
        for name, section in (("train", "training"), ("validate", "validation")):
            found = pictures(workflow.parser.get_parsed_content(f"{name}#dataset"))
            assert found == listed(section) | listed(section, "label")


def test_stage_1_trains_and_releases_its_best_weights(trained):
    run = trained / "runs/train_autoencoder"
    assert all(torch.isfinite(tensor).all() for tensor in weights(trained, "stages/autoencoder").values())
    names = {row[3] for row in curve(run, "validation")}
    assert names == {"mean_absolute_error", "peak_signal_to_noise_ratio", "ms_ssim"}
    assert {row[0] for row in curve(run, "train", "discriminator")} == {"2"}
    losses = [float(row[4]) for row in curve(run, "train", "reconstruction")]
    assert losses[1] < losses[0]
    assert (run / "previews/epoch_0002_reconstruction.png").exists()
    lowest = min(float(row[4]) for row in curve(run, "validation", "mean_absolute_error"))
    said = json.loads((trained / "models/stages/autoencoder.json").read_text())
    assert said["metric"]["mean_absolute_error"] == pytest.approx(lowest, rel=1e-5)


def test_autoencoder_sees_pictures_and_black_and_white_masks(phantoms, trained, tmp_path):
    with SDSEG.small("train_autoencoder", phantoms, options_of(trained, "train_autoencoder", tmp_path)) as workflow:
        dataset = workflow.parser.get_parsed_content("train#dataset")
        kinds = [item["kind"] for item in dataset.data]
        assert kinds.count("mask") == kinds.count("image") == len(dataset) // 2
        for kind in ("image", "mask"):
            image = dataset[kinds.index(kind)]["image"]
            assert image.shape == (3, *SIZE)
            assert len(image.unique()) == 2 if kind == "mask" else len(image.unique()) > 100


@pytest.mark.reliability(8)
def test_main_stage_trains_unet_and_vision_encoder_alone(trained):
    model, stage_1 = weights(trained), weights(trained, "stages/autoencoder")
    assert {key.split(".")[0] for key in model} == {"autoencoder", "unet", "vision_encoder", "scale_factor"}
    assert changed(part(model, "autoencoder."), stage_1) == []
    # It was started from the autoencoder's encoder; without training the two would be equal.
    own, started = part(model, "vision_encoder.encoder."), part(stage_1, "encoder.")
    assert len(changed(own, started)) == len(own) > 10
    checkpoint = torch.load(trained / CHECKPOINTS.format(2), weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["network"]} == {"unet", "vision_encoder"}
    run = trained / "runs/train"
    losses = [float(row[4]) for row in curve(run, "train", "loss")]
    assert losses[1] < losses[0]
    highest = max(float(row[4]) for row in curve(run, "validation", "mean_dice"))
    assert checkpoint["best"]["best"] == pytest.approx(highest, rel=1e-5)
    assert {row[3] for row in curve(run, "validation")} == {"mean_dice", "mean_iou"}
    assert {row[3] for row in curve(run, "train")} == {"loss", "learning_rate", "gradient_norm"}
    rates = [float(row[4]) for row in curve(run, "train", "learning_rate")]
    # After 4 of the 6 steps of the warm-up, and after all of them.
    assert rates == pytest.approx([0.01 * 4 / 6, 0.01], rel=1e-3)
    assert (run / "previews/epoch_0002_segmentation.png").exists()


def test_released_are_the_averaged_weights_of_the_best_epoch(trained):
    said = json.loads((trained / "models/model.json").read_text())
    dice = {int(row[0]): float(row[4]) for row in curve(trained / "runs/train", "validation", "mean_dice")}
    assert said["metric"]["mean_dice"] == pytest.approx(dice[said["epoch"]], rel=1e-5) == max(dice.values())
    checkpoint = torch.load(trained / CHECKPOINTS.format(said["epoch"]), weights_only=True)
    model = {key: tensor for key, tensor in weights(trained).items() if key in checkpoint["ema"]}
    assert changed(model, checkpoint["ema"]) == []
    assert len(changed(checkpoint["ema"], checkpoint["network"])) > 20
    # The average moves towards the weights, after n steps by 9 / (10 + n) of the way at first.
    first, second = (torch.load(trained / CHECKPOINTS.format(epoch), weights_only=True)["ema"] for epoch in (1, 2))
    assert len(changed(first, second)) > 20


@pytest.mark.parametrize(("stage", "path"), [("train", "model.pt"), ("train_baseline", "stages/baseline.pt")])
def test_higher_dice_is_better(stage, path, phantoms, trained, tmp_path):
    options = options_of(trained, stage, tmp_path) | {"ckpt_dir": str(copy_stage(trained, tmp_path) / "models")}
    with SDSEG.small(stage, phantoms, options) as workflow:
        best = workflow.parser.get_parsed_content("validate#best")
        engine = Engine(lambda engine, batch: None)
        engine.state.rank = 0
        best.attach(engine)
        for epoch, dice in enumerate((0.4, 0.6, 0.5), start=1):
            engine.state.epoch, engine.state.metrics = epoch, {"mean_dice": dice, "mean_iou": -dice}
            engine.fire_event(Events.EPOCH_COMPLETED)
    assert json.loads((tmp_path / "models" / path).with_suffix(".json").read_text())["epoch"] == 2


def test_scale_factor_is_measured_on_the_masks(trained):
    cached = np.load(next((trained / "runs/latents").glob("*.npy")))
    means, log_variances = cached.astype(np.float64).swapaxes(0, 1)
    assert means.shape[1:] == LATENT_SHAPE
    expected = (means.var() + np.exp(log_variances).mean()) ** -0.5
    assert weights(trained)["scale_factor"].item() == pytest.approx(expected, rel=1e-5)


def read_pair(item: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and mask of an item at working size, by Pillow and PyTorch alone."""
    image, mask = (torch.from_numpy(np.array(Image.open(item[key]))).float() / 255 for key in ("image", "label"))
    flipped = [axis for bit, axis in ((1, 2), (2, 1)) if item["flip"] & bit]
    image = interpolate(image.movedim(-1, 0)[None], SIZE, mode="bilinear", antialias=True)[0].flip(flipped)
    return image, interpolate(mask[None, None], SIZE, mode="nearest-exact")[0].flip(flipped)


@pytest.mark.parametrize("stage", ["train", "train_baseline"])
def test_pair_is_resized_and_flipped_together(stage, phantoms, trained, tmp_path):
    options = options_of(trained, "train", tmp_path) | {"flips": "both"}
    with SDSEG.small(stage, phantoms, options | {"latent_cache_dir": ""}) as workflow:
        dataset = workflow.parser.get_parsed_content("train#dataset")
        assert [item["flip"] for item in dataset.data[:8]] == [0, 1, 2, 3] * 2
        seen = []
        for index in range(4):
            item, (image, mask) = dataset[index], read_pair(dataset.data[index])
            torch.testing.assert_close(
                torch.as_tensor(item["image"]).as_subclass(torch.Tensor), image, rtol=0, atol=1e-6
            )
            found = item["target"] if stage == "train" else item["label"].expand(3, -1, -1)
            assert torch.equal(found.as_subclass(torch.Tensor), mask.expand(3, -1, -1))
            seen.append(mask)
        assert 0.01 < seen[0].mean() < 0.99
        assert not any(torch.equal(seen[0], other) for other in seen[1:])
    with SDSEG.small(stage, phantoms, options_of(trained, "train", tmp_path)) as workflow:
        item = workflow.parser.get_parsed_content("validate#dataset")[0]
        source = {**load_datalist(phantoms, "validation")[0], "flip": 0}
        for found, expected in zip((item["image"], item["label"]), read_pair(source), strict=True):
            torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["train", "train_baseline"])
def test_intensities_change_as_asked(stage, phantoms, trained, tmp_path):
    options = options_of(trained, "train", tmp_path)
    items = []
    for probability in (0.0, 1.0):
        with SDSEG.small(stage, phantoms, options | {"intensity_probability": probability}) as workflow:
            items.append(workflow.parser.get_parsed_content("train#dataset")[0])
    different = [key for key in items[0] if key != "item_id" and not torch.equal(items[0][key], items[1][key])]
    assert different == ["image"]
    assert 0 <= items[1]["image"].min() <= items[1]["image"].max() <= 1


def test_training_sees_latents_of_the_trained_encoder(phantoms, trained, tmp_path):
    """A data set that is built before the weights are loaded would hold random ones."""
    with SDSEG.small("train", phantoms, options_of(trained, "train", tmp_path)) as workflow:
        dataset = workflow.parser.get_parsed_content("train#dataset")
        autoencoder = workflow.parser.get_parsed_content("autoencoder_def").eval()
        autoencoder.load_state_dict(weights(trained, "stages/autoencoder"))
        for index in (0, 1):
            item = dataset[index]
            assert sorted(item) == ["image", "item_id", "latent_log_variance", "latent_mean"]
            image, mask = read_pair(dataset.data[index])
            torch.testing.assert_close(item["image"].as_subclass(torch.Tensor), image, rtol=0, atol=1e-6)
            with torch.no_grad():
                mean, sigma = autoencoder.encode(mask.expand(1, 3, -1, -1))
            torch.testing.assert_close(item["latent_mean"], mean[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(item["latent_log_variance"], 2 * sigma[0].log(), rtol=0, atol=1e-4)


def dice_of(one: torch.Tensor, two: torch.Tensor) -> float:
    total = (one.sum() + two.sum()).item()
    return 2 * (one * two).sum().item() / total if total else 1.0


def test_validation_measures_the_averaged_model_with_a_seed_for_each_image(phantoms, trained, tmp_path):
    """Dice of the released weights, anew: one step, threshold at one half."""
    with SDSEG.small("train", phantoms, options_of(trained, "train", tmp_path)) as workflow:
        content = workflow.parser.get_parsed_content
        model = content("network_def").eval()
        model.load_state_dict(weights(trained))
        assert content("validate#inferer").num_inference_steps == 1
        dice, seeds = [], []
        for batch in content("validate#dataloader"):
            image, label, _, named = content("validate#prepare_batch")(batch, torch.device("cpu"))
            seeds += named["seeds"]
            mask = content("validate#inferer")(image, model, **named)[0, 0] > 0.5
            dice.append(dice_of(mask, label[0, 0]))
    assert len(set(seeds)) == len(seeds) == len(load_datalist(phantoms, "validation"))
    said = json.loads((trained / "models/model.json").read_text())["metric"]["mean_dice"]
    assert np.mean(dice) == pytest.approx(said, abs=1e-3)


def trained_baseline(phantoms: Path, trained: Path) -> torch.nn.Module:
    with SDSEG.small("train_baseline", phantoms, {}) as workflow:
        baseline = workflow.parser.get_parsed_content("network_def").eval()
    baseline.load_state_dict(weights(trained, "stages/baseline"))
    return baseline


def test_baseline_trains(phantoms, trained):
    run = trained / "runs/train_baseline"
    assert {row[3] for row in curve(run, "validation")} == {"mean_dice", "mean_iou"}
    losses = [float(row[4]) for row in curve(run, "train", "loss")]
    assert losses[1] < losses[0]
    said = json.loads((trained / "models/stages/baseline.json").read_text())
    checkpoint = torch.load(run / f"checkpoints/checkpoint_epoch={said['epoch']}.pt", weights_only=True)
    assert changed(weights(trained, "stages/baseline"), checkpoint["ema"]) == []
    assert changed(checkpoint["ema"], checkpoint["network"])
    averages = [torch.load(path, weights_only=True)["ema"] for path in sorted((run / "checkpoints").glob("*.pt"))]
    assert changed(*averages)
    baseline, dice = trained_baseline(phantoms, trained), []
    for item in load_datalist(phantoms, "validation"):
        image, mask = read_pair({**item, "flip": 0})
        with torch.no_grad():
            dice.append(dice_of(baseline(image[None])[0] > 0, mask))
    assert said["metric"]["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-3)


STAND_ALONE = [path.stem for path in STANDALONE if path.parents[1] == SDSEG.folder]


@pytest.mark.parametrize("stage", [*STAND_ALONE, "train evaluate"])
def test_monai_finds_its_properties(stage, phantoms, trained, tmp_path):
    with SDSEG.small(stage, phantoms, options_of(trained, stage.split()[0], tmp_path)) as workflow:
        assert workflow.check_properties() == []


# Options of the main stage


def train(phantoms: Path, trained: Path, root: Path, /, **overrides: Any) -> Path:
    """One epoch of the main stage; the latents of the masks are at hand already."""
    latents = {"latent_cache_dir": str(trained / "runs/latents"), "max_epochs": 1}
    SDSEG.execute("train", phantoms, **SDSEG.folders(copy_stage(trained, root), "train") | latents | overrides)
    return root / "runs/train"


def first_loss(run: Path) -> float:
    return float(curve(run, "train", "loss")[0][4])


def test_condition_can_come_by_cross_attention(phantoms, trained, tmp_path):
    run = train(phantoms, trained, tmp_path, **CROSSATTN)
    assert np.isfinite(first_loss(run))
    model = weights(tmp_path)
    assert model["unet.conv_in.weight"].shape[1] == LATENT_SHAPE[0]
    options = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out"), **CROSSATTN}
    SDSEG.execute("inference", phantoms, **options)
    assert len(list((tmp_path / "out").rglob("*_mask.png"))) == len(load_datalist(phantoms, "test"))


@pytest.mark.reliability(8)
def test_vision_encoder_can_be_frozen(phantoms, trained, tmp_path):
    run = train(phantoms, trained, tmp_path, train_vision_encoder=False)
    own, started = part(weights(tmp_path), "vision_encoder.encoder."), part(weights(trained), "autoencoder.encoder.")
    assert changed(own, started) == []
    checkpoint = torch.load(run / "checkpoints/checkpoint_epoch=1.pt", weights_only=True)
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert len(group["params"]) == len([key for key in checkpoint["network"] if key.startswith("unet.")])


def test_latent_loss_can_be_left_out(phantoms, trained, tmp_path):
    """The same noise and weights: what is missing is the latent's part alone."""
    loss = first_loss(train(phantoms, trained, tmp_path, latent_weight=0.0, learning_rate=1e-9))
    whole = first_loss(train(phantoms, trained, tmp_path / "whole", learning_rate=1e-9))
    # A U-Net that has not learnt predicts next to nothing: |n| is 0.8 on average, the factor 1 + 6.1.
    assert loss == pytest.approx(0.8, abs=0.2)
    assert whole / loss == pytest.approx(7.1, abs=3)


def test_training_goes_on_from_a_unet_and_from_a_model(phantoms, trained, tmp_path):
    """The pretrained channels of the first convolution stay, those of the condition start at zero."""
    quiet = {"learning_rate": 1e-12}
    small = network(**{"unet_def#in_channels": LATENT_SHAPE[0]})
    torch.save(small.unet.state_dict(), tmp_path / "unet.pt")
    train(phantoms, trained, tmp_path, unet_weights=str(tmp_path / "unet.pt"), **quiet)
    first = weights(tmp_path)["unet.conv_in.weight"]
    torch.testing.assert_close(first[:, :4], small.unet.conv_in.weight.detach(), rtol=0, atol=1e-6)
    assert first[:, 4:].abs().max() < 1e-6

    model = {"model_weights": str(trained / "models/model.pt")}
    train(phantoms, trained, tmp_path / "model", **model, **quiet)
    found, given = weights(tmp_path / "model"), weights(trained)
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)


def test_gradients_of_several_batches_are_summed_up_as_asked(phantoms, trained, tmp_path):
    for stage, expected in (("train", 3), ("train_baseline", 1)):
        options = options_of(trained, stage, tmp_path) | ({"accumulation_steps": 3} if stage == "train" else {})
        with SDSEG.small(stage, phantoms, options) as workflow:
            assert workflow.parser.get_parsed_content("train#trainer").accumulation_steps == expected


def test_time_limit_ends_the_training_after_an_epoch(phantoms, trained, tmp_path):
    run = train(phantoms, trained, tmp_path, max_epochs=5, max_minutes=0.0001)
    assert {row[0] for row in curve(run)} == {"1"}
    assert (run / "checkpoints/checkpoint_epoch=1.pt").exists()
    assert (tmp_path / "models/model.pt").exists()
    for stage in TRAININGS:
        for minutes, expected in (("", []), (3.5, [3.5])):
            options = options_of(trained, stage, tmp_path / "unused") | {"max_minutes": minutes}
            with SDSEG.small(stage, phantoms, options) as workflow:
                handlers = workflow.parser.get_parsed_content("train#handlers")
            assert [one.minutes for one in handlers if isinstance(one, TimeLimit)] == expected


# Resuming


def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(phantoms, trained, tmp_path):
    """The seed decides the first weights, and the latents need not be at hand."""
    options = SDSEG.folders(copy_stage(trained, tmp_path), "train")
    steps = int(curve(trained / "runs/train", "train", "loss")[0][1])
    assert steps > 2
    # The crash comes in the middle of epoch 2.
    runs = [SDSEG.train_and_crash("train", phantoms, crash_at, **options) for crash_at in (steps + 2, None)]
    assert runs == [list(range(1, steps + 3)), list(range(steps + 1, 2 * steps + 1))]
    assert curve(tmp_path / "runs/train") == curve(trained / "runs/train")
    assert changed(weights(tmp_path), weights(trained)) == []


def test_other_autoencoder_is_not_resumed_with(phantoms, trained, tmp_path, capsys):
    run = train(phantoms, trained, tmp_path)
    state = weights(trained, "stages/autoencoder")
    torch.save({name: tensor * 1.01 for name, tensor in state.items()}, tmp_path / "models/stages/autoencoder.pt")
    line = SDSEG.last_line("train", phantoms, capsys, **SDSEG.folders(tmp_path, "train"))
    path = run / "checkpoints/checkpoint_epoch=1.pt"
    assert line.startswith(f"{path}: made with other settings (autoencoder_weights: ")
    assert line.count("there,") == 1


# Evaluation


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_compares_with_the_baseline_and_repeats_itself(phantoms, trained, tmp_path):
    before = {path: path.read_bytes() for path in (trained / "models").rglob("*") if path.is_file()}
    options = {"ckpt_dir": str(trained / "models"), "baseline_def": BASELINE, "num_samples": 3}
    SDSEG.execute("train evaluate", phantoms, output_dir=str(tmp_path), **options)
    folder = tmp_path / "evaluation"
    methods = ["one sample", "mean of 3 samples", "mean training mask", "U-Net", "autoencoder's ceiling"]
    rows = json.loads((folder / "summary.json").read_text())
    sizes = ("native", f"{SIZE[0]} x {SIZE[1]}")
    dice = {
        (row["method"], row["resolution"]): row["value"]
        for row in rows
        if row.get("measure") == "dice" and row["method"] in methods
    }
    assert dice.keys() == {(method, size) for method in methods for size in sizes}
    assert all(0 <= value <= 1 for value in dice.values())
    images = load_datalist(phantoms, "test")
    lines = table(folder / "per_image.csv")
    assert {line["name"] for line in lines} == {Path(item["image"]).stem for item in images}
    assert {line["group"] for line in lines} == {item["group"] for item in images}
    assert len(lines) == len(images) * len(methods) * len(sizes)
    assert len(table(folder / "stability.csv")) == len(images)
    assert all((folder / f"{name}.png").exists() for name in ("worst", "median", "best"))
    assert {path: path.read_bytes() for path in before} == before

    again = [
        SDSEG.execute("train evaluate", phantoms, output_dir=str(tmp_path / str(seed)), seed=seed, **options)
        and table(tmp_path / f"{seed}/evaluation/per_image.csv")
        for seed in (42, 7)
    ]
    scores = [[line["dice"] for line in one] for one in (lines, *again)]
    assert scores[0] == scores[1] != scores[2]


def test_baseline_of_the_evaluation_is_the_trained_one(phantoms, trained, tmp_path):
    """Its Dice at the working size, by hand."""
    options = {"ckpt_dir": str(trained / "models"), "baseline_def": BASELINE, "num_samples": 1}
    SDSEG.execute("train evaluate", phantoms, output_dir=str(tmp_path), **options)
    baseline = trained_baseline(phantoms, trained)
    found = {
        line["name"]: float(line["dice"])
        for line in table(tmp_path / "evaluation/per_image.csv")
        if (line["method"], line["resolution"]) == ("U-Net", f"{SIZE[0]} x {SIZE[1]}")
    }
    for item in load_datalist(phantoms, "test"):
        image, mask = read_pair({**item, "flip": 0})
        with torch.no_grad():
            expected = dice_of(baseline(image[None])[0] > 0, mask)
        assert found[Path(item["image"]).stem] == pytest.approx(expected, abs=1e-3)
