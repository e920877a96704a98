# SPDX-License-Identifier: Apache-2.0
"""The files of an evaluation of NODDI maps."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shared.files import save_json
from shared.handlers.cost import CallCost, cost_rows, setting_of
from shared.metrics import noddi_maps, uncertainty
from shared.metrics.noddi_maps import MAPS, SSIMWindow
from shared.metrics.noddi_table import SubjectScore, scored_rows
from shared.noddi_picture import ERROR_GAIN
from shared.pictures import INTENDED_USE, save_marked_png
from shared.tables import summary_text, without_nan, write_table

logger = logging.getLogger(__name__)

PICTURES = ("worst", "median", "best")


class MeasuredScan(NamedTuple):
    """What was measured of a scan: method -> note, lines of ``per_subject.csv``, ``uncertainty.csv`` and
    ``calibration.csv``, and map -> picture (H, W) in 8 bits."""

    methods: dict[str, str]
    scores: list[SubjectScore]
    uncertainty: list[dict[str, Any]]
    calibration: list[dict[str, Any]]
    pictures: dict[str, np.ndarray]


class NoddiResults:
    """Writes what was measured into ``evaluation``, each file whole or not at all:

    - ``summary.json``: rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}`` with ``sd``, ``median``,
      ``method``, ``measure`` and the heading ``group`` they stand under, as ``tools.report`` shows them;
    - ``protocol.json``: conventions in words, device, versions, the data's SHA-256;
    - ``per_subject.csv``: a line per scan and method with all measures; subjects and names are those of the data list,
      so it is as private as that;
    - ``uncertainty.csv``: a line per scan and map; ``calibration.csv``: one per scan, map and bin of predicted sd; from
      4 samples on;
    - ``worst_ndi.png``, ...: tri-planar pictures of the subjects of worst, median and best PSNR in the brain (mean of
      the maps), a picture for each map.
    """

    def __init__(
        self,
        folder: Path,
        items: Sequence[MeasuredScan],
        *,
        own: Sequence[str],
        pairs: Sequence[tuple[str, str]],
        num_samples: int,
        window: SSIMWindow,
        dataset_dir: str | os.PathLike[str] | None,
        pictures: Sequence[str] = PICTURES,
    ) -> None:
        self.folder, self.own, self.pairs, self.num_samples = folder, list(own), list(pairs), num_samples
        self.window, self.dataset_dir, self.pictures = window, dataset_dir, tuple(pictures)
        self.methods = {method: note for item in items for method, note in item.methods.items()}
        self.scores = [score for item in items for score in item.scores]
        self.uncertainty = [line for item in items for line in item.uncertainty]
        self.calibration = [line for item in items for line in item.calibration]
        self.pictures_of = [item.pictures for item in items]

    def write(self, *, cost: CallCost, device: torch.device) -> dict[str, float]:
        """Write everything; returns name -> value of all rows for the engine's metrics."""
        if not self.scores:
            raise ValueError("evaluation: expected at least one subject, got none; check the section of datalist.json")
        summary = scored_rows(self.scores, self.methods, pairs=self.pairs, window=self.window)
        if self.uncertainty:
            note = f"of {self.own[-1]}"
            summary += uncertainty.uncertainty_rows(self.uncertainty, num_samples=self.num_samples, note=note)
        times = {
            method: [one.seconds for one in self._of(method) if one.seconds is not None] for method in self.methods
        }
        summary += cost_rows(cost, times, self.methods, device=device, peak_of=self.own[-1], what="subject")
        save_json(summary, self.folder / "summary.json")
        save_json(self._protocol(cost, device), self.folder / "protocol.json")
        write_table(self.folder / "per_subject.csv", [one.columns for one in self.scores])
        for name, lines in (("uncertainty", self.uncertainty), ("calibration", self.calibration)):
            write_table(self.folder / f"{name}.csv", [without_nan(line) for line in lines])
        self._write_pictures()
        named = [row | {"name": f"{row['name']} ({row['group']})"} for row in summary]
        count = len(self._of(self.own[0]))
        logger.info("evaluation of %d scans, written to %s\n%s", count, self.folder, summary_text(named))
        return {row["name"]: row["value"] for row in named if row["value"] is not None}

    def _of(self, method: str) -> list[SubjectScore]:
        return [one for one in self.scores if one.method == method]

    def _protocol(self, cost: CallCost, device: torch.device) -> dict[str, Any]:
        lines = self._of(self.own[0])
        measured = self.num_samples >= uncertainty.LEAST_SAMPLES
        return {
            "scans": len(lines),
            "subjects": len({one.subject for one in lines}),
            "samples": self.num_samples,
            "ssim": self.window.note,
            "interval": "95 %, bootstrap of 2000 resamples over subjects",
            **setting_of(
                cost,
                device,
                self.dataset_dir,
                timed="per subject, from the loaded batch until the inferer or the baseline has returned",
            ),
            "conventions": noddi_maps.CONVENTIONS | (uncertainty.CONVENTIONS if measured else {}),
        }

    def _write_pictures(self) -> None:
        scores = [one.scores for one in self._of(self.own[-1])]
        order = np.argsort([np.mean([one[f"{key}_psnr_brain"] for key in MAPS]) for one in scores], kind="stable")
        places = {"worst": 0, "median": len(order) // 2, "best": len(order) - 1}
        shown: dict[str, int] = {}
        one = len(order) == 1 and "median" in self.pictures  # it is no failure
        for name in ("median",) if one else self.pictures:  # of two subjects, no subject twice
            if (row := int(order[places[name]])) not in shown.values():
                shown[name] = row
        what = (
            "rows axial, coronal, sagittal; radiological: the patient's right on the left, anterior on the left of "
            f"sagittal slices; errors and standard deviations times {ERROR_GAIN}; contains synthetic images"
        )
        for name in PICTURES:
            for key in MAPS:
                path = self.folder / f"{name}_{key}.png"
                if name in shown:
                    save_marked_png(self.pictures_of[shown[name]][key], path, {"Comment": f"{what}; {INTENDED_USE}"})
                else:  # a picture of an earlier evaluation in this folder would be misread
                    path.unlink(missing_ok=True)
