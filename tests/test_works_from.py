# SPDX-License-Identifier: Apache-2.0
"""Exported bundles where their consumers find them: other folders, other processes, without this repository.

For each bundle one process does what a user does after a download; the tests read what it left. `run_alone` hides
the repository from it.
"""

from __future__ import annotations

import functools
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests import dmri_runs
from tests.conftest import ROOT, digest
from tests.exports import TASKS, exported, run_alone, zipped

tasks = pytest.mark.parametrize("task", TASKS)
OPTIONS: dict[str, dict[str, Any]] = {
    "cxr_ldm": {"prompt": "Cardiomegaly.", "num_inference_steps": 3, "seed": 5},
    "brain_controlnet": {"num_inference_steps": 3, "seed": 5},
    "sdseg": {"seed": 5, "num_samples": 2},
    "dmri2noddi": {"num_inference_steps": 2, "seed": 5},
}
SCHEMA = ROOT / "tools/schemas/meta_schema_20240725.json"
SCRIPT = """
import json, os, shutil, sys, traceback
import monai
from monai import bundle
from monai.bundle import ConfigWorkflow

options = json.loads(sys.stdin.read())
task, root = options["task"], os.path.join(os.getcwd(), "downloaded", options["task"])
os.mkdir("downloaded")
answers = {}

def attempt(name, function):
    try:
        answers[name] = function()
    except Exception:
        answers[name] = traceback.format_exc()

def download():
    bundle.download(name=task, url="file://" + options["zip"], bundle_dir="downloaded", progress=False)
    return sorted(os.listdir(root))

def infer(out, config_file, **more):
    bundle.run(config_file=config_file, output_dir=os.path.abspath(out), device="cpu", **options["run"], **more)

def from_other_folder():
    infer("far", f"{root}/configs/inference.json", bundle_root=root)

def from_own_folder():
    home = os.getcwd()
    os.chdir(root)
    try:
        infer(os.path.join(home, "near"), "configs/inference.json")
    finally:
        os.chdir(home)

def load():
    network = bundle.load(task, bundle_dir="downloaded", workflow_type="inference", args_file={"bundle_root": root})
    return type(network).__module__

def metadata():
    os.makedirs("eval")
    shutil.copy(options["schema"], "eval/schema.json")
    bundle.verify_metadata(meta_file=f"{root}/configs/metadata.json", filepath="eval/schema.json")

def in_and_out():
    files = {"meta_file": f"{root}/configs/metadata.json", "config_file": f"{root}/configs/inference.json"}
    bundle.verify_net_in_out("network_def", **files, device="cpu", bundle_root=root)

def properties():
    workflow = ConfigWorkflow(config_file=f"{root}/configs/inference.json", workflow_type="inference",
                              bundle_root=root, device="cpu", **options["run"])
    workflow.initialize()
    return workflow.check_properties()

# `load` comes last of those that need the root: the others must not live on what it leaves behind.
for function in (download, from_other_folder, from_own_folder, metadata, in_and_out, properties, load):
    attempt(function.__name__, function)
answers["hidden"] = [name for name in sys.modules if name.split(".")[0] in ("shared", "tools", "tests")]
with open("answers.json", "w") as file:
    json.dump(answers, file)
"""


