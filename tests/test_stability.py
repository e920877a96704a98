# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from torchvision.models import squeezenet1_1

from shared.metrics.stability import StabilityStudy, fitting_kernel
from shared.perceptual import LpipsSqueeze

H, W = 72, 90
TRUTH = torch.ones(H, W)


def runs(count: int, *, seed: int = 0, classes: int = 1, shape: tuple[int, ...] = (H, W)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(1, classes, *shape, generator=generator)
    maps = (base + 0.1 * torch.randn(count, classes, *shape, generator=generator)).clamp(0, 1)
    return maps if classes == 1 else maps.softmax(dim=1)


def pairs_of(maps: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(maps[i], maps[j]) for i, j in itertools.combinations(range(len(maps)), 2)]


def test_all_pairs_as_one_by_one():
    maps = runs(4)
    found = StabilityStudy()(maps, TRUTH)
    assert (found["pairs"], found["slices"], found["slices_without_truth"]) == (6, 1, 0)
    dice = [2 * ((a > 0.5) & (b > 0.5)).sum() / ((a > 0.5).sum() + (b > 0.5).sum()) for a, b in pairs_of(maps)]
    assert found["pairwise_dice"] == pytest.approx(float(np.mean(dice)))
    psnr = [-10 * math.log10(((a - b).double() ** 2).mean()) for a, b in pairs_of(maps)]
    assert found["psnr"] == pytest.approx(float(np.mean(psnr)), rel=1e-5)
    x, y = (torch.stack(part) for part in zip(*pairs_of(maps), strict=True))
    ssim = SSIMMetric(spatial_dims=2, data_range=1.0, win_size=11, reduction="none")(x, y)
    assert found["ssim"] == pytest.approx(float(ssim.mean()), abs=1e-5)
    kernel = fitting_kernel(H, scales=5)
    assert kernel == 3
    ms_ssim = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel)(x, y)
    assert found["ms_ssim"] == pytest.approx(float(ms_ssim.mean()), abs=1e-4)


def test_published_variant_compares_with_the_first_run():
    maps = runs(4)
    first = StabilityStudy(reference="first")
    found = first(maps, TRUTH)
    halves = [StabilityStudy()(torch.stack((maps[0], other)), TRUTH) for other in maps[1:]]
    assert found["pairs"] == 3
    for column in ("pairwise_dice", "psnr", "ssim", "ms_ssim"):
        assert found[column] == pytest.approx(np.mean([half[column] for half in halves]), rel=1e-5)
        assert "the first run with each other one" in first.notes[column]
    with pytest.raises(ValueError, match="reference: expected 'all' or 'first', got 'second'"):
        StabilityStudy(reference="second")


def test_pairs_that_are_left_out_are_counted():
    maps = runs(2)
    empty = torch.full((2, 1, H, W), 0.5 / 255)  # 0 in an 8-bit file
    found = StabilityStudy()(torch.cat((maps, maps[:1], empty)), TRUTH)
    assert (found["pairs"], found["pairs_all_zero"], found["pairs_identical"]) == (10, 7, 1)
    alone = StabilityStudy()(maps, TRUTH)
    assert found["psnr"] == pytest.approx(alone["psnr"], rel=1e-6)  # of 0-1 and 1-2; 0-2 would be infinite
    assert found["ssim"] == pytest.approx((2 * alone["ssim"] + 1) / 3, abs=1e-6)
    nothing = StabilityStudy()(empty, TRUTH)
    assert all(math.isnan(nothing[column]) for column in ("psnr", "ssim", "ms_ssim"))
    assert nothing["pairwise_dice"] == 1
    same = StabilityStudy()(maps[:1].repeat(3, 1, 1, 1), TRUTH)
    assert math.isnan(same["psnr"])
    assert same["ssim"] == pytest.approx(1, abs=1e-6)
    assert (same["pairs_identical"], same["pairwise_dice"]) == (3, 1)
    rounded = torch.cat((maps[:1], maps[:1] * (1 - 1e-6)))  # 120 dB would be a mean of rounding
    assert StabilityStudy()(rounded, TRUTH)["pairs_identical"] == 1


