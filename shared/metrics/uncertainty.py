# SPDX-License-Identifier: Apache-2.0
"""Does the standard deviation over samples say how wrong their mean is?

If a model is right, the truth is one more draw from the distribution of its N samples (mean mu, standard deviation
sigma, at each voxel). Even then the sample mean m and the sample standard deviation s of few samples are no perfect
knowledge of mu and sigma, which these measures account for:

- (truth - m) has the variance sigma^2 (1 + 1/N): the mean of N samples has an error of its own. For a normal
  distribution (truth - m) / (s sqrt(1 + 1/N)) has Student's t distribution with N - 1 degrees of freedom. So the truth
  lies within m +- k s with the probability of :func:`nominal_coverage`: for 1 and 2 sd 0.563 and 0.828 with 4 samples,
  0.623 and 0.899 with 8, 0.653 and 0.929 with 16; 0.683 and 0.954 only without end.
- Voxels with a large s are partly those where s came out too large by chance. Bins of s against the error of the same
  samples would show a perfect model as miscalibrated. Here one half of the samples sorts the voxels into bins, and the
  other half, which knows nothing of that chance, is measured in them; then the other way round. Within a bin, the mean
  s^2 and the mean (truth - m)^2 / (1 + 1/n), n samples in the half, are equal for a right model of any distribution.

MONAI core has no calibration measure of regressions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from shared.metrics.noddi_maps import MAPS
from shared.metrics.segmentation_table import summary_over_groups

LEAST_SAMPLES = 4  # two halves need a standard deviation each
_LEVEL = 0.95


class CalibrationBin(NamedTuple):
    """Voxels of similar predicted sd.

    Attributes:
        voxels: how many.
        predicted: root of the mean variance over samples.
        observed: root mean squared error of the mean, less the share that it has from being the mean of few samples.
    """

    voxels: int
    predicted: float
    observed: float


def nominal_coverage(deviations: float, num_samples: int) -> float:
    """Probability that a further draw lies within mean +- ``deviations`` sd of N draws from one normal distribution.

    P(|t| <= k / sqrt(1 + 1/N)), t of Student's distribution with N - 1 degrees of freedom.

    Raises:
        ValueError: fewer than 2 samples.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 for a standard deviation, got {num_samples}")
    return float(1 - 2 * stats.t.sf(deviations / math.sqrt(1 + 1 / num_samples), num_samples - 1))


def interval_width(num_samples: int, level: float = _LEVEL) -> float:
    """How many sd the interval about the mean of N samples must reach to hold a further draw with ``level``."""
    return float(stats.t.ppf(0.5 + level / 2, num_samples - 1) * math.sqrt(1 + 1 / num_samples))


def measures(num_samples: int) -> dict[str, str]:
    """Key -> heading, with the nominal figures of N samples."""
    one, two = (f"{nominal_coverage(k, num_samples):.3f}" for k in (1, 2))
    return {
        "coverage_1sd": f"Truth within ± 1 sd (nominal {one})",
        "coverage_2sd": f"Truth within ± 2 sd (nominal {two})",
        "coverage_95": f"Truth within ± {interval_width(num_samples):.2f} sd (nominal 0.95)",
        "calibration_error": "Expected calibration error",
        "calibration_slope": "Error over sd (calibrated: 1)",
        "rank_correlation": "Rank correlation of sd and |error|",
        "mean_sd": "Mean sd",
        "mae": "Mean |error|",
    }


CONVENTIONS = {
    "sd": "unbiased standard deviation over the samples, voxel by voxel, in the brain mask",
    "coverage": "share of voxels whose truth lies within mean ± k sd; nominal figures by Student's t distribution and "
    "with the error of the mean of N samples: P(|t| <= k / sqrt(1 + 1/N)), N - 1 degrees of freedom",
    "calibration": "voxels in bins of equal count of the sd of one half of the samples; in each, root mean variance "
    "and root mean squared error of the other half (error² divided by 1 + 1/n for the n samples of a half); both "
    "halves in turn. Expected calibration error: mean difference of the two over the bins, weighted by voxels. Error "
    "over sd: slope through the origin, above 1 where the sd is too small",
    "rank correlation": "Spearman's, of the sd and the absolute error of the mean",
}


