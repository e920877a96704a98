# SPDX-License-Identifier: Apache-2.0
"""Every training of every bundle in two processes (gloo, on the CPU), as ``tests/stage_gang.py`` runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bundle_runs import curve
from tests.bundle_tools import read
from tests.conftest import ROOT
from tests.stage_gang import ADVERSARIAL, SMALL, compared, home, launch, names, prepare

# Of sdseg seven pictures, each mirrored too, or with its mask.
ITEMS = {"cxr_ldm": 7, "brain_controlnet": 7, "sdseg": 14, "dmri2noddi": 11}
stages = pytest.mark.parametrize("stage", list(SMALL))


@pytest.fixture(scope="module")
def gang(tmp_path_factory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """Folder of the runs, what each of two processes found, what one process found."""
    folder = prepare(tmp_path_factory.mktemp("stages"))
    return folder, *launch(folder, "whole", "crashed", "resumed", "equal")


@pytest.fixture(scope="module")
def ranks(gang) -> list[dict[str, Any]]:
    return gang[1]


def test_every_training_of_every_bundle_is_here():
    found = {
        f"{path.parents[1].name} {path.stem}"
        for path in (ROOT / "bundles").glob("*/configs/train*.json")
        if "train#trainer" in json.dumps(read(path))
    }
    assert found == set(SMALL)
    assert len(found) == 14
    overlays = {(ROOT / f"bundles/{bundle}/configs/multi_gpu_train.json").read_bytes() for bundle in ITEMS}
    assert len(overlays) == 1


def own(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weights and buffers of all networks, without statistics in the discriminator, which are of a share."""
    return {
        f"{network} {name}": tensor
        for network, tensors in state.items()
        for name, tensor in tensors.items()
        if network == "network" or not name.endswith(("running_mean", "running_var"))
    }


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    a, b = own(one["weights"]), own(two["weights"])
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert one["average"] == two["average"]


@stages
@pytest.mark.reliability(11)
def test_ranks_end_with_the_same_weights(stage, ranks):
    """Codes of a codebook, scale factor and statistics of latents included."""
    one, two = (rank[f"{stage} whole"] for rank in ranks)
    assert_equal(one, two)
    assert ("discriminator" in one["weights"]) == (stage in ADVERSARIAL)
    assert one["metrics"] == two["metrics"]
    assert all(math.isfinite(value) for value in one["metrics"].values())
    assert one["properties"] == two["properties"] == []
    assert one["settings"]["processes"] == 2
    assert one["losses"] != two["losses"]
    measured = [t for name, t in own(one["weights"]).items() if name.endswith(("scale_factor", "latent_mean"))]
    assert bool(measured) == (stage.split()[1] in ("train", "train_diffusion"))
    assert all((tensor != 1).all() and tensor.any() for tensor in measured)


@stages
def test_every_epoch_deals_every_item_in_a_new_order(stage, ranks):
    count = ITEMS[stage.split()[0]]
    one, two = (rank[f"{stage} whole"] for rank in ranks)
    for a, b in zip(one["orders"], two["orders"], strict=True):
        # Of an odd number one is dealt twice.
        assert len(a) == len(b) == (count + 1) // 2
        assert set(a) | set(b) == set(range(count))
    assert one["orders"][0] != one["orders"][1]
    # Steps of two items for each process: what is left over is dropped.
    steps = (count + 1) // 2 // 2
    assert one["iterations"] == two["iterations"] == list(range(1, 2 * steps + 1))
    dealt = one["validation"] + two["validation"]
    assert sorted(dealt) == list(range(len(dealt)))
    assert 0 < len(two["validation"]) <= len(one["validation"])


@stages
@pytest.mark.reliability(11)
def test_only_the_main_process_writes(stage, ranks):
    one, two = (rank[f"{stage} whole"] for rank in ranks)
    for name in ("metrics.csv", "manifest.json", "config.json", "checkpoints/checkpoint_epoch=2.pt"):
        assert f"run/{name}" in one["files"]
    bundle, config = names(stage)
    place = read(bundle / f"configs/{config}.json")["validate"]["best"]["path"].split("'")[1]
    assert f"models{place}" in one["files"]
    assert any("previews/epoch_0002" in name for name in one["files"]) == (
        "preview_interval" in read(bundle / f"configs/{config}.json")
    )
    assert two["files"] == []


@stages
def test_resumed_training_repeats_the_uninterrupted_one(stage, gang):
    folder, ranks, _ = gang
    for rank in ranks:
        whole, crashed, resumed = (rank[f"{stage} {kind}"] for kind in ("whole", "crashed", "resumed"))
        half = len(whole["iterations"]) // 2
        assert crashed["iterations"] == whole["iterations"][: half + 1]
        assert resumed["iterations"] == whole["iterations"][half:]
        assert crashed["losses"] + resumed["losses"][1:] == whole["losses"]
        assert crashed["losses"][half] == resumed["losses"][0]
        assert_equal(whole, resumed)
    one, two = (curve(home(folder, kind) / stage / "run") for kind in ("whole", "resumed"))
    assert len(one) >= 6
    assert one == two


@stages
@pytest.mark.reliability(11)
def test_two_shares_step_as_one_process_with_the_whole_batch(stage, gang):
    """In ten steps and more: losses by name, gradients after clipping, weights, and metrics of the validation."""
    _, ranks, alone = gang
    found = compared(f"{stage} equal", ranks, alone)
    assert found["steps"] >= 10
    assert found["moved"] > 5e-4
    assert {name: found[name] for name in ("loss", "weights", "metrics") if found[name] > 1e-5} == {}
    # Of an absolute value: in one pixel rounding may turn the sign.
    assert found["gradient"] < 1e-4
    assert found["between_ranks"] == 0
    one, two = (rank[f"{stage} equal"]["losses"] for rank in ranks)
    assert one != two
