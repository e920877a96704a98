# SPDX-License-Identifier: Apache-2.0
"""``cxr_ldm`` as a whole, run small on phantoms."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bundle_runs import BundleRuns, curve
from tests.bundle_tools import STANDALONE, read
from tests.conftest import ROOT
from tools.phantoms.cxr_ldm import make_dataset

TINY = read(ROOT / "bundles/cxr_ldm/configs/tiny.json")
AUTOENCODER = {**TINY["autoencoder_def"], "channels": [4, 4, 8, 8], "norm_num_groups": 4}
UNET = {**TINY["unet_def"], "channels": [8, 16, 16], "num_head_channels": [0, 8, 8], "norm_num_groups": 8}
SMALL: dict[str, Any] = {
    "image_size": [64, 64],
    "latent_shape": [3, 8, 8],
    "autoencoder_def": AUTOENCODER,
    "device": "$torch.device('cpu')",
}
SMALL_TRAINING = {"max_epochs": 2, "batch_size": 4, "num_workers": 0, "tracking_uri": ""}
STAGES: dict[str, dict[str, Any]] = {
    "train_autoencoder": {**SMALL, **SMALL_TRAINING, "adversarial_start": 2, "ms_ssim_kernel_size": 3},
    "train": {**SMALL, **SMALL_TRAINING, "unet_def": UNET, "preview_prompts": ["Cardiomegaly."], "preview_interval": 9},
    "inference": {**SMALL, "unet_def": UNET, "num_inference_steps": 3},
}
CXR = BundleRuns("cxr_ldm", STAGES)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), n=28, size=128, split=(0.35, 0.2, 0.45))
    assert len(json.loads((folder / "datalist.json").read_text())["training"]) // 4 == 2
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantoms) -> Path:
    """A folder with both stages trained for two epochs."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("train_autoencoder", "train"):
        CXR.execute(stage, phantoms, **CXR.folders(root, stage))
    return root


def test_stage_1_trains_and_releases_its_best_weights(trained):
    run = trained / "runs/train_autoencoder"
    state = torch.load(trained / "models/stages/autoencoder.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    names = {row[3] for row in curve(run, "validation")}
    assert names == {"mean_absolute_error", "peak_signal_to_noise_ratio", "ms_ssim"}
    # Rows are (epoch, iteration, phase, name, value): the discriminator joins in epoch 2.
    assert {row[0] for row in curve(run, "train", "discriminator")} == {"2"}
    assert {row[0] for row in curve(run, "train", "reconstruction")} == {"1", "2"}
    assert (run / "previews/epoch_0002_reconstruction.png").exists()
    assert json.loads((run / "config.json").read_text())["adversarial_start"] == 2
    assert json.loads((run / "manifest.json").read_text())["settings"]["image_size"] == [64, 64]


def test_stage_2_trains_and_its_weights_carry_stage_1_and_the_scale_factor(trained):
    model = torch.load(trained / "models/model.pt", weights_only=True)
    stage_1 = torch.load(trained / "models/stages/autoencoder.pt", weights_only=True)
    for name, tensor in stage_1.items():
        assert torch.equal(model[f"autoencoder.{name}"], tensor)
    latents = [np.load(path) for path in (trained / "runs/latents").glob("*.npy")]
    means, log_variances = max(latents, key=len).astype(np.float64).swapaxes(0, 1)
    expected = (means.var() + np.exp(log_variances).mean()) ** -0.5
    assert model["scale_factor"].item() == pytest.approx(expected, rel=1e-5)
    assert {row[3] for row in curve(trained / "runs/train", "validation")} == {"velocity_mse"}
    assert (trained / "runs/train/previews/epoch_0002_samples.png").exists()


@pytest.mark.parametrize("stage", [path.stem for path in STANDALONE if path.parent.parent == CXR.folder])
def test_monai_finds_its_properties(stage, phantoms, trained, tmp_path):
    overrides = {**STAGES.get(stage, SMALL_TRAINING), "dataset_dir": str(phantoms)}
    overrides |= CXR.folders(trained, stage) | {"output_dir": str(tmp_path)}
    with CXR.loaded(stage, "tiny", **overrides) as workflow:
        assert workflow.check_properties() == []


def test_inference_writes_a_picture_for_each_prompt(trained, tmp_path):
    prompts = ["Cardiomegaly.", "Normal chest radiograph."]
    output_dir = str(tmp_path / "eval")
    with CXR.loaded("inference", "tiny", **STAGES["inference"], ckpt_dir=str(trained / "models"), prompt=prompts,
                output_dir=output_dir) as workflow:  # fmt: skip
        workflow.run()
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "eval").glob("*.png"))]
    assert [picture.shape for picture in pictures] == [(64, 64), (64, 64)]
    assert all(picture.dtype == np.uint8 and picture.std() > 0 for picture in pictures)
    assert not np.array_equal(*pictures)


