# SPDX-License-Identifier: Apache-2.0
"""``sdseg`` with several classes: volumes in the layout of BTCV from the download to the table of the evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from shared.datalist import load_datalist
from tests.bundle_runs import curve
from tests.sdseg_runs import BASELINE, LATENT_SHAPE, SDSEG, SIZE, changed, part, rewritten, save_network, weights
from tools.phantoms.sdseg_abdomen import make_dataset
from tools.prepare.btcv import btcv

VOLUME = (40, 36, 9)
ORGANS = ["spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"]
CLASSES: dict[str, Any] = {"num_classes": 9, "flips": "none", "batch_size": 16, "max_epochs": 1, "preview_interval": 1}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Four volumes as downloaded: two for training, one each for validation and test."""
    folder = tmp_path_factory.mktemp("raw")
    make_dataset(str(folder), num_volumes=4, size=VOLUME)
    return folder


@pytest.fixture(scope="module")
def abdomen(tmp_path_factory, raw) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    btcv(str(raw), str(folder), classes="8")
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    """A binary model and its autoencoder, with random weights."""
    root = tmp_path_factory.mktemp("binary")
    save_network(root / "models")
    return root


@pytest.fixture(scope="module")
def trained(binary, abdomen, tmp_path_factory) -> Path:
    """An epoch of several classes, gone on from the binary model, and of the baseline."""
    root = tmp_path_factory.mktemp("trained")
    start = {"autoencoder_weights": str(binary / "models/stages/autoencoder.pt")}
    start["model_weights"] = str(binary / "models/model.pt")
    SDSEG.execute("train", abdomen, **SDSEG.folders(root, "train"), **CLASSES, **start)
    baseline = {**CLASSES, **SDSEG.folders(root, "train_baseline")}
    del baseline["preview_interval"]
    SDSEG.execute("train_baseline", abdomen, **baseline)
    return root


def test_one_class_of_a_slice_is_an_item(abdomen, trained, tmp_path):
    """Spec sdseg 3.1: the mask of one class; class 0 is any of them."""
    options = SDSEG.folders(trained, "train") | CLASSES | {"latent_cache_dir": "", "output_dir": str(tmp_path)}
    with SDSEG.small("train", abdomen, options | {"ckpt_dir": str(tmp_path)}) as workflow:
        # The data set waits for an autoencoder that is not needed here.
        workflow.parser.set(None, "train#dataset#autoencoder")
        workflow.parser.parse(True)
        dataset = workflow.parser.get_parsed_content("train#dataset")
        shown = {(item["slice"], item["class_id"]) for item in dataset.data if "0005" in item["image"]}
        source = dataset.data[0]
        label = nibabel.as_closest_canonical(nibabel.load(source["label"])).get_fdata()
        present = {(k, int(c)) for k in range(VOLUME[2]) for c in np.unique(label[..., k])}
        assert shown == present | {(k, 0) for k in range(VOLUME[2])}
        assert {int(c) for _, c in present} == set(range(9))
        for index in (0, len(dataset) // 2):
            item, wanted = dataset[index], dataset.data[index]
            volume = nibabel.as_closest_canonical(nibabel.load(wanted["label"])).get_fdata()
            upright = volume[::-1, ::-1, wanted["slice"]].T
            mask = upright == wanted["class_id"] if wanted["class_id"] else upright > 0
            resized = torch.nn.functional.interpolate(
                torch.tensor(mask.copy()).float()[None, None], SIZE, mode="nearest-exact"
            )
            assert torch.equal(item["target"].as_subclass(torch.Tensor), resized[0].expand(3, -1, -1))
            assert item["image"].shape == (1, *SIZE)
            assert item["class_id"] == wanted["class_id"]


def test_autoencoder_sees_single_classes(abdomen, tmp_path):
    options = SDSEG.folders(tmp_path, "train_autoencoder") | {"num_classes": 9, "flips": "none"}
    with SDSEG.small("train_autoencoder", abdomen, options) as workflow:
        for name in ("train", "validate"):
            dataset = workflow.parser.get_parsed_content(f"{name}#dataset")
            classes = [item.get("class_id") for item in dataset.data]
            assert set(classes) == {None, *range(9)}
            liver = dataset[classes.index(5)]["image"]
            place = dataset.data[classes.index(5)]
            every = next(
                dataset[row]["image"]
                for row, item in enumerate(dataset.data)
                if (item["image"], item["slice"], item.get("class_id")) == (place["image"], place["slice"], 0)
            )
            assert liver.unique().tolist() == every.unique().tolist() == [0, 1]
            assert (liver <= every).all()
            assert liver.sum() < every.sum()


def test_training_goes_on_from_a_binary_model(binary, trained):
    """All but the class embedding, which is new, was there."""
    model, start = weights(trained), weights(binary)
    added = {key for key in model if key not in start}
    assert added == {"unet.class_embedding.weight"}
    assert model["unet.class_embedding.weight"].shape[0] == 9
    assert changed(part(model, "autoencoder."), part(start, "autoencoder.")) == []
    unet = part(model, "unet.")
    del unet["class_embedding.weight"]
    moved = [(unet[key] - tensor).abs().max().item() for key, tensor in part(start, "unet.").items()]
    # One epoch of the average at a learning rate of 0.01: not where it was, and not far.
    assert 0 < max(moved) < 1
    cached = np.load(next((trained / "runs/latents").glob("*.npy"))).astype(np.float64)
    assert cached.shape[2:] == LATENT_SHAPE
    expected = (cached[:, 0].var() + np.exp(cached[:, 1]).mean()) ** -0.5
    assert model["scale_factor"].item() == pytest.approx(expected, rel=1e-5)


def test_class_embedding_learns_faster(abdomen, binary, tmp_path):
    options = SDSEG.folders(tmp_path, "train") | CLASSES | {"ckpt_dir": str(binary / "models"), "warmup_steps": 4}
    with SDSEG.small("train", abdomen, options) as workflow:
        optimizer = workflow.parser.get_parsed_content("optimizer")
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 1.0])
        assert [tuple(weight.shape) for weight in optimizer.param_groups[1]["params"]] == [(9, 32)]


