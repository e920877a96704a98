# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from shared.files import sha256_of_file
from shared.weights import load_weights
from tools.shrink_weights import shrink


def test_small_weights_load_strictly_and_stay_close(tmp_path):
    network, other = nn.Linear(64, 64), nn.Linear(64, 64)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"epoch": 3, "sha256": sha256_of_file(tmp_path / "model.pt")}))
    shrink(str(tmp_path / "model.pt"), str(tmp_path / "small.pt"))
    load_weights(other, tmp_path / "small.pt")
    assert other.weight.dtype == torch.float32
    torch.testing.assert_close(other.weight, network.weight, rtol=2**-11, atol=1e-7)
    assert (tmp_path / "small.pt").stat().st_size < 0.7 * (tmp_path / "model.pt").stat().st_size
    description = json.loads((tmp_path / "small.json").read_text())
    assert description["epoch"] == 3
    assert description["sha256"] == sha256_of_file(tmp_path / "small.pt")


def test_damaged_weights_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"sha256": "of others"}))
    with pytest.raises(ValueError, match=r"model\.pt: expected the file with sha256 of others"):
        shrink(str(tmp_path / "model.pt"), str(tmp_path / "small.pt"))
    assert not (tmp_path / "small.pt").exists()


def test_values_beyond_half_precision_are_refused(tmp_path):
    torch.save({"weight": torch.tensor([1e6])}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: expected values within float16's 65504, got 1e\+06 in weight"):
        shrink(str(tmp_path / "model.pt"), str(tmp_path / "small.pt"))
    assert not (tmp_path / "small.pt").exists()
