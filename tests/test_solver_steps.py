# SPDX-License-Identifier: Apache-2.0
"""Quality against steps: the table's statistics and rule, tiny runs of each bundle, going on after an interruption."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tools import solver_steps as tool
from tools.phantoms import dmri2noddi
from tools.solver_steps_table import (
    comparison,
    is_equal,
    markdown,
    paired_difference,
    paired_share_interval,
    recommended,
    relative_rms,
)
from tools.solver_steps_tasks import SOLVERS, TASKS, Metric

PSNR = Metric("PSNR (dB)", negligible=0.05)
SHARE = Metric("agreement", is_share=True)
TINY = {"count": 2, "reference": 5, "steps": "2,3", "check_reference": False}


def run(solver: str, steps: int, images: float, values: list[float], **other) -> dict:
    return {
        **{"value": 1.0, "solver": solver, "steps": steps, "evaluations": steps, "seconds": 1.0},
        **{"latents_difference": 2 * images, "images_difference": images, "values": {"psnr": values}},
        **other,
    }


TRUE = [20.0, 21.0, 19.5, 20.5]
RUNS = [
    run("ddim-trailing", 1000, 0.0, TRUE),
    run("ddim-trailing", 200, 0.01, [v + e for v, e in zip(TRUE, (0.1, -0.1, 0.2, -0.2), strict=True)]),
    # near enough, but surely worse
    run("dpm-karras", 5, 0.009, [v - 1 + e for v, e in zip(TRUE, (0.1, -0.1, 0.2, -0.2), strict=True)]),
    # as good, but farther than the published sampler
    run("dpm-karras", 10, 0.02, TRUE),
    run("dpm-karras", 15, 0.008, [v + 0.01 for v in TRUE]),
    run("dpm-karras", 20, 0.007, TRUE),
]


def rows_of(runs: list[dict]) -> list[dict]:
    return comparison(runs, {"psnr": PSNR}, reference=1000, published=200)


@pytest.fixture(autouse=True, scope="module")
def tasks_made_once() -> Iterator[None]:
    """Networks and phantoms do not change from run to run, and schedulers are made for each."""
    with pytest.MonkeyPatch.context() as patch:
        # Heads that just hold the block of two patches.
        small = functools.partial(dmri2noddi.make_dataset, shape=(52, 36, 34))
        patch.setattr("tools.solver_steps_tasks.dmri2noddi.make_dataset", small)
        for name, make in TASKS.items():
            patch.setitem(TASKS, name, functools.lru_cache(maxsize=4)(make))
        yield


def test_relative_rms_is_the_norm_of_the_difference_over_that_of_the_reference():
    reference = torch.tensor([3.0, 4.0])
    assert relative_rms(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_rms(7 * reference, reference) == pytest.approx(6)
    with pytest.raises(ValueError, match=r"^values: expected finite numbers \(2,\).* of which 1 are not finite"):
        relative_rms(torch.tensor([3.0, math.nan]), reference)
    with pytest.raises(ValueError, match=r"^values: expected finite numbers \(2,\).*, got \(3,\)"):
        relative_rms(torch.ones(3), reference)


def test_interval_of_paired_shares_is_newcombes():
    # Counts of both, first only, second only, neither.
    def interval(both: int, first: int, second: int, neither: int):
        values = [1] * (both + first) + [0] * (second + neither)
        other = [1] * both + [0] * first + [1] * second + [0] * neither
        return paired_share_interval(values, other)

    # His example of method 10: 36, 12, 2, 0 of 50 gives 0.2 (0.0569 to 0.3404).
    found = interval(36, 12, 2, 0)
    assert found == pytest.approx((0.2, 0.0569, 0.3404, 50), abs=1e-4)
    swapped = interval(36, 2, 12, 0)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    # Nobody changed: no difference is seen, which of twenty units says less than of a thousand.
    few, many = interval(19, 0, 0, 1), interval(950, 0, 0, 50)
    assert few.value == many.value == 0
    assert few.high - few.low > 5 * (many.high - many.low) > 0
    assert interval(20, 0, 0, 0).high > 0.1


def test_paired_difference_takes_the_pairs():
    rng = np.random.default_rng(0)
    true = rng.normal(20, 5, size=12)
    found = paired_difference(true + 0.5 + rng.normal(0, 0.01, size=12), true, PSNR)
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert found.high - found.low < 0.05
    assert paired_difference([1.0, 0.0], [1.0, 1.0], SHARE).value == -0.5
    with pytest.raises(ValueError, match="^values: expected one for each of 2 of the reference, got 1"):
        paired_difference([1.0], [1.0, 2.0], PSNR)


def test_equal_means_zero_inside_or_negligible():
    assert is_equal(paired_difference([1.0, 3.0], [2.0, 2.0], PSNR), PSNR)
    shifted = paired_difference([2.01, 2.0101], [2.0, 2.0], PSNR)
    assert shifted.low > 0
    assert is_equal(shifted, PSNR)
    assert not is_equal(shifted, Metric("PSNR (dB)", negligible=0.005))
    # One unit has no interval and proves nothing.
    assert not is_equal(paired_difference([2.0], [2.0], PSNR), PSNR)


def best_of(runs: list[dict]) -> dict:
    return recommended(rows_of(runs), {"psnr": PSNR}, published=200)["1"]


def test_rules_ask_for_metric_and_nearness():
    rows = rows_of(RUNS)
    chosen = {"solver": "dpm-karras", "steps": 15, "evaluations": 15}
    assert best_of(RUNS) == {"equal": chosen, "like_published": chosen}
    by_steps = {(row["solver"], row["steps"]): row for row in rows}
    assert not by_steps["dpm-karras", 5]["metrics"]["psnr"]["equal"]
    assert by_steps["dpm-karras", 5]["as_near_as_published"]
    assert by_steps["dpm-karras", 10]["metrics"]["psnr"]["equal"]
    assert not by_steps["dpm-karras", 10]["as_near_as_published"]
    # Without the published sampler, or without the reference, there is nothing to go by.
    assert best_of([one for one in RUNS if one["steps"] != 200]) == {"equal": None, "like_published": None}
    assert rows_of(RUNS[1:]) == []


def test_like_published_allows_what_the_published_sampler_does():
    off = [
        run("ddim-trailing", 200, 0.01, [v + 0.2 for v in TRUE]),
        run("dpm-karras", 10, 0.01, [v - 0.2 for v in TRUE]),
    ]
    runs = [RUNS[0], *off, run("dpm-karras", 8, 0.01, [v - 0.21 for v in TRUE]), RUNS[5]]
    best = best_of(runs)
    assert (best["equal"]["steps"], best["like_published"]["steps"]) == (20, 10)


def test_table_marks_what_differs():
    text = markdown(rows_of(RUNS), {"psnr": PSNR}, option="start", reference=1000)
    lines = {tuple(cell.strip() for cell in line.split("|")[2:4]): line for line in text.splitlines()[2:]}
    assert len(lines) == len(RUNS)
    assert "**-1.00 (" in lines["dpm-karras", "5"]
    assert "**" not in lines["dpm-karras", "15"]
    assert "| reference | reference | 20.25 |" in lines["ddim-trailing", "1000"]


@pytest.mark.parametrize(("bundle", "values"), [("cxr_ldm", "4,1"), ("brain_controlnet", "1")])
def test_tiny_runs(tmp_path: Path, bundle: str, values: str, capsys):
    out = tmp_path / "steps.json"
    tool.solver_steps(bundle, str(out), **TINY)
    record = json.loads(out.read_text())
    count = len(values.split(","))
    assert record["settings"]["option"] == "guidance_scale"
    assert len(record["runs"]) == len(record["comparison"]) == count * (1 + len(SOLVERS) * 2)
    by_run = {(run["value"], run["solver"], run["steps"]): run for run in record["runs"]}
    for value in map(float, values.split(",")):
        assert by_run[value, "ddim-trailing", 5]["images_difference"] == 0
        far, near = (by_run[value, "ddim-trailing", steps] for steps in (2, 3))
        assert 0 < near["images_difference"] < far["images_difference"] < 0.5
        assert near["latents_difference"] < far["latents_difference"]
        # The first step is of first order in both solvers, and so is the last: two steps are DDIM's.
        two, three = (by_run[value, "dpm-trailing", steps]["images_difference"] for steps in (2, 3))
        assert two == pytest.approx(far["images_difference"], rel=1e-4)
        assert three != pytest.approx(near["images_difference"], rel=1e-2)
        with Image.open(tmp_path / f"steps_samples/{value:g}_dpm-karras_2.png") as picture:
            assert picture.height > picture.width
    assert "guidance_scale 1, equal: none of these runs" in capsys.readouterr().out


def test_tiny_run_of_maps_starts_where_it_is_told(tmp_path: Path):
    out = tmp_path / "steps.json"
    tool.solver_steps("dmri2noddi", str(out), **{**TINY, "steps": 4, "solvers": "dpm-trailing"})
    record = json.loads(out.read_text())
    evaluations = {(run["value"], run["steps"]): run["evaluations"] for run in record["runs"]}
    assert evaluations == {(1.0, 5): 5, (1.0, 4): 4, (0.5, 5): 2, (0.5, 4): 2}
    for run in record["runs"]:
        assert set(run["values"]) == {"ndi_psnr", "odi_psnr", "fwf_psnr"}
        # Trained weights and the true maps of the same place: noise would have some 10 dB.
        assert all(len(values) == 2 and min(values) > 15 for values in run["values"].values())


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch):
    out, whole = tmp_path / "steps.json", tmp_path / "whole.json"
    options = {**TINY, "values": 1, "solvers": "dpm-karras,dpm-trailing"}
    taken: list[tuple[str, int]] = []

    class Interrupted(Exception):
        pass

    def interrupted(task, path, value, solver, steps, reference):
        if solver == "dpm-trailing":
            raise Interrupted
        taken.append((solver, steps))
        return run_one(task, path, value, solver, steps, reference)

    run_one = tool._run
    monkeypatch.setattr(tool, "_run", interrupted)
    with pytest.raises(Interrupted):
        tool.solver_steps("brain_controlnet", str(out), **options)
    assert taken == [("ddim-trailing", 5), ("dpm-karras", 2), ("dpm-karras", 3)]
    assert [(r["solver"], r["steps"]) for r in json.loads(out.read_text())["runs"]] == taken

    monkeypatch.setattr(tool, "_run", lambda *args: taken.append(args[3:5]) or run_one(*args))
    tool.solver_steps("brain_controlnet", str(out), **options)
    assert taken[3:] == [("dpm-trailing", 2), ("dpm-trailing", 3)]
    monkeypatch.setattr(tool, "_run", run_one)
    tool.solver_steps("brain_controlnet", str(whole), **options)
    runs = [json.loads(path.read_text())["runs"] for path in (out, whole)]
    for one, two in zip(*runs, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}

    with pytest.raises(ValueError, match=r"steps\.json: expected results of the same seed, got others"):
        tool.solver_steps("brain_controlnet", str(out), **{**options, "seed": 1})
    (tmp_path / "steps_samples/reference_1.pt").unlink()
    with pytest.raises(ValueError, match=r"steps\.json: expected the samples of its reference in .*reference_1\.pt"):
        tool.solver_steps("brain_controlnet", str(out), **{**options, "steps": 4})


def test_planted_fault_shows(tmp_path: Path, monkeypatch):
    """A solver that halves what the network predicts is farther off, and its slices are worse."""
    kind = SOLVERS["dpm-karras"][0]
    step = kind.step
    options = {**TINY, "solvers": "dpm-trailing", "steps": 3}
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    tool.solver_steps("brain_controlnet", str(good), **options)
    monkeypatch.setattr(kind, "step", lambda self, output, t, sample: step(self, 0.5 * output, t, sample))
    tool.solver_steps("brain_controlnet", str(bad), **options)
    good_row, bad_row = (json.loads(path.read_text())["comparison"][0] for path in (good, bad))
    assert bad_row["images_difference"] > 5 * good_row["images_difference"]
    assert bad_row["metrics"]["psnr"]["mean"] < good_row["metrics"]["psnr"]["mean"] - 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bundle": "sdseg"}, "bundle: expected one of cxr_ldm, brain_controlnet, dmri2noddi, got 'sdseg'"),
        ({"steps": "5,0"}, "--steps: expected a whole number from 1 to 1000, got '0'"),
        ({"steps": 1001}, "--steps: expected a whole number from 1 to 1000, got 1001"),
        ({"solvers": "dpm-karras,euler"}, r"--solvers: expected some of dpm-karras.*got \['euler'\]"),
        ({"count": -1}, "--count: expected a whole number from 0"),
        ({"threads": 0}, "--threads: expected a whole number from 1"),
    ],
)
def test_options_are_checked_before_anything_is_made(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        tool.solver_steps(**{"bundle": "cxr_ldm", "out": str(tmp_path / "x.json"), **options})
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_overwritten(tmp_path: Path):
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"notes\.json: expected results of this tool, got another file"):
        tool.solver_steps("cxr_ldm", str(out), **TINY)
    assert out.read_text() == '{"mine": 1}'
