# SPDX-License-Identifier: Apache-2.0
"""Estimates with the interval and the number of samples they rest on.

An :class:`Interval` carries n, so a value cannot be reported without it. All intervals are two-sided.
SciPy gives the distributions; the jackknife over images is our own, because the pairs of a set are not independent
(each image is in n - 1 of them), and so is the short bootstrap, whose keywords differ between SciPy versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A point estimate with its confidence limits (NaN where it has none) and the number of independent samples."""

    value: float
    low: float
    high: float
    n: int


def _finite_vector(values: Any, *, name: str) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64).reshape(-1)
    if vector.size == 0:
        raise ValueError(f"{name}: expected at least one value, got none; is the evaluated section empty?")
    if not np.isfinite(vector).all():
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ValueError(f"{name}: expected finite values, got {vector[bad]} at row {bad}; check that row's image")
    return vector


def mean_interval(values: Sequence[float] | np.ndarray | Any, *, level: float = LEVEL) -> Interval:
    """Mean with Student's t interval.

    Args:
        values: n independent values, any shape, finite.
        level: confidence level in (0, 1).

    Returns:
        The mean; the limits are NaN for n = 1.

    Raises:
        ValueError: no value, or a value that is not finite.
    """
    vector = _finite_vector(values, name="values")
    mean, n = float(vector.mean()), vector.size
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * vector.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Any,
    *,
    statistic: Callable[..., Any] = np.mean,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of ``statistic`` over n independent values.

    Args:
        values: n independent values, finite.
        statistic: NumPy reduction with an ``axis`` argument, such as ``numpy.median``.
        level: confidence level in (0, 1).
        resamples: number of bootstrap sets.
        seed: of the resampling; the same seed gives the same limits.

    Returns:
        The statistic of the values themselves; the limits are NaN for n = 1.

    Raises:
        ValueError: no value, or a value that is not finite.
    """
    vector = _finite_vector(values, name="values")
    value = float(statistic(vector, axis=0))
    if vector.size == 1:
        return Interval(value, math.nan, math.nan, 1)
    rows = np.random.default_rng(seed).integers(vector.size, size=(resamples, vector.size))
    low, high = np.percentile(statistic(vector[rows], axis=1), [50 * (1 - level), 50 * (1 + level)])
    return Interval(value, float(low), float(high), vector.size)


def grouped_bootstrap_interval(
    values: Sequence[float] | np.ndarray | Any,
    groups: Sequence[Any],
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over all values, with a percentile bootstrap that draws whole groups.

    Images of one patient or video are no independent samples: each resample draws as many groups as there are, with
    replacement, and averages all their values.

    Args:
        values: finite values.
        groups: the group of each value.
        level: confidence level in (0, 1).
        resamples: number of bootstrap sets.
        seed: of the resampling; the same seed gives the same limits.

    Returns:
        The mean and n, the number of **groups**; the limits are NaN for one group.

    Raises:
        ValueError: no value, a value that is not finite, or another number of groups.
    """
    vector = _finite_vector(values, name="values")
    if len(groups) != vector.size:
        raise ValueError(f"groups: expected one for each of {vector.size} values, got {len(groups)}")
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    n, mean = len(members), float(vector.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    sums = np.array([vector[rows].sum() for rows in members.values()])
    counts = np.array([len(rows) for rows in members.values()])
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Interval(mean, float(low), float(high), n)


def wilson_interval(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Proportion with Wilson's score interval, which stays inside [0, 1] and is honest for 0 or n successes.

    Args:
        successes: number of successes, 0 to n.
        n: number of independent trials, at least 1.
        level: confidence level in (0, 1).

    Raises:
        ValueError: n < 1 or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    limits = stats.binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return Interval(successes / n, float(limits.low), float(limits.high), n)


def pairwise_interval(matrix: np.ndarray | Any, *, level: float = LEVEL) -> Interval:
    """Mean over all unordered pairs of n images, with a jackknife over the images.

    The n(n-1)/2 pairs are dependent, so the interval of their plain mean would be far too narrow. Leaving out image i
    leaves ``(S - r_i) / C(n-1, 2)``, with S the sum over pairs and r_i the sum over the pairs that hold image i
    (Efron and Stein 1981, "The jackknife estimate of variance").

    Args:
        matrix: (n, n) symmetric; the diagonal is ignored.
        level: confidence level in (0, 1).

    Returns:
        The mean over pairs and n, the number of **images**; the limits are NaN for fewer than 3 images.

    Raises:
        ValueError: the matrix is not square, has fewer than two rows, or holds values that are not finite.
    """
    values = np.array(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.shape[0] < 2:
        raise ValueError(f"matrix: expected (n, n) with n >= 2, got {values.shape}; a pair needs two images")
    n = values.shape[0]
    np.fill_diagonal(values, 0.0)
    _finite_vector(values, name="matrix")
    rows = values.sum(axis=1)
    total = rows.sum() / 2
    mean = float(total / (n * (n - 1) / 2))
    if n < 3:
        return Interval(mean, math.nan, math.nan, n)
    left_out = (total - rows) / ((n - 1) * (n - 2) / 2)
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Interval(mean, mean - half, mean + half, n)
