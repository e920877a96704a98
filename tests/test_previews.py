# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.handlers.previews import (
    ReconstructionPreview,
    TranslationPreview,
    UnconditionalPreview,
    spread_indices,
)
from shared.transforms.volumes import for_display


class Slices:
    """Twelve pairs of (X, Y) = (5, 8) whose grey levels say which they are."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        true = torch.full((1, 5, 8), index / 20)
        true[0, 4, 7] = 1.0  # right, anterior
        return {"condition": torch.stack((true[0] * 0.5, true[0] * 0)), "image": true, "flair": true, "t1w": true}


class Sampler:
    """Records how it was called; draws the first condition plus 0.1."""

    def __init__(self, channels: int = 1) -> None:
        self.calls: list = []
        self.channels = channels

    def __call__(self, condition, network, seeds):
        self.calls.append((condition, network.training, list(seeds)))
        return torch.cat([condition[:, :1] + 0.1] * self.channels, dim=1)

    def sample(self, network, seeds):
        self.calls.append((None, network.training, list(seeds)))
        return torch.stack([torch.full((1, 5, 8), seed / 10) for seed in seeds])


@pytest.mark.parametrize(
    ("length", "count", "expected"), [(12, 4, [1, 4, 7, 10]), (3, 8, [0, 1, 2]), (5, 1, [2]), (0, 4, [])]
)
def test_items_are_spread_over_the_dataset(length, count, expected):
    assert spread_indices(length, count) == expected


def test_equal_volumes_show_their_middle_slices():
    assert spread_indices(4 * 25, 4) == [12, 37, 62, 87]


@pytest.mark.parametrize("channels", [1, 2])
def test_translation_rows_are_condition_generated_true_difference(channels):
    network, sampler = nn.Linear(1, 1).train(), Sampler(channels)
    pictures = TranslationPreview(network, sampler, Slices(), n=3, seed=7)()
    assert pictures.shape == (12, 1, 8, 5)
    ((condition, was_training, seeds),) = sampler.calls
    assert condition.shape == (3, 2, 5, 8)
    assert seeds == [7, 8, 9]
    assert not was_training
    assert network.training
    for row, index in enumerate((2, 6, 10)):
        true = index / 20
        shown = pictures[4 * row : 4 * row + 4, 0, 4, 2]
        expected = [0.5 * true, 0.5 * true + 0.1, true, 2 * abs(0.1 - 0.5 * true)]
        assert shown.tolist() == pytest.approx(expected, abs=1e-6)
        # The mark at right anterior stands at the upper left: radiological.
        assert pictures[4 * row + 2, 0, 0, 0] == 1.0
        assert pictures[4 * row + 3, 0].max() <= 1.0


def test_translation_keys_and_a_failing_sampler():
    network = nn.Linear(1, 1).train()
    options = {"condition_key": "flair", "target_key": "t1w", "n": 1}
    assert TranslationPreview(network, Sampler(), Slices(), **options)().shape == (4, 1, 8, 5)

    def fail(*args, **kwargs):
        raise ValueError("seed: broken")

    with pytest.raises(ValueError, match="seed: broken"):
        TranslationPreview(network, fail, Slices())()
    assert network.training


def test_unconditional_samples_count_their_seeds_up():
    network, sampler = nn.Linear(1, 1).train(), Sampler()
    pictures = UnconditionalPreview(network, sampler, n=3, seed=2)()
    assert pictures.shape == (3, 1, 8, 5)
    assert pictures[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert sampler.calls == [(None, False, [2, 3, 4])]
    assert network.training


class Halves(nn.Module):
    def encode(self, x):
        assert not self.training
        return x / 2, None

    def decode(self, z):
        return z


def test_reconstructions_stand_under_their_images_and_can_be_turned():
    plain = ReconstructionPreview(Halves(), Slices(), n=3, columns=2, key="t1w")()
    assert plain.shape == (8, 1, 5, 8)
    assert plain[:, 0, 0, 0].tolist() == pytest.approx([0, 0.05, 0, 0.025, 0.1, 1, 0.05, 1])
    turned = ReconstructionPreview(Halves(), Slices(), n=3, columns=2, display=for_display)()
    assert turned.shape == (8, 1, 8, 5)
    assert turned[0, 0, 0, 0] == 1.0
    assert plain[0, 0, 4, 7] == 1.0
    spread = ReconstructionPreview(Halves(), Slices(), n=2, columns=2, spread=True)()
    assert spread[:2, 0, 0, 0].tolist() == pytest.approx([3 / 20, 9 / 20])
