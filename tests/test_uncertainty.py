# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from shared.metrics.noddi_maps import MAPS
from shared.metrics.uncertainty import (
    calibration_bins,
    interval_width,
    measures,
    nominal_coverage,
    uncertainty_rows,
    uncertainty_scores,
)

VOXELS = 40_000


def drawn(
    num_samples: int, *, scale: float = 1.0, spread: float = 3.0, kind: str = "normal", bias: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Samples with ``scale`` times the sd of the truth; the sd varies by a factor e^spread over the voxels."""
    rng = np.random.default_rng(1)
    centre, sd = rng.uniform(0.2, 0.8, VOXELS), 0.01 * np.exp(rng.uniform(0, spread, VOXELS))
    noise = rng.standard_normal if kind == "normal" else lambda shape: rng.exponential(size=shape) - 1
    return centre + scale * sd * noise((num_samples, VOXELS)), centre + bias * sd + sd * noise((VOXELS,))


def scores(samples: np.ndarray, true: np.ndarray) -> dict[str, float]:
    return uncertainty_scores(samples, true, calibration_bins(samples, true))


def test_nominal_coverage():
    for samples, one, two in ((4, 0.563, 0.828), (8, 0.623, 0.899), (16, 0.653, 0.929), (10**6, 0.683, 0.954)):
        assert nominal_coverage(1, samples) == pytest.approx(one, abs=6e-4)
        assert nominal_coverage(2, samples) == pytest.approx(two, abs=6e-4)
        assert nominal_coverage(interval_width(samples), samples) == pytest.approx(0.95)
    assert interval_width(10**6) == pytest.approx(1.96, abs=1e-3)
    assert "nominal 0.563" in measures(4)["coverage_1sd"]
    with pytest.raises(ValueError, match="num_samples: expected at least 2"):
        nominal_coverage(1, 1)


@pytest.mark.parametrize("num_samples", [4, 5, 8, 16])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_truth_from_the_same_distribution_is_calibrated(num_samples, spread):
    """Also where all voxels have one sd, and the bins differ by chance alone."""
    found = scores(*drawn(num_samples, spread=spread))
    assert found["coverage_1sd"] == pytest.approx(nominal_coverage(1, num_samples), abs=0.01)
    assert found["coverage_2sd"] == pytest.approx(nominal_coverage(2, num_samples), abs=0.01)
    assert found["coverage_95"] == pytest.approx(0.95, abs=0.005)
    assert found["calibration_slope"] == pytest.approx(1, abs=0.03)
    assert found["calibration_error"] < 0.03 * found["mean_sd"]
    assert (found["rank_correlation"] > 0.3) == (spread > 0)


def test_the_normal_quantile_would_be_wrong():
    found = scores(*drawn(4))
    assert found["coverage_1sd"] < 0.683 - 0.1


def test_calibration_holds_for_skewed_distributions():
    found = scores(*drawn(8, kind="exponential"))
    assert found["calibration_slope"] == pytest.approx(1, abs=0.04)
    assert found["calibration_error"] < 0.04 * found["mean_sd"]


@pytest.mark.parametrize("num_samples", [4, 8])
def test_half_the_sd_is_found(num_samples):
    found = scores(*drawn(num_samples, scale=0.5))
    half = num_samples // 2
    # Error variance sigma^2 (1 + 1/(4 n)), less the share of the mean of n, over sigma^2 / 4.
    expected = 2 * math.sqrt((1 + 0.25 / half) / (1 + 1 / half))
    assert found["calibration_slope"] == pytest.approx(expected, abs=0.05)
    assert found["coverage_1sd"] < nominal_coverage(1, num_samples) - 0.15
    assert found["coverage_95"] < 0.85
    assert found["calibration_error"] > 0.5 * found["mean_sd"]


def test_double_the_sd_is_found():
    found = scores(*drawn(8, scale=2))
    assert found["calibration_slope"] < 0.8
    assert found["coverage_1sd"] > nominal_coverage(1, 8) + 0.1


def test_a_bias_is_found():
    samples, true = drawn(8, bias=2)
    assert scores(samples, true)["calibration_slope"] > 1.5
    assert scores(samples, true)["coverage_1sd"] < 0.4


def test_bins_go_from_small_to_large_and_hold_all_voxels_twice():
    samples, true = drawn(8)
    bins = calibration_bins(samples, true, num_bins=6)
    assert len(bins) == 6
    assert sum(one.voxels for one in bins) == 2 * VOXELS
    assert [one.predicted for one in bins] == sorted(one.predicted for one in bins)
    assert [one.observed for one in bins] == sorted(one.observed for one in bins)
    assert max(abs(one.observed / one.predicted - 1) for one in bins) < 0.05


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    sd = rng.permutation(np.linspace(0.01, 0.1, 500))
    samples = 0.5 + sd * np.array([-1.0, -1.0, 1.0, 1.0])[:, None]
    assert scores(samples, 0.5 + sd**3)["rank_correlation"] == pytest.approx(1)
    assert scores(samples, 0.5 + 0.2 - sd)["rank_correlation"] == pytest.approx(-1)


def test_samples_without_spread():
    samples, true = np.full((4, 100), 0.3), np.full(100, 0.3)
    found = scores(samples, true)
    assert found["coverage_1sd"] == 1
    assert math.isnan(found["calibration_slope"])
    assert math.isnan(found["rank_correlation"])
    assert scores(samples, true + 0.1)["coverage_95"] == 0
    # Half of the voxels certain: bins that hold nothing are left out.
    mixed = np.random.default_rng(0).normal(0.3, 0.1, (4, 100))
    mixed[:, :50] = 0.3
    assert all(one.voxels > 0 for one in calibration_bins(mixed, true))


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"samples: expected \(N, V\) with N >= 4 .* got \(3, 9\) and \(9,\)"):
        calibration_bins(np.zeros((3, 9)), np.zeros(9))
    with pytest.raises(ValueError, match=r"got \(4, 9\) and \(8,\)"):
        uncertainty_scores(np.zeros((4, 9)), np.zeros(8), [])


def test_rows():
    values = dict.fromkeys(measures(4), 0.5)
    lines = [{"subject": s, "map": key, **values} for s in "abc" for key in MAPS]
    lines[0]["calibration_slope"] = math.nan
    rows = uncertainty_rows(lines, num_samples=4, note="of the model")
    found = {(row["method"], row["measure"]): row for row in rows}
    assert len(found) == len(rows) == 3 * len(measures(4))
    row = found["ODI", "coverage_1sd"]
    assert row["name"] == "Truth within ± 1 sd (nominal 0.563), ODI"
    assert (row["value"], row["n"], row["group"]) == (0.5, 3, "Uncertainty: sd of 4 samples")
    assert row["row_heading"] == "Map"
    assert found["NDI", "calibration_slope"]["n"] == 2
