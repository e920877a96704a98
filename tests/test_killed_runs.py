# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed with ``kill -9``; many more kills, of every stage: ``make soak``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.soak.kills import kill_and_resume
from tests.soak.trainings import BUNDLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.mark.reliability(1)
@pytest.mark.parametrize(("name", "workers"), list(zip(BUNDLES, (0, 2, 2, 0), strict=True)))
def test_killed_process_resumes_bit_for_bit(name, workers, folder, tmp_path, record_property):
    """The documented command; its checkpoints load after the kill, and curves and weights are those of no kill."""
    stage, runs = BUNDLES[name].trainings[0], BUNDLES[name].runs.folder / "runs"
    seed = random.SystemRandom().randrange(10**6)
    present = sorted(runs.rglob("*"))
    done = kill_and_resume(name, stage, folder, tmp_path, rng=random.Random(seed), kills=1, epochs=3, workers=workers)
    assert done.problems == [], f"seed {seed}"
    assert done.kills + done.early > 0
    assert sorted(runs.rglob("*")) == present, "the run wrote outside of the test's folder"
    record_property("cases", done.kills + done.early)
    record_property("figure", f"{stage}, {workers} workers: {done.kills} after and {done.early} before a checkpoint")
