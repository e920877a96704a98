# SPDX-License-Identifier: Apache-2.0
"""Is it white noise? Mean, variance and autocorrelation at all lags of an array, such as a noise or a latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft
from scipy.special import erfc

# Of the article on dmri2noddi (spec/dmri2noddi.md 4.7): white noise stays below at every lag but zero.
THRESHOLD = 0.023


@dataclass(frozen=True)
class WhiteNoise:
    """What `measure_white_noise` found.

    Attributes:
        shape: of the array.
        mean: of all values.
        variance: of all values (divided by N).
        autocorrelation: float64, of shape (2n - 1, ...) for an array (n, ...), with lag zero, where it is 1, in the
            centre; r(-k) = r(k). `along` gives one axis of it.
        largest: largest |r| of all lags but zero.
        largest_lag: a lag that has it, one number per axis.
        above: lags with |r| above the threshold; k and -k count once.
        lags: how many lags there are, without zero; k and -k count once.
        threshold: fixed, of the article.
        expected_largest: median of `largest` for true white noise of this size.
        chance: upper bound of the probability that white noise of this size has a lag as large as `largest`.
        false_alarm: the same for the threshold: how probable it is at most that white noise is flagged.
    """

    shape: tuple[int, ...]
    mean: float
    variance: float
    autocorrelation: np.ndarray
    largest: float
    largest_lag: tuple[int, ...]
    above: int
    lags: int
    threshold: float
    expected_largest: float
    chance: float
    false_alarm: float

    @property
    def flagged(self) -> bool:
        """The article's verdict: some lag but zero exceeds the threshold. Wrong for few values: see `is_decidable`."""
        return self.above > 0

    @property
    def is_decidable(self) -> bool:
        """Whether white noise of this size stays below the threshold (`false_alarm` at most 1 %).

        A flat array needs about 40,000 values; being flagged says nothing for smaller ones: go by `chance`.
        """
        return self.false_alarm <= 0.01

    def along(self, axis: int = 0) -> np.ndarray:
        """Autocorrelation at the lags 0..n-1 along one axis, all other lags zero."""
        index: list[Any] = [n - 1 for n in self.shape]
        index[axis] = slice(self.shape[axis] - 1, None)
        return self.autocorrelation[tuple(index)]

    def description(self) -> dict[str, Any]:
        """All but the autocorrelation itself, as JSON takes it."""
        names = ("mean", "variance", "largest", "above", "lags", "threshold", "expected_largest", "chance",
                 "false_alarm")  # fmt: skip
        return {
            "shape": list(self.shape),
            **{name: getattr(self, name) for name in names},
            "largest_lag": list(self.largest_lag),
            "flagged": self.flagged,
            "is_decidable": self.is_decidable,
        }


