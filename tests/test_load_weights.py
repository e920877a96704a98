# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from shared.handlers.weights import StrictCheckpointLoader


def start(handler: StrictCheckpointLoader) -> None:
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.run([0], max_epochs=1)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_weights_are_loaded_when_the_engine_starts(tmp_path, wrap):
    source, network = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(wrap(source.state_dict()), tmp_path / "model.pt")
    start(StrictCheckpointLoader(tmp_path / "model.pt", network))
    assert torch.equal(network.weight, source.weight)


def test_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/model.pt: .* Train it first"):
        start(StrictCheckpointLoader(tmp_path / "model.pt", nn.Linear(2, 3), remedy="Train it first."))


def test_weights_of_another_configuration_are_refused(tmp_path):
    torch.save(nn.Linear(2, 4).state_dict(), tmp_path / "model.pt")
    network = nn.Linear(2, 3)
    before = network.weight.clone()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.pt: .*weight has shape \(4, 2\) instead of \(3, 2\)"):
        start(StrictCheckpointLoader(tmp_path / "model.pt", network))
    assert torch.equal(network.weight, before)
