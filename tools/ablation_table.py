# SPDX-License-Identifier: Apache-2.0
"""The results of an ablation: read from the evaluations of its arms, written as JSON, as a page and as a chart."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.handlers.segmentation_evaluation import ONE_SAMPLE
from shared.metrics.segmentation import MEAN
from shared.metrics.segmentation_table import summary_over_groups
from tools.ablation_arms import BASELINE, NOISE_ONLY, PUBLISHED
from tools.report_chart import Series, line_chart, standalone
from tools.report_html import number

_CURVES = {PUBLISHED.name: ("latent weight 1", "train"), NOISE_ONLY.name: ("latent weight 0", "validation")}


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of an arm.

    Attributes:
        arm: name.
        steps: reverse steps; None for the baseline.
        folder: that holds `summary.json`, `protocol.json` and `per_image.csv`.
        method: the arm's name in these files.
    """

    arm: str
    steps: int | None
    folder: Path
    method: str = ONE_SAMPLE

    def value(self, measure: str) -> dict[str, Any]:
        """`value`, `ci_low`, `ci_high`, `n`, `groups` and `note` of a measure, over classes, at native resolution.

        Raises:
            ValueError: the summary has no such row, or no value in that of Dice.
        """
        path = self.folder / "summary.json"
        rows = [
            row
            for row in json.loads(path.read_text(encoding="utf-8"))
            if (row.get("method"), row.get("measure")) == (self.method, measure)
            and row.get("resolution", "native") == "native"
        ]
        row = next((row for row in rows if row.get("class") == MEAN), rows[0] if rows else None)
        if measure in ("dice", "iou") and (row is None or row["value"] is None):
            raise ValueError(
                f"{path}: expected {measure} of {self.method!r} at native resolution, got {row}; was another "
                "configuration evaluated?"
            )
        names = ("value", "ci_low", "ci_high", "n", "groups", "note")
        return {name: None if row is None else row.get(name) for name in names}

    def dices(self) -> dict[str, tuple[float, str]]:
        """Name of each image -> Dice at native resolution over classes, and its group."""
        with (self.folder / "per_image.csv").open(newline="", encoding="utf-8") as file:
            lines = [
                line for line in csv.DictReader(file) if (line["method"], line["resolution"]) == (self.method, "native")
            ]
        if any(line["class"] == MEAN for line in lines):
            lines = [line for line in lines if line["class"] == MEAN]
        return {line["name"]: (float(line["dice"]), line["group"]) for line in lines}

    def protocol(self) -> dict[str, Any]:
        return json.loads((self.folder / "protocol.json").read_text(encoding="utf-8"))


def result_rows(evaluations: Sequence[Evaluation], *, root: Path) -> list[dict[str, Any]]:
    """A row for each evaluation: Dice, IoU, their intervals, the paired difference from the first one, the cost.

    Args:
        evaluations: the first one is what the others are compared with.
        root: folder to which `evaluation`, the place of the files, is relative.
    """
    reference = evaluations[0].dices()
    rows = []
    for index, one in enumerate(evaluations):
        dices = one.dices()
        if dices.keys() != reference.keys():
            raise ValueError(
                f"{one.folder / 'per_image.csv'}: expected the {len(reference)} images of {evaluations[0].folder}, got "
                f"{len(dices)}; remove both folders and run again"
            )
        differences = [dice - reference[name][0] for name, (dice, _) in dices.items()]
        groups = [group for _, group in dices.values()]
        rows.append(
            {
                "arm": one.arm,
                "steps": one.steps,
                "dice": one.value("dice"),
                "iou": one.value("iou"),
                "difference": summary_over_groups("", differences, groups, "paired by image") if index else None,
                "seconds_per_image": one.value("seconds")["value"],
                "peak_memory_mb": one.value("memory_mb")["value"],
                "evaluation": one.folder.relative_to(root).as_posix(),
            }
        )
    return rows


