# SPDX-License-Identifier: Apache-2.0
"""Released weights, damaged at random, given to inference."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests import commands
from tests.soak.campaign import Campaign, Case
from tests.soak.fuzzing import complaints, damage, results, values
from tests.soak.trainings import BUNDLES, sample_data

LIMIT = 60


def _infer(name: str, data: Path, weights: Path, out: Path) -> commands.Finished:
    words: tuple[Any, ...] = ("--ckpt_dir", weights, "--output_dir", out, "--num_inference_steps", "2")
    if name != "cxr_ldm":
        words += ("--dataset_dir", data)
    files = "['configs/inference.json','configs/tiny.json']"
    return commands.run(
        *("monai.bundle", "run", "--config_file", files, *words), cwd=BUNDLES[name].runs.folder, limit=LIMIT
    )


def _undisturbed(name: str, folder: Path) -> Path:
    out = folder / "released" / name
    if not out.exists():
        data, released = sample_data(name, folder), BUNDLES[name].runs.folder / "models/tiny"
        done = _infer(name, data, released, out)
        if done.code:
            raise RuntimeError(f"{name}: inference with the released weights failed: {done.last_line}")
    return out


def _different(out: Path, expected: Path) -> list[str]:
    names = [path.relative_to(expected) for path in results(expected)]
    if [path.relative_to(out) for path in results(out)] != names:
        return ["exit code 0 with other files"]
    return [
        f"{name}: differs from what the whole weights give"
        for name in names
        if not np.array_equal(values(out / name), values(expected / name), equal_nan=False)
    ]


def case(folder: Path, rng: random.Random, number: int) -> Case:
    """Half of the files with their description, which states the SHA-256, half alone."""
    name = list(BUNDLES)[number % len(BUNDLES)]
    expected = _undisturbed(name, folder)
    place = folder / f"weights{number}"
    place.mkdir()
    described = rng.random() < 0.5
    shutil.copyfile(BUNDLES[name].runs.folder / "models/tiny/model.pt", place / "model.pt")
    if described:
        shutil.copyfile(BUNDLES[name].runs.folder / "models/tiny/model.json", place / "model.json")
    victim = place / ("model.json" if described and rng.random() < 0.2 else "model.pt")
    changed, what = damage(victim.read_bytes(), rng)
    victim.write_bytes(changed)
    done = _infer(name, sample_data(name, folder), place, place / "out")
    problems = complaints(done, place)
    if done.code == 0:
        problems += _different(place / "out", expected)
    if not problems:
        shutil.rmtree(place)
    return Case(
        f"{name}, {victim.name}{'' if described else ' alone'}: {what}; exit code {done.code}",
        survived=int(not problems),
        problems=tuple(problems),
        counts={"refused": int(done.code != 0), "read with equal results": int(done.code == 0)},
    )


CAMPAIGN = Campaign("weights", 7, "released weights damaged at random", share=0.15, target=120, case=case)
