# SPDX-License-Identifier: Apache-2.0
"""Do generated slices fit their neighbours, and does their spread say where they are wrong?

MONAI core has neither measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats

from shared.metrics.confidence import Interval, mean_interval
from shared.metrics.measures import TabledMeasurement, collected_images, summary_row
from shared.metrics.subjects import slice_rows


class ThroughPlaneConsistency:
    """Change from slice to slice of the generated volume, relative to that of the true one.

    Per subject: the sum over neighbouring slices of mean |pred(k+1) - pred(k)|, divided by the same of the true images.
    Near 1: as in the truth. Above 1: flicker, such as independent noise per slice gives. Below 1: too smooth. Needs
    ``info["subject"]`` and ``info["slice"]``; slices that do not follow one another are not compared, and without a
    pair the row has no value.

    Args:
        method: name of what is evaluated.
    """

    def __init__(self, *, method: str = "ControlNet") -> None:
        self.name = f"Through-plane change relative to the true volume, {method}"

    def __call__(self, collected: Mapping[str, Any]) -> TabledMeasurement:
        real = collected_images(collected, "image", measure=self.name)
        pred = collected_images(collected, "pred", measure=self.name)
        ratios: list[float] = []
        lines: list[dict[str, Any]] = []
        constant = compared = 0
        for subject, pairs in slice_rows(collected, measure=self.name).neighbours().items():
            lower, upper = (list(rows) for rows in zip(*pairs, strict=True))
            change, truth = (float((x[upper] - x[lower]).abs().double().mean()) for x in (pred, real))
            if truth == 0:
                constant += 1
                continue
            ratios.append(change / truth)
            compared += len(pairs)
            lines.append({"subject": subject, "pairs": len(pairs), "change": change, "true_change": truth})
        note = f"{compared} pairs of neighbouring slices; near 1 is good, above 1 is flicker"
        if not ratios:
            note = "no neighbouring slices that differ were evaluated"
        elif constant:
            note += f"; {constant} subjects whose true slices do not change left out"
        row = summary_row(self.name, _mean(ratios), note)
        return TabledMeasurement([row], {}, {"through_plane": lines})


class UncertaintyCorrelation:
    """Spearman correlation, over brain voxels, of the standard deviation over samples with the absolute error.

    Per subject, then averaged. Above 0: the map of standard deviations points at the errors. Uses ``pred_sd``
    (N, 1, X, Y); where it was not collected there is no row. Slices without a brain mask are left out, since the
    background, where both are near 0, would raise the correlation.

    Args:
        method: name of what is evaluated.
        max_voxels: the most voxels of a subject that are ranked, drawn at random with a fixed seed.
    """

    def __init__(self, *, method: str = "ControlNet", max_voxels: int = 200_000) -> None:
        self.name = f"Correlation of standard deviation and error in the brain, {method}"
        self.max_voxels = max_voxels

    def __call__(self, collected: Mapping[str, Any]) -> TabledMeasurement:
        if "pred_sd" not in collected:
            return TabledMeasurement([], {}, {})
        real = collected_images(collected, "image", measure=self.name)
        pred = collected_images(collected, "pred", measure=self.name)
        spread = collected["pred_sd"]
        mask = collected.get("mask", torch.zeros_like(real)) > 0.5
        values, lines = [], []
        subjects = slice_rows(collected, measure=self.name).by_subject
        for subject, rows in subjects.items():
            inside = mask[rows]
            pair = np.stack([spread[rows][inside].numpy(), (pred[rows] - real[rows]).abs()[inside].numpy()])
            if pair.shape[1] > self.max_voxels:
                pair = pair[:, np.random.default_rng(0).choice(pair.shape[1], self.max_voxels, replace=False)]
            if pair.shape[1] < 2 or (np.ptp(pair, axis=1) == 0).any():
                continue
            values.append(float(stats.spearmanr(pair[0], pair[1]).statistic))
            lines.append({"subject": subject, "voxels": pair.shape[1], "spearman": values[-1]})
        note = f"Spearman's rank correlation over the mask's voxels; {len(values)} of {len(subjects)} subjects"
        if not values:
            note = "no subject with a brain mask in which standard deviation and error vary"
        return TabledMeasurement([summary_row(self.name, _mean(values), note)], {}, {"uncertainty": lines})


def _mean(values: list[float]) -> Interval:
    """Mean over subjects with Student's t interval; without a value for no subject."""
    return mean_interval(values) if values else Interval(math.nan, math.nan, math.nan, 0)
