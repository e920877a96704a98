# SPDX-License-Identifier: Apache-2.0
"""Measures of sets of chest images: diversity of all pairs, and Fréchet distance of features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from monai.metrics import MultiScaleSSIMMetric

from shared.metrics.distribution import frechet_distance as nuclear_frechet_distance
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from tools.benchmarks.published_chest import frechet_distance, ordered_pairs, pair_similarities
from tools.benchmarks.workload import Setting, Workload

BASELINE = "published loop, pair by pair"
EACH_ONCE = "each pair once, in batches, MONAI core"
BUNDLE = "cxr_ldm"
TOLERANCE = 1e-5


def pairwise_diversity(setting: Setting) -> Workload:
    """MS-SSIM of all pairs of a set."""
    count = setting.pick(6, 64, 64)
    size = setting.pick((48, 56), (512, 512), (512, 512))
    kernel_size = setting.pick(3, 11, 11)
    # Smooth shapes in noise: of plain noise the coarse scales know nothing.
    generator = torch.Generator().manual_seed(setting.seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0.0, 1.0)
    images = (0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)).to(setting.device)
    pairs = ordered_pairs(count)
    timed = pairs[: setting.pick(5, 24, 63)]
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel_size)
    ours = PairwiseMultiScaleSSIM(kernel_size=kernel_size)

    def in_batches() -> torch.Tensor:
        # Of one image with the next ones, as many as are timed of the loop.
        others = images[1 : 1 + len(timed)]
        return torch.cat(
            [torch.as_tensor(metric(images[:1].expand_as(part), part)).flatten() for part in others.split(8)]
        )

    def matrix() -> torch.Tensor:
        return ours(images).matrix

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        expected = results[BASELINE].cpu()
        found = {
            EACH_ONCE: results[EACH_ONCE].cpu(),
            BUNDLE: torch.stack([results[BUNDLE][i, j] for i, j in timed]),
        }
        worst = 0.0
        for name, values in found.items():
            difference = float((values - expected).abs().max())
            if not difference <= TOLERANCE:
                raise ValueError(f"{name}: expected MS-SSIM within {TOLERANCE:g} of {BASELINE}, got {difference:.2g}.")
            worst = max(worst, difference)
        return f"MS-SSIM of {len(timed)} pairs equal within {worst:.0e}"

    return Workload(
        name=f"pairwise diversity of {count} images",
        sizes=(
            f"images of {size[0]} x {size[1]}; the published loop compares each pair twice: {len(timed)} of its "
            f"{len(pairs)} pairs were timed, with images in memory that it read from files in every turn"
        ),
        ways={
            BASELINE: lambda: pair_similarities(images, timed, kernel_size=kernel_size),
            EACH_ONCE: in_batches,
            BUNDLE: matrix,
        },
        equal=equal,
        target=30.0,
        factors={BASELINE: len(pairs) / len(timed), EACH_ONCE: len(pairs) / 2 / len(timed)},
    )


def frechet(setting: Setting) -> Workload:
    """Fréchet distance of two sets of features."""
    count, features = setting.pick((40, 48), (1000, 1024), (1000, 1024))
    generator = torch.Generator().manual_seed(setting.seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    a = torch.randn(count, features, generator=generator) @ mixing
    b = torch.randn(count, features, generator=generator) @ mixing * 1.1 + 0.1

    def equal(results: Mapping[str, float]) -> str:
        reference = results["matrix root"]
        difference = abs(results[BUNDLE] / reference - 1.0)
        # The covariances are singular, of which a matrix root keeps half of the digits.
        if not difference <= 1e-4:
            raise ValueError(
                f"{BUNDLE}: expected the distance of the matrix root, {reference:.8g}, got {results[BUNDLE]:.8g}."
            )
        return f"distances equal within {difference:.0e} (relative)"

    return Workload(
        name="Fréchet distance",
        sizes=f"two sets of {count} images with {features} features",
        ways={
            "matrix root": lambda: frechet_distance(a, b),
            BUNDLE: lambda: nuclear_frechet_distance(a, b, warn=False).value,
        },
        equal=equal,
    )
