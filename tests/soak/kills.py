# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed with ``kill -9`` at random moments and started again by the same command.

Half of the kills come after a random time, half as soon as a file is being written after it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared.files import TEMPORARY_SUFFIX
from shared.handlers.checkpoint import checkpoints_in
from tests import commands
from tests.bundle_runs import curve
from tests.soak.campaign import Campaign, Case
from tests.soak.trainings import (
    BUNDLES,
    LIMIT,
    Command,
    finish,
    sample_data,
    training_command,
    with_earlier_weights,
)

TRAININGS = [(name, stage) for name, bundle in BUNDLES.items() for stage in bundle.trainings]
KILLS = 3  # of each training


@dataclass
class Killed:
    """What became of a training.

    Attributes:
        kills: kills after the first checkpoint.
        early: kills before it: nothing to load yet.
        writing: kills of both kinds that left a half-written file.
        problems: what was wrong.
    """

    kills: int = 0
    early: int = 0
    writing: int = 0
    problems: list[str] = field(default_factory=list)


def kill_and_resume(
    name: str, stage: str, folder: Path, place: Path, *, rng: random.Random, kills: int, epochs: int, workers: int = 0
) -> Killed:
    """Train once undisturbed and once with kills, below ``place``, and compare.

    Args:
        folder: of the sample data and the earlier stages.
        kills: wanted after the first checkpoint; fewer where the training is faster.
    """
    data, result = sample_data(name, folder), Killed()
    roots = [with_earlier_weights(name, stage, folder, place / root) for root in ("whole", "killed")]
    words = [training_command(name, stage, data, root, max_epochs=epochs, num_workers=workers) for root in roots]
    cwd = BUNDLES[name].runs.folder
    whole, killed = (root / "runs" / stage for root in roots)
    finish(name, words[0])
    checkpoints = checkpoints_in(whole / "checkpoints")
    seconds = checkpoints[-1].stat().st_mtime - (whole / "manifest.json").stat().st_mtime
    for _ in range(3 * kills):
        before = checkpoints_in(killed / "checkpoints")
        remaining = seconds * (1 - (_epoch(before[-1]) if before else 0) / epochs)
        delay = rng.uniform(0, 0.9 * remaining / (kills - result.kills))
        finished = _killed_at(words[1], cwd, roots[1], killed, delay, writing=rng.random() < 0.5)
        if finished.code != -9:
            _check_resumed(finished, before, epochs, result)
            break
        result.writing += bool(_half_written(roots[1]))
        after = checkpoints_in(killed / "checkpoints")
        result.kills += bool(after)
        result.early += not after
        result.problems += _unreadable(roots[1], killed)
        if result.kills == kills:
            break
    before = checkpoints_in(killed / "checkpoints")
    finished = commands.run(*words[1], cwd=cwd, limit=LIMIT)
    _check_resumed(finished, before, epochs, result)
    result.problems += [] if finished.code else _differences(roots, stage)
    return result


def _killed_at(words: Command, cwd: Path, root: Path, run: Path, delay: float, *, writing: bool) -> commands.Finished:
    manifest = run / "manifest.json"
    before = manifest.stat().st_ino if manifest.exists() else None
    running = commands.start(*words, cwd=cwd)
    deadline = time.monotonic() + LIMIT
    # Written when the training begins.
    while running.running and (not manifest.exists() or manifest.stat().st_ino == before):
        if time.monotonic() > deadline:
            running.kill()
            raise RuntimeError(f"{run}: the training did not begin within {LIMIT} s")
        time.sleep(0.002)
    time.sleep(delay)
    while writing and running.running and not _half_written(root) and time.monotonic() < deadline:
        time.sleep(0.0005)
    running.kill()
    return running.wait(LIMIT)


def _epoch(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("=")[1])


def _half_written(root: Path) -> list[Path]:
    return list(root.rglob(f".*{TEMPORARY_SUFFIX}"))


def _check_resumed(finished: commands.Finished, before: list[Path], epochs: int, result: Killed) -> None:
    said = finished.out + finished.err
    if finished.code:
        result.problems.append(f"ended by itself with {finished.code}: {finished.last_line}")
    elif before and _epoch(before[-1]) < epochs and f"resuming from {before[-1]}" not in said:
        result.problems.append(f"did not resume from {before[-1].name}: {finished.last_line}")


def _unreadable(root: Path, run: Path) -> list[str]:
    """Files that are neither whole nor temporary: weights and checkpoints that do not load, broken JSON and curves."""
    problems = []
    for path in sorted(root.rglob("*")):
        if path.name.startswith(".") or path.suffix not in (".pt", ".json"):
            continue
        try:
            if path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True)
            else:
                json.loads(path.read_text())
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__} {error}")
    if (run / "metrics.csv").exists() and not (run / "metrics.csv").read_bytes().endswith(b"\n"):
        problems.append(f"{run / 'metrics.csv'}: half a row")
    return problems


def _differences(roots: list[Path], stage: str) -> list[str]:
    whole, killed = (curve(root / "runs" / stage) for root in roots)
    problems = []
    if whole != killed:
        pairs = zip(whole, killed, strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), f"{len(whole)} rows, {len(killed)} rows")
        problems.append(f"curves differ: {first}")
    for path in sorted((roots[0] / "models").rglob("*.pt")):
        other = roots[1] / path.relative_to(roots[0])
        if not other.exists() or not _equal(path, other):
            problems.append(f"{other}: differs from the undisturbed training's")
    return problems + [f"{path}: left behind" for path in _half_written(roots[1])]


def _equal(one: Path, two: Path) -> bool:
    states: list[dict[str, Any]] = [torch.load(path, weights_only=True) for path in (one, two)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def case(folder: Path, rng: random.Random, number: int) -> Case:
    name, stage = TRAININGS[number % len(TRAININGS)]
    workers = 2 * ((number + number // len(TRAININGS)) % 2)
    place = folder / f"kills{number}"
    done = kill_and_resume(name, stage, folder, place, rng=rng, kills=KILLS, epochs=6, workers=workers)
    if not done.problems:
        shutil.rmtree(place)
    return Case(
        f"{name} {stage}, {workers} workers: {done.kills} kills",
        survived=0 if done.problems else done.kills,
        tried=done.kills,
        problems=tuple(done.problems),
        counts={"more before the first checkpoint": done.early, "left a half-written file": done.writing},
    )


CAMPAIGN = Campaign(
    "kills", 1, "kill -9 at random moments, resumed bit for bit", share=0.35, target=KILLS * len(TRAININGS), case=case
)
