# SPDX-License-Identifier: Apache-2.0
"""From runs of solvers to a table, paired differences to the reference, and the number of steps they speak for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shared.metrics.confidence import Interval, mean_interval, wilson_interval
from tools.solver_steps_tasks import REFERENCE_SOLVER, SOLVERS, Metric

RULES = {
    "equal": "the fewest network evaluations for which every metric of the bundle is that of the reference (the 95 % "
    "interval of the paired difference holds 0, or lies within what the metric calls negligible), and whose images are "
    "no farther from the reference's than those of the published sampler",
    "like_published": "the fewest network evaluations that are no farther from the reference than the published "
    "sampler, in the images and in the mean of every metric (what the metric calls negligible counts as nothing)",
}


def relative_rms(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference.

    Raises:
        ValueError: other shapes, or a value that is not finite.
    """
    if values.shape != reference.shape or not bool(values.isfinite().all()):
        raise ValueError(
            f"values: expected finite numbers {tuple(reference.shape)} as the reference has, got {tuple(values.shape)} "
            f"of which {int((~values.isfinite()).sum())} are not finite"
        )
    return float((values.double() - reference.double()).norm() / reference.double().norm())


def paired_difference(values: Sequence[float], reference: Sequence[float], metric: Metric) -> Interval:
    """Mean of ``values - reference``, pair by pair, with its 95 % interval: of Student for means, else of Newcombe.

    Raises:
        ValueError: different numbers of values.
    """
    if len(values) != len(reference):
        raise ValueError(f"values: expected one for each of {len(reference)} of the reference, got {len(values)}")
    if metric.is_share:
        return paired_share_interval(values, reference)
    return mean_interval(np.subtract(values, reference))


