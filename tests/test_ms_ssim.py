# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric
from scipy import stats

from shared.metrics.confidence import bootstrap_interval, mean_interval, pairwise_interval, wilson_interval
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM, multiscale_ssim


def _images(n: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Smooth random scenes with some noise, (n, 1, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth + 0.1 * torch.randn(n, 1, height, width, generator=generator)).clamp(0, 1)


@pytest.mark.reliability(10)
@pytest.mark.parametrize(("size", "kernel"), [((192, 208), 11), ((128, 128), 7), ((131, 117), 7)])
def test_pairs_equal_monai(size: tuple[int, int], kernel: int) -> None:
    x, y = _images(5, *size), _images(5, *size, seed=1)
    y[0] = 0.9 * x[0]
    expected = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel)._compute_metric(x, y)[:, 0]
    torch.testing.assert_close(multiscale_ssim(x, y, kernel_size=kernel), expected, atol=1e-5, rtol=0)


@pytest.mark.reliability(10)
def test_pairs_equal_an_independent_package() -> None:
    reference = pytest.importorskip("pytorch_msssim", reason="development dependency pytorch-msssim")
    x = _images(4, 192, 208)
    y = (0.8 * x + 0.2 * _images(4, 192, 208, seed=1)).clamp(0, 1)
    expected = reference.ms_ssim(x, y, data_range=1.0, size_average=False)
    torch.testing.assert_close(multiscale_ssim(x, y), expected, atol=1e-4, rtol=0)


def test_identity_symmetry_and_range() -> None:
    x, y = _images(3, 128, 128), _images(3, 128, 128, seed=1)
    torch.testing.assert_close(multiscale_ssim(x, x, kernel_size=7), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(multiscale_ssim(x, y, kernel_size=7), multiscale_ssim(y, x, kernel_size=7))
    # The data range scales the constants: the same picture in other units has the same similarity.
    scaled = multiscale_ssim(255 * x, 255 * y, kernel_size=7, data_range=255)
    torch.testing.assert_close(scaled, multiscale_ssim(x, y, kernel_size=7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("memory_bytes", [1, 3 * 32 * 128 * 112, 1 << 29])
def test_set_equals_the_pairs_one_by_one(memory_bytes: int) -> None:
    images = _images(7, 128, 112)
    result = PairwiseMultiScaleSSIM(kernel_size=7, memory_bytes=memory_bytes, pairs_per_step=2)(images)
    rows, columns = torch.triu_indices(7, 7, offset=1)
    expected = multiscale_ssim(images[rows], images[columns], kernel_size=7)
    torch.testing.assert_close(result.matrix[rows, columns], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.matrix, result.matrix.T)
    assert result.num_pairs == 21
    assert result.interval.n == 7
    assert result.interval.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert result.interval.low < result.interval.value < result.interval.high


def test_collapse_raises_similarity() -> None:
    diverse = _images(6, 128, 128)
    noise = torch.randn(6, 1, 128, 128, generator=torch.Generator().manual_seed(3))
    collapsed = (diverse[:1] + 0.02 * noise).clamp(0, 1)
    measure = PairwiseMultiScaleSSIM(kernel_size=7)
    assert measure(collapsed).interval.low > measure(diverse).interval.high


def test_small_images_are_refused_with_remedies_that_work() -> None:
    images = _images(2, 128, 140)
    with pytest.raises(
        ValueError, match="every side >= 176, got 128 x 140; use kernel_size 7 or `weights` of length 4"
    ):
        PairwiseMultiScaleSSIM()(images)
    PairwiseMultiScaleSSIM(kernel_size=7)(images)
    PairwiseMultiScaleSSIM(weights=(0.1, 0.3, 0.3, 0.3))(images)
    # MONAI's own rule, more than 160 here, lets 161 through: halved four times it is 10 pixels, and the result is NaN.
    with pytest.raises(ValueError, match="got 175 x 200"):
        multiscale_ssim(_images(1, 175, 200), _images(1, 175, 200))
    assert multiscale_ssim(_images(1, 176, 200), _images(1, 176, 200)).isfinite().all()
    with pytest.raises(ValueError, match="use larger images"):
        PairwiseMultiScaleSSIM()(torch.zeros(2, 1, 8, 8))


def test_misuse_is_refused() -> None:
    images = _images(2, 128, 128)
    measure = PairwiseMultiScaleSSIM(kernel_size=7)
    with pytest.raises(ValueError, match=r"images: expected finite values in \[0, 1\], got \[0, 255\]; clamp"):
        measure((images - images.min()) / (images.max() - images.min()) * 255)
    images[0, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        measure(images)
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, W\), got \(2, 3, 128, 128\)"):
        measure(torch.zeros(2, 3, 128, 128))
    with pytest.raises(ValueError, match="at least 2 images"):
        measure(torch.zeros(1, 1, 128, 128))
    with pytest.raises(ValueError, match="expected the shape of x"):
        measure.paired(torch.zeros(1, 1, 128, 128), torch.zeros(1, 1, 128, 127))
    with pytest.raises(ValueError, match="kernel_size: expected an odd"):
        PairwiseMultiScaleSSIM(kernel_size=8)


def test_mean_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(3, 1, 20)
    low, high = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high, 20))
    assert np.isnan(mean_interval([1.0]).low)
    with pytest.raises(ValueError, match="got nan at row 1"):
        mean_interval([0.0, np.nan])
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_bootstrap_interval_repeats_and_nears_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(3, 1, 200)
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(values, seed=1)
    assert first == pytest.approx(mean_interval(values), abs=0.02)


def test_wilson_interval_by_hand() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + z^2/20) / (1 + z^2/10), Wilson 1927.
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433, 10), abs=1e-4)
    assert wilson_interval(0, 10).low == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="got 11 of 10"):
        wilson_interval(11, 10)


def test_jackknife_covers_the_mean_where_independent_pairs_would_not() -> None:
    """Pairs h(i, j) = a_i + a_j: the true sd of the mean is 2 sd(a) / sqrt(n), not sd(h) / sqrt(pairs)."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        a = generator.normal(0, 1, 15)
        interval = pairwise_interval(a[:, None] + a[None])
        covered += interval.low <= 0 <= interval.high
        assert interval.value == pytest.approx(2 * a.mean())
        expected = stats.t.ppf(0.975, 14) * 2 * a.std(ddof=1) / np.sqrt(15)
        assert interval.high - interval.value == pytest.approx(expected, rel=1e-6)
    assert 180 <= covered <= 198
