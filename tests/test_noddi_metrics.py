# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import SSIMMetric
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from shared.metrics.noddi_maps import FLATTENED, MAPS, MEASURES, SSIMWindow, flattened_scores, map_scores
from shared.metrics.noddi_table import AS_PUBLISHED, SubjectScore, scored_rows

SHAPE = (20, 24, 18)


def fields(seed: int = 0, *, smooth: float = 1.5) -> torch.Tensor:
    """(3, X, Y, Z) in [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(3, *SHAPE))
    maps = gaussian_filter(noise, (0, smooth, smooth, smooth))
    return torch.from_numpy((maps - maps.min()) / (maps.max() - maps.min())).float()


def ball() -> torch.Tensor:
    axes = [torch.linspace(-1, 1, n) for n in SHAPE]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return ((x**2 + y**2 + z**2) < 0.4).float()[None]


def test_names_of_all_measures():
    found = map_scores(fields(), fields(1), ball())
    assert set(found) == {f"{key}_{name}" for key in MAPS for name in MEASURES} | set(FLATTENED)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_equal_maps_are_perfect():
    found = map_scores(fields(), fields(), ball())
    for key in MAPS:
        assert found[f"{key}_psnr"] == found[f"{key}_psnr_brain"] == pytest.approx(100)
        assert found[f"{key}_ssim"] == pytest.approx(1)
        assert found[f"{key}_ssim_brain"] == pytest.approx(1)
        assert found[f"{key}_mae"] == 0
        assert found[f"{key}_correlation_brain"] == pytest.approx(1)
    assert found["flattened_psnr"] == pytest.approx(100)
    assert found["flattened_ssim"] == pytest.approx(1)


@pytest.mark.reliability(10)
def test_closed_forms_and_each_map_by_itself():
    true, brain = 0.4 * fields() + 0.3, ball()
    pred = true.clone()
    pred[1] += 0.1 * brain[0]  # ODI, inside only
    pred[2] += 0.2 * (1 - brain[0])  # FWF, outside only
    found = map_scores(pred, true, brain)
    share = float(brain.mean())
    assert found["ndi_psnr"] == 100
    assert found["odi_psnr_brain"] == pytest.approx(20, abs=1e-4)
    assert found["odi_mae_brain"] == pytest.approx(0.1, abs=1e-6)
    assert found["odi_psnr"] == pytest.approx(20 - 10 * math.log10(share), abs=1e-4)
    assert found["odi_mae"] == pytest.approx(0.1 * share, abs=1e-6)
    assert found["odi_correlation_brain"] == pytest.approx(1, abs=1e-6)
    assert found["fwf_psnr_brain"] == 100
    assert found["fwf_mae"] == pytest.approx(0.2 * (1 - share), abs=1e-6)
    assert found["fwf_ssim_brain"] > found["fwf_ssim"]
    assert found["odi_ssim_brain"] < 1


def test_correlation_is_pearsons_inside_the_mask():
    true, pred, brain = fields(), fields(3), ball()
    found = map_scores(pred, true, brain)
    inside = brain[0].bool()
    for row, key in enumerate(MAPS):
        expected = np.corrcoef(true[row][inside], pred[row][inside])[0, 1]
        assert found[f"{key}_correlation_brain"] == pytest.approx(expected, abs=1e-6)
    assert math.isnan(map_scores(torch.full_like(true, 0.5), true, brain)["ndi_correlation_brain"])


@pytest.mark.parametrize("window", [SSIMWindow(), SSIMWindow("uniform", 7)])
def test_ssim_is_that_of_monai(window):
    true, pred = fields(), fields(5)
    metric = SSIMMetric(3, kernel_type=window.kind, win_size=window.size, kernel_sigma=window.sigma, reduction="none")
    found = map_scores(pred, true, ball(), window=window)
    for row, key in enumerate(MAPS):
        expected = metric(pred[row][None, None], true[row][None, None])
        assert found[f"{key}_ssim"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.reliability(10)
def test_uniform_ssim_is_that_of_scikit_image_also_inside_the_mask():
    """Places and their voxels belong together: scikit-image pads its map to the size of the volume."""
    true, pred, brain = fields(), (fields() + 0.2 * fields(9)).clamp(0, 1), ball()
    found = map_scores(pred, true, brain, window=SSIMWindow("uniform", 7))
    inside = brain[0].bool().numpy()
    for row, key in enumerate(MAPS):
        pair = true[row].double().numpy(), pred[row].double().numpy()
        options = {"data_range": 1.0, "win_size": 7, "use_sample_covariance": False, "full": True}
        mean, local = structural_similarity(*pair, **options)
        assert found[f"{key}_ssim"] == pytest.approx(mean, abs=1e-5)
        inner = (slice(3, -3),) * 3
        assert found[f"{key}_ssim_brain"] == pytest.approx(local[inner][inside[inner]].mean(), abs=1e-5)


@pytest.mark.reliability(10)
def test_data_range_is_one_whatever_the_values():
    small = map_scores(0.1 * fields(1), 0.1 * fields(), ball())
    large = map_scores(fields(1), fields(), ball())
    assert small["ndi_psnr"] == pytest.approx(large["ndi_psnr"] + 20, abs=1e-3)
    assert small["ndi_ssim"] > large["ndi_ssim"]
    # The article divides by the range of the truth, so there it makes no difference.
    assert small["flattened_psnr"] == pytest.approx(large["flattened_psnr"], abs=1e-3)
    assert small["flattened_ssim"] == pytest.approx(large["flattened_ssim"], abs=1e-4)


@pytest.mark.reliability(10)
def test_flattened_scores_are_those_of_scikit_image():
    true, pred = 0.8 * fields(), 0.8 * fields(2)
    lines = [part.permute(1, 2, 3, 0).reshape(-1, 3).double().numpy() for part in (true, pred)]
    span = lines[0].max() - lines[0].min()
    found = flattened_scores(pred, true)
    assert found["flattened_ssim"] == pytest.approx(
        structural_similarity(*lines, channel_axis=1, data_range=span), abs=1e-10
    )
    assert found["flattened_psnr"] == pytest.approx(peak_signal_noise_ratio(*lines, data_range=span), abs=1e-9)


def test_flattened_ssim_depends_on_the_order_of_axes():
    """What is wrong with it: a volume and its transpose score differently."""
    true, pred = fields(), fields(2)
    pred[:, :, ::2] = true[:, :, ::2]
    turned = flattened_scores(pred.transpose(1, 3), true.transpose(1, 3))
    other = flattened_scores(pred.transpose(2, 3), true.transpose(2, 3))
    assert abs(turned["flattened_ssim"] - other["flattened_ssim"]) > 0.01
    assert math.isnan(flattened_scores(pred, torch.zeros_like(true))["flattened_ssim"])


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"maps: expected at least 11 voxels along each axis .* got \(20, 10, 18\)"):
        map_scores(fields()[:, :, :10], fields()[:, :, :10], ball()[:, :, :10])
    with pytest.raises(ValueError, match="brain: expected voxels inside the mask"):
        map_scores(fields(), fields(), torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match=r"maps: expected truth and estimate \(3, X, Y, Z\)"):
        map_scores(fields()[:2], fields(), ball())
    with pytest.raises(ValueError, match="kind: expected gaussian or uniform, got 'box'"):
        SSIMWindow("box")
    with pytest.raises(ValueError, match="size: expected an odd number"):
        SSIMWindow(size=8)


def scores_of(method: str, values: list[float], subjects: list[str]) -> list[SubjectScore]:
    columns = [f"{key}_{name}" for key in MAPS for name in MEASURES] + list(FLATTENED)
    return [
        SubjectScore(subject, f"scan{i}", method, dict.fromkeys(columns, value), seconds=1.0)
        for i, (value, subject) in enumerate(zip(values, subjects, strict=True))
    ]


def test_table_rows():
    subjects = ["a", "b", "c", "c"]
    scores = scores_of("model", [1.0, 2.0, 3.0, 4.0], subjects) + scores_of("cubic", [0.5, 1.5, 2.5, 3.5], subjects)
    methods = {"model": "mine", "cubic": "theirs", "U-Net": "not trained"}
    pairs = [("model", "cubic"), ("model", "U-Net")]
    rows = scored_rows(scores, methods, pairs=pairs, window=SSIMWindow())
    assert len(rows) == 3 * 7 * 5 + 2 * 5
    found = {(row["group"], row["method"], row["measure"]): row for row in rows}
    assert len(found) == len(rows)
    own = found["ODI", "model", "odi_psnr_brain"]
    assert (own["value"], own["n"], own["groups"]) == (2.5, 4, 3)
    assert own["ci_low"] < 2.5 < own["ci_high"]
    assert own["note"].startswith("4 scans of 3 subjects, interval by bootstrap over subjects; higher is better; mine")
    assert own["name"] == "PSNR (dB) in the brain, model"
    difference = found["NDI", "model - cubic", "ndi_mae"]
    assert (difference["value"], difference["ci_low"], difference["ci_high"]) == (0.5, 0.5, 0.5)
    assert "below 0: better" in difference["note"]
    assert found["FWF", "U-Net", "fwf_ssim"]["value"] is None
    assert found["FWF", "U-Net", "fwf_ssim"]["note"] == "not trained"
    assert found["FWF", "model - U-Net", "fwf_ssim"]["note"] == "not trained"
    assert "gaussian window of 11, sigma 1.5" in found["FWF", "model", "fwf_ssim"]["note"]
    assert "one-dimensional" in found[AS_PUBLISHED, "model", "flattened_ssim"]["note"]


def test_what_could_not_be_measured_is_left_out_and_counted():
    scores = scores_of("model", [1.0, math.nan, 3.0], ["a", "b", "c"])
    rows = scored_rows(scores, {"model": ""}, pairs=[], window=SSIMWindow())
    assert (rows[0]["value"], rows[0]["n"]) == (2.0, 2)
    assert "1 of 3 scans could not be measured" in rows[0]["note"]
    assert "no interval from fewer than 3 subjects" in rows[0]["note"]
    assert scores[1].columns["ndi_psnr"] is None