def parameter_counts(path: Path) -> dict[str, int]:
    """Number of weights in a file by the first word of their names (`unet`, ...), without buffers that are scalars."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    counts: dict[str, int] = {}
    for name, tensor in state.items():
        if tensor.ndim:
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + tensor.numel()
    return counts


def page(content: Mapping[str, Any]) -> str:
    """The content of `ablation.json` as Markdown."""
    setting, rows, trainings = content["setting"], content["results"], content["trainings"]
    first = _called(rows[0])
    results = [
        [
            row["arm"],
            "-" if row["steps"] is None else str(row["steps"]),
            _interval(row["dice"]),
            _interval(row["iou"]),
            "" if row["difference"] is None else _interval(row["difference"], sign="+"),
            _shown(row["seconds_per_image"]),
            _shown(row["peak_memory_mb"]),
        ]
        for row in rows
    ]
    heads = ["arm", "reverse steps", "Dice", "IoU", f"Dice minus {first}", "s per image", "peak memory (MB)"]
    learned = [
        [
            one["arm"],
            one["differs"],
            f"{sum(one['parameters'].values()):,} ({one['trained_parameters']:,})",
            f"{one['epochs']} ({one['best_epoch']})",
            f"{one['iterations']}",
            f"{one['seconds'] / 60:.1f}" + (f" in {one['processes']} runs" if one["processes"] > 1 else ""),
            ", ".join(f"{_shown(value)}" for value in (one["validation"] or {}).values()),
        ]
        for one in trainings
    ]
    learned_heads = ["arm", "differs from the published method in", "parameters (trained)", "epochs (best)"]
    learned_heads += ["training steps", "minutes", "validation Dice"]
    lines = [
        f"# Ablation of {content['bundle']}",
        "",
        f"{setting['images']} {setting['section']} images of {setting['groups']} groups, "
        f"{setting['samples']} sample(s) an image of which the first counts, seed {setting['seed']}, on "
        f"{setting['device']}. Dice and IoU are means over images at native resolution with 95 % intervals in brackets "
        f"({setting['interval']}). Written by `{content['command']}`.",
        "",
        _table(heads, results, left=1),
        "",
        *([f"![Dice against the number of reverse steps]({content['chart']})", ""] if content["chart"] else []),
        "## Trainings",
        "",
        f"Budget of each: {setting['budget']}. {setting['training_images']} training images, the released epoch chosen "
        f"by {setting['validation_images']} validation images; validation is within the time, loading is not.",
        "",
        _table(learned_heads, learned, left=2),
        "",
        "## Setting",
        "",
        *(f"- {name}: {text}" for name, text in _facts(content)),
    ]
    return "\n".join(lines) + "\n"


def steps_chart(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Dice against reverse steps with and without the latent loss, as SVG; None where neither was evaluated."""
    curves = []
    for name, (label, style) in _CURVES.items():
        points = [(float(row["steps"]), float(row["dice"]["value"])) for row in rows if row["arm"] == name]
        if points:
            curves.append(Series(label, style, points))
    if not curves:
        return None
    svg = line_chart(curves, label="Dice against the number of reverse steps", x_label="reverse steps")
    return standalone(svg, curves, title="Dice, one sample")


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    setting = content["setting"]
    software = ", ".join(f"{name} {version}" for name, version in setting["software"].items())
    return [
        ("data", f"`datalist.json` with SHA-256 {setting['datalist_sha256']}"),
        ("autoencoder of all arms", f"SHA-256 {setting['autoencoder_sha256']}"),
        ("configurations", ", ".join(setting["files"])),
        ("overrides", ", ".join(f"{k}={v}" for k, v in setting["overrides"].items()) or "none"),
        ("software", software),
        ("commit", str(setting["git_commit"])),
        ("seconds per image", f"median; {setting['time']}"),
        ("peak memory", f"{setting['memory']}; not measured for {BASELINE.name}, which runs beside another arm"),
        *((name, text) for name, text in setting["conventions"].items()),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Markdown; all but the first `left` columns to the right."""
    rule = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *rows))


def _called(row: Mapping[str, Any]) -> str:
    return f"{row['arm']}, {row['steps']} step{'s' if row['steps'] != 1 else ''}"


def _shown(value: float | None) -> str:
    return "not measured" if value is None else number(value)


def _interval(cell: Mapping[str, Any], *, sign: str = "") -> str:
    value = f"{cell['value']:{sign}.4f}"
    if cell["ci_low"] is None:
        return f"{value} [no interval: {cell['groups']} groups]"
    return f"{value} [{cell['ci_low']:{sign}.4f}, {cell['ci_high']:{sign}.4f}]"
