# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from shared.transforms.samples import SplitSamplesd


def test_mean_and_deviation_are_taken_apart():
    pred = torch.rand(2, 3, 5)
    result = SplitSamplesd()({"pred": pred, "subject": "a"})
    assert torch.equal(result["pred"], pred[:1])
    assert torch.equal(result["pred_sd"], pred[1:])
    assert result["subject"] == "a"


def test_one_sample_has_no_deviation():
    pred = torch.rand(1, 3, 5)
    result = SplitSamplesd()({"pred": pred})
    assert torch.equal(result["pred"], pred)
    assert "pred_sd" not in result


def test_other_channels_are_named():
    with pytest.raises(ValueError, match="pred: expected one channel, or mean and standard deviation, got 3"):
        SplitSamplesd()({"pred": torch.rand(3, 4, 5)})
