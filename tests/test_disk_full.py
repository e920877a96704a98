# SPDX-License-Identifier: Apache-2.0
"""Full disks, by a limit on the size of files; more sizes, and real file systems that are full: ``make soak``."""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.files import remove_incomplete
from tests import commands
from tests.bundle_runs import curve
from tests.conftest import digest
from tests.soak.disk import complaints, limited_from, resize, small_disk, what_a_user_reads
from tests.soak.trainings import BUNDLES, sample_data, training_command

pytestmark = pytest.mark.reliability(2)
# The smallest training: its checkpoints have 38 kB.
QUICK = ("sdseg", "train_baseline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def after_one_epoch(folder):
    """A function that gives the folder of a training's first epoch, not to be written to."""

    def root(name: str, stage: str) -> Path:
        place, runs = folder / name / stage, BUNDLES[name].runs
        if not place.exists():
            runs.execute(stage, sample_data(name, folder), **runs.folders(place, stage), max_epochs=1)
        return place

    return root


def train_on_full_disk(name: str, stage: str, folder: Path, root: Path, victim: str, size: int) -> list[str]:
    options = {**BUNDLES[name].runs.folders(root, stage), "max_epochs": 2}
    with limited_from(victim, size):
        return what_a_user_reads(BUNDLES[name].runs.small(stage, sample_data(name, folder), options))


def newest(root: Path, stage: str, epoch: int) -> Path:
    return root / f"runs/{stage}/checkpoints/checkpoint_epoch={epoch}.pt"


def check_failed_checkpoint(name: str, stage: str, folder: Path, one: Path, root: Path, share: float) -> None:
    shutil.copytree(one, root)
    size = newest(root, stage, 1).stat().st_size
    room = int(share * size)
    lines = train_on_full_disk(name, stage, folder, root, "checkpoint_epoch=2.pt", room)
    # The earlier checkpoint and the released weights load.
    assert complaints(lines, root) == []
    assert digest(newest(root, stage, 1).parent) == digest(newest(one, stage, 1).parent)
    failed = newest(root, stage, 2)
    said = re.fullmatch(
        rf"{failed}: the write failed after (\d+) bytes of at least (\d+) needed with (\d+) bytes free and {room} "
        r"bytes allowed in a file \(ulimit -f\); a previous file is unchanged\. Free some space or choose another "
        r"folder, then resume\. Cause: .+",
        lines[-1],
    )
    assert said, lines
    written, needed, free = map(int, said.groups())
    assert written <= room
    # The checkpoint of an epoch with a discriminator is larger than that of the one before.
    assert 0.25 * size < needed < (size if (name, stage) == QUICK else 2 * size)
    assert free > 0


@pytest.mark.parametrize("tenth", range(10))
def test_checkpoint_that_does_not_fit_leaves_the_one_before(tenth, after_one_epoch, folder, tmp_path):
    check_failed_checkpoint(*QUICK, folder, after_one_epoch(*QUICK), tmp_path / "run", (tenth + 0.5) / 10)


@pytest.mark.parametrize("share", [0.01, 0.97])
@pytest.mark.parametrize("name", [name for name in BUNDLES if name != QUICK[0]])
def test_checkpoints_of_other_bundles(name, share, after_one_epoch, folder, tmp_path):
    stage = BUNDLES[name].trainings[0]
    check_failed_checkpoint(name, stage, folder, after_one_epoch(name, stage), tmp_path / "run", share)


def test_training_goes_on_as_if_the_disk_had_never_been_full(after_one_epoch, folder, tmp_path):
    (name, stage), curves = QUICK, []
    for place in ("full", "whole"):
        root = tmp_path / place
        shutil.copytree(after_one_epoch(name, stage), root)
        if place == "full":
            assert train_on_full_disk(name, stage, folder, root, "checkpoint_epoch=2.pt", 9000)
        assert train_on_full_disk(name, stage, folder, root, "nothing", 9000) == []
        curves.append(curve(root / "runs" / stage))
    assert {row[0] for row in curves[0]} == {"1", "2"}
    assert curves[0] == curves[1]


# Everything else that is written


def check_refused(lines: list[str], root: Path, victim: str, before: dict[str, str]) -> None:
    assert complaints(lines, root) == []
    path = Path(lines[-1].split(": ")[0])
    assert fnmatch.fnmatch(path.name, victim)
    name = str(path.relative_to(root))
    assert digest(root).get(name) in (None, before.get(name))


@pytest.mark.parametrize(
    ("name", "stage", "victim"),
    [
        ("sdseg", "train_autoencoder", "config.json"),
        ("sdseg", "train_autoencoder", "manifest.json"),
        ("sdseg", "train_autoencoder", "metrics.csv"),
        ("sdseg", "train_autoencoder", "autoencoder.pt"),
        ("sdseg", "train_autoencoder", "autoencoder.json"),
        ("sdseg", "train_autoencoder", "epoch_0002_*.png"),
        ("sdseg", "train", "latent*.npy"),
        ("sdseg", "train", "latent*.json"),
        ("dmri2noddi", "train_vqgan", "*.npy"),
    ],
)
def test_what_a_training_writes(name, stage, victim, after_one_epoch, folder, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(after_one_epoch(name, "train_autoencoder" if name == "sdseg" else stage), root)
    if name == "dmri2noddi":
        shutil.rmtree(root / "runs/volumes")
    before = digest(root)
    check_refused(train_on_full_disk(name, stage, folder, root, victim, 10), root, victim, before)


def results(name: str, files: list[str], folder: Path, root: Path, victim: str, **options: Any) -> list[str]:
    """Of the demo weights."""
    options = {"dataset_dir": str(sample_data(name, folder)), "output_dir": str(root), **options}
    with limited_from(victim, 10):
        return what_a_user_reads(BUNDLES[name].runs.loaded(*files, "tiny", **options))


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("cxr_ldm", "*.png"),
        ("cxr_ldm", "0_*.json"),
        ("cxr_ldm", "*.dcm"),
        ("brain_controlnet", "*.nii.gz"),
        ("sdseg", "*_mask.png"),
        ("sdseg", "*_mask.json"),
        ("dmri2noddi", "*_odi.nii.gz"),
    ],
)
def test_what_inference_writes(name, victim, folder, tmp_path):
    own: dict[str, Any] = {"num_inference_steps": 1}
    if name == "cxr_ldm":
        own |= {"prompt": "Normal.", "dicom": True}
        own["num_inference_steps"] = 2
    lines = results(name, ["inference"], folder, tmp_path, victim, **own)
    check_refused(lines, tmp_path, victim, {})


