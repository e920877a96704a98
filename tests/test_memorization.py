# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.metrics.measures import Memorization
from shared.metrics.memorization import describe, find_copies, nearest_neighbours


def _chests(n: int, *, seed: int) -> torch.Tensor:
    """Images (n, 1, 96, 80) that share one anatomy and differ in detail, as X-rays do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    anatomy = F.interpolate(coarse, size=(96, 80), mode="bicubic")
    detail = F.interpolate(torch.randn(n, 1, 9, 8, generator=generator), size=(96, 80), mode="bicubic")
    return (anatomy + 0.12 * detail + 0.02 * torch.randn(n, 1, 96, 80, generator=generator)).clamp(0, 1)


def _planted() -> tuple[torch.Tensor, torch.Tensor]:
    """100 samples with 10 copies of training rows 50 to 59: exact, noised, shifted by a pixel or two, darkened."""
    training, samples = _chests(300, seed=0), _chests(100, seed=1)
    for i in range(10):
        copy = training[50 + i].clone()
        if i in (2, 3, 4):
            copy = copy + 0.05 * torch.randn(copy.shape, generator=torch.Generator().manual_seed(i))
        if i in (5, 6):
            copy = torch.roll(copy, (1, -1) if i == 5 else (2, 0), dims=(1, 2))
        if i in (7, 8):
            copy = 0.8 * copy + 0.05
        samples[9 * i] = copy.clamp(0, 1)
    return samples, training


@pytest.mark.reliability(13)
def test_planted_copies_are_all_found_and_few_others() -> None:
    samples, training = _planted()
    reference = _chests(200, seed=2)
    report = find_copies(describe([samples]), describe(training.split(64)), describe([reference]))
    rows = np.arange(10) * 9
    assert report.flagged[rows].all()
    np.testing.assert_array_equal(report.indices["correlation"][rows], np.arange(50, 60))
    others = np.delete(report.flagged, rows)
    assert others.sum() <= 6  # about 1 % of 90 in each of two views
    assert report.num_training == 300
    assert set(report.thresholds) == {"pixel", "correlation"}


@pytest.mark.reliability(13)
def test_feature_view_finds_a_copy_that_pixels_miss() -> None:
    """A mirrored copy: only features that do not depend on the side see it."""
    training, samples, reference = _chests(100, seed=0), _chests(10, seed=1), _chests(60, seed=2)
    samples[4] = training[33].flip(-1)

    def mirrored_mean(images: torch.Tensor) -> torch.Tensor:
        small = F.avg_pool2d(images + images.flip(-1), 8).flatten(1)
        return small - small.mean(1, keepdim=True)

    sets = [describe([s], feature_extractor=mirrored_mean) for s in (samples, training, reference)]
    report = find_copies(*sets)
    assert report.flagged[4]
    assert report.indices["feature"][4] == 33
    assert report.distances["pixel"][4] > report.thresholds["pixel"]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_chunks_give_what_one_product_gives(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 12, generator=generator), torch.randn(50, 12, generator=generator)
    b[31] = a[3]
    distance, index = nearest_neighbours(a, b, metric=metric, chunk=8)
    if metric == "l2":
        whole = (a[:, None] - b[None]).square().mean(-1).sqrt()
    else:
        whole = 1 - F.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(distance, whole.min(1).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(index, whole.argmin(1))
    assert int(index[3]) == 31


def test_bad_input_is_named() -> None:
    views = describe([_chests(5, seed=0)])
    with pytest.raises(ValueError, match="reference: expected at least 2 held-out images, got 1"):
        find_copies(views, views, {"pixel": views["pixel"][:1]})
    with pytest.raises(ValueError, match=r"samples: expected the views \['pixel'\]"):
        find_copies({**views, "feature": views["pixel"]}, views, views)
    with pytest.raises(ValueError, match=r"percentile: expected a value in \(0, 50\), got 99"):
        find_copies(views, views, views, percentile=99)
    with pytest.raises(ValueError, match="metric: expected 'cosine' or 'l2', got 'cos'"):
        nearest_neighbours(views["pixel"], views["pixel"], metric="cos")
    with pytest.raises(ValueError, match="references: expected"):
        nearest_neighbours(views["pixel"], torch.zeros(0, 1024))
    with pytest.raises(ValueError, match="queries: expected finite"):
        nearest_neighbours(views["pixel"], views["pixel"] / 0)
    with pytest.raises(ValueError, match="batches: expected at least one image"):
        describe([])
    with pytest.raises(ValueError, match=r"batches: expected \(B, 1, H, W\)"):
        describe([torch.zeros(3, 8, 8)])


def test_note_states_the_chance_that_few_held_out_images_allow():
    """With 9 held-out images a sample is nearer than all of them once in 10, whatever percentile is asked for."""
    images = torch.rand(29, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    training = [{"image": image} for image in images[:10]]
    measurement = Memorization(training)({"pred": images[10:20], "image": images[20:29]})
    assert "about 10 % per view by chance" in measurement.rows[0]["note"]
