# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from shared.segmentation_probability import chosen_probability, mask_of, split_agreement


def test_one_foreground_is_above_the_threshold():
    probability = torch.tensor([[[0.2, 0.5, 0.6], [0.5000001, 0.0, 1.0]]])
    assert mask_of(probability).tolist() == [[0, 0, 1], [1, 0, 1]]
    assert mask_of(probability, threshold=0.1).tolist() == [[1, 1, 1], [1, 0, 1]]
    assert mask_of(probability).dtype == torch.uint8
    assert torch.equal(chosen_probability(probability), probability[0])


def test_of_several_classes_the_most_probable_wins_whatever_the_threshold():
    probability = torch.tensor([[[0.2, 0.4]], [[0.3, 0.35]], [[0.5, 0.25]]])
    assert mask_of(probability, threshold=0.9).tolist() == [[2, 0]]
    assert chosen_probability(probability).tolist() == [[0.5, pytest.approx(0.4)]]


def test_agreement_is_the_last_channel_of_several_samples():
    pred = torch.rand(4, 5, 7, 2)
    probability, agreement = split_agreement(pred, num_classes=3, num_samples=2)
    assert torch.equal(probability, pred[:3])
    assert agreement is not None
    assert torch.equal(agreement, pred[3])
    assert split_agreement(pred, num_classes=4)[1] is None
    with pytest.raises(ValueError, match=r"^pred: expected 3 channels \(3 of probabilities\), got 4"):
        split_agreement(pred, num_classes=3)
    with pytest.raises(ValueError, match=r"^pred: expected 2 channels \(1 of probabilities, one of agreement\), got 4"):
        split_agreement(pred, num_samples=5)
