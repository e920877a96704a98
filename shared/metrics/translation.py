# SPDX-License-Identifier: Apache-2.0
"""How near a translated image is to the true one: per subject, beside baselines, a control and a ceiling.

Neighbouring slices of one head are no independent samples (the published figures, 200 subjects of 5 slices, took them
for 1 000). So slices are averaged within each subject first, and means, deviations and intervals are over subjects.
``monai.metrics`` has PSNR, MAE and MS-SSIM, but none inside a mask; a test holds ours equal to its on whole images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shared.metrics.baselines import Baseline
from shared.metrics.confidence import Interval, bootstrap_interval, mean_interval
from shared.metrics.measures import TabledMeasurement, clamp_note, collected_images, summary_row
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from shared.metrics.subjects import SliceRows, slice_rows

_LEAST_MSE = 1e-10  # equal images would have an infinite PSNR, and a subject with one an infinite mean
_BATCH = 16
_LEAST_SUBJECTS = 3  # the t interval of two is some ten times as wide as their distance, beyond any possible value
# Column -> name in the summary; those of the brain need a mask.
MEASURES = {
    "psnr": "PSNR (dB)",
    "mae": "MAE",
    "ms_ssim": "MS-SSIM",
    "brain_psnr": "PSNR (dB) in the brain",
    "brain_mae": "MAE in the brain",
    "brain_ms_ssim": "MS-SSIM of the masked brain",
}
CEILING = "autoencoder ceiling"


def slice_scores(
    images: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    ssim: PairwiseMultiScaleSSIM,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """PSNR (dB, data range 1), MAE and MS-SSIM of each image with its target, and the same inside the mask.

    PSNR = -10 lg(MSE), with an MSE below 1e-10 counted as 1e-10 (100 dB). Inside the mask, MSE and MAE are means over
    the mask's voxels; MS-SSIM compares both images multiplied by the mask, whose common zero background raises it.

    Args:
        images, target: (N, 1, X, Y) in [0, 1].
        mask: (N, 1, X, Y), inside where > 0.5; None gives no measures of the brain.
        ssim: the MS-SSIM.
        device: where it is computed.

    Returns:
        Key of ``MEASURES`` -> (N,) float64; NaN for those of the brain where the mask is empty.
    """
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES if mask is not None or "brain" not in name}
    for start in range(0, len(images), _BATCH):
        x, y = (part[start : start + _BATCH].to(device).clamp(0, 1) for part in (images, target))
        error = (x - y).double()
        found = errors_within(error, torch.ones_like(error)) | {"ms_ssim": ssim.paired(x, y)}
        if mask is not None:
            inside = (mask[start : start + _BATCH].to(device) > 0.5).float()
            found |= {f"brain_{name}": value for name, value in errors_within(error, inside.double()).items()}
            masked = ssim.paired(x * inside, y * inside)
            found["brain_ms_ssim"] = masked.masked_fill(~inside.flatten(1).any(1), math.nan)
        for name, value in found.items():
            scores[name].append(value.double().cpu())
    return {name: torch.cat(values).numpy() for name, values in scores.items()}


def errors_within(error: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR (dB, data range 1, at most 100) and MAE over the voxels of weight 1; NaN where there is none.

    Args:
        error, weight: (B, ...) float64.

    Returns:
        "psnr" and "mae", (B,) each.
    """
    count = weight.flatten(1).sum(1)
    mse = (error.square() * weight).flatten(1).sum(1) / count  # 0 / 0 is NaN
    psnr = -10 * torch.log10(torch.where(mse < _LEAST_MSE, _LEAST_MSE, mse))
    return {"psnr": psnr, "mae": (error.abs() * weight).flatten(1).sum(1) / count}


