# SPDX-License-Identifier: Apache-2.0
"""Run the workflows of a bundle in this process, small, and read what they leave behind."""

from __future__ import annotations

import contextlib
import copy
import csv
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from tests import commands
from tests.bundle_tools import read
from tests.conftest import ROOT


class Interruption(Exception):
    """Stands for a crash."""


@dataclass(frozen=True)
class BundleRuns:
    """A bundle and what makes its workflows small.

    Attributes:
        name: folder below ``bundles/``.
        stages: name of a stand-alone configuration -> overrides for a test, over ``tiny.json``.
        cached: stages that keep latents on the disk.
    """

    name: str
    stages: Mapping[str, Mapping[str, Any]]
    cached: Collection[str] = ("train",)

    @property
    def folder(self) -> Path:
        return ROOT / "bundles" / self.name

    def config(self, name: str) -> dict[str, Any]:
        return read(self.folder / f"configs/{name}.json")

    def folders(self, root: Path, stage: str) -> dict[str, str]:
        """Overrides that keep what a stage writes below ``root``, where the next stage looks for it."""
        result = {"ckpt_dir": str(root / "models"), "output_dir": str(root / "runs" / stage)}
        return {**result, "latent_cache_dir": str(root / "runs/latents")} if stage in self.cached else result

    @contextlib.contextmanager
    def loaded(self, *names: str, **overrides: Any) -> Iterator[ConfigWorkflow]:
        """The workflow of configuration files, initialized; what it changes in the process is undone."""
        path, hook = list(sys.path), sys.excepthook
        training = names[0].startswith("train") and not any(name.startswith("evaluate") for name in names)
        workflow = ConfigWorkflow(
            config_file=[str(self.folder / "configs" / f"{name}.json") for name in names],
            logging_file=False,
            run_id="training" if training else "run",
            workflow_type="train" if names[0].startswith("train") else "inference",
            **{"bundle_root": str(self.folder), **overrides},
        )
        try:
            workflow.initialize()
            yield workflow
        finally:
            sys.path[:], sys.excepthook = path, hook

    @contextlib.contextmanager
    def small(self, stage: str, dataset_dir: Path, overrides: Mapping[str, Any]) -> Iterator[ConfigWorkflow]:
        """The small workflow of a stage, or of one with overlays: ``train evaluate``."""
        names = stage.split()
        # MONAI writes nested overrides (``unet_def#in_channels``) into the very dictionaries that it was given.
        options = copy.deepcopy({**self.stages[names[0]], "dataset_dir": str(dataset_dir), **overrides})
        with self.loaded(*names, "tiny", **options) as workflow:
            yield workflow

    def execute(self, stage: str, dataset_dir: Path, /, **overrides: Any) -> ConfigWorkflow:
        with self.small(stage, dataset_dir, overrides) as workflow:
            workflow.run()
        return workflow

    def command(self, *names: str, limit: float = 240, **overrides: Any) -> commands.Finished:
        """The documented command in the bundle's folder, a process of its own, with the options of the small runs."""
        files = "[" + ",".join(f"'configs/{name}.json'" for name in (*names, "tiny")) + "]"
        options = [f"--{key}={value}" for key, value in {**self.stages[names[0]], **overrides}.items()]
        run = ("run", "training") if names[0].startswith("train") and len(names) == 1 else ("run",)
        return commands.run("monai.bundle", *run, "--config_file", files, *options, cwd=self.folder, limit=limit)

    def train_and_crash(self, stage: str, dataset_dir: Path, crash_at: int | None, /, **overrides: Any) -> list[int]:
        """Run a training until an iteration, and return the iterations that were done."""
        done: list[int] = []

        def step(engine: Any) -> None:
            done.append(engine.state.iteration)
            if engine.state.iteration == crash_at:
                raise Interruption

        with self.small(stage, dataset_dir, overrides) as workflow:
            workflow.parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_COMPLETED, step)
            # MONAI wraps every error of an expression.
            with pytest.raises(RuntimeError) if crash_at else contextlib.nullcontext():
                workflow.run()
        return done

    def last_line(self, stage: str, dataset_dir: Path, capsys: pytest.CaptureFixture[str], /, **overrides: Any) -> str:
        """What a user reads last when the workflow fails."""
        with self.small(stage, dataset_dir, overrides) as workflow:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - the message is what is tested
                workflow.run()
            capsys.readouterr()
            sys.excepthook(caught.type, caught.value, caught.tb)
        return capsys.readouterr().err.strip().splitlines()[-1]


def curve(run: Path, phase: str | None = None, name: str | None = None) -> list[tuple[str, ...]]:
    """Rows of ``metrics.csv`` without their time: (epoch, iteration, phase, name, value)."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if phase in (None, row["phase"]) and name in (None, row["name"])]
    return sorted(tuple(value for key, value in row.items() if key != "time") for row in chosen)
