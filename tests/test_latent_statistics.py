# SPDX-License-Identifier: Apache-2.0
"""Measured statistics of latents in the network, its average and a resumed run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from torch import nn

from shared.handlers.checkpoint import ResumableCheckpoint
from shared.handlers.ema import TrainedWeightsAverage
from shared.handlers.latent_statistics import MeasureLatentStatistics


class Latents:
    """Items with given latents, as ``LatentDataset`` has them; counts what is asked for."""

    cache_path = "latents.npy"

    def __init__(self, latents: list[torch.Tensor]) -> None:
        self.latents, self.asked = latents, 0

    def __len__(self) -> int:
        return len(self.latents)

    def posterior(self, index: int) -> tuple[torch.Tensor, None]:
        self.asked += 1
        return self.latents[index], None


class Scaling(nn.Module):
    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def latents(scale: float = 1.0) -> Latents:
    """Channel 0 has mean 3 and deviation 2, channel 1 mean -1 and deviation 0.5, times a scale."""
    signs = torch.tensor([1.0, -1.0]).repeat(12).reshape(2, 3, 4)
    parts = [scale * torch.stack((3 + 2 * signs, -1 + 0.5 * signs)) for _ in range(4)]
    return Latents(parts)


def train(folder: Path, network: Scaling, dataset: Any, *, epochs: int = 1, **options: Any) -> TrainedWeightsAverage:
    ema = TrainedWeightsAverage(network)
    loader = DataLoader(Dataset([{"image": torch.ones(1), "label": torch.ones(1)}]), batch_size=1)
    state = {"network": network, "ema": ema.ema_model}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        loss_function=nn.MSELoss(),
        train_handlers=[
            MeasureLatentStatistics(network, dataset, **options),
            ResumableCheckpoint(folder / "checkpoints", state),
            ema,
        ],
        decollate=False,
    )
    trainer.run()
    return ema


def test_a_training_starts_with_the_measured_statistics(tmp_path, caplog):
    network = Scaling()
    with caplog.at_level(logging.INFO, logger="shared.handlers.latent_statistics"):
        ema = train(tmp_path, network, latents())
    for one in (network, ema.ema_model):
        assert one.latent_mean.tolist() == [3, -1]
        assert one.latent_std.tolist() == [2, 0.5]
    assert [r.getMessage() for r in caplog.records if r.name.endswith("latent_statistics")] == [
        "latents have mean (3, -1) and standard deviation (2, 0.5), measured on up to 512 training items"
    ]


def test_a_resumed_run_keeps_its_statistics(tmp_path):
    train(tmp_path, Scaling(), latents())
    network = Scaling()
    ema = train(tmp_path, network, latents(scale=10), epochs=2)
    for one in (network, ema.ema_model):
        assert one.latent_mean.tolist() == [3, -1]
        assert one.latent_std.tolist() == [2, 0.5]


def test_a_copy_without_a_handler_gets_the_values_too(tmp_path):
    copy = Scaling()
    train(tmp_path, Scaling(), latents(), ema_model=copy)
    assert copy.latent_mean.tolist() == [3, -1]
    assert copy.latent_std.tolist() == [2, 0.5]


def test_only_so_many_items_are_measured(tmp_path):
    dataset = latents()
    train(tmp_path, Scaling(), dataset, max_items=2)
    assert dataset.asked == 2


def test_the_values_of_the_main_process_are_used(tmp_path, monkeypatch):
    module = "shared.handlers.latent_statistics"
    monkeypatch.setattr(f"{module}.is_main_process", lambda: False)
    sent: list[Any] = []

    def receive(value: Any) -> Any:
        sent.append(value)
        return torch.tensor([7.0, 8.0]), torch.tensor([0.1, 0.2])

    monkeypatch.setattr(f"{module}.from_main_process", receive)
    network, dataset = Scaling(), latents()
    handler = MeasureLatentStatistics(network, dataset)  # type: ignore[arg-type]
    handler._measure(None)
    assert sent == [None]
    assert dataset.asked == 0
    assert network.latent_mean.tolist() == [7, 8]
    torch.testing.assert_close(network.latent_std, torch.tensor([0.1, 0.2]))


def test_another_number_of_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^latent_mean: expected 3 channels of latents, as the network has, got 2"):
        train(tmp_path, Scaling(3), latents())


def test_a_constant_channel_is_refused(tmp_path):
    dataset = Latents([torch.ones(2, 3, 4)] * 3)
    with pytest.raises(ValueError, match=r"^latents\.npy: expected latents that vary"):
        train(tmp_path, Scaling(), dataset)