def test_latents_can_be_encoded_in_every_step(phantoms, trained, tmp_path):
    options = CXR.folders(trained, "train") | {"output_dir": str(tmp_path), "max_epochs": 1}
    options |= {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path)), "latent_cache_dir": ""}
    CXR.execute("train", phantoms, **options)
    assert len(curve(tmp_path, "train", "loss")) == 1


def test_evaluation_writes_measures(phantoms, trained, tmp_path):
    execute_classifier(phantoms, tmp_path)
    overrides = {**STAGES["train"], **CXR.folders(trained, "train"), "dataset_dir": str(phantoms)}
    overrides |= {"output_dir": str(tmp_path), "num_inference_steps": 2, "ms_ssim_kernel_size": 3}
    overrides |= {"feature_extractor#weights_path": str(tmp_path / "models/stages/classifier.pt")}
    before = (trained / "models/model.pt").read_bytes()
    with CXR.loaded("train", "evaluate", "tiny", **overrides) as workflow:
        workflow.run()
    rows = json.loads((tmp_path / "evaluation/summary.json").read_text())
    names = " ".join(row["name"] for row in rows)
    for measure in ("MS-SSIM of reconstructions", "MS-SSIM between samples", "MS-SSIM between real images"):
        assert measure in names
    assert all(set(row) >= {"name", "value", "ci_low", "ci_high", "n", "note"} for row in rows)
    with (tmp_path / "evaluation/per_image.csv").open(newline="") as file:
        tests = json.loads((phantoms / "datalist.json").read_text())["test"]
        assert len(list(csv.DictReader(file))) == len(tests)
    assert (trained / "models/model.pt").read_bytes() == before


def execute_classifier(phantoms: Path, root: Path) -> None:
    overrides = {**SMALL_TRAINING, "max_epochs": 1, "dataset_dir": str(phantoms)}
    overrides |= {"ckpt_dir": str(root / "models"), "output_dir": str(root / "classifier"), "device": "cpu"}
    with CXR.loaded("train_classifier", **overrides) as workflow:
        workflow.run()
    assert len(curve(root / "classifier", "validation", "accuracy")) == 1


# Resuming


def copy_of_stage_1(trained: Path, root: Path) -> Path:
    folder = root / "models"
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    (folder / "stages/autoencoder.pt").write_bytes((trained / "models/stages/autoencoder.pt").read_bytes())
    return folder


@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_seed_decides_the_whole_run(stage, phantoms, trained, tmp_path):
    """First weights included, whatever was drawn before, and whether latents were cached or not."""
    options = CXR.folders(tmp_path, stage) | {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path)), "max_epochs": 1}
    if stage == "train":
        options["latent_cache_dir"] = str(tmp_path / "new")
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    CXR.execute(stage, phantoms, **options)
    expected = [row for row in curve(trained / "runs" / stage) if row[0] == "1"]
    assert curve(tmp_path / "runs" / stage) == expected
    other = options | {"output_dir": str(tmp_path / "other"), "seed": 43}
    CXR.execute(stage, phantoms, **other)
    assert curve(tmp_path / "other", "train", "loss") != curve(tmp_path / "runs" / stage, "train", "loss")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(stage, workers, phantoms, trained, tmp_path):
    curves = []
    # Two batches of 4 in an epoch: the crashes come in the middle of epochs 2 and 3.
    crashing = [3, None] if workers else [3, 5, None]
    for name, crashes in (("whole", [None]), ("broken", crashing)):
        options = CXR.folders(tmp_path / name, stage) | {"num_workers": workers, "max_epochs": 3}
        copy_of_stage_1(trained, tmp_path / name)
        runs = [CXR.train_and_crash(stage, phantoms, crash_at, **options) for crash_at in crashes]
        curves.append(curve(tmp_path / name / "runs" / stage))
    assert runs == ([[1, 2, 3], [3, 4, 5, 6]] if workers else [[1, 2, 3], [3, 4, 5], [5, 6]])
    assert len(curves[0]) > 10
    assert curves[0] == curves[1]


