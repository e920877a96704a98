# SPDX-License-Identifier: Apache-2.0
"""Measures against independent programs and against numbers worked out by hand: less than 1e-4 apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from pytorch_msssim import ms_ssim as their_ms_ssim
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from shared.metrics.distribution import FeatureStatistics, frechet_distance
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM, multiscale_ssim
from shared.metrics.noddi_maps import map_scores
from shared.metrics.segmentation import mask_scores
from shared.metrics.surface import surface_distance
from shared.metrics.translation import slice_scores
from tests.bundle_tools import WORKFLOWS, components, label, read

pytestmark = pytest.mark.reliability(10)
TARGET = 1e-4
SIZES = [(192, 208), (176, 240), (208, 192)]


def images(count: int, size: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Smooth scenes with some noise, (count, 1, *size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 1, *(6,) * len(size)), generator=generator)
    mode = "bicubic" if len(size) == 2 else "trilinear"
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode=mode)
    return (smooth + 0.1 * torch.randn((count, 1, *size), generator=generator)).clamp(0, 1)


def pair(size: tuple[int, ...], count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = images(count, size)
    return x, (0.8 * x + 0.2 * images(count, size, seed=1)).clamp(0, 1)


# Pictures


@pytest.mark.parametrize("size", [(61, 47), *SIZES])
def test_psnr_is_that_of_scikit_image(size, record_property):
    x, y = pair(size)
    ssim = PairwiseMultiScaleSSIM(kernel_size=7, weights=(0.4, 0.6))
    expected = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0) for a, b in zip(x, y, strict=True)]
    error = np.abs(slice_scores(x, y, None, ssim=ssim)["psnr"] - expected).max()
    record_property("figure", f"{error:.1e} dB")
    assert error < TARGET
    # Inside a mask: of the pixels there alone.
    mask = (images(4, size, seed=2) > 0.5).float()
    inside = [
        peak_signal_noise_ratio(b[m > 0].numpy(), a[m > 0].numpy(), data_range=1.0)
        for a, b, m in zip(x, y, mask, strict=True)
    ]
    assert np.abs(slice_scores(x, y, mask, ssim=ssim)["brain_psnr"] - inside).max() < TARGET


@pytest.mark.parametrize("size", [(61, 47), *SIZES])
def test_ssim_of_one_scale_is_that_of_scikit_image(size, record_property):
    x, y = pair(size)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [structural_similarity(a[0].double().numpy(), b[0].double().numpy(), **options)
                for a, b in zip(x, y, strict=True)]  # fmt: skip
    error = float((multiscale_ssim(x, y, weights=(1.0,)).double() - torch.tensor(expected)).abs().max())
    record_property("figure", f"{error:.1e}")
    assert error < TARGET
    # A wrong data range is no rounding.
    assert (multiscale_ssim(x, y, weights=(1.0,), data_range=2.0).double() - torch.tensor(expected)).abs().min() > 1e-3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [7, 11])
def test_ms_ssim_is_that_of_pytorch_msssim(size, kernel, record_property):
    x, y = pair(size)
    expected = their_ms_ssim(x, y, data_range=1.0, size_average=False, win_size=kernel)
    error = float((multiscale_ssim(x, y, kernel_size=kernel) - expected).abs().max())
    record_property("figure", f"{error:.1e}")
    assert error < TARGET
    assert (multiscale_ssim(x, y, kernel_size=kernel, data_range=2.0) - expected).abs().min() > 1e-3


def test_a_data_range_scales_with_the_images():
    """Images of 0 to 255 with the range 255 have the value of images of 0 to 1 with the range 1."""
    x, y = pair((176, 208))
    torch.testing.assert_close(
        multiscale_ssim(255 * x, 255 * y, data_range=255.0), multiscale_ssim(x, y), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="declare another data_range"):
        multiscale_ssim(255 * x, 255 * y)


def test_psnr_of_maps_is_that_of_scikit_image():
    x, y = pair((11, 13, 12), count=3)
    mask = (images(1, (11, 13, 12), seed=2)[0] > 0.5).float()
    scores = map_scores(x[:, 0], y[:, 0], mask)
    for row, name in enumerate(("ndi", "odi", "fwf")):
        a, b = x[row, 0].numpy(), y[row, 0].numpy()
        inside = mask[0].numpy() > 0
        assert scores[f"{name}_psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0), abs=TARGET)
        expected = peak_signal_noise_ratio(b[inside], a[inside], data_range=1.0)
        assert scores[f"{name}_psnr_brain"] == pytest.approx(expected, abs=TARGET)


DECLARED = {"PeakSignalToNoiseRatio": "max_val", "PSNRMetric": "max_val", "SSIMMetric": "data_range",
            "MultiScaleSSIMMetric": "data_range", "SSIMLoss": "data_range"}  # fmt: skip
USED = [
    (path, where, component)
    for path in WORKFLOWS
    for where, component in components(read(path))
    if component["_target_"] in DECLARED
]


@pytest.mark.parametrize(
    ("path", "where", "component"), USED, ids=[f"{label(path)}-{where}" for path, where, _ in USED]
)
def test_configurations_declare_the_data_range_of_images_in_0_to_1(path, where, component):
    assert component[DECLARED[component["_target_"]]] == 1.0
    if component["_target_"] == "PeakSignalToNoiseRatio":
        metric = ConfigParser({"it": {**component, "output_transform": "$lambda x: x"}}).get_parsed_content("it")
        x, y = pair((61, 47), count=1)
        expected = peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=1.0)
        assert float(metric.metric_fn(x, y)) == pytest.approx(expected, abs=TARGET)


def test_configurations_with_such_measures_are_found():
    assert {path.parent.parent.name for path, *_ in USED} >= {"cxr_ldm", "brain_controlnet", "dmri2noddi"}


# Distributions


def gaussian_features(mean: torch.Tensor, covariance_root: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, len(mean)), generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * (count - 1) ** 0.5
    return mean + white @ covariance_root.T


@pytest.mark.parametrize(
    ("features", "count", "offset"), [(1, 50, 0.0), (6, 400, 0.0), (64, 300, 0.0), (16, 200, 100.0)]
)
def test_frechet_distance_is_the_closed_form_of_gaussians(features, count, offset, record_property):
    """Covariances with the same axes commute: |m_a - m_b|^2 + sum (sqrt(d) - sqrt(e))^2."""
    generator = torch.Generator().manual_seed(features)
    axes = torch.linalg.qr(torch.randn((features, features), generator=generator, dtype=torch.float64)).Q
    d, e = torch.rand((2, features), generator=generator, dtype=torch.float64) + 0.2
    mean = offset + torch.rand((2, features), generator=generator, dtype=torch.float64)
    # Roots with any rotation behind them: only the covariance counts.
    turn = torch.linalg.qr(torch.randn((features, features), generator=generator, dtype=torch.float64)).Q
    one = gaussian_features(mean[0], axes * d.sqrt(), count, 1)
    other = gaussian_features(mean[1], (axes * e.sqrt()) @ turn, count + 30, 2)
    expected = float((mean[0] - mean[1]).square().sum() + (d.sqrt() - e.sqrt()).square().sum())
    found = [frechet_distance(one, other).value, frechet_distance(other, one).value]
    streamed = FeatureStatistics(features)
    for part in one.split(17):
        streamed.update(part)
    found.append(frechet_distance(streamed, other).value)
    error = max(abs(value - expected) for value in found)
    record_property("figure", f"{error:.1e} of {expected:.3g}")
    assert error < TARGET


def test_frechet_distance_of_two_gaussians_with_other_axes_by_hand():
    """Covariances diag(4, 1) and the same turned by 90 degrees, means 3 apart: 9 + 5 + 5 - 2 (2 + 2) = 11."""
    one = gaussian_features(torch.zeros(2).double(), torch.diag(torch.tensor([2.0, 1.0])).double(), 100, 0)
    other = gaussian_features(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 2.0])).double(), 80, 1)
    assert frechet_distance(one, other).value == pytest.approx(11, abs=1e-9)


# Masks


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.int64)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
    return mask


HAND = {  # prediction, truth, spacing -> Dice, IoU, HD95, ASSD
    "equal": (box((9, 12), (2, 3), (4, 5)), box((9, 12), (2, 3), (4, 5)), None, 1.0, 1.0, 0.0, 0.0),
    "half": (box((9, 12), (2, 2), (2, 4)), box((9, 12), (2, 4), (2, 4)), None, 0.5, 1 / 3, 2.0, (2 * 2 * (1 + 2)) / 16),
    "apart": (box((9, 12), (1, 1), (1, 1)), box((9, 12), (4, 5), (1, 1)), None, 0.0, 0.0, 5.0, 5.0),
    "apart in mm": (box((9, 12), (1, 1), (1, 1)), box((9, 12), (4, 5), (1, 1)), [2.0, 1.5], 0.0, 0.0, 72**0.5, 72**0.5),
    "inside": (box((9, 12), (3, 3), (1, 1)), box((9, 12), (2, 2), (3, 3)), None, 0.2, 1 / 9,
               2**0.5, (1 + 4 * 1 + 4 * 2**0.5) / 9),
    "volume": (box((4, 7, 9), (1, 1, 1), (1, 1, 1)), box((4, 7, 9), (1, 1, 3), (1, 1, 1)), [1, 1, 2.5],
               0.0, 0.0, 5.0, 5.0),
    "both empty": (box((5, 6), (0, 0), (0, 0)), box((5, 6), (0, 0), (0, 0)), None, 1.0, 1.0, math.nan, math.nan),
    "one empty": (box((5, 6), (0, 0), (0, 0)), box((5, 6), (1, 1), (2, 2)), None, 0.0, 0.0, math.inf, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND.values(), ids=HAND)
def test_masks_by_hand(case):
    prediction, truth, spacing, *expected = case
    (score,) = mask_scores(prediction, truth, {1: "x"}, spacing=spacing)
    np.testing.assert_allclose([score.dice, score.iou, score.hd95, score.assd], expected, atol=1e-6)
    (swapped,) = mask_scores(truth, prediction, {1: "x"}, spacing=spacing)
    np.testing.assert_allclose([swapped.dice, swapped.iou, swapped.hd95, swapped.assd], expected, atol=1e-6)


def border_distances(one: np.ndarray, other: np.ndarray, spacing: list[float]) -> np.ndarray:
    """From each border voxel of one mask to the nearest of the other, by comparing all of them."""
    places = [np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (one, other)]
    return np.sqrt(((places[0][:, None] - places[1][None]) ** 2).sum(-1)).min(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shape", "spacing"), [((23, 31), [1.0, 1.0]), ((11, 14, 9), [0.8, 1.3, 3.0])])
def test_overlap_and_distances_by_comparing_all_voxels(seed, shape, spacing, record_property):
    one, other = (mask[0, 0] for mask in (images(2, shape, seed=seed) > 0.55).split(1))
    a, b = one.numpy(), other.numpy()
    there, back = border_distances(a, b, spacing), border_distances(b, a, spacing)
    expected = [
        2 * (a & b).sum() / (a.sum() + b.sum()),
        (a & b).sum() / (a | b).sum(),
        max(np.percentile(there, 95), np.percentile(back, 95)),
        np.concatenate((there, back)).mean(),
    ]
    (score,) = mask_scores(one.long(), other.long(), {1: "x"}, spacing=spacing)
    error = np.abs(np.array([score.dice, score.iou, score.hd95, score.assd]) - expected).max()
    record_property("figure", f"{error:.1e}")
    assert error < TARGET
    assert surface_distance(one, other, spacing=spacing).hd95 == pytest.approx(expected[2], abs=TARGET)
