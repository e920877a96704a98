# SPDX-License-Identifier: Apache-2.0
"""The files of a segmentation's evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shared.files import save_json
from shared.handlers.cost import CallCost, cost_rows, setting_of
from shared.metrics.segmentation import CONVENTIONS, MEAN
from shared.metrics.segmentation_table import ItemScore, scored_rows, summary_over_groups
from shared.metrics.stability import MEASURES
from shared.pictures import INTENDED_USE, save_grid
from shared.segmentation_picture import comparison_row
from shared.segmentation_probability import mask_of
from shared.tables import summary_text, without_nan, write_table

logger = logging.getLogger(__name__)

PICTURES = ("worst", "median", "best")


class Case(NamedTuple):
    """What a picture shows of an item, in 8 bits: image (1 or 3, h, w), label (h, w), probability (N, h, w)."""

    name: str
    image: torch.Tensor
    label: torch.Tensor
    probability: torch.Tensor

    @classmethod
    def of(
        cls, name: str, image: torch.Tensor, label: torch.Tensor, probability: torch.Tensor, *, threshold: float
    ) -> Case:
        """A picture, or of a volume the slice with most foreground in truth and prediction together."""
        if label.ndim == 3:
            found = mask_of(probability, threshold=threshold) > 0
            index = int(((label > 0).float() + found.cpu().float()).sum(dim=(0, 1)).argmax())
            image, label, probability = image[..., index], label[..., index], probability[..., index]
        bytes_ = [(255 * part.clamp(0, 1)).round().to("cpu", torch.uint8) for part in (image, probability)]
        return cls(name, bytes_[0], label.to("cpu", torch.uint8), bytes_[1])


class MeasuredImage(NamedTuple):
    """What was measured of an item: method -> note, lines of ``per_image.csv``, that of ``stability.csv`` where samples
    were compared, and what a picture shows."""

    methods: dict[str, str]
    scores: list[ItemScore]
    stability: dict[str, Any] | None
    case: Case


class SegmentationResults:
    """Writes what was measured into ``evaluation``, each file whole or not at all:

    - ``summary.json``: rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}`` with ``sd``, ``median``,
      ``method``, ``measure`` and the heading ``group`` they stand under, as ``tools.report`` shows them;
    - ``protocol.json``: conventions in words, classes, sizes, device, versions, the data's SHA-256;
    - ``per_image.csv``: a line per image or volume, method, resolution and class; names and groups are those of the
      data list, so it is as private as that;
    - ``stability.csv``: a line per image, where samples were compared;
    - ``worst.png``, ``median.png``, ``best.png``: cases by Dice of the first sample at native resolution.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[MeasuredImage],
        *,
        own: Sequence[str],
        class_names: Mapping[int, str],
        threshold: float,
        empty_score: float,
        num_samples: int,
        dataset_dir: str | os.PathLike[str] | None,
        max_pictures: int,
    ) -> None:
        self.folder, self.own, self.class_names = folder, list(own), dict(class_names)
        self.threshold, self.empty_score, self.num_samples = threshold, empty_score, num_samples
        self.dataset_dir, self.max_pictures = dataset_dir, max_pictures
        self.methods = {method: note for item in items for method, note in item.methods.items()}
        self.scores = [score for item in items for score in item.scores]
        self.stability = [item.stability for item in items if item.stability is not None]
        self.cases = [item.case for item in items]

    def write(self, *, cost: CallCost, device: torch.device, stability_notes: Mapping[str, str]) -> dict[str, float]:
        """Write everything; returns name -> value of all rows for the engine's metrics."""
        if not self.scores:
            raise ValueError("evaluation: expected at least one image, got none; check the section of datalist.json")
        summary = scored_rows(self.scores, self.methods, own=self.own)
        summary += self._stability_rows(stability_notes) + self._cost_rows(cost, device)
        save_json(summary, self.folder / "summary.json")
        save_json(self._protocol(cost, device), self.folder / "protocol.json")
        write_table(self.folder / "per_image.csv", [without_nan(one.columns) for one in self.scores])
        write_table(self.folder / "stability.csv", [without_nan(line) for line in self.stability])
        self._write_pictures()
        named = [row | {"name": f"{row['name']} ({row['group']})"} for row in summary]
        count = len(self._first_lines())
        logger.info("evaluation of %d images, written to %s\n%s", count, self.folder, summary_text(named))
        return {row["name"]: row["value"] for row in named if row["value"] is not None}

    def _first_lines(self) -> list[ItemScore]:
        """The first sample's lines at native resolution, one an item."""
        name = MEAN if len(self.class_names) > 1 else next(iter(self.class_names.values()))
        wanted = (self.own[0], "native", name)
        return [one for one in self.scores if (one.method, one.resolution, one.score.name) == wanted]

    def _stability_rows(self, notes: Mapping[str, str]) -> list[dict[str, Any]]:
        if not self.stability:
            return []
        counts = {name: sum(line[name] for line in self.stability) for name in ("pairs", "pairs_all_zero")}
        identical = sum(line["pairs_identical"] for line in self.stability)
        skipped = f"; {counts['pairs_all_zero']} of {counts['pairs']} pairs had an all-zero map"
        rows = []
        for column, (name, _) in MEASURES.items():
            lines = [line for line in self.stability if np.isfinite(line.get(column, np.nan))]
            note = notes[column]
            if lines and column in ("psnr", "ssim", "ms_ssim"):
                note += skipped + (f", {identical} identical maps" if column == "psnr" else "")
            values, groups = [line[column] for line in lines], [line["group"] for line in lines]
            rows.append(summary_over_groups(name, values, groups, note))
        return [row | {"group": f"Stability over {self.num_samples} samples"} for row in rows]

    def _cost_rows(self, cost: CallCost, device: torch.device) -> list[dict[str, Any]]:
        times = {
            method: [one.seconds for one in self._of(method) if one.seconds is not None] for method in self.methods
        }
        return cost_rows(cost, times, self.methods, device=device, peak_of=self.own[-1])

    def _of(self, method: str) -> list[ItemScore]:
        """One line an item."""
        lines = [one for one in self.scores if one.method == method and one.resolution == "native"]
        return [one for one in lines if one.score.name == lines[0].score.name]

    def _protocol(self, cost: CallCost, device: torch.device) -> dict[str, Any]:
        lines = self._first_lines()
        return {
            "images": len(lines),
            "groups": len({one.group for one in lines}),
            "classes": list(self.class_names.values()),
            "samples": self.num_samples,
            "threshold": self.threshold,
            "resolutions": list(dict.fromkeys(one.resolution for one in self.scores)),
            "interval": "95 %, bootstrap of 2000 resamples over groups",
            **setting_of(
                cost, device, self.dataset_dir, timed="per image, from the loaded batch until the inferer has returned"
            ),
            "conventions": {
                name: text.format(empty_score=self.empty_score, threshold=self.threshold)
                for name, text in CONVENTIONS.items()
            },
        }

    def _write_pictures(self) -> None:
        order = np.argsort([one.score.dice for one in self._first_lines()], kind="stable").tolist()
        count = min(self.max_pictures, len(order))
        middle = (len(order) - count) // 2
        chosen = (order[:count], order[middle : middle + count], order[::-1][:count])
        for name, rows in zip(PICTURES, chosen, strict=True):
            path = self.folder / f"{name}.png"
            if not rows:  # a picture of an earlier evaluation in this folder would be misread
                path.unlink(missing_ok=True)
                continue
            strips = [self._strip(self.cases[row]) for row in rows]
            note = "image | truth | prediction | probability, at the working size; contains predicted masks"
            save_grid(torch.stack(strips), path, columns=1, marks={"Comment": f"{note}; {INTENDED_USE}"})

    def _strip(self, case: Case) -> torch.Tensor:
        image, probability = case.image.float() / 255, case.probability.float() / 255
        return comparison_row(image, case.label, probability, threshold=self.threshold)