def test_slices_without_truth_are_left_out():
    maps = runs(3, shape=(H, W, 4))
    truth = torch.zeros(H, W, 4)
    truth[5, 6, 1] = truth[60, 80, 3] = 2
    found = StabilityStudy()(maps, truth)
    single = [StabilityStudy()(maps[..., index], TRUTH) for index in (1, 3)]
    assert (found["slices"], found["slices_without_truth"], found["pairs"]) == (2, 2, 6)
    for column in ("psnr", "ssim", "ms_ssim"):
        assert found[column] == pytest.approx(np.mean([one[column] for one in single]), rel=1e-6)
    inside = maps[:, 0] > 0.5
    dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(inside, 2)]
    assert found["pairwise_dice"] == pytest.approx(float(np.mean(dice)))
    empty = StabilityStudy()(maps, torch.zeros(H, W, 4))
    assert (empty["slices"], empty["pairs"]) == (0, 0)
    assert math.isnan(empty["psnr"])


def test_several_classes():
    maps = runs(3, classes=4)
    maps[:, 3] = 0
    found = StabilityStudy()(maps, TRUTH)
    masks = maps.argmax(1)
    dice = [
        [2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in (1, 2)]
        for a, b in itertools.combinations(masks, 2)
    ]
    assert found["pairwise_dice"] == pytest.approx(float(np.mean(dice)), rel=1e-6)  # class 3 is in no mask
    foreground = StabilityStudy()(1 - maps[:, :1], TRUTH)
    assert found["psnr"] == pytest.approx(foreground["psnr"], rel=1e-5)


def test_wrong_inputs_are_named():
    for wrong in (runs(1), runs(3)[..., 1:], runs(3)[:, 0]):
        with pytest.raises(ValueError, match=r"probabilities: expected \(K, N, 72, 90\) of K >= 2 runs"):
            StabilityStudy()(wrong, TRUTH)


def test_windows_fit_small_maps():
    assert [fitting_kernel(side, scales=5) for side in (256, 176, 175, 96, 79, 47)] == [11, 11, 9, 5, 3, 1]
    assert fitting_kernel(256, scales=1) == 11
    study = StabilityStudy()
    found = study(runs(2)[..., :20, :24], torch.ones(20, 24))
    assert math.isnan(found["ms_ssim"])
    assert math.isfinite(found["ssim"])
    assert study.notes["ms_ssim"] == "not measured: maps of (20, 24) are too small"


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(3)
    torch.save(squeezenet1_1(weights=None).state_dict(), folder / "trunk.pth")
    channels = (64, 128, 256, 384, 384, 512, 512)
    torch.save(
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}, folder / "linear.pth"
    )
    return folder / "trunk.pth", folder / "linear.pth"


def test_lpips_of_pairs(lpips_files: tuple[Path, Path]):
    trunk, linear = lpips_files
    maps = runs(3)
    measure = LpipsSqueeze(trunk, linear_path=linear, reduction="none")
    one_by_one = [float(measure(a[None], b[None])) for a, b in pairs_of(maps)]
    matrix = measure.pairwise(maps)
    assert matrix.diagonal().abs().max() < 1e-6
    torch.testing.assert_close(matrix, matrix.T)
    study = StabilityStudy(lpips_weights=trunk, lpips_linear=linear)
    assert study(maps, TRUTH)["lpips"] == pytest.approx(np.mean(one_by_one), rel=1e-4)
    with pytest.raises(ValueError, match="images: expected a batch of the shape"):
        measure.pairwise(maps[..., :16])


def test_without_weights_lpips_says_why(tmp_path: Path):
    for study, reason in (
        (StabilityStudy(), "not measured: no weights were given"),
        (StabilityStudy(lpips_weights=tmp_path / "squeeze.pth"), f"not measured: {tmp_path}/squeeze.pth"),
    ):
        assert "lpips" not in study(runs(2), TRUTH)
        assert study.notes["lpips"].startswith(reason)
