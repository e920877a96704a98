# SPDX-License-Identifier: Apache-2.0
"""Training in two processes (gloo, on the CPU): one launch of ``tests/gang.py`` works, the tests read its answers."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from shared import distributed
from shared.handlers.progress import EpochProgress
from tests.conftest import ROOT
from tests.test_cxr_bundle import CXR, STAGES
from tests.tiny_networks import segmentation_model
from tests.two_processes import launch
from tools.phantoms.cxr_ldm import make_dataset

CONFIGS = "['configs/train_autoencoder.json','configs/multi_gpu_train.json','configs/tiny.json']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gang")
    done = launch("-m", "tests.gang", str(folder))
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def curve(path: Path) -> dict[tuple[str, str, str], float]:
    with path.open(newline="") as file:
        return {(row["epoch"], row["phase"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}


def test_no_thread_of_gloo_outlives_the_run(ranks, folder):
    """Such a thread ends the process by SIGABRT when it lets go of a tensor while Python is ending."""
    for rank in range(len(ranks)):
        assert "gloo" in (folder / f"threads{rank}_joined.txt").read_text()
        assert "gloo" not in (folder / f"threads{rank}_left.txt").read_text()


# Steps


@pytest.mark.reliability(11)
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


@pytest.mark.reliability(11)
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
@pytest.mark.reliability(11)
def test_all_ranks_skip_a_step_that_one_must_refuse(where, ranks):
    one, two = (rank[f"skip {where}"] for rank in ranks)
    assert one["skipped"] == two["skipped"] == [0, 1, 0, 0]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name])
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.reliability(11)
def test_all_ranks_stop_and_name_the_items_of_the_one_at_fault(where, ranks):
    one, two = (rank[f"stop {where}"] for rank in ranks)
    assert one["message"] == two["message"]
    assert one["message"].startswith("item 11a, item 11b: expected a finite loss and gradient, got loss nan")
    assert one["skipped"] == [0]


def test_value_of_rank_0_is_everyones(ranks):
    assert [rank["from main"] for rank in ranks] == ["said by 0", "said by 0"]


# The documented commands


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), n=10, size=64, split=(0.6, 0.3, 0.1))
    return folder


def arguments(dataset_dir: Path, folder: Path, **overrides: Any) -> list[str]:
    """Of the first stage of ``cxr_ldm``, as they are typed."""
    given = STAGES["train_autoencoder"] | {"dataset_dir": dataset_dir, "output_dir": folder / "run"}
    given |= {"ckpt_dir": folder / "models", "batch_size": 2, **overrides}
    return [f"--{key}={value}" for key, value in given.items()]


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
    options = arguments(tmp_path, tmp_path, max_epochs=1)
    done = launch("-m", "monai.bundle", "run", "training", "--config_file", CONFIGS, *options, cwd=CXR.folder)
    assert done.returncode != 0
    name = tmp_path / content["validation"][1]["image"]
    summary = done.stdout.split("Root Cause (first observed failure):")[1]
    assert f"traceback : {name}: expected a readable image" in done.stdout
    assert "rank      : 1" in summary
    assert f"[rank1]: {name}: expected a readable image" in done.stdout
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# Stand for Slurm's: two nodes, which are both this machine, and a queue that remembers what it was told.
SLURM = {
    "scontrol": """case "$1" in
show) echo 127.0.0.1; echo 127.0.0.1 ;;
requeue) echo "$2" >> "$QUEUE" ;;
esac
""",
    "srun": """trap 'kill $(jobs -p); wait' TERM
[ "$1" = --kill-on-bad-exit=1 ] && shift
SLURM_NODEID=0 "$@" &
SLURM_NODEID=1 "$@" &
wait -n && wait -n
""",
    "torchrun": """exec PYTHON -m torch.distributed.run "$@"
""",
}


def test_slurm_script_trains_on_two_nodes_and_goes_on_after_its_time_is_up(phantoms, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text("#!/bin/bash\n" + text.replace("PYTHON", sys.executable))
        (programs / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QUEUE": str(tmp_path / "queue")}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1"}

    def start(log: Path, max_epochs: int) -> subprocess.Popen:
        options = arguments(phantoms, tmp_path, max_epochs=max_epochs, adversarial_start=2)
        with log.open("w") as file:
            return subprocess.Popen(
                ["bash", str(ROOT / "docs/slurm/train.sbatch"), str(CXR.folder), CONFIGS, *options],
                env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    log, checkpoints = tmp_path / "job.log", tmp_path / "run/checkpoints"
    job = start(log, 1000)
    until = time.monotonic() + 200
    while not list(checkpoints.glob("checkpoint_epoch=*.pt")) and job.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=100)
    assert "goes back to the queue" in log.read_text()
    assert (tmp_path / "queue").read_text() == f"{os.getpid()}\n"
    last = max(int(path.stem.partition("=")[2]) for path in checkpoints.glob("*.pt"))
    assert 1 <= last < 1000
    job = start(log, last + 1)
    assert job.wait(timeout=200) == 0, log.read_text()[-3000:]
    assert f"checkpoint_epoch={last}.pt after epoch {last}" in log.read_text()
    assert json.loads((tmp_path / "run/manifest.json").read_text())["settings"]["processes"] == 2
    epochs = [epoch for epoch, phase, name in curve(tmp_path / "run/metrics.csv") if (phase, name) == ("train", "loss")]
    assert epochs == [str(epoch) for epoch in range(1, last + 2)]


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
