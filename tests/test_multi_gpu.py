# SPDX-License-Identifier: Apache-2.0
"""Training in two processes (gloo, on the CPU): one launch of ``tests/gang.py`` works, the tests read its answers."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from torch import nn

from shared import distributed
from shared.handlers.progress import EpochProgress
from tests import dmri_runs, sdseg_runs
from tests.conftest import ROOT
from tests.gang import BUNDLE, CONFIGS, NODDI, STAGES
from tests.tiny_networks import segmentation_model
from tools.phantoms.cxr_ldm import make_dataset
from tools.phantoms.sdseg import make_dataset as make_pictures

stages = pytest.mark.parametrize("stage", list(STAGES))


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )


def shorten(folder: Path) -> None:
    """Odd numbers of items: shares differ in size and in the last batch."""
    content = json.loads((folder / "datalist.json").read_text())
    assert len(content["training"]) >= 7
    assert len(content["validation"]) >= 3
    content |= {"training": content["training"][:7], "validation": content["validation"][:3]}
    (folder / "datalist.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Data sets by bundle, and an autoencoder with random weights."""
    folder = tmp_path_factory.mktemp("gang")
    make_dataset(str(folder / "data/cxr_ldm"), n=14, size=64, split=(0.6, 0.3, 0.1))
    make_pictures(str(folder / "data/sdseg"), num_images=18, size=(80, 64), split=(0.6, 0.3, 0.1))
    for bundle in ("cxr_ldm", "sdseg"):
        shorten(folder / "data" / bundle)
    dmri_runs.make_phantoms(folder / "data/dmri2noddi", num_subjects=3)
    dmri_runs.save_network(folder / "data/dmri2noddi/models")
    torch.save(sdseg_runs.network().autoencoder.state_dict(), folder / "data/sdseg/autoencoder.pt")
    return folder / "data"


@pytest.fixture(scope="module")
def phantoms(data) -> Path:
    return data / "cxr_ldm"


