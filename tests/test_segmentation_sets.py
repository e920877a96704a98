# SPDX-License-Identifier: Apache-2.0
"""`shared.segmentation_sets`: lists of a data set, and the plain pairs that MONAI Label trains on in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset
from PIL import Image

from shared.datalist import load_datalist
from shared.segmentation_items import training_items
from shared.segmentation_sets import SegmentationTrainingSet, SegmentationValidationSet
from tests.sdseg_runs import SDSEG, network
from tools.phantoms.sdseg import make_dataset


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_dataset(str(folder), num_images=18, size=(40, 56))
    return folder


def pairs(folder: Path, section: str) -> list[dict[str, str]]:
    """What MONAI Label makes of its studies."""
    return [{"image": item["image"], "label": item["label"]} for item in load_datalist(folder, section)]


@pytest.mark.parametrize("flips", ["none", "horizontal", "both"])
def test_plain_pairs_are_flipped_as_those_of_a_data_set(pictures, flips):
    options: dict[str, Any] = {"image_transform": dict, "autoencoder": torch.nn.Identity(), "cache_dir": None}
    plain = SegmentationTrainingSet(pairs(pictures, "training"), flips=flips, **options)
    assert plain.data == training_items(pairs(pictures, "training"), flips=flips)
    listed = SegmentationTrainingSet(load_datalist(pictures, "training"), flips=flips, **options)
    wanted = [(item["image"], item["flip"]) for item in listed.data]
    assert [(item["image"], item["flip"]) for item in plain.data] == wanted


def test_several_classes_are_told_apart(tmp_path):
    for name, values in (("image", [[0, 9, 30]]), ("label", [[0, 1, 2]])):
        Image.fromarray(np.array(values, np.uint8)).save(tmp_path / f"{name}.png")
    pair = {name: str(tmp_path / f"{name}.png") for name in ("image", "label")}
    options: dict[str, Any] = {"image_transform": dict, "autoencoder": torch.nn.Identity(), "cache_dir": None}
    dataset = SegmentationTrainingSet([pair], num_classes=3, flips="none", **options)
    assert [item["class_id"] for item in dataset.data] == [0, 1, 2]


def test_names_are_given_where_they_are_missing(tmp_path):
    images = [tmp_path / name for name in ("a/1.png", "b/1.png", "b/two.png")]
    dataset = SegmentationValidationSet([{"image": str(image), "label": "m.png"} for image in images])
    assert isinstance(dataset, Dataset)
    assert [item["name"] for item in dataset.data] == ["a_1", "b_1", "two"]
    named = [{"image": "x.png", "label": "m.png", "name": "own"}]
    assert SegmentationValidationSet(named).data == named
    with pytest.raises(ValueError, match="validate#dataset#data: expected at least one image with its mask"):
        SegmentationValidationSet([])


def test_training_goes_on_from_given_weights_with_pairs_instead_of_a_data_set(pictures, tmp_path):
    """As `monailabel.tasks.train.bundle.BundleTrainTask` overrides the configuration."""
    given, stage_1 = network().state_dict(), network("inference")
    (tmp_path / "models/stages").mkdir(parents=True)
    torch.save(given, tmp_path / "models/model.pt")
    torch.save(
        {k: v * 0.5 for k, v in stage_1.autoencoder.state_dict().items()}, tmp_path / "models/stages/autoencoder.pt"
    )
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(tmp_path / "models/model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    workflow = SDSEG.execute(
        "train",
        tmp_path / "no data set",
        **SDSEG.folders(tmp_path, "train"),
        **{
            "learning_rate": 0.0,
            "train#trainer#max_epochs": 1,
            "train#dataset#data": pairs(pictures, "training"),
            "validate#dataset#data": pairs(pictures, "validation"),
            "device": "cpu",
            "train#handlers": [loader, *SDSEG.config("train")["train"]["handlers"]],
        },
    )
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 1
    assert len(trainer.data_loader.dataset) == 2 * len(pairs(pictures, "training"))
    released = torch.load(tmp_path / "models/model.pt", map_location="cpu", weights_only=True)
    # Without learning the released weights are those that were given, not stage 1's with a random U-Net.
    differing = {name for name, value in released.items() if not torch.allclose(value, given[name], atol=1e-6)}
    assert differing <= {"scale_factor"}
    assert (tmp_path / "models/model.json").is_file()
    # Made of the validation pairs.
    assert (tmp_path / "runs/train/previews/epoch_0001_segmentation.png").is_file()
