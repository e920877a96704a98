# SPDX-License-Identifier: Apache-2.0
"""Distances between two sets of feature vectors: Fréchet (FID) and kernel (KID), with their floor and their n.

``monai.metrics.FIDMetric`` does not fit: its ``scipy.linalg.sqrtm`` call breaks with SciPy >= 1.18, a matrix root of
2048 features is many times slower than the form below, and it says nothing about n. ``monai.metrics.MMDMetric`` is a
biased estimate with one fixed kernel.

The trace of the matrix root without a matrix root: write both covariances as S_a = L_a L_a^T, S_b = L_b L_b^T (for
centred features A, L = A^T / sqrt(n - 1)) and M = L_a^T L_b. The non-zero eigenvalues of
S_a S_b = L_a (L_a^T L_b L_b^T) are those of (L_a^T L_b L_b^T) L_a = M M^T, that is the squared singular values of M. So
tr (S_a S_b)^(1/2) = sum of the singular values of M, the nuclear norm: real by construction, exact for singular
covariances, and the smaller of n and the number of features sets its cost.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np
import torch

logger = logging.getLogger(__name__)


class FrechetDistance(NamedTuple):
    """Squared Fréchet distance of two Gaussians and what it rests on. Biased upwards by about features / n."""

    value: float
    n_a: int
    n_b: int
    num_features: int


class KernelDistance(NamedTuple):
    """Kernel distance: mean and standard deviation over subsets, standard error of the mean (NaN if unknown)."""

    mean: float
    std: float
    standard_error: float
    n_a: int
    n_b: int
    subset_size: int


class Floor(NamedTuple):
    """Distances that a perfect generator would get: real images against other real images, n in each half."""

    frechet: float
    kernel: float
    n: int
    repeats: int


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 (Chan, Golub and LeVeque 1979).

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        self.n = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch (B, F) of finite values, on any device.

        Raises:
            ValueError: another number of features, or values that are not finite.
        """
        batch = _matrix(features, name="features").cpu()
        if batch.shape[1] != self.mean.numel():
            raise ValueError(f"features: expected {self.mean.numel()} columns, got {batch.shape[1]}")
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._shift(len(batch), mean)
        self._scatter.addmm_(centred.T, centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add all that another accumulator has seen (another worker's share)."""
        self._shift(other.n, other.mean)
        self._scatter += other._scatter

    def _shift(self, n: int, mean: torch.Tensor) -> None:
        """Move the mean by ``n`` more vectors; what they add beside their own scatter. In place: with 2048 features a
        matrix of this size is 34 MB."""
        if n == 0:
            return
        total = self.n + n
        step = mean - self.mean
        self._scatter.addr_(step, step, alpha=self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total

    @property
    def covariance(self) -> torch.Tensor:
        """(F, F) float64, unbiased.

        Raises:
            ValueError: fewer than two vectors were seen.
        """
        if self.n < 2:
            raise ValueError(f"features: expected at least 2 vectors for a covariance, got {self.n}")
        return self._scatter / (self.n - 1)


def _matrix(features: torch.Tensor, *, name: str, minimum: int = 1) -> torch.Tensor:
    if features.ndim != 2 or features.shape[0] < minimum:
        raise ValueError(f"{name}: expected (n, features) with n >= {minimum}, got {tuple(features.shape)}")
    values = features.detach().as_subclass(torch.Tensor).to(torch.float64)
    bad = (~torch.isfinite(values).all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"{name}: expected finite values, got NaN or Inf in row {int(bad[0])}; check that image")
    return values


def _mean_and_root(features: torch.Tensor | FeatureStatistics, *, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean (F,), a factor L (F, m) with covariance L L^T, and n."""
    if isinstance(features, FeatureStatistics):
        eigenvalues, vectors = torch.linalg.eigh(features.covariance)
        return features.mean, vectors * eigenvalues.clamp_min(0).sqrt(), features.n
    values = _matrix(features, name=name, minimum=2)
    n = len(values)
    mean = values.mean(dim=0)
    centred = (values - mean) / math.sqrt(n - 1)
    if n > values.shape[1]:  # R of QR has the same R^T R with fewer rows
        centred = torch.linalg.qr(centred, mode="r").R
    return mean, centred.T, n


def frechet_distance(
    features_a: torch.Tensor | FeatureStatistics, features_b: torch.Tensor | FeatureStatistics, *, warn: bool = True
) -> FrechetDistance:
    """Squared Fréchet distance between the Gaussians fitted to two sets (Heusel et al., arXiv:1706.08500, eq. 6).

    ``|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)``, in float64 without a matrix root (module docstring).
    With fewer vectors than features the covariances are singular and the value is dominated by its bias: this is logged
    as a warning, and :func:`real_versus_real_floor` says how large the bias is.

    Args:
        features_a, features_b: (n, F) of n >= 2 finite vectors, or streamed statistics of the same F.
        warn: log a warning for fewer vectors than features; False in the repetitions of one comparison.

    Returns:
        The distance (>= 0 up to rounding), both n, and F.

    Raises:
        ValueError: wrong shapes, different F, values that are not finite.
    """
    mean_a, root_a, n_a = _mean_and_root(features_a, name="features_a")
    mean_b, root_b, n_b = _mean_and_root(features_b, name="features_b")
    num_features = mean_a.numel()
    if mean_b.numel() != num_features:
        raise ValueError(f"features_b: expected {num_features} features as in features_a, got {mean_b.numel()}")
    if warn and min(n_a, n_b) < num_features:
        logger.warning(
            "Fréchet distance from n = %d and %d images with %d features: fewer images than features, the value is "
            "mostly bias; compare it only with the real-versus-real floor at the same n",
            n_a,
            n_b,
            num_features,
        )
    root_b = root_b.to(root_a.device)
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    traces = root_a.square().sum() + root_b.square().sum()
    shift = (mean_a - mean_b.to(mean_a.device)).square().sum()
    return FrechetDistance(float(shift + traces - 2 * cross), n_a, n_b, num_features)


def _unbiased_mmd2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / F + 1)^3 of two sets of m vectors."""
    m, num_features = a.shape

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / num_features + 1) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def kernel_distance(
    features_a: torch.Tensor,
    features_b: torch.Tensor,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Kernel distance (KID, Bińkowski et al., arXiv:1801.01401): unbiased, so usable with few images.

    Mean of the unbiased squared maximum mean discrepancy (cubic polynomial kernel) over random subsets without
    replacement. The standard error of the mean is the delete-d jackknife's, ``std * sqrt(m / (n - m))`` for subsets of
    m of the smaller set's n (Shao and Wu 1989), which is the plain std for halves.

    Args:
        features_a, features_b: (n, F) with n >= 4, finite.
        subset_size: m; None takes half of the smaller set, at most 1000.
        subsets: number of random subsets.
        seed: of the subsets.

    Returns:
        Mean (may be slightly negative: unbiased around 0), std over subsets, standard error, both n, m.

    Raises:
        ValueError: wrong shapes, different F, a subset larger than a set or smaller than 2.
    """
    a = _matrix(features_a, name="features_a", minimum=4)
    b = _matrix(features_b, name="features_b", minimum=4).to(a.device)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b: expected {a.shape[1]} features as in features_a, got {b.shape[1]}")
    n = min(len(a), len(b))
    m = min(1000, n // 2) if subset_size is None else int(subset_size)
    if not 2 <= m <= n:
        raise ValueError(f"subset_size: expected 2 to {n} (the smaller set), got {m}")
    if subsets < 1:
        raise ValueError(f"subsets: expected at least 1, got {subsets}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:m]
        rows_b = torch.randperm(len(b), generator=generator)[:m]
        values.append(_unbiased_mmd2(a[rows_a], b[rows_b]))
    std = float(np.std(values, ddof=1)) if subsets > 1 else math.nan
    error = std * math.sqrt(m / (n - m)) if m < n else math.nan
    return KernelDistance(float(np.mean(values)), std, error, len(a), len(b), m)


def disjoint_halves(
    total: int, *, n: int | None = None, repeats: int = 5, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random pairs of disjoint index sets of a real set.

    Args:
        total: size of the set, at least 8.
        n: size of each half; None takes total // 2.
        repeats: number of random splits.
        seed: of the splits.

    Raises:
        ValueError: the set is too small for two halves of n >= 4.
    """
    half = total // 2 if n is None else int(n)
    if half < 4 or 2 * half > total:
        raise ValueError(f"n: expected two disjoint halves of 4 <= n <= {total // 2} of {total} images, got n = {half}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(total, generator=generator) for _ in range(repeats)]
    return [(order[:half], order[half : 2 * half]) for order in orders]


def real_versus_real_floor(features: torch.Tensor, *, n: int | None = None, seed: int = 0, repeats: int = 5) -> Floor:
    """Distances between two disjoint random halves of the real set: no generator can be expected to do better.

    Args:
        features: (N, F) of real images.
        n: images in each half; None takes N // 2. The Fréchet distance depends on n: compare at equal n only.
        seed: of the splits.
        repeats: random splits that are averaged.

    Raises:
        ValueError: fewer than 8 images, or 2 n > N.
    """
    values = _matrix(features, name="features")
    halves = disjoint_halves(len(values), n=n, repeats=repeats, seed=seed)
    frechet = [frechet_distance(values[a], values[b], warn=False).value for a, b in halves]
    kernel = [kernel_distance(values[a], values[b], subset_size=len(a), subsets=1).mean for a, b in halves]
    return Floor(float(np.mean(frechet)), float(np.mean(kernel)), len(halves[0][0]), repeats)