def test_training_and_baseline_are_validated_over_the_organs(abdomen, trained):
    for stage in ("train", "train_baseline"):
        rows = {row[3]: float(row[4]) for row in curve(trained / "runs" / stage, "validation")}
        assert rows.keys() == {"mean_dice", "mean_iou"}
        assert all(0 <= value < 1 for value in rows.values())
    assert (trained / "runs/train/previews/epoch_0001_segmentation.png").exists()
    assert weights(trained, "stages/baseline")


def test_validation_scores_each_organ_that_is_there(abdomen, binary, tmp_path):
    """The background does not count, nor does an organ that neither has."""
    options = {**CLASSES, "ckpt_dir": str(tmp_path)}
    for stage in ("train", "train_baseline"):
        with SDSEG.small(stage, abdomen, options) as workflow:
            content = workflow.parser.get_parsed_content
            label = torch.zeros(1, 4, 6)
            label[0, :2], label[0, 2, :3] = 3, 5
            scores = torch.nn.functional.one_hot(label[0].long(), 9).movedim(-1, 0).float()
            scores[:, 0, :3] = torch.eye(9)[8][:, None]
            item = content("validate#postprocessing")({"pred": scores, "label": label})
            assert item["pred"].shape == item["label"].shape == (9, 4, 6)
            (dice,) = content("validate#key_metric").values()
            metric = dice.metric_fn
            metric(item["pred"][None], item["label"][None])
            # Organ 3: 9 of 12 pixels found, 2 * 9 / (9 + 12); organ 5: all; organ 8: none of those found is there.
            values = metric.aggregate("none").squeeze()
            assert metric.aggregate().item() == pytest.approx(torch.nanmean(values).item())
            assert values[2].item() == pytest.approx(18 / 21)
            assert values[4].item() == 1
            assert values[0].isnan()


