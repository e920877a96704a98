# SPDX-License-Identifier: Apache-2.0
"""Do generated images show what the prompt asked for, in the eyes of a classifier that never saw the generator?

The published evaluation has no such measure. A classifier makes errors of its own: report its accuracy on real images
next to the agreement. MONAI core offers ``compute_roc_auc`` without an interval; a test holds ours equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from shared.metrics.confidence import LEVEL, Interval, pairwise_interval, wilson_interval


@dataclass(frozen=True)
class AgreementResult:
    """Agreement of predicted with prompted findings.

    Attributes:
        overall: fraction of samples whose predicted finding is the prompted one, Wilson interval.
        per_class: the same for each prompted finding; None for one that no sample was prompted with.
        wrong_prompt: agreement with the prompts of the *other* samples (mean over all rolls of the list by 1 to n - 1,
            jackknife interval): what a generator that ignores its prompt would reach, 1 / K for K balanced findings.
        confusion: (K, K) counts, rows prompted, columns predicted.
        class_names: K names, in the order of rows and columns.
    """

    overall: Interval
    per_class: dict[str, Interval | None]
    wrong_prompt: Interval
    confusion: np.ndarray
    class_names: tuple[str, ...]

    def table(self) -> str:
        """The confusion table as aligned text, prompted finding by row."""
        width = max(len(name) for name in self.class_names)
        lines = [" " * width + "  " + " ".join(f"{k:>5d}" for k in range(len(self.class_names))) + "   (predicted)"]
        for name, row in zip(self.class_names, self.confusion, strict=True):
            lines.append(f"{name:<{width}}  " + " ".join(f"{count:>5d}" for count in row))
        return "\n".join(lines)


class PromptAgreement:
    """Agreement between prompted and predicted findings, with a wrong-prompt control.

    Args:
        class_names: the K findings in the order of the classifier's outputs.
        level: confidence level in (0, 1).
    """

    def __init__(self, class_names: Sequence[str], *, level: float = LEVEL) -> None:
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            raise ValueError(f"class_names: expected at least two different names, got {list(class_names)}")
        self.class_names = tuple(class_names)
        self.level = level

    def __call__(
        self, predicted: torch.Tensor | Sequence[int], prompted: torch.Tensor | Sequence[int] | Sequence[str]
    ) -> AgreementResult:
        """Compare n samples.

        Args:
            predicted: (n,) class indices, or (n, K) logits or probabilities whose largest entry counts.
            prompted: n class indices or names.

        Raises:
            ValueError: different n, no sample, or a class that does not exist.
        """
        guesses = self._indices(predicted, name="predicted")
        prompts = self._indices(prompted, name="prompted")
        n, k = len(prompts), len(self.class_names)
        if len(guesses) != n or n == 0:
            raise ValueError(f"predicted: expected one class for each of n >= 1 prompts, got {len(guesses)} for {n}")
        confusion = np.zeros((k, k), dtype=np.int64)
        np.add.at(confusion, (prompts, guesses), 1)
        per_class = {
            name: (
                wilson_interval(int(confusion[i, i]), int(confusion[i].sum()), level=self.level)
                if confusion[i].sum()
                else None
            )
            for i, name in enumerate(self.class_names)
        }
        overall = wilson_interval(int(np.trace(confusion)), n, level=self.level)
        crossed = guesses[:, None] == prompts[None, :]
        control = (
            pairwise_interval((crossed + crossed.T.astype(np.float64)) / 2, level=self.level)
            if n > 1
            else Interval(math.nan, math.nan, math.nan, n)
        )
        return AgreementResult(overall, per_class, control, confusion, self.class_names)

    def _indices(self, values: torch.Tensor | Sequence[int] | Sequence[str], *, name: str) -> np.ndarray:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            if values.ndim == 2:
                if values.shape[1] != len(self.class_names):
                    raise ValueError(f"{name}: expected {len(self.class_names)} columns, got {values.shape[1]}")
                values = values.argmax(dim=1)
            indices = values.reshape(-1).numpy().astype(np.int64)
        else:
            unknown = [v for v in values if isinstance(v, str) and v not in self.class_names]
            if unknown:
                raise ValueError(f"{name}: expected one of {', '.join(self.class_names)}, got {unknown[0]!r}")
            lookup = [self.class_names.index(v) if isinstance(v, str) else int(v) for v in values]
            indices = np.array(lookup, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self.class_names):
            raise ValueError(
                f"{name}: expected class indices 0 to {len(self.class_names) - 1}, "
                f"got {indices.min()} to {indices.max()}"
            )
        return indices


def area_under_roc(scores: np.ndarray | torch.Tensor, positive: np.ndarray | torch.Tensor) -> Interval:
    """Area under the ROC curve with DeLong's interval (DeLong, DeLong and Clarke-Pearson 1988), clipped to [0, 1].

    Args:
        scores: (n,) finite; larger means more likely positive.
        positive: (n,) 0 or 1; NaN or -1 excludes a row (label unknown or uncertain).

    Returns:
        Area (ties count half) and n, the number of labelled rows; NaN where there are not two rows of each kind.

    Raises:
        ValueError: different lengths, or a score that is not finite.
    """
    s = np.asarray(scores, dtype=np.float64).reshape(-1)
    y = np.asarray(positive, dtype=np.float64).reshape(-1)
    if s.shape != y.shape or not np.isfinite(s).all():
        raise ValueError(f"scores: expected {len(y)} finite values, one per label, got {len(s)} values")
    known = (y == 0) | (y == 1)
    cases, controls = s[known & (y == 1)], s[known & (y == 0)]
    n = int(known.sum())
    if len(cases) < 2 or len(controls) < 2:
        return Interval(math.nan, math.nan, math.nan, n)
    # Mid-ranks in all rows minus mid-ranks within the own kind count the rows of the other kind below.
    ranks = stats.rankdata(np.concatenate([cases, controls]))
    placed_cases = (ranks[: len(cases)] - stats.rankdata(cases)) / len(controls)
    placed_controls = 1 - (ranks[len(cases) :] - stats.rankdata(controls)) / len(cases)
    area = float(placed_cases.mean())
    error = math.sqrt(placed_cases.var(ddof=1) / len(cases) + placed_controls.var(ddof=1) / len(controls))
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * error
    return Interval(area, max(0.0, area - half), min(1.0, area + half), n)


def pathology_auroc(
    probabilities: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray, pathologies: Sequence[str]
) -> dict[str, Interval]:
    """Area under the ROC curve of each pathology that the labels know in both states.

    Args:
        probabilities: (n, P) outputs of a multi-label classifier, such as torchxrayvision's 18.
        labels: (n, P) 0, 1, or NaN/-1 for unknown: what the prompts asked for.
        pathologies: P names; empty names (outputs that the weights do not have) are skipped.

    Returns:
        Name -> interval, only for pathologies with at least two samples of each kind.

    Raises:
        ValueError: shapes that do not agree.
    """
    p, y = np.asarray(probabilities), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 2 or p.shape[1] != len(pathologies):
        raise ValueError(f"labels: expected the shape {p.shape} with {len(pathologies)} pathologies, got {y.shape}")
    areas = {name: area_under_roc(p[:, i], y[:, i]) for i, name in enumerate(pathologies) if name}
    return {name: area for name, area in areas.items() if not math.isnan(area.value)}
