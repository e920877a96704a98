# SPDX-License-Identifier: Apache-2.0
"""Weights that federated clients and MONAI Label put into a network count, whatever handlers do at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.fl.client.monai_algo import disable_ckpt_loaders
from torch import nn

from shared.handlers.checkpoint import ResumableCheckpoint
from shared.handlers.ema import TrainedWeightsAverage
from shared.handlers.given_weights import GivenWeights
from shared.handlers.latent_statistics import MeasureLatentStatistics
from shared.handlers.scale_factor import MeasureScaleFactor
from shared.handlers.weights import StrictCheckpointLoader


class Model(nn.Module):
    """Two parts, of which a checkpoint holds one in a container of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.net = nn.Linear(3, 2).requires_grad_(False), nn.Linear(2, 5)

    @property
    def trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"net": self.net})


def doubled(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 2.0 * tensor for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.trained])
def test_weights_are_noticed_from_watching_on(part):
    model = Model()
    weights = GivenWeights(part(model), torch.optim.SGD(model.parameters(), 0.1))
    model.load_state_dict(doubled(model))
    weights.watch()
    assert not weights.given
    model.frozen.load_state_dict(doubled(model.frozen))
    model.net.weight.data += 1.0
    assert not weights.given
    model.load_state_dict(doubled(model))
    assert weights.given


def engine() -> Any:
    result: Any = Engine(lambda engine, batch: None)
    result.state.rank, result.scaler = 0, None
    return result


def checkpoint_of(model: Model, folder: Any, **options: Any) -> tuple[ResumableCheckpoint, Any]:
    handler, trainer = ResumableCheckpoint(folder, {"network": model.trained}, **options), engine()
    handler.attach(trainer)
    return handler, trainer


def test_checkpoint_is_read_unless_weights_were_given(tmp_path, caplog):
    saved = Model()
    checkpoint_of(saved, tmp_path)[1].run([0], max_epochs=1)
    assert (tmp_path / "checkpoint_epoch=1.pt").exists()

    resumed = Model()
    trainer = checkpoint_of(resumed, tmp_path)[1]
    trainer.run([0], max_epochs=2)
    assert torch.equal(resumed.net.weight, saved.net.weight)

    given = Model()
    trainer = checkpoint_of(given, tmp_path)[1]
    epochs = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    weights = doubled(given)
    given.load_state_dict(weights)
    with caplog.at_level("INFO"):
        trainer.run([0], max_epochs=1)
    assert torch.equal(given.net.weight, weights["net.weight"])
    assert epochs == [1]
    assert f"{tmp_path}: not read, the training goes on from the weights in the network" in caplog.text


def test_checkpoint_that_was_asked_for_does_not_replace_weights(tmp_path):
    model = Model()
    checkpoint_of(model, tmp_path)[1].run([0], max_epochs=1)
    trainer = checkpoint_of(model, tmp_path, resume=str(tmp_path / "checkpoint_epoch=1.pt"))[1]
    model.load_state_dict(doubled(model))
    with pytest.raises(ValueError, match=r"^resume: expected auto or never where weights were put into the network"):
        trainer.run([0], max_epochs=2)


def test_average_moves_as_the_weights_do():
    model = Model()
    ema = TrainedWeightsAverage(model)
    ema.attach(engine())
    with torch.no_grad():
        ema.ema_model.net.weight += 0.5
    old, average = model.net.weight.detach().clone(), ema.ema_model.net.weight.clone()
    frozen = ema.ema_model.frozen.weight.clone()
    model.load_state_dict(doubled(model))
    torch.testing.assert_close(ema.ema_model.net.weight, average + old)
    assert torch.equal(ema.ema_model.frozen.weight, frozen)
    # The same weights again change nothing.
    average = ema.ema_model.net.weight.clone()
    model.load_state_dict(dict(model.state_dict()))
    torch.testing.assert_close(ema.ema_model.net.weight, average, rtol=1e-6, atol=1e-6)


def test_a_resumed_average_is_that_of_the_checkpoint():
    model = Model()
    ema = TrainedWeightsAverage(model)
    ema.attach(engine())
    state, average = doubled(model), {name: 3.0 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    ema.ema_model.load_state_dict(average)
    assert torch.equal(ema.ema_model.net.weight, average["net.weight"])


class Latents:
    """Of standard deviation 0.5."""

    cache_path = None

    def __len__(self) -> int:
        return 1

    def posterior(self, index: int) -> tuple[torch.Tensor, None]:
        return torch.tensor([[-0.5, 0.5], [0.5, -0.5]])[:, None], None


def network_with(**buffers: torch.Tensor) -> Any:
    network: Any = nn.Linear(2, 3)
    for name, value in buffers.items():
        network.register_buffer(name, value)
    return network


@pytest.mark.parametrize(("given", "expected"), [(None, 2.0), (1.0, 2.0), (3.0, 3.0)])
def test_a_measured_scale_factor_is_kept_with_the_weights_it_came_with(given, expected):
    network = network_with(scale_factor=torch.tensor(7.0 if given is None else 1.0))
    handler = MeasureScaleFactor(network, Latents())  # type: ignore[arg-type]
    trainer = engine()
    handler.attach(trainer)
    if given is not None:
        network.load_state_dict({**network.state_dict(), "scale_factor": torch.tensor(given)})
    trainer.run([0], max_epochs=1)
    assert network.scale_factor.item() == pytest.approx(expected)


@pytest.mark.parametrize(("std", "kept"), [(1.0, False), (3.0, True)])
def test_measured_latent_statistics_are_kept_with_the_weights_they_came_with(std, kept):
    network = network_with(latent_mean=torch.zeros(2), latent_std=torch.ones(2))
    handler = MeasureLatentStatistics(network, Latents())  # type: ignore[arg-type]
    trainer = engine()
    handler.attach(trainer)
    network.load_state_dict({**network.state_dict(), "latent_std": torch.full((2,), std)})
    trainer.run([0], max_epochs=1)
    assert network.latent_std.tolist() == pytest.approx([3.0, 3.0] if kept else [0.5, 0.5])


def test_monai_disables_the_handler_that_loads_released_weights():
    """By its name, before a federated client evaluates: the server's weights are measured, not the file."""
    target = f"{StrictCheckpointLoader.__module__}.{StrictCheckpointLoader.__qualname__}"
    parser = ConfigParser({"validate": {"handlers": [{"_target_": target}, "@other"]}})
    disable_ckpt_loaders(parser)
    assert parser["validate#handlers#0#_disabled_"] is True