class TranslationQuality:
    """Table of PSNR, MAE and MS-SSIM, whole image and inside the brain mask, of a method and what it is measured by.

    Needs ``image``, ``pred``, ``info["subject"]``; ``condition`` for baselines; uses ``mask``, ``reconstruction``,
    ``info["slice"]`` and ``info["session"]`` where they were collected. A summary row for each measure and method:

    - the method: ``pred``;
    - each baseline (:mod:`shared.metrics.baselines`);
    - "wrong <condition> (control)": a sample depends on its condition and seed alone, so the ``pred`` of the next
      subject, at the nearest relative slice position, is what the wrong condition gives. If it scores like the method,
      the condition is ignored;
    - "autoencoder ceiling": the reconstruction of the true image, which no translation through this autoencoder beats.

    Then, for PSNR, the paired differences over subjects, method minus baseline, with a bootstrap interval.
    Rows have the further fields ``sd`` (over subjects), ``method`` and ``measure``. Per-image columns are those of the
    method; the table ``per_subject`` has a line for each subject and method.

    Args:
        baselines: name in the table -> baseline.
        method: name of what is evaluated.
        condition_name: name of the condition image.
        kernel_size: side of the MS-SSIM's Gaussian window, pixels (7 as published).
        device: where the measures are computed.
        ssim: further arguments of :class:`~shared.metrics.ms_ssim.PairwiseMultiScaleSSIM`.

    Raises:
        ValueError: when images or subjects were not collected, or a baseline gives images of another shape.
    """

    name = "Translation quality"

    def __init__(
        self,
        *,
        baselines: Mapping[str, Baseline] | None = None,
        method: str = "ControlNet",
        condition_name: str = "FLAIR",
        kernel_size: int = 7,
        device: torch.device | str = "cpu",
        **ssim: Any,
    ) -> None:
        self.baselines, self.method, self.device = dict(baselines or {}), method, torch.device(device)
        self.control = f"wrong {condition_name} (control)"
        if taken := {method, self.control, CEILING} & self.baselines.keys():
            raise ValueError(f"baselines: expected names of their own, got {sorted(taken)}; choose other names")
        self.ssim = PairwiseMultiScaleSSIM(kernel_size=kernel_size, **ssim)

    def __call__(self, collected: Mapping[str, Any]) -> TabledMeasurement:
        real = collected_images(collected, "image", measure=self.name)
        rows = slice_rows(collected, measure=self.name)
        mask = collected.get("mask")
        masked = mask is not None and bool((mask > 0.5).any())
        notes: dict[str, str] = {}
        scores: dict[str, dict[str, np.ndarray] | None] = {}
        for method, images, notes[method] in self._methods(collected, rows):
            if images is not None and images.shape != real.shape:
                raise ValueError(f"{method}: expected images {tuple(real.shape)}, got {tuple(images.shape)}")
            options: dict[str, Any] = {"ssim": self.ssim, "device": self.device}
            scores[method] = None if images is None else slice_scores(images, real, mask if masked else None, **options)
        summary = []
        for measure in MEASURES:
            if masked or "brain" not in measure:
                summary += [self._row(measure, method, scores[method], rows, notes[method]) for method in scores]
            else:
                summary.append(self._row(measure, self.method, None, rows, "no brain mask in the data"))
        for measure in ("psnr", "brain_psnr") if masked else ("psnr",):
            for other in (*self.baselines, self.control):
                summary.append(self._difference(measure, other, scores, rows, notes[other]))
        own = scores[self.method]
        assert own is not None
        columns = {name: [v if math.isfinite(v) else None for v in values.tolist()] for name, values in own.items()}
        return TabledMeasurement(summary, dict(columns), {"per_subject": _per_subject(scores, rows)})

    def _methods(self, collected: Mapping[str, Any], rows: SliceRows) -> Any:
        """(name, images or None, note) of each line of the table, one at a time to spare memory."""
        pred = collected_images(collected, "pred", measure=self.name)
        present = [key for key in ("image", "pred", "reconstruction") if key in collected]
        yield self.method, pred, clamp_note(collected, *present)
        for name, baseline in self.baselines.items():
            images = baseline(collected_images(collected, "condition", measure=self.name))
            yield name, images, baseline.note
        other = rows.rows_of_another_subject()
        if other is None:
            yield self.control, None, "needs a second subject"
        else:
            note = "generated from another subject's slice at the nearest relative position; should be clearly worse"
            yield self.control, pred[other], note
        reconstruction = collected.get("reconstruction")
        note = "reconstruction of the true image; a translation cannot be better"
        yield CEILING, reconstruction, note if reconstruction is not None else "no reconstructions were collected"

    def _row(
        self, measure: str, method: str, scores: Mapping[str, np.ndarray] | None, rows: SliceRows, note: str
    ) -> dict[str, Any]:
        fields = {"method": method, "measure": measure}
        name = f"{MEASURES[measure]}, {method}"
        if scores is None:
            return summary_row(name, Interval(math.nan, math.nan, math.nan, 0), note) | {"sd": None, **fields}
        values, by_subject = scores[measure], rows.subject_means(scores[measure])
        used = int(np.isfinite(values).sum())
        text = f"{used} slices of {len(by_subject)} subjects, averaged per subject first; {note}"
        if used < len(values):
            text += f"; {len(values) - used} slices with an empty mask left out"
        if method == self.method:
            text += f"; {self._protocol(measure)}"
        means = list(by_subject.values())
        interval = mean_interval(means)
        if len(means) < _LEAST_SUBJECTS:
            interval = Interval(interval[0], math.nan, math.nan, len(means))
            text += f"; no interval from fewer than {_LEAST_SUBJECTS} subjects"
        return summary_row(name, interval, text) | {"sd": _deviation(means), **fields}

    def _protocol(self, measure: str) -> str:
        higher = "lower is better" if measure.endswith("mae") else "higher is better"
        if measure.endswith("ms_ssim"):
            masked = "; both images multiplied by the mask" if "brain" in measure else ""
            return f"{self.ssim.note}{masked}; {higher}"
        where = "over the mask's voxels" if "brain" in measure else "over the whole image, background included"
        return f"{where}, data range 1; {higher}"

    def _difference(
        self,
        measure: str,
        other: str,
        scores: Mapping[str, Mapping[str, np.ndarray] | None],
        rows: SliceRows,
        note: str,
    ) -> dict[str, Any]:
        name = f"{MEASURES[measure]}, {self.method} minus {other}"
        fields = {"method": f"{self.method} - {other}", "measure": measure}
        own, theirs = scores[self.method], scores[other]
        if own is None or theirs is None:
            return summary_row(name, Interval(math.nan, math.nan, math.nan, 0), note) | {"sd": None, **fields}
        differences = list(rows.subject_means(own[measure] - theirs[measure]).values())
        text = "paired per subject, interval by bootstrap over subjects; above 0: better than it"
        return summary_row(name, bootstrap_interval(differences), text) | {"sd": _deviation(differences), **fields}


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation over subjects; None for one subject."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _per_subject(scores: Mapping[str, Mapping[str, np.ndarray] | None], rows: SliceRows) -> list[dict[str, Any]]:
    lines = []
    for method, values in scores.items():
        means = {name: rows.subject_means(column) for name, column in (values or {}).items()}
        for subject, members in rows.by_subject.items() if values is not None else ():
            own = {name: column.get(subject) for name, column in means.items()}
            lines.append({"subject": subject, "method": method, "slices": len(members)} | own)
    return lines