@pytest.mark.parametrize("victim", ["summary.json", "per_image.csv", "*.png"])
def test_what_evaluation_writes(victim, folder, tmp_path):
    lines = results("sdseg", ["train", "evaluate"], folder, tmp_path, victim)
    check_refused(lines, tmp_path, victim, {})


# File systems that are really full


@pytest.fixture
def disk(tmp_path):
    """An empty file system with room for 300 kB."""
    with small_disk(tmp_path / "disk") as real:
        if not real:
            pytest.skip("may not mount a file system")
        resize(tmp_path / "disk", 300_000)
        yield tmp_path / "disk"


def run_command(name: str, stage: str, folder: Path, root: Path, **overrides: Any) -> commands.Finished:
    words = training_command(name, stage, sample_data(name, folder), root, **overrides)
    return commands.run(*words, cwd=BUNDLES[name].runs.folder, limit=120)


def test_latents_that_do_not_fit(after_one_epoch, folder, tmp_path, disk):
    """Written through a memory map they would end the process by a signal, without a word."""
    root = tmp_path / "run"
    shutil.copytree(after_one_epoch("sdseg", "train_autoencoder"), root)
    (disk / "filler").write_bytes(bytes(290_000))
    done = run_command("sdseg", "train", folder, root, latent_cache_dir=disk)
    assert done.code == 1
    assert complaints([done.last_line], disk) == []
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_tracker_that_cannot_record(after_one_epoch, folder, tmp_path, disk):
    root = tmp_path / "run"
    shutil.copytree(after_one_epoch(*QUICK), root)
    done = run_command(*QUICK, folder, root, max_epochs=2, tracking_uri=f"sqlite:///{disk}/mlflow.db")
    assert done.code == 1
    assert done.last_line.startswith(f"{disk}/mlflow.db: ")
    assert "Traceback" not in done.err


# What a kill leaves


def test_next_start_removes_half_written_files(after_one_epoch, folder, tmp_path):
    name, stage = QUICK
    root, runs = tmp_path / "run", BUNDLES[name].runs
    shutil.copytree(after_one_epoch(name, stage), root)
    strays = [f"runs/{stage}/{place}" for place in (".config.json.x", "checkpoints/.a.pt.x", "previews/.b.png.x")]
    strays += ["models/stages/.baseline.pt.x"]
    for stray in strays:
        (root / f"{stray}.incomplete").parent.mkdir(exist_ok=True)
        (root / f"{stray}.incomplete").write_text("half")
    runs.execute(stage, sample_data(name, folder), **runs.folders(root, stage), max_epochs=2)
    assert [path.name for path in root.rglob(".*.incomplete")] == []
    assert remove_incomplete(root / "absent") == []
