# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from shared.metrics.distribution import (
    FeatureStatistics,
    disjoint_halves,
    frechet_distance,
    kernel_distance,
    real_versus_real_floor,
)


def _features(n: int, num_features: int, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, generator=torch.Generator().manual_seed(99)) / num_features**0.5
    return shift + scale * torch.randn(n, num_features, generator=generator, dtype=torch.float64) @ mixing.double()


def _by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula with scipy's matrix root, as an independent oracle."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root))


@pytest.mark.reliability(10)
@pytest.mark.parametrize(("n_a", "n_b"), [(200, 300), (200, 25)])
def test_frechet_equals_the_matrix_root(n_a: int, n_b: int) -> None:
    a, b = _features(n_a, 20), _features(n_b, 20, seed=1, shift=0.3, scale=1.4)
    result = frechet_distance(a, b)
    assert result.value == pytest.approx(_by_matrix_root(a.numpy(), b.numpy()), abs=1e-6)
    assert result[1:] == (n_a, n_b, 20)
    assert frechet_distance(b, a).value == pytest.approx(result.value, abs=1e-9)


@pytest.mark.reliability(10)
def test_frechet_equals_the_closed_form_of_gaussians() -> None:
    """Diagonal covariances: |m_a - m_b|^2 + sum (s_a - s_b)^2, met exactly by features whitened to those moments."""
    white = torch.linalg.qr(_features(400, 6) - _features(400, 6).mean(0)).Q * 399**0.5
    s_a, s_b, shift = torch.rand(6).double() + 0.5, torch.rand(6).double() + 0.5, torch.rand(6).double()
    expected = (shift**2).sum() + ((s_a - s_b) ** 2).sum()
    assert frechet_distance(white * s_a, white * s_b + shift).value == pytest.approx(expected.item(), abs=1e-9)


def test_frechet_of_equal_sets_is_zero_even_when_singular(caplog: pytest.LogCaptureFixture) -> None:
    few = _features(10, 40)
    with caplog.at_level(logging.WARNING):
        assert frechet_distance(few, few).value == pytest.approx(0.0, abs=1e-8)
    assert "n = 10 and 10 images with 40 features" in caplog.text


def test_no_warning_with_enough_images(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        frechet_distance(_features(60, 20), _features(60, 20, seed=1))
    assert caplog.text == ""


def test_streamed_statistics_equal_the_whole_set() -> None:
    features = _features(100, 12, shift=50.0)
    streamed, other = FeatureStatistics(12), FeatureStatistics(12)
    for batch in features[:60].split(7):
        streamed.update(batch)
    other.update(features[60:].float())
    streamed.merge(other)
    assert streamed.n == 100
    np.testing.assert_allclose(streamed.mean, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(streamed.covariance, np.cov(features, rowvar=False), atol=1e-5)
    reference = _features(80, 12, seed=1)
    assert frechet_distance(streamed, reference).value == pytest.approx(
        frechet_distance(features, reference).value, rel=1e-6
    )
    with pytest.raises(ValueError, match="at least 2 vectors for a covariance, got 0"):
        _ = FeatureStatistics(3).covariance
    with pytest.raises(ValueError, match="expected 12 columns, got 3"):
        streamed.update(torch.zeros(2, 3))


@pytest.mark.reliability(10)
def test_kernel_distance_by_loops() -> None:
    a, b = _features(6, 3), _features(6, 3, seed=1, shift=1.0)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [kernel(s[i], s[j]) for s in (a, b) for i in range(6) for j in range(6) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = sum(within) / 30 - 2 * sum(between) / 36
    result = kernel_distance(a, b, subset_size=6, subsets=2)
    assert result.mean == pytest.approx(expected, rel=1e-9)
    assert result.std == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(result.standard_error)
    assert (result.n_a, result.n_b, result.subset_size) == (6, 6, 6)


def test_kernel_distance_is_unbiased_and_its_error_is_right() -> None:
    """Shifted sets: 20 independent repetitions spread as the reported standard error says."""
    means, errors, null = [], [], []
    for seed in range(20):
        a, b = _features(60, 8, seed=2 * seed), _features(60, 8, seed=2 * seed + 1, shift=0.7)
        result = kernel_distance(a, b, subsets=40, seed=seed)
        means.append(result.mean)
        errors.append(result.standard_error)
        null.append(kernel_distance(a, b - 0.7, subsets=10, seed=seed).mean)
    assert 0.5 < np.mean(errors) / np.std(means, ddof=1) < 2
    assert abs(np.mean(null)) < 3 * np.std(null, ddof=1) / 20**0.5
    assert np.mean(means) > 5 * np.std(null, ddof=1)


def test_kernel_distance_repeats_with_its_seed() -> None:
    a, b = _features(30, 5), _features(20, 5, seed=1)
    assert kernel_distance(a, b, seed=4) == kernel_distance(a, b, seed=4)
    assert kernel_distance(a, b).subset_size == 10
    with pytest.raises(ValueError, match="subset_size: expected 2 to 20 .*, got 21"):
        kernel_distance(a, b, subset_size=21)


def test_floor_falls_with_n_and_is_below_a_shifted_set() -> None:
    features = _features(400, 16)
    floor, small = real_versus_real_floor(features), real_versus_real_floor(features, n=40)
    assert (floor.n, small.n) == (200, 40)
    assert floor.frechet < small.frechet / 3
    assert floor.frechet < frechet_distance(features, features + 0.5).value
    assert abs(floor.kernel) < 0.1
    assert floor == real_versus_real_floor(features)


def test_halves_are_disjoint() -> None:
    for a, b in disjoint_halves(31, repeats=3, seed=1):
        assert len(a) == len(b) == 15
        assert not set(a.tolist()) & set(b.tolist())
    with pytest.raises(ValueError, match="of 4 <= n <= 15 of 31 images, got n = 16"):
        disjoint_halves(31, n=16)


def test_bad_features_are_named() -> None:
    good = _features(10, 4)
    bad = good.clone()
    bad[3, 1] = torch.inf
    with pytest.raises(ValueError, match="features_b: expected finite values, got NaN or Inf in row 3"):
        frechet_distance(good, bad)
    with pytest.raises(ValueError, match="features_b: expected 4 features as in features_a, got 5"):
        frechet_distance(good, _features(10, 5))
    with pytest.raises(ValueError, match=r"features_a: expected \(n, features\) with n >= 2, got \(1, 4\)"):
        frechet_distance(good[:1], good)
