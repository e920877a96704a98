# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from skimage.exposure import match_histograms

from shared.metrics.baselines import CopyCondition, HistogramMatched, Regression

X, Y = 24, 40


def _uniform(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 1, X, Y, generator=torch.Generator().manual_seed(seed))


def test_the_copied_condition_is_one_channel_of_it() -> None:
    condition = torch.cat((_uniform(2, 0), 2 * _uniform(2, 1) - 0.5), dim=1)
    assert torch.equal(CopyCondition()(condition), condition[:, :1])
    assert torch.equal(CopyCondition(channel=1)(condition), condition[:, 1:].clamp(0, 1))
    with pytest.raises(ValueError, match=r"condition: expected \(N, C, X, Y\) with C > 2, got \(2, 2, 24, 40\)"):
        CopyCondition(channel=2)(condition)


def test_a_known_monotone_mapping_is_undone() -> None:
    """Targets uniform on [0, 1]; the condition is their square: its matched image must be the root of the condition."""
    targets = _uniform(40, 0)
    training = [{"t1w": image} for image in targets[:39]]
    condition = torch.zeros(1, 1, X, Y)
    condition[0] = targets[39] ** 2
    matched = HistogramMatched(training, background=0.0)(condition)
    assert matched.shape == condition.shape
    assert (matched - targets[39]).abs().max() < 0.03  # 960 voxels: their own sampling error
    assert (condition - targets[39]).abs().mean() > 0.1
    before = condition.clone()
    HistogramMatched(training, background=0.0)(condition)
    assert torch.equal(condition, before)  # the input is not written to


def test_one_training_image_as_template_gives_the_known_matching() -> None:
    template, condition = _uniform(1, 3) ** 2, _uniform(1, 4)
    matched = HistogramMatched([{"t1w": template[0]}], background=-1.0)(condition)
    reference = match_histograms(condition[0, 0].numpy(), template[0, 0].numpy())
    np.testing.assert_allclose(matched[0, 0], reference, atol=0.01)


def test_background_stays_and_does_not_count() -> None:
    """The same brain on a small and on a large field of view gets the same grey levels."""
    training = [{"t1w": torch.nn.functional.pad(0.5 + 0.4 * image, (8, 8, 30, 30))} for image in _uniform(5, 1)]
    brain = 0.1 + 0.3 * _uniform(1, 2)
    small, large = brain, torch.nn.functional.pad(brain, (40, 0, 0, 20))
    baseline = HistogramMatched(training)
    matched = baseline(large)
    torch.testing.assert_close(matched[..., :X, 40:], baseline(small))
    assert (matched[..., X:, :] == 0).all()
    assert matched[..., :X, 40:].min() > 0.49  # 5 % black border in the template would reach the brain
    assert (baseline(torch.zeros(1, 1, X, Y)) == 0).all()
    assert baseline.note == "condition mapped to the foreground histogram of 5 training targets"


def test_equal_levels_stay_equal_and_order_is_kept() -> None:
    condition = (_uniform(3, 5) * 8).floor() / 8
    matched = HistogramMatched([{"t1w": image} for image in _uniform(4, 6)])(condition)
    for levels, result in zip(condition, matched, strict=True):
        values = [result[levels == level].unique() for level in levels.unique()]
        assert all(len(value) == 1 for value in values)
        assert all(a < b for a, b in zip(values[:-1], values[1:], strict=True))


def test_a_level_gets_the_middle_of_the_quantiles_it_covers() -> None:
    """A quarter of the condition at one level, the rest at another, the targets uniform: 1/8 and 5/8."""
    condition = torch.full((1, 1, X, Y), 0.9)
    condition[..., : Y // 4] = 0.2
    matched = HistogramMatched([{"t1w": torch.linspace(0, 1, 10_000)}], background=0.0)(condition)
    torch.testing.assert_close(matched.unique(), torch.tensor([0.125, 0.625]), rtol=0, atol=1e-3)


def test_training_images_are_read_once_and_only_some() -> None:
    read: list[int] = []

    class Training:
        def __len__(self) -> int:
            return 101

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            read.append(index)
            return {"t1w": _uniform(1, index)[0]}

    baseline = HistogramMatched(Training(), max_images=5)
    assert read == []
    baseline(_uniform(2, 0))
    baseline(_uniform(2, 1))
    assert read == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("training", [[], [{"t1w": torch.zeros(1, X, Y)}]])
def test_training_data_without_foreground_is_named(training: list) -> None:
    with pytest.raises(ValueError, match=r"t1w: expected foreground \(values above 0.05\) in the training data"):
        HistogramMatched(training)(_uniform(1, 0))


def _network() -> torch.nn.Module:
    return BasicUNet(spatial_dims=2, in_channels=2, out_channels=1, features=(4, 4, 8, 8, 8, 4))


def test_regression_is_the_network_clamped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = _network()
    torch.save(trained.state_dict(), tmp_path / "regression.pt")
    condition = torch.rand(5, 2, 48, 32)
    with torch.no_grad():
        expected = trained.eval()(condition)
    assert expected.min() < 0  # so that clamping shows
    result = Regression(_network(), tmp_path / "regression.pt", batch_size=2)(condition)
    assert result is not None
    torch.testing.assert_close(result, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert not result.requires_grad


def test_an_untrained_regression_is_an_error_or_says_so(tmp_path: Path) -> None:
    path = tmp_path / "regression.pt"
    with pytest.raises(FileNotFoundError, match=r"regression.pt: expected weights .* Train it with configs/train_reg"):
        Regression(_network(), path)
    optional = Regression(_network(), path, required=False, remedy="Run the training.")
    assert optional(torch.rand(1, 2, 32, 32)) is None
    assert optional.note == "not trained: regression.pt was not found. Run the training."
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"regression.pt: expected the weights of this configuration"):
        Regression(_network(), path, required=False)(torch.rand(1, 2, 32, 32))