# Bad input


def spoiled(phantoms: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The phantoms with ``change`` made to every training item; pictures are links."""
    content = json.loads((phantoms / "datalist.json").read_text())
    for item in content["training"]:
        change(item)
    folder.mkdir()
    (folder / "images").symlink_to(phantoms / "images")
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_truncated_film_is_named(stage, workers, phantoms, trained, tmp_path, capsys):
    content = json.loads((phantoms / "datalist.json").read_text())
    name = Path(content["training"][0]["image"]).name
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (phantoms / "images").iterdir():
        written = path.read_bytes()
        (data / "images" / path.name).write_bytes(written[:300] if path.name == name else written)
    (data / "datalist.json").write_text(json.dumps(content))
    options = CXR.folders(tmp_path, stage) | {
        "num_workers": workers,
        "ckpt_dir": str(copy_of_stage_1(trained, tmp_path)),
    }
    assert CXR.last_line(stage, data, capsys, **options).startswith(f"{data}/images/{name}: expected a readable image")


def remove_text(item: dict[str, Any]) -> None:
    del item["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.update(text="  "), "the text under 'text' is empty"),
        (remove_text, "expected 'text' (the text) or 'report' (path of a text file)"),
    ],
    ids=["empty", "absent"],
)
def test_film_without_text_is_named(change, message, phantoms, trained, tmp_path, capsys):
    data = spoiled(phantoms, tmp_path / "data", change)
    options = CXR.folders(tmp_path, "train") | {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path))}
    line = CXR.last_line("train", data, capsys, **options)
    assert line.startswith(f"{data}/images/p")
    assert message in line


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("train_autoencoder", {"image_size": [60, 60]}, "image_size: expected multiples of 8, .* nearest is [64, 64]"),
        ("train_autoencoder", {"ms_ssim_kernel_size": 7}, "ms_ssim_kernel_size: expected at most 3 for image_size"),
        ("train", {"image_size": [72, 72], "latent_shape": [3, 9, 9]}, "image_size: expected multiples of 32"),
        ("train", {"latent_shape": [3, 16, 16]}, "latent_shape: expected [3, 8, 8] for image_size [64, 64]"),
        ("inference", {"latent_shape": [3, 9, 9]}, "latent_shape: expected [3, 8, 8] for image_size [64, 64]"),
    ],
)
@pytest.mark.reliability(6)
def test_size_that_networks_cannot_halve_is_named(stage, overrides, message, phantoms, trained, tmp_path, capsys):
    options = CXR.folders(trained, stage) | {"output_dir": str(tmp_path)} | overrides
    line = CXR.last_line(stage, phantoms, capsys, **options)
    for part in message.split(" .* "):
        assert part in line
    assert line.startswith(message[:10])


def test_weights_of_another_configuration_and_missing_weights_are_named(phantoms, trained, tmp_path, capsys):
    options: dict[str, Any] = CXR.folders(trained, "inference") | {"output_dir": str(tmp_path)}
    wide = {**AUTOENCODER, "channels": [8, 8, 8, 8]}
    line = CXR.last_line("inference", phantoms, capsys, **options, autoencoder_def=wide)
    assert line.startswith(f"{trained}/models/model.pt: expected the weights of this configuration")
    line = CXR.last_line("inference", phantoms, capsys, **options | {"ckpt_dir": str(tmp_path)})
    assert line.startswith(f"{tmp_path}/model.pt: expected trained weights, found no file. Train the model")
    line = CXR.last_line("train", phantoms, capsys, **CXR.folders(tmp_path, "train"))
    assert line.startswith(
        f"{tmp_path}/models/stages/autoencoder.pt: expected trained weights, found no file. Train it"
    )
    assert "configs/train_autoencoder.json" in line


def test_batch_larger_than_the_data_still_trains(phantoms, tmp_path):
    """With drop_last alone MONAI would skip the whole run and end without an error."""
    options = CXR.folders(tmp_path, "train_autoencoder") | {"batch_size": 64, "max_epochs": 1}
    CXR.execute("train_autoencoder", phantoms, **options)
    assert len(curve(tmp_path / "runs/train_autoencoder", "train", "loss")) == 1