def calibration_bins(samples: np.ndarray, true: np.ndarray, *, num_bins: int = 10) -> list[CalibrationBin]:
    """Predicted against observed error in bins of predicted sd, from the smallest; see the module.

    Args:
        samples: (N, V) values of N >= 4 samples at V voxels.
        true: (V,).
        num_bins: bins of equal count; fewer where many sd are equal.

    Raises:
        ValueError: fewer than 4 samples, no voxel, or shapes that do not agree.
    """
    samples, true = _checked(samples, true)
    half = len(samples) // 2
    parts = (samples[:half], samples[half:])
    keys = [part.std(axis=0, ddof=1) for part in parts]
    edges = np.unique(np.quantile(np.concatenate(keys), np.linspace(0, 1, num_bins + 1)[1:-1]))
    count, variance, squared = (np.zeros(len(edges) + 1) for _ in range(3))
    for key, part in zip(keys, parts[::-1], strict=True):
        index = np.searchsorted(edges, key, side="right")
        error = (true - part.mean(axis=0)) ** 2 / (1 + 1 / len(part))
        count += np.bincount(index, minlength=len(count))
        variance += np.bincount(index, part.var(axis=0, ddof=1), len(count))
        squared += np.bincount(index, error, len(count))
    rows = zip(count, variance, squared, strict=True)
    return [CalibrationBin(int(n), math.sqrt(v / n), math.sqrt(e / n)) for n, v, e in rows if n]


def uncertainty_scores(samples: np.ndarray, true: np.ndarray, bins: Sequence[CalibrationBin]) -> dict[str, float]:
    """Key of :func:`measures` -> value; NaN where nothing varies.

    Args:
        samples: (N, V).
        true: (V,).
        bins: of :func:`calibration_bins`.
    """
    samples, true = _checked(samples, true)
    sd, error = samples.std(axis=0, ddof=1), np.abs(true - samples.mean(axis=0))
    # Equal samples that are right lie within any interval, in spite of rounding.
    covered = {
        name: float((error <= k * sd + 1e-9).mean())
        for name, k in (("coverage_1sd", 1.0), ("coverage_2sd", 2.0), ("coverage_95", interval_width(len(samples))))
    }
    voxels, predicted, observed = (np.array(column, np.float64) for column in zip(*bins, strict=True))
    spread = (voxels * predicted**2).sum()
    varies = np.ptp(sd) > 0 and np.ptp(error) > 0
    return covered | {
        "calibration_error": float((voxels * np.abs(predicted - observed)).sum() / voxels.sum()),
        "calibration_slope": float((voxels * predicted * observed).sum() / spread) if spread > 0 else math.nan,
        "rank_correlation": float(stats.spearmanr(sd, error).statistic) if varies else math.nan,
        "mean_sd": float(sd.mean()),
        "mae": float(error.mean()),
    }


def _checked(samples: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    samples, true = np.asarray(samples, np.float64), np.asarray(true, np.float64)
    if samples.ndim != 2 or len(samples) < LEAST_SAMPLES or samples.shape[1:] != true.shape or not true.size:
        raise ValueError(
            f"samples: expected (N, V) with N >= {LEAST_SAMPLES} and a truth (V,), got {samples.shape} and {true.shape}"
        )
    return samples, true


def uncertainty_rows(lines: Sequence[Mapping[str, Any]], *, num_samples: int, note: str) -> list[dict[str, Any]]:
    """Summary rows, maps by measures, with intervals over subjects.

    Args:
        lines: one for each scan and map: ``subject``, ``map`` and the keys of :func:`measures`.
        num_samples: N.
        note: for all rows.
    """
    rows = []
    for key, heading in measures(num_samples).items():
        for name, title in MAPS.items():
            found = [line for line in lines if line["map"] == name and math.isfinite(line[key])]
            values, subjects = [line[key] for line in found], [line["subject"] for line in found]
            row = summary_over_groups(f"{heading}, {title}", values, subjects, note, of=("scans", "subjects"))
            rows.append(row | {"method": title, "measure": key, "row_heading": "Map"})
    return [row | {"group": f"Uncertainty: sd of {num_samples} samples"} for row in rows]
