# SPDX-License-Identifier: Apache-2.0
"""``dmri2noddi`` in the published forms, through its stages: a map at a time, and volumes of directions as input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.datalist import load_datalist
from tests.dmri_runs import (
    DIRECTIONS,
    DMRI,
    check_maps,
    make_phantoms,
    patches,
    save_network,
    true_maps,
    weights,
)

STAGES = ("train_vqgan", "train_encoder", "train")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """The cache of whole volumes of the phantoms."""
    return tmp_path_factory.mktemp("volumes")


def test_one_map_at_a_time_through_all_stages(phantoms, volumes, tmp_path):
    for stage in STAGES:
        options = DMRI.folders(tmp_path, stage, volumes=volumes) | {"max_epochs": 1, "one_map": True}
        DMRI.execute(stage, phantoms, **options)
        with DMRI.small(stage, phantoms, options) as workflow:
            content = workflow.parser.get_parsed_content
            data = content("train#dataset").data
            assert [item["map_id"] for item in data[:4]] == [0, 1, 2, 0]
            assert len(data) == 3 * len(patches(phantoms, "training"))
            for index in (3, 4, 5):
                item = content("train#dataset")[index]
                truth = true_maps(data[index])[data[index]["map_id"]][None]
                if "maps" in item:
                    assert torch.equal(torch.as_tensor(item["maps"]), truth)
                    continue
                with torch.no_grad():
                    encoded = content("autoencoder_def").eval().encode(truth[None])[0]
                torch.testing.assert_close(item["latent_mean"], encoded, rtol=0, atol=1e-4)
                assert item["map_id"] == data[index]["map_id"]
                if stage == "train":
                    check_condition(content, index)
    assert weights(tmp_path, "stages/vqgan")["encoder.conv_in.1.conv.weight"].shape[1] == 1
    assert weights(tmp_path, "stages/encoder")["kernels.0.conv.weight"].shape[1] == 8 + 3
    check_maps(phantoms, tmp_path, tmp_path / "out", one_map=True)


@torch.no_grad()
def check_condition(content: Callable, index: int) -> None:
    """The cached estimate of the wanted map, normalised, is the condition that the network makes of the features."""
    item, model = content("train#dataset")[index], content("network_def").eval()
    features = content("train#feature_preprocessing")(content("train#dataset").data[index])["image"]
    wanted = torch.tensor([item["map_id"]])
    condition = model.normalize(item["condition_latent"][None])
    torch.testing.assert_close(condition, model.condition(features[None], wanted), rtol=0, atol=1e-5)
    assert (condition - model.condition(features[None], (wanted + 1) % 3)).abs().max() > 1e-3


def test_volumes_of_each_direction_can_be_the_input(phantoms, volumes, tmp_path, capsys):
    count = {"num_directions": DIRECTIONS}
    save_network(tmp_path / "models")
    for stage in ("train_encoder", "train", "train_baseline"):
        options = DMRI.folders(tmp_path, stage, volumes=volumes) | {"max_epochs": 1} | count
        DMRI.execute(f"{stage} directions", phantoms, **options)
    assert weights(tmp_path, "stages/encoder")["kernels.0.conv.weight"].shape[1] == DIRECTIONS
    check_maps(phantoms, tmp_path, tmp_path / "out", "inference directions", **count)
    options = DMRI.folders(tmp_path, "train_baseline", volumes=volumes) | {"num_directions": 59, "resume": "never"}
    line = DMRI.last_line("train_baseline directions", phantoms, capsys, **options)
    assert line.split(": ")[0] in {item["dwi"] for item in load_datalist(phantoms, "training")}
    assert ": gradient table: expected 59 diffusion-weighted volumes, but got 60; " in line
