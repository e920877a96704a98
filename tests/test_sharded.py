# SPDX-License-Identifier: Apache-2.0
"""Inference and evaluation shared by two processes (gloo, on the CPU): the files are those of one process.

One launch of ``tests/sharded_gang.py`` does all runs of all bundles, the tests read its answers.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from monai.engines import SupervisedEvaluator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from shared import shares
from shared.handlers.cost import CallCost
from shared.shares import BatchShares, in_list_order, run_share
from tests import dmri_runs, sdseg_runs
from tests.bundle_runs import BundleRuns
from tests.conftest import digest
from tests.sharded_gang import BRAIN, CXR, LOADERS, RUNS, execute
from tests.two_processes import launch
from tools.phantoms import brain_controlnet, cxr_ldm, dmri2noddi, sdseg

# Which items each process has: batches are dealt in turn.
ITEMS = {
    "cxr inference": ([0, 1, 4], [2, 3]),
    "cxr evaluation": ([0, 1, 4], [2, 3]),
    "brain samples": ([0, 1, 4], [2, 3]),
    **dict.fromkeys(("brain inference", "sdseg inference", "dmri inference"), ([0, 2], [1])),
    **dict.fromkeys(("sdseg evaluation", "dmri evaluation"), ([0, 2], [1])),
    **dict.fromkeys(("brain evaluation", "brain evaluation of samples"), ([0, 1, 2, 3, 4, 10, 11], [5, 6, 7, 8, 9])),
    **dict.fromkeys(("sdseg inference of one image", "sdseg evaluation of one image"), ([0], [])),
}
INFERENCES = [name for name in RUNS if RUNS[name][1] in LOADERS]
EVALUATIONS = [name for name in RUNS if RUNS[name][1] not in LOADERS]
SCORED = [name for name in EVALUATIONS if name.startswith(("sdseg", "dmri"))]


def shorten(folder: Path, count: int) -> None:
    content = json.loads((folder / "datalist.json").read_text())
    assert len(content["test"]) >= count
    (folder / "datalist.json").write_text(json.dumps(content | {"test": content["test"][:count]}))


def save_random(runs: BundleRuns, stage: str, path: Path) -> None:
    """Random weights of a stage's network, also those that start at zero: its pictures depend on the noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), runs.small(stage, Path("unused"), {}) as workflow:
        torch.manual_seed(0)
        network = workflow.parser.get_parsed_content("network_def")
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.3 * parameter[0].numel() ** -0.5)
        torch.save(network.state_dict(), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data sets and weights, and what one process and two make of them."""
    root = tmp_path_factory.mktemp("sharded")
    split = (0.3, 0.2, 0.5)
    cxr_ldm.make_dataset(str(root / "cxr_ldm"), n=18, size=128, split=split)
    brain_controlnet.make_dataset(
        str(root / "brain_controlnet"), n=6, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0), split=split
    )
    sdseg.make_dataset(str(root / "sdseg"), num_images=18, size=(80, 64), split=split)
    dmri2noddi.make_dataset(
        str(root / "dmri2noddi"), num_subjects=6, shape=dmri_runs.HR_SHAPE, split=split, lesions=0.0
    )
    for name, count in (("cxr_ldm", 5), ("brain_controlnet", 3), ("sdseg", 3), ("dmri2noddi", 3)):
        shorten(root / name, count)
    shutil.copytree(root / "sdseg", root / "one_image")
    shorten(root / "one_image", 1)
    sdseg_runs.save_network(root / "models/sdseg")
    dmri_runs.save_network(root / "models/dmri2noddi")
    save_random(CXR, "inference", root / "models/cxr_ldm/model.pt")
    save_random(BRAIN, "inference", root / "models/brain_controlnet/model.pt")
    save_random(BRAIN, "inference_unconditional", root / "models/brain_controlnet/stages/diffusion.pt")
    done = launch("-m", "tests.sharded_gang", str(root))
    assert done.returncode == 0, done.stdout[-5000:]
    for name in RUNS:
        execute(name, root, "one")
    return root


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def results_of(folder: Path) -> dict[str, str]:
    """Digests of what a run made, without what says how it was run."""
    return {name: value for name, value in digest(folder).items() if name not in ("config.json", "manifest.json")}


# What two processes do


@pytest.mark.parametrize("name", RUNS)
def test_each_item_has_one_process(name, ranks):
    assert tuple(rank[name]["items"] for rank in ranks) == ITEMS[name]
    assert [rank[name]["properties"] for rank in ranks] == [[], []]
    # What was dealt is what was run.
    assert sum(rank[name]["batches"] for rank in ranks) == {5: 3, 3: 3, 12: 3, 1: 1}[sum(map(len, ITEMS[name]))]


@pytest.mark.parametrize("name", INFERENCES)
def test_results_have_the_names_and_bytes_of_one_process(name, folder, ranks):
    one, two = (results_of(folder / processes / name) for processes in ("one", "two"))
    assert one == two
    count = sum(map(len, ITEMS[name]))
    assert len({Path(file).parent / Path(file).stem for file in one if file.endswith(".json")}) == count
    assert len(set(one.values())) == len(one), "every item has noise of its own"
    assert json.loads((folder / "two" / name / "manifest.json").read_text())["processes"] == 2
    assert json.loads((folder / "one" / name / "manifest.json").read_text())["processes"] == 1


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(path: Path) -> Any:
    """What a file of an evaluation says, but for times and memory."""
    if path.suffix == ".csv":
        return [{key: value for key, value in line.items() if key != "seconds"} for line in table(path)]
    if path.name == "summary.json":
        rows = json.loads(path.read_text())
        return [row for row in rows if row.get("group") != "Time and memory"]
    if path.name == "protocol.json":
        content = json.loads(path.read_text())
        return {key: value for key, value in content.items() if key not in ("processes", "memory")}
    return path.read_bytes()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_is_that_of_one_process(name, folder, ranks):
    one, two = (folder / processes / name / "evaluation" for processes in ("one", "two"))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert {"summary.json"} < set(files)
    assert [file for file in files if untimed(one / file) != untimed(two / file)] == []
    lines = table(two / ("per_subject.csv" if name.startswith("dmri") else "per_image.csv"))
    subjects = {line.get("name", line.get("row")) for line in lines}
    assert len(subjects) == sum(map(len, ITEMS[name]))
    rows = {row["name"] for row in json.loads((two / "summary.json").read_text())}
    assert len(rows) > 5
    # Every process knows them, as after a run of its own.
    assert ranks[0][name]["metrics"] == pytest.approx(ranks[1][name]["metrics"], nan_ok=True)
    assert len(ranks[1][name]["metrics"]) > 5


@pytest.mark.parametrize("name", SCORED)
def test_times_are_those_of_all_items_and_memory_is_the_most_of_any_process(name, folder, ranks):
    two = folder / "two" / name / "evaluation"
    rows = [row for row in json.loads((two / "summary.json").read_text()) if row.get("group") == "Time and memory"]
    assert {row["n"] for row in rows} == {sum(map(len, ITEMS[name]))}
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    assert rows[-1]["note"].endswith("; the most of 2 processes")
    assert json.loads((two / "protocol.json").read_text())["processes"] == 2


def test_values_of_all_ranks_reach_rank_0_alone(ranks):
    assert ranks[0]["gathered"] == [[], [f"1.{number}" for number in range(40)]]
    assert ranks[1]["gathered"] == []
    assert [rank["owner"] for rank in ranks] == ["both", "both"]


def test_two_processes_refuse_inputs_of_one_name(ranks):
    """Which is ``mask`` and which ``mask_1`` is known to one process alone."""
    assert ranks[0]["claim"] == "mask"
    assert ranks[1]["claim"].startswith("/in/1/x.png: expected inputs of different names in several processes, but")
    assert "the results of /in/0/x.png are called mask too" in ranks[1]["claim"]


# The documented command


def test_error_in_one_process_ends_all_with_its_message(tmp_path):
    for index in range(3):
        Image.effect_noise((80, 64), 50).save(tmp_path / f"{index}.png")
    broken = tmp_path / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    files = "['configs/inference.json','configs/multi_gpu_inference.json','configs/tiny.json']"
    options = [f"--dataset_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
    done = launch("-m", "monai.bundle", "run", "--config_file", files, *options, cwd=sdseg_runs.SDSEG.folder)
    assert done.returncode == 1
    summary = done.stdout.split("Root Cause (first observed failure):")[1]
    assert f"traceback : {broken}: expected a readable image" in summary
    assert "rank      : 1" in summary


# Without other processes


def test_a_process_of_its_own_has_all_items_in_order():
    assert list(BatchShares(range(5), 2)) == [0, 1, 2, 3, 4]
    engine = SimpleNamespace(state=SimpleNamespace(dataloader=None))
    assert in_list_order(engine, "abc") == ["a", "b", "c"]
    cost = CallCost()
    cost.peak_bytes, cost.memory_note = 3, "note"
    cost.merge()
    assert (cost.peak_bytes, cost.memory_note) == (3, "note")


@pytest.mark.parametrize("count", [0, 1, 4, 7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_batches_are_those_of_one_process(count, batch_size, processes):
    def batches(**options: int) -> list[list[int]]:
        sampler = BatchShares(range(count), batch_size, **options)
        loader = DataLoader(list(range(count)), batch_size=batch_size, sampler=sampler)
        assert len(sampler) == len(list(sampler))
        return [batch.tolist() for batch in loader] if len(sampler) else []

    found = [batches(rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(batch for share in found for batch in share) == batches(rank=0, processes=1)
    # The shares differ by one batch at most, and rank 0 has the most.
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(found[0]) == max(map(len, found))


def test_idle_processes_are_told_of(caplog):
    BatchShares(range(4), 4, rank=0, processes=2)
    (record,) = caplog.records
    assert record.getMessage().startswith("1 batches of 4 items for 2 processes: some have nothing to do")
    BatchShares(range(5), 4, rank=0, processes=2)
    assert len(caplog.records) == 1


def in_two(places: list[list[int]]) -> Any:
    """``in_list_order`` on rank 0 of two with items at ``places``, whose rows are their places."""
    engine = SimpleNamespace(state=SimpleNamespace(dataloader=SimpleNamespace(sampler=places[0])))
    gathered = [[(place, place) for place in share] for share in places]
    with (
        mock.patch.object(shares, "is_distributed", return_value=True),
        mock.patch.object(shares, "is_main_process", return_value=True),
        mock.patch.object(shares, "to_main_process", return_value=gathered),
    ):
        return in_list_order(engine, places[0])


def test_rows_are_put_into_the_order_of_the_list():
    assert in_two([[0, 1, 4], [2, 3]]) == [0, 1, 2, 3, 4]
    assert in_two([[0], []]) == [0]


@pytest.mark.parametrize("places", [[[0, 1, 2], [0, 1, 2]], [[0, 2], [2]], [[0], [2]]])
def test_items_that_are_not_shared_once_each_are_refused(places):
    with pytest.raises(ValueError, match="^dataloader#sampler: .* each once, got .*; lay configs/multi_gpu_evaluate"):
        in_two(places)


def test_a_row_is_needed_for_every_item():
    engine = SimpleNamespace(state=SimpleNamespace(dataloader=SimpleNamespace(sampler=[0, 1])))
    with (
        mock.patch.object(shares, "is_distributed", return_value=True),
        pytest.raises(ValueError, match="^rows: expected one for each of the 2 items of this process, got 1"),
    ):
        in_list_order(engine, ["a"])


@pytest.mark.parametrize("count", [0, 3])
def test_handlers_start_and_complete_also_without_items(count):
    seen: list[str] = []

    class Handler:
        def attach(self, engine: Any) -> None:
            for event in ("STARTED", "ITERATION_COMPLETED", "COMPLETED"):
                engine.add_event_handler(getattr(shares.Events, event), lambda _, name=event: seen.append(name))

    loader = DataLoader([{"image": torch.zeros(1)} for _ in range(5)], sampler=range(count))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=nn.Identity(), val_handlers=[Handler()]
    )
    run_share(evaluator)
    assert seen == ["STARTED", *["ITERATION_COMPLETED"] * count, "COMPLETED"]
    assert list(evaluator.state.dataloader.sampler) == list(range(count))
