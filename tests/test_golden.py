# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import golden_values, small_stages

# Relative, by iteration. Random numbers are torch's on the CPU, the same in every build, but other kernels sum in
# another order, and steps magnify that: without oneDNN losses moved by at most 2e-7, 6e-6, 3e-4, 1.5e-3 and 5e-4.
LOSS_TOLERANCES = (1e-4, 1e-3, 1e-2, 1e-2, 1e-2)
# Absolute, for values in [0, 1]; without oneDNN 1e-4. A grey level of a PNG is 0.004.
BLOCK_TOLERANCE = 0.02
WHOLE_TOLERANCE = 0.005


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_stages.prepare(tmp_path_factory.mktemp("stages"))


def test_golden_values_exist_for_every_training_and_bundle():
    losses, demo = golden_values.stored("losses"), golden_values.stored("demo")
    assert losses["values"].keys() == set(small_stages.STAGES)
    assert demo["values"].keys() == set(golden_values.DEMO)
    assert demo["setting"]["options"] == golden_values.DEMO
    assert all(demo["values"].values())


@pytest.mark.parametrize("stage", small_stages.STAGES)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_first_losses_stay_what_they_were(stage, data, tmp_path):
    expected = golden_values.stored("losses")["values"][stage]
    found = golden_values.losses(stage, data, tmp_path)
    assert len(found) == golden_values.ITERATIONS
    for number, (new, old) in enumerate(zip(found, expected, strict=True), start=1):
        tolerance = LOSS_TOLERANCES[number - 1]
        assert new == pytest.approx(old, rel=tolerance, abs=1e-6), f"iteration {number}"


@pytest.mark.reliability(7)
@pytest.mark.parametrize("bundle", golden_values.DEMO)
def test_demo_weights_make_what_they_made(bundle, tmp_path, record_property):
    expected = golden_values.stored("demo")["values"][bundle]
    found = golden_values.demo(bundle, tmp_path)
    assert found.keys() == expected.keys()
    largest = max(_distance(found[name], expected[name]) for name in expected)
    record_property("cases", len(expected))
    record_property("figure", f"{bundle}: block means of {len(expected)} demo outputs within {largest:.1e}")


def _distance(new: dict[str, Any], old: dict[str, Any]) -> float:
    """The largest difference of a block's mean."""
    assert new["shape"] == old["shape"]
    for name in ("mean", "sd"):
        assert new[name] == pytest.approx(old[name], abs=WHOLE_TOLERANCE)
    blocks = [np.array(values["blocks"].split(), dtype=float) for values in (new, old)]
    distance = float(np.abs(blocks[0] - blocks[1]).max())
    assert distance < BLOCK_TOLERANCE
    return distance
