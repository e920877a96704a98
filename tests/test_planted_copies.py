# SPDX-License-Identifier: Apache-2.0
"""Copies of training images planted among the samples: the measure that evaluations list finds all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.metrics.measures import Memorization
from tools.phantoms.chest_anatomy import draw_finding, draw_patient
from tools.phantoms.chest_render import render

pytestmark = pytest.mark.reliability(13)
TRAINING, SAMPLES, HELD_OUT, COPIES = 170, 100, 100, 10
PLACES = np.arange(COPIES) * 9 + 4
ROWS = np.arange(COPIES) * 16 + 11


@cache
def chests(count: int, seed: int) -> torch.Tensor:
    """Films of so many patients, (count, 1, 72, 64) in [0, 1]; half of them with a finding."""
    films = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name, severity = ("no_finding", "none") if number % 2 else ("right_opacity", "large")
        finding = draw_finding(name, severity=severity, rng=rng)
        films.append(render(draw_patient(rng), finding, size=72, rng=rng)[:, 4:68])
    return torch.from_numpy(np.stack(films)).float()[:, None]


def moved(images: torch.Tensor, down: float, right: float) -> torch.Tensor:
    """By pixels, fractions too; borders repeated."""
    height, width = images.shape[-2:]
    offset = torch.tensor([[1.0, 0.0, -2 * right / width], [0.0, 1.0, -2 * down / height]])
    grid = F.affine_grid(offset.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def noisy(images: torch.Tensor, level: float) -> torch.Tensor:
    return images + level * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))


ALTERED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exact": lambda x: x,
    "8 bit": lambda x: (255 * x).round() / 255,
    "noise": lambda x: noisy(x, 0.05),
    "shift": lambda x: moved(x, 1.6, -1.2),
    "mirror": lambda x: x.flip(-1),
    "contrast": lambda x: 0.7 * x + 0.1,
    # 1.3 is beyond what the views see: they ignore linear changes of contrast.
    "gamma": lambda x: x**1.1,
    "darker and noise": lambda x: 0.9 * noisy(x, 0.03),
    "smooth": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "all at once": lambda x: 0.8 * noisy(moved(x, -0.8, 1.2), 0.03).flip(-1) + 0.05,
}


def measured(samples: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are flagged, and the training row that each resembles most."""
    training = [{"image": image} for image in chests(TRAINING, 0)]
    collected = {"pred": samples.clamp(0, 1), "image": chests(HELD_OUT, 2)}
    measurement = Memorization(training, batch_size=64)(collected)
    columns = measurement.columns
    flagged = np.asarray(columns["near_copy"], bool)
    assert measurement.rows[0]["value"] == pytest.approx(flagged.mean())
    return flagged, np.asarray(columns["training_row_correlation"])


@pytest.mark.parametrize("turn", range(3))
def test_ten_planted_copies_of_a_hundred_are_all_found(turn, record_property):
    """One of each kind, each time of other images."""
    samples, names = chests(SAMPLES, 1).clone(), list(ALTERED)
    kinds = [names[(place + 3 * turn) % COPIES] for place in range(COPIES)]
    rows = ROWS + turn
    for place, row, kind in zip(PLACES, rows, kinds, strict=True):
        samples[place] = ALTERED[kind](chests(TRAINING, 0)[row][None])[0]
    flagged, nearest = measured(samples)
    alarms = int(np.delete(flagged, PLACES).sum())
    record_property("cases", COPIES)
    record_property(
        "figure", f"{int(flagged[PLACES].sum())} of {COPIES} found, {alarms} of {SAMPLES - COPIES} others flagged"
    )
    assert [kind for kind, found in zip(kinds, flagged[PLACES], strict=True) if not found] == []
    np.testing.assert_array_equal(nearest[PLACES], rows)
    # About 1 % in each of two views by chance.
    assert alarms <= 7


def test_samples_without_copies_are_flagged_as_rarely_as_stated(record_property):
    flagged, _ = measured(chests(SAMPLES, 1))
    record_property("figure", f"no copies: {int(flagged.sum())} of {SAMPLES} flagged")
    assert flagged.sum() <= 7