def test_evaluation_has_a_line_for_each_organ(abdomen, trained, tmp_path):
    options = {"ckpt_dir": str(trained / "models"), "baseline_def": BASELINE, "num_samples": 2, "num_classes": 9}
    names = {str(index): name for index, name in enumerate(["background", *ORGANS])}
    assert json.loads((abdomen / "datalist.json").read_text())["labels"] == names
    # The names are those of the data list.
    SDSEG.execute("train evaluate", abdomen, output_dir=str(tmp_path), **options)
    rows = json.loads((tmp_path / "evaluation/summary.json").read_text())
    dice = [row for row in rows if row.get("measure") == "dice" and row.get("resolution") == "native"]
    for method in ("one sample", "mean of 2 samples", "mean training mask", "U-Net", "autoencoder's ceiling"):
        assert {row["class"] for row in dice if row["method"] == method} >= set(ORGANS)
    (item,) = load_datalist(abdomen, "test")
    with (tmp_path / "evaluation/per_image.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["resolution"] == "native"]
    assert {line["name"] for line in lines} == {Path(item["image"]).name.split(".")[0]}
    assert {line["distance_unit"] for line in lines} == {"mm"}
    voxels = nibabel.load(item["label"])
    size = np.prod(voxels.header.get_zooms()) / 1000
    liver = next(line for line in lines if line["class"] == "liver")
    assert float(liver["true_size"]) == pytest.approx(size * (voxels.get_fdata() == 5).sum(), rel=1e-4)


@pytest.mark.reliability(6)
def test_raw_volume_becomes_a_label_map_on_its_grid(raw, trained, tmp_path):
    path = raw / "RawData/Training/img/img0001.nii.gz"
    options = {"ckpt_dir": str(trained / "models"), "output_dir": str(tmp_path), "num_classes": 9}
    SDSEG.execute("inference", path, window=[-175, 250], class_names=["background", *ORGANS], **options)
    result, source = nibabel.load(tmp_path / "img0001_mask.nii.gz"), nibabel.load(path)
    assert result.shape == source.shape == VOLUME
    assert np.array_equal(result.affine, source.affine)
    assert result.get_data_dtype() == np.uint8
    assert set(np.unique(result.dataobj)) <= set(range(9))
    said = json.loads((tmp_path / "img0001_mask.json").read_text())
    assert [entry["name"] for entry in said["classes"]] == ORGANS


def test_prepared_volume_is_seen_as_in_training(abdomen, trained, tmp_path):
    """The same slice through the three loaders: of the training, the validation and the inference."""
    images = []
    options = SDSEG.folders(trained, "train") | CLASSES | {"output_dir": str(tmp_path), "section": "training"}
    with SDSEG.small("inference", abdomen, {key: options[key] for key in ("num_classes", "section")}) as workflow:
        images.append(workflow.parser.get_parsed_content("dataset")[0]["image"][..., 4])
    with SDSEG.small("train evaluate", abdomen, options) as workflow:
        images.append(workflow.parser.get_parsed_content("validate#dataset")[0]["image"][..., 4])
    with SDSEG.small("train_baseline", abdomen, {**CLASSES, "output_dir": str(tmp_path)}) as workflow:
        dataset = workflow.parser.get_parsed_content("train#dataset")
        index = next(index for index, item in enumerate(dataset.data) if item["slice"] == 4)
        images.append(dataset[index]["image"][:1])
    plain = [torch.as_tensor(image).as_subclass(torch.Tensor) for image in images]
    assert plain[0].shape == (1, *SIZE)
    assert plain[0].std() > 0.01
    assert all(torch.equal(plain[0], other) for other in plain[1:])


# Bad input


def test_classes_that_do_not_fit_the_labels_are_named(abdomen, binary, tmp_path, capsys):
    options = SDSEG.folders(tmp_path, "train") | {**CLASSES, "ckpt_dir": str(binary / "models"), "num_classes": 3}
    line = SDSEG.last_line("train", abdomen, capsys, **options)
    assert line.startswith(f"{abdomen}/labels/")
    assert "expected class ids 1..2 (num_classes 3)" in line


def test_two_windows_are_named(abdomen, binary, tmp_path, capsys):
    options = SDSEG.folders(tmp_path, "train") | CLASSES | {"ckpt_dir": str(binary / "models")}
    line = SDSEG.last_line("train", abdomen, capsys, **options, window=[-100, 100])
    assert line.startswith(f"{abdomen}/images/")
    assert "expected one window, but the item (its data list) has [-175.0, 250.0]" in line


def test_label_of_another_grid_is_named(abdomen, binary, tmp_path, capsys):
    data = rewritten(abdomen, tmp_path / "data", lambda content: None)
    path = data / json.loads((data / "datalist.json").read_text())["training"][0]["label"]
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj).copy(), image.affine @ np.diag([1.0, 1, 1.5, 1])), path)
    options = SDSEG.folders(tmp_path, "train") | CLASSES | {"ckpt_dir": str(binary / "models")}
    line = SDSEG.last_line("train", data, capsys, **options)
    assert line.startswith(f"{path}: expected ")
    assert f"{data}/images/" in line