def paired_share_interval(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Difference of two shares of the same n units (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    Where no unit changes, the interval of the differences themselves would have no width, however few units there are.
    SciPy has no interval for paired shares.

    Args:
        values, reference: 0 or 1 for each unit, n >= 1.
    """
    pairs = list(zip(values, reference, strict=True))
    n = len(pairs)
    both, first, second, neither = (
        sum((bool(a), bool(b)) == kind for a, b in pairs)
        for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    one, two = wilson_interval(both + first, n), wilson_interval(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    excess: float = both * neither - first * second
    if excess > 0:  # corrected for continuity, against a correlation that few units cannot show
        excess = max(excess - n / 2, 0)
    correlation = excess / math.sqrt(margins) if margins else 0.0
    difference = one.value - two.value

    def width(up: float, down: float) -> float:
        return math.sqrt(max(up**2 - 2 * correlation * up * down + down**2, 0.0))

    low = difference - width(one.value - one.low, two.high - two.value)
    high = difference + width(one.high - one.value, two.value - two.low)
    return Interval(difference, low, high, n)


def is_equal(difference: Interval, metric: Metric) -> bool:
    """Whether the interval holds 0 or lies within what is negligible; never without an interval."""
    if not math.isfinite(difference.low):
        return False
    inside = max(abs(difference.low), abs(difference.high)) <= metric.negligible
    return difference.low <= 0 <= difference.high or inside


def run_of(runs: Iterable[Mapping[str, Any]], value: float, solver: str, steps: int) -> Mapping[str, Any] | None:
    """The run of this value of the option, solver and number of steps, if there is one."""
    wanted = (value, solver, steps)
    return next((run for run in runs if (run["value"], run["solver"], run["steps"]) == wanted), None)


def comparison(
    runs: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric], *, reference: int, published: int
) -> list[dict[str, Any]]:
    """A row for each run whose reference is there, ordered by option, solver and steps.

    Args:
        runs: with ``value``, ``solver``, ``steps``, ``evaluations``, ``seconds``, ``latents_difference``,
            ``images_difference`` and ``values`` (metric -> a number for each unit).
        metrics: by key.
        reference: steps of the reference.
        published: steps of the published sampler.

    Returns:
        Rows with the numbers of the run, and for each metric ``mean``, ``difference`` (value, low, high, n) and
        ``equal``; ``as_near_as_published`` is None where the published sampler was not run.
    """
    rows = []
    order = list(SOLVERS)
    for run in sorted(runs, key=lambda r: (-r["value"], order.index(r["solver"]), r["steps"])):
        base = run_of(runs, run["value"], REFERENCE_SOLVER, reference)
        if base is None:
            continue
        model = run_of(runs, run["value"], REFERENCE_SOLVER, published)
        row = {name: run[name] for name in ("value", "solver", "steps", "evaluations", "seconds")}
        row |= {name: run[name] for name in ("latents_difference", "images_difference")}
        near = None if model is None else run["images_difference"] <= model["images_difference"]
        row |= {"as_near_as_published": near, "metrics": {}}
        for name, metric in metrics.items():
            difference = paired_difference(run["values"][name], base["values"][name], metric)
            row["metrics"][name] = {
                "mean": float(np.mean(run["values"][name])),
                "difference": dict(zip(("value", "low", "high", "n"), difference, strict=True)),
                "equal": is_equal(difference, metric),
            }
        rows.append(row)
    return rows


def recommended(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric], *, published: int
) -> dict[str, dict[str, dict[str, Any] | None]]:
    """By value of the option and name of a rule of ``RULES``: solver, steps, evaluations; None where no run fits."""
    result: dict[str, dict[str, dict[str, Any] | None]] = {}
    for value in dict.fromkeys(row["value"] for row in rows):
        near = [row for row in rows if row["value"] == value and row["as_near_as_published"]]
        model = run_of(near, value, REFERENCE_SOLVER, published)
        fitting = {
            "equal": [row for row in near if all(found["equal"] for found in row["metrics"].values())],
            "like_published": [row for row in near if model is not None and _no_farther(row, model, metrics)],
        }
        result[f"{value:g}"] = {rule: _fewest(fit) for rule, fit in fitting.items()}
    return result


def _no_farther(row: Mapping[str, Any], model: Mapping[str, Any], metrics: Mapping[str, Metric]) -> bool:
    own, other = ({name: abs(r["metrics"][name]["difference"]["value"]) for name in metrics} for r in (row, model))
    return all(own[name] <= max(other[name], metric.negligible) for name, metric in metrics.items())


def _fewest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    best = min(rows, key=lambda row: (row["evaluations"], row["images_difference"]), default=None)
    return None if best is None else {name: best[name] for name in ("solver", "steps", "evaluations")}


def markdown(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric], *, option: str, reference: int) -> str:
    """The rows as a table; differences that are not ``is_equal`` are in bold."""
    heads = [f"{metric.label}: mean; minus reference (95 %)" for metric in metrics.values()]
    lines = [f"| {option} | solver | steps | latents | images | {' | '.join(heads)} | CPU s |"]
    lines.append("|---" * (len(metrics) + 6) + "|")
    for row in rows:
        steps = f"{row['steps']}" + ("" if row["evaluations"] == row["steps"] else f" ({row['evaluations']} run)")
        cells = [f"{row['value']:g}", row["solver"], steps]
        for name in ("latents_difference", "images_difference"):
            cells.append("reference" if _is_reference(row, reference) else f"{row[name]:.4f}")
        for name, metric in metrics.items():
            cells.append(_metric_cell(row["metrics"][name], metric, only_mean=_is_reference(row, reference)))
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.1f')])} |")
    return "\n".join(lines) + "\n"


def _is_reference(row: Mapping[str, Any], reference: int) -> bool:
    return row["solver"] == REFERENCE_SOLVER and row["steps"] == reference


def _metric_cell(found: Mapping[str, Any], metric: Metric, *, only_mean: bool) -> str:
    digits = 2 if "dB" in metric.label else 4
    mean = f"{found['mean']:.{digits}f}"
    if only_mean:
        return mean
    difference = found["difference"]
    text = f"{difference['value']:+.{digits}f} ({difference['low']:+.{digits}f} to {difference['high']:+.{digits}f})"
    return f"{mean}; {text if found['equal'] else f'**{text}**'}"