@pytest.fixture(scope="module")
def folder(data) -> Path:
    done = launch("-m", "tests.gang", str(data.parent))
    assert done.returncode == 0, done.stdout[-5000:]
    return data.parent


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def curve(path: Path) -> dict[tuple[str, str, str], float]:
    with path.open(newline="") as file:
        return {(row["epoch"], row["phase"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}


# Whole trainings


@stages
def test_ranks_end_with_the_same_weights(stage, ranks):
    one, two = (rank[f"{stage} whole"] for rank in ranks)
    names = ["network", "average", "scale_factor", *(["discriminator"] if stage == "train_autoencoder" else [])]
    assert {name: one[name] for name in names} == {name: two[name] for name in names}
    assert (one["scale_factor"] != 1.0) == (stage != "train_autoencoder")
    assert one["metrics"] == two["metrics"]
    assert all(math.isfinite(value) for value in one["metrics"].values())
    assert one["properties"] == two["properties"] == []
    assert one["settings"]["processes"] == 2


@pytest.mark.parametrize("stage", list(NODDI))
def test_ranks_have_the_same_codes_and_statistics(stage, ranks):
    """The codebook is moved and restarted by the vectors of both, latents are measured by one."""
    one, two = (rank[f"{stage} whole"] for rank in ranks)
    names = ["network", "buffers", "average", "metrics", *(["discriminator"] if "discriminator" in one else [])]
    assert {name: one[name] for name in names} == {name: two[name] for name in names}
    assert ("discriminator" in one) == (stage == "noddi train_vqgan")
    assert all(math.isfinite(value) for value in one["metrics"].values())
    assert one["properties"] == two["properties"] == []
    # Shares of their own, of which all are dealt.
    assert len(one["iterations"]) == len(two["iterations"]) >= 4
    assert not set(one["validation"]) & set(two["validation"])
    assert all(
        set(a) | set(b) == set(range(max(*a, *b) + 1)) for a, b in zip(one["orders"], two["orders"], strict=True)
    )
    assert one["orders"] != two["orders"]
    name = dmri_runs.RELEASED[stage.split()[1]]
    assert f"models/dmri2noddi/{name}.pt" in one["files"]
    assert two["files"] == []


@stages
def test_every_epoch_deals_every_item_in_a_new_order(stage, ranks):
    orders = [[tuple(order) for order in rank[f"{stage} whole"]["orders"]] for rank in ranks]
    assert len(orders[0]) == 3
    for one, two in zip(*orders, strict=True):
        # Seven items for two: one of them is dealt twice.
        assert len(one) == len(two) == 4
        assert set(one) | set(two) == set(range(7))
    assert len(set(orders[0])) == 3
    assert [rank[f"{stage} whole"]["validation"] for rank in ranks] == [[0, 2], [1]]
    # Two batches of two for each process: seven items are not dropped for want of a batch.
    assert ranks[0][f"{stage} whole"]["iterations"] == [1, 2, 3, 4, 5, 6]


@stages
def test_only_the_main_process_writes(stage, ranks):
    files = ranks[0][f"{stage} whole"]["files"]
    name = "stages/autoencoder.pt" if stage == "train_autoencoder" else "model.pt"
    weights = f"models/{CONFIGS.get(stage, (BUNDLE, ''))[0].name}/{name}"
    for name in ("metrics.csv", "manifest.json", "config.json", "checkpoints/checkpoint_epoch=3.pt"):
        assert f"runs/{stage}/{name}" in files
    assert weights in files
    assert any("previews/epoch_0003" in name for name in files)
    assert ranks[1][f"{stage} whole"]["files"] == []


@stages
def test_resumed_training_repeats_the_uninterrupted_one(stage, ranks, folder):
    assert ranks[0][f"{stage} broken"]["iterations"] == [[1, 2, 3], [3, 4, 5, 6]]
    for rank in ranks:
        for name in ("network", "average", "scale_factor", "metrics"):
            assert rank[f"{stage} broken"][name] == rank[f"{stage} whole"][name]
    whole, broken = (curve(folder / name / "runs" / stage / "metrics.csv") for name in ("whole", "broken"))
    assert len(whole) > 10
    assert whole == broken


@pytest.mark.parametrize("stage", ["train_autoencoder", "segmentation"])
def test_metrics_of_shares_are_those_of_all_items(stage, folder, data, ranks):
    """The weights of the last epoch, measured by one process."""
    bundle, config = CONFIGS.get(stage, (BUNDLE, stage))
    options = copy.deepcopy(STAGES[stage]) | {"dataset_dir": str(data / bundle.name), "output_dir": "unused"}
    options |= {"resume": "never", "ckpt_dir": "unused"}
    if stage == "segmentation":
        options["autoencoder_weights"] = str(data / "sdseg/autoencoder.pt")
    hook, path = sys.excepthook, list(sys.path)
    files = [str(bundle / "configs" / f"{name}.json") for name in (config, "tiny")]
    workflow = ConfigWorkflow(files, logging_file=False, workflow_type="train", **options)
    try:
        workflow.initialize()
        content = workflow.parser.get_parsed_content
        # The handlers would write; only the numbers are wanted.
        workflow.parser.set([], "validate#handlers")
        workflow.parser.parse(True)
        checkpoint = torch.load(folder / f"whole/runs/{stage}/checkpoints/checkpoint_epoch=3.pt", weights_only=True)
        model = content("ema").ema_model
        if stage == "segmentation":
            # The checkpoint lacks what is not trained.
            model.scale_factor.fill_(ranks[0]["segmentation whole"]["scale_factor"])
            model = model.trained
        model.load_state_dict(checkpoint["ema"])
        evaluator = content("validate#evaluator")
        evaluator.run()
    finally:
        sys.excepthook, sys.path[:] = hook, path
    assert evaluator.state.metrics == pytest.approx(ranks[1][f"{stage} whole"]["metrics"], rel=1e-5)


# Steps


def test_two_shares_step_as_one_process_with_the_whole_batch(ranks, folder):
    """Generator, late discriminator and clipping included."""
    one, two = (rank["shares"] for rank in ranks)
    for network in ("network", "discriminator"):
        for name, expected in one["whole"][network].items():
            assert torch.equal(one["shared"][network][name], two["shared"][network][name])
            torch.testing.assert_close(one["shared"][network][name], expected, rtol=0, atol=1e-6)
    losses = (torch.tensor(one["shared_losses"]) + torch.tensor(two["shared_losses"])) / 2
    assert len(losses) == 18
    assert one["shared_losses"] != two["shared_losses"]
    torch.testing.assert_close(losses, torch.tensor(one["whole_losses"]), rtol=0, atol=1e-5)
    whole, shared = curve(folder / "whole.csv"), curve(folder / "shared.csv")
    assert ("2", "train", "discriminator") in whole
    assert shared == pytest.approx(whole, abs=1e-5)


def test_two_shares_segment_as_one_process_with_the_whole_batch(ranks):
    one, two = (rank["segmentation shares"] for rank in ranks)
    start = segmentation_model().state_dict()
    trained = [name for name in start if name.startswith(("unet.", "vision_encoder."))]
    for name, expected in one["whole"].items():
        assert torch.equal(one["shared"][name], two["shared"][name])
        torch.testing.assert_close(one["shared"][name], expected, rtol=0, atol=1e-5)
        assert name in trained or torch.equal(expected, start[name])
    assert max((one["whole"][name] - start[name]).abs().max() for name in trained) > 1e-3
    losses = (torch.tensor(one["shared_losses"]) + torch.tensor(two["shared_losses"])) / 2
    assert len(losses) == 12
    torch.testing.assert_close(losses, torch.tensor(one["whole_losses"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_all_ranks_skip_a_step_that_one_must_refuse(where, ranks):
    one, two = (rank[f"skip {where}"] for rank in ranks)
    assert one["skipped"] == two["skipped"] == [0, 1, 0, 0]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name])
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_all_ranks_stop_and_name_the_items_of_the_one_at_fault(where, ranks):
    one, two = (rank[f"stop {where}"] for rank in ranks)
    assert one["message"] == two["message"]
    assert one["message"].startswith("item 11a, item 11b: expected a finite loss and gradient, got loss nan")
    assert one["skipped"] == [0]


def test_value_of_rank_0_is_everyones(ranks):
    assert [rank["from main"] for rank in ranks] == ["said by 0", "said by 0"]


# The documented command


def test_error_in_one_process_ends_all_and_is_the_last_message(phantoms, tmp_path):
    content = json.loads((phantoms / "datalist.json").read_text())
    (tmp_path / "images").mkdir()
    for item in content["training"]:
        (tmp_path / item["image"]).write_bytes((phantoms / item["image"]).read_bytes())
    # Of the three items of the validation, the second is the share of rank 1.
    for index, item in enumerate(content["validation"]):
        written = (phantoms / item["image"]).read_bytes()
        (tmp_path / item["image"]).write_bytes(written[:200] if index == 1 else written)
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    overrides = STAGES["train_autoencoder"] | {"dataset_dir": tmp_path, "output_dir": tmp_path / "run"}
    overrides |= {"ckpt_dir": tmp_path / "models", "max_epochs": 1}
    files = "['configs/train_autoencoder.json','configs/multi_gpu_train.json','configs/tiny.json']"
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    done = launch("-m", "monai.bundle", "run", "training", "--config_file", files, *arguments, cwd=BUNDLE)
    assert done.returncode != 0
    name = tmp_path / content["validation"][1]["image"]
    summary = done.stdout.split("Root Cause (first observed failure):")[1]
    assert f"traceback : {name}: expected a readable image" in done.stdout
    assert "rank      : 1" in summary
    assert f"[rank1]: {name}: expected a readable image" in done.stdout
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_overlay_without_torchrun_says_so(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"LOCAL_RANK: expected to be started by torchrun.*leave out multi_gpu_train"):
        distributed.local_device()
    with pytest.raises(ValueError, match=r"RANK: expected to be started by torchrun"):
        distributed.join_processes("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=2),
    ):
        with pytest.raises(ValueError, match="--nproc_per_node: expected at most 2, a process for each GPU, got 4"):
            distributed.local_device()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert distributed.local_device() == torch.device("cuda", 1)


# Without other processes


def test_a_process_of_its_own_keeps_its_values():
    values = torch.tensor([1.0, float("nan")])
    assert distributed.mean_over_processes(values) is values
    assert distributed.from_main_process("x") == "x"
    assert distributed.from_all_processes("x") == ["x"]
    assert distributed.process_count() == 1
    assert distributed.is_main_process()


def test_unwrapped_is_the_network_itself():
    network = nn.Linear(2, 2)
    for wrapped in (network, nn.DataParallel(network), torch.compile(network), torch.compile(nn.DataParallel(network))):
        assert distributed.unwrapped(wrapped) is network
    optimizer = torch.optim.SGD(network.parameters())
    assert distributed.unwrapped(optimizer) is optimizer


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_shows_a_bar(rank, capsys):
    engine = Engine(lambda engine, batch: None)
    engine.state.rank = rank
    EpochProgress().attach(engine)
    engine.run([1, 2], max_epochs=1)
    assert ("[1/2]" in capsys.readouterr().err) == (rank == 0)
