# SPDX-License-Identifier: Apache-2.0
"""The small trainings of all bundles as commands, each with the data and the earlier stages it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import commands
from tests.bundle_runs import BundleRuns
from tests.dmri_runs import DMRI, make_phantoms
from tests.sdseg_runs import SDSEG
from tests.test_brain_bundle import BRAIN
from tests.test_cxr_bundle import CXR
from tools.phantoms import brain_controlnet, cxr_ldm, sdseg

Command = tuple[str, ...]
LIMIT = 180  # seconds for a workflow


@dataclass(frozen=True)
class SmallBundle:
    """A bundle with sample data.

    Attributes:
        runs: its workflows, small.
        make_data: writes the sample data into a folder.
        trainings: stages in their order; each needs the weights of those before it.
    """

    runs: BundleRuns
    make_data: Callable[[Path], Any]
    trainings: tuple[str, ...]


BUNDLES = {
    "cxr_ldm": SmallBundle(
        CXR,
        lambda folder: cxr_ldm.make_dataset(str(folder), n=28, size=128, split=(0.35, 0.2, 0.45)),
        ("train_autoencoder", "train"),
    ),
    "brain_controlnet": SmallBundle(
        BRAIN,
        lambda folder: brain_controlnet.make_dataset(
            str(folder), n=8, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0), split=(0.5, 0.25, 0.25)
        ),
        ("train_autoencoder", "train_diffusion", "train", "train_regression"),
    ),
    "sdseg": SmallBundle(
        SDSEG,
        lambda folder: sdseg.make_dataset(str(folder), num_images=24),
        ("train_autoencoder", "train", "train_baseline"),
    ),
    "dmri2noddi": SmallBundle(DMRI, make_phantoms, ("train_vqgan", "train_encoder", "train", "train_baseline")),
}


def sample_data(name: str, folder: Path) -> Path:
    """The sample data of a bundle in a folder, made if it is not there yet."""
    data = folder / "data" / name
    if not (data / "datalist.json").exists():
        BUNDLES[name].make_data(data)
    return data


def with_earlier_weights(name: str, stage: str, folder: Path, root: Path) -> Path:
    """``root`` with the weights of the stages before, which are trained once and kept in ``folder``."""
    (root / "models").mkdir(parents=True)
    trained = folder / "trained" / name
    bundle = BUNDLES[name]
    for earlier in bundle.trainings[: bundle.trainings.index(stage)]:
        place = trained / earlier
        if not place.exists():
            unfinished = with_earlier_weights(name, earlier, folder, trained / f"{earlier}_unfinished")
            finish(name, training_command(name, earlier, sample_data(name, folder), unfinished))
            unfinished.rename(place)
        shutil.copytree(place / "models", root / "models", dirs_exist_ok=True)
    return root


def finish(name: str, words: Command) -> commands.Finished:
    """Run a command in a bundle's folder; it must succeed."""
    done = commands.run(*words, cwd=BUNDLES[name].runs.folder, limit=LIMIT)
    if done.code:
        raise RuntimeError(f"{name}: expected {' '.join(words[:5])} to succeed, got {done.code}: {done.last_line}")
    return done


def training_command(name: str, stage: str, data: Path, root: Path, **overrides: Any) -> Command:
    """Words after ``python -m`` for a training that writes below ``root``; to be run in the bundle's folder."""
    runs = BUNDLES[name].runs
    return workflow_command(runs, stage, data, run_id="training", **{**runs.folders(root, stage), **overrides})


def workflow_command(
    runs: BundleRuns, stages: str, data: Path, *, run_id: str | None = None, **overrides: Any
) -> Command:
    """Words after ``python -m`` for a workflow, or one with overlays: ``train evaluate``."""
    names = stages.split()
    options = {**runs.stages[names[0]], "dataset_dir": str(data), **overrides}
    files = ",".join(f"'configs/{name}.json'" for name in (*names, "tiny"))
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return ("monai.bundle", "run", *([run_id] if run_id else []), "--config_file", f"[{files}]", *arguments)