def autocorrelation(values: Any) -> np.ndarray:
    """Autocorrelation at all lags: sum over x of (v(x) - mean) (v(x + k) - mean) / (N variance).

    Exact and linear (nothing wraps around), as the article's padded convolution, by fast Fourier transforms:
    `numpy.correlate` takes N^2 steps and one axis. Sums have fewer terms the larger the lag while the divisor stays,
    so that large lags are small (the biased estimate).

    Args:
        values: array of any number of axes (n, ...), each with lags of its own; flatten it for the article's.

    Returns:
        float64 (2n - 1, ...), lags -(n - 1)..n - 1 of each axis, 1 at lag zero in the centre.

    Raises:
        ValueError: fewer than two values, NaN or infinite ones, or all equal.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.size < 2:
        raise ValueError(f"values: expected at least two numbers, got the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"values: expected finite numbers, but {int((~np.isfinite(array)).sum())} of {array.size} are NaN or "
            "infinite"
        )
    centred = array - array.mean()
    # A constant whose mean rounds leaves crumbs; the correlation of crumbs would be that of the rounding.
    if centred.std() <= 1e-12 * max(np.abs(array).max(), np.finfo(np.float64).tiny):
        raise ValueError(
            f"values: expected numbers that vary, but all are {array.flat[0]:g}: no correlation is defined"
        )
    centred /= centred.std()
    axes = range(array.ndim)
    # Padded so far that the last lag does not meet the first value again.
    sizes = [fft.next_fast_len(2 * n - 1, real=True) for n in array.shape]
    power = np.abs(fft.rfftn(centred, sizes, axes=axes)) ** 2
    result = fft.irfftn(power, sizes, axes=axes) / array.size
    for axis, n in enumerate(array.shape):
        result = np.take(result, np.arange(-(n - 1), n), axis=axis)
    return result


def measure_white_noise(values: Any, *, threshold: float = THRESHOLD) -> WhiteNoise:
    """Mean, variance and autocorrelation at all lags, and whether a lag other than zero exceeds a threshold.

    The threshold does not know the number of values N. Of white noise each r(k) is about normal with mean 0 and the
    variance (N - k) / N^2, so the largest of all lags is about sqrt(2 ln N / N) or a fifth below it: 0.035 for 10,000
    values in a row, 0.008 for the 262,144 of the published latent 8 x 32^3. Below about 40,000 values the fixed
    threshold flags true noise now and then, and soon always; `expected_largest`, `chance` and `false_alarm` say what N
    allows.

    Args:
        values: array of any number of axes; flattened (the article's) it has N - 1 lags, with its axes kept about
            2^(axes - 1) N of them, which also see what lies in a direction across.
        threshold: |r| above which a lag counts.

    Raises:
        ValueError: see `autocorrelation`.
    """
    array = np.asarray(values, dtype=np.float64)
    correlation = autocorrelation(array)
    size = np.abs(correlation)
    centre = tuple(n - 1 for n in array.shape)
    size[centre] = 0.0
    where = np.unravel_index(int(size.argmax()), size.shape)
    lag = tuple(int(i) - c for i, c in zip(where, centre, strict=True))
    if next(k for k in lag if k) < 0:
        lag = tuple(-k for k in lag)  # r(-k) = r(k)
    largest = float(size[where])
    lags = size.size // 2
    by_chance = _LargestByChance(array.shape)
    return WhiteNoise(
        shape=array.shape,
        mean=float(array.mean()),
        variance=float(array.var()),
        autocorrelation=correlation,
        largest=largest,
        largest_lag=lag,
        above=int((size > threshold).sum()) // 2,
        lags=lags,
        threshold=float(threshold),
        expected_largest=by_chance.median(),
        chance=by_chance.bound(largest),
        false_alarm=by_chance.bound(threshold),
    )


class _LargestByChance:
    """Distribution of the largest |r| of white noise, whose lags are nearly independent normal variables.

    A lag whose sum has the share v of the N terms has the variance v / N; how many lags have which v is binned, as
    there may be millions of lags.
    """

    def __init__(self, shape: tuple[int, ...], *, bins: int = 1000) -> None:
        share = np.ones(1)
        for n in shape:
            share = np.multiply.outer(share, 1 - np.abs(np.arange(-(n - 1), n)) / n).ravel()
        counts, edges = np.histogram(share, bins=bins, range=(0.0, 1.0))
        counts[-1] -= 1  # lag zero
        self.counts = counts / 2  # k and -k are one
        self.scale = np.sqrt(np.prod(shape) / (edges[:-1] + edges[1:]))  # sqrt(N / 2 v), v in the middle of a bin

    def bound(self, level: float) -> float:
        """Upper bound (Bonferroni) of the probability that some lag exceeds a level."""
        return float(min(1.0, self.counts @ erfc(level * self.scale)))

    def median(self) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            with np.errstate(divide="ignore"):  # log 0: certainly exceeded
                below = np.where(self.counts > 0, self.counts * np.log1p(-erfc(middle * self.scale)), 0.0).sum()
            low, high = (middle, high) if below < np.log(0.5) else (low, middle)
        return high