@functools.cache
def inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of the inference of each bundle, with an input of odd size."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / "polyp.png")
    heads = rng.random((40, 52, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(heads, np.diag([-2.0, 2.0, 5.0, 1.0])), folder / "flair.nii.gz")
    dmri_runs.make_phantoms(folder / "dmri", num_subjects=3)
    items = json.loads((folder / "dmri/datalist.json").read_text())["test"]
    series = folder / "dmri" / items[0]["dwi"]
    sources = {"sdseg": folder / "polyp.png", "brain_controlnet": folder / "flair.nii.gz", "dmri2noddi": series}
    return {
        task: {**OPTIONS[task], **({"dataset_dir": str(sources[task])} if task in sources else {})} for task in TASKS
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("works")


@pytest.fixture(scope="module")
def answers(place):
    """Per bundle what the process of its user answered."""

    @functools.cache
    def ask(task: str) -> dict[str, Any]:
        folder = place / task
        folder.mkdir()
        words = {"task": task, "zip": str(zipped(task)), "schema": str(SCHEMA), "run": inputs(place / "inputs")[task]}
        program = f"import io, sys; sys.stdin = io.StringIO({json.dumps(json.dumps(words))})\n{textwrap.dedent(SCRIPT)}"
        done = run_alone("-c", program, cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:]
        return json.loads((folder / "answers.json").read_text())

    return ask


def results(folder: Path) -> dict[str, str]:
    """Hashes of pictures and volumes; JSON states paths and moments."""
    return {name: value for name, value in digest(folder).items() if name.endswith((".png", ".nii.gz"))}


@tasks
@pytest.mark.reliability(14)
def test_downloaded_zip_is_the_bundle(task, answers, place):
    assert answers(task)["download"] == sorted(path.name for path in exported(task).iterdir())
    found = digest(place / task / "downloaded" / task)
    expected = digest(exported(task))
    assert {name: found[name] for name in expected} == expected


@tasks
@pytest.mark.reliability(14)
def test_same_results_as_the_source_from_any_folder(task, answers, place, monkeypatch):
    """Bit for bit."""
    assert answers(task)["from_other_folder"] is None, answers(task)["from_other_folder"]
    assert answers(task)["from_own_folder"] is None, answers(task)["from_own_folder"]
    source = ROOT / "bundles" / task
    monkeypatch.chdir(source)
    workflow = ConfigWorkflow(
        config_file=["configs/inference.json", "configs/tiny.json"],
        workflow_type="inference",
        **{**inputs(place / "inputs")[task], "output_dir": str(place / f"{task}_source"), "device": "cpu"},
    )
    workflow.initialize()
    workflow.run()
    expected = results(place / f"{task}_source")
    assert expected
    assert results(place / task / "far") == results(place / task / "near") == expected


@tasks
@pytest.mark.reliability(14)
def test_the_repository_was_hidden(task, answers):
    assert answers(task)["hidden"] == []


@tasks
@pytest.mark.reliability(14)
def test_load(task, answers):
    """Without its folder on the path of the process; the root is an argument, as `load` sets none."""
    assert answers(task)["load"].startswith((f"{task}_lib.", "monai.")), answers(task)["load"]


@tasks
def test_verify_metadata(task, answers):
    assert answers(task)["metadata"] is None, answers(task)["metadata"]


@pytest.mark.parametrize("task", ["sdseg", "dmri2noddi"])
def test_verify_net_in_out(task, answers):
    assert answers(task)["in_and_out"] is None, answers(task)["in_and_out"]


@tasks
def test_properties(task, answers):
    assert answers(task)["properties"] == [], answers(task)["properties"]


@pytest.mark.reliability(14)
def test_two_bundles_in_one_process(place, tmp_path):
    """Each runs its own code, in either order, with the results of a process of its own."""
    wanted = inputs(place / "inputs")
    runs = {task: {**wanted[task], "bundle_root": str(exported(task))} for task in ("sdseg", "brain_controlnet")}
    program = f"""
import sys
from monai.bundle import ConfigWorkflow
runs = {json.dumps(runs)}
workflows = {{}}
for task, options in runs.items():
    workflows[task] = ConfigWorkflow(config_file=options["bundle_root"] + "/configs/inference.json",
        workflow_type="inference", output_dir=task, device="cpu", **options)
    workflows[task].initialize()
for task in reversed(runs):
    workflows[task].run()
for task in runs:
    network = workflows[task].network_def
    assert type(network).__module__.split(".")[0] == task + "_lib", type(network)
"""
    done = run_alone("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    for task in ("sdseg", "brain_controlnet"):
        alone = tmp_path / f"alone_{task}"
        workflow = ConfigWorkflow(
            config_file=[str(ROOT / f"bundles/{task}/configs/{name}.json") for name in ("inference", "tiny")],
            workflow_type="inference",
            **{**wanted[task], "bundle_root": str(ROOT / "bundles" / task), "output_dir": str(alone), "device": "cpu"},
        )
        workflow.initialize()
        workflow.run()
        assert results(tmp_path / task) == results(alone) != {}


@pytest.mark.reliability(14)
def test_command_line_in_the_bundles_folder(place, tmp_path):
    """What the card says: one command in the folder of the bundle, no argument but the input."""
    folder = tmp_path / "sdseg"
    shutil.copytree(exported("sdseg"), folder)
    done = run_alone(
        *("-m", "monai.bundle", "run", "--config_file", "configs/inference.json"),
        *("--dataset_dir", str(place / "inputs/polyp.png")),
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    mask = np.asarray(Image.open(folder / "eval/polyp_mask.png"))
    assert mask.shape == (50, 70)
    assert set(np.unique(mask)) <= {0, 255}
    made_by = json.loads((folder / "eval/manifest.json").read_text())
    assert made_by["git_commit"] == json.loads((folder / "manifest.json").read_text())["commit"]


def test_from_another_folder_without_the_root_the_last_line_says_so(place, tmp_path):
    done = run_alone(
        *("-m", "monai.bundle", "run", "--config_file", str(exported("sdseg") / "configs/inference.json")),
        *("--dataset_dir", str(place / "inputs/polyp.png")),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("models/model.pt: expected trained weights, found no file.")
    assert last.endswith("run from the bundle's folder or give --bundle_root.")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.reliability(14)
def test_trains_from_the_export(place, tmp_path):
    """The smallest training of each form: one epoch, then the weights that inference reads."""
    from tools.phantoms.sdseg import make_dataset

    make_dataset(str(tmp_path / "data"), num_images=18, size=(80, 64))
    folder = tmp_path / "sdseg"
    shutil.copytree(exported("sdseg"), folder)
    before = torch.load(folder / "models/model.pt", weights_only=True)
    done = run_alone(
        *("-m", "monai.bundle", "run", "training", "--config_file", "configs/train.json", "--max_epochs", "1"),
        *("--dataset_dir", str(tmp_path / "data"), "--tracking_uri", ""),
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    after = torch.load(folder / "models/model.pt", weights_only=True)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name].float(), before[name].float()) for name in after if "unet" in name)
    assert all(torch.equal(after[n].float(), before[n].float()) for n in after if n.startswith("autoencoder."))
