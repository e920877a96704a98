# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import collections
import json

import pytest
import torch
from torch import nn

from shared.weights import load_weights, read_tensors, save_weights


def refuse(content: object, tmp_path, message: str) -> None:
    """Saved ``content`` is refused with the path and ``message``, and the network stays as it was."""
    path = tmp_path / "model.pt"
    torch.save(content, path)
    network = nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"^{path}: expected the weights of this configuration, got others \({message}"
    ):
        load_weights(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}], ids=["plain", "model"])
def test_weights_are_loaded_and_the_network_returned(tmp_path, wrap):
    source, network = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(wrap(source.state_dict()), tmp_path / "model.pt")
    assert load_weights(network, str(tmp_path / "model.pt")) is network
    assert torch.equal(network.weight, source.weight)
    assert torch.equal(network.bias, source.bias)


def test_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"^{tmp_path}/model.pt: expected trained weights, found no file\. Train"
    ):
        load_weights(nn.Linear(2, 3), tmp_path / "model.pt", remedy="Train it.")
    with pytest.raises(FileNotFoundError, match=r"found no file\.$"):
        load_weights(nn.Linear(2, 3), tmp_path)


def test_other_shape_is_refused(tmp_path):
    refuse(nn.Linear(2, 4).state_dict(), tmp_path, r"weight has shape \(4, 2\) instead of \(3, 2\)")


def test_missing_key_is_refused(tmp_path):
    refuse(nn.Linear(2, 3, bias=False).state_dict(), tmp_path, "bias is missing")


def test_unexpected_key_is_refused(tmp_path):
    state = nn.Linear(2, 3).state_dict() | {"extra": torch.zeros(1)}
    refuse(state, tmp_path, "extra is not part of the network")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "a list instead of a state dict"),
        (torch.zeros(1), "a Tensor instead of a state dict"),
        ({"weight": 1.0, "bias": torch.zeros(3)}, "weight is a float instead of a tensor"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    refuse(content, tmp_path, message)


@pytest.mark.reliability(7)
def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    content = path.read_bytes()
    for size in (0, 1, 3, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"^{path}: expected a state dict of plain tensors, .*damaged"):
            load_weights(nn.Linear(2, 3), path)


@pytest.mark.reliability(7)
def test_pickled_objects_are_refused(tmp_path):
    torch.save({"weight": collections.Counter(a=1), "network": nn.Linear(2, 3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.pt: expected a state dict of plain tensors"):
        load_weights(nn.Linear(2, 3), tmp_path / "model.pt")


def test_replaced_weights_lose_the_description_of_others_and_no_other_file(tmp_path):
    path, network = tmp_path / "model.pt", nn.Linear(2, 3)
    for name in ("model.json", "settings.json"):
        (tmp_path / name).write_text(json.dumps({"sha256": "0" * 64} if name == "model.json" else {"size": 3}))
    save_weights(nn.Linear(2, 3).state_dict(), path)
    load_weights(network, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "settings.json"]
    save_weights(network.state_dict(), tmp_path / "settings.pt")
    assert json.loads((tmp_path / "settings.json").read_text()) == {"size": 3}


def test_a_file_that_is_absent_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "model.pt")
