# SPDX-License-Identifier: Apache-2.0
"""Handlers on the smallest training that has every part: a linear network, two epochs, no files."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import RandGaussianNoised
from torch import nn

from shared.handlers.best import SaveBest
from shared.handlers.checkpoint import ResumableCheckpoint, checkpoints_in
from shared.handlers.ema import TrainedWeightsAverage
from shared.handlers.guard import GradientGuard, NonFiniteLossError, batch_files
from shared.handlers.manifest import RunManifest
from shared.handlers.metrics_csv import MetricsCsv
from shared.handlers.previews import PreviewGrid, save_grid
from shared.handlers.seeding import EpochSeeds


def make_trainer(handlers: list[Any], network: nn.Module, *, epochs: int = 3, workers: int = 0, **options: Any):
    from monai.transforms import RandGaussianNoised

    data = [{"image": torch.full((2,), i / 8), "label": torch.zeros(2), "item_id": str(i)} for i in range(8)]
    dataset = Dataset(data, transform=RandGaussianNoised("image", prob=1.0))
    loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        inferer=SimpleInferer(),
        train_handlers=handlers,
        decollate=False,
        **options,
    )
    return trainer, optimizer, dataset


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def record_losses(trainer: SupervisedTrainer) -> dict[int, float]:
    losses: dict[int, float] = {}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: losses.__setitem__(e.state.iteration, e.state.output["loss"].item())
    )
    return losses


class Interruption(Exception):
    """Stands for a crash."""


def run_with_checkpoints(folder: Path, workers: int, crash_at: int | None = None, **options: Any) -> dict[int, float]:
    network = linear()
    trainer, optimizer, dataset = make_trainer([], network, workers=workers)
    checkpoint = ResumableCheckpoint(folder, {"network": network, "optimizer": optimizer}, **options)
    for handler in (checkpoint, EpochSeeds(7, [dataset])):
        handler.attach(trainer)
    losses = record_losses(trainer)

    def crash(engine):
        if engine.state.iteration == crash_at:
            raise Interruption

    trainer.add_event_handler(Events.ITERATION_COMPLETED, crash)
    trainer.run()
    return losses


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crash_at", [5, 8, 11])
def test_resumed_losses_equal_the_uninterrupted_ones_bit_for_bit(tmp_path, workers, crash_at):
    whole = run_with_checkpoints(tmp_path / "whole", workers)
    with pytest.raises(Interruption):
        run_with_checkpoints(tmp_path / "broken", workers, crash_at=crash_at)
    resumed = run_with_checkpoints(tmp_path / "broken", workers)
    assert min(resumed) > 1, "the run started anew instead of resuming"
    assert resumed == {iteration: whole[iteration] for iteration in resumed}


def test_epochs_ranks_and_seeds_draw_differently():
    def draws(seed: int, epoch: int, rank: int) -> tuple[float, ...]:
        dataset = Dataset([{"image": torch.zeros(2)}], transform=RandGaussianNoised("image", prob=1.0))
        state = SimpleNamespace(epoch=epoch, rank=rank)
        EpochSeeds(seed, [dataset])._seed(SimpleNamespace(state=state))
        return torch.rand(()).item(), float(np.random.rand()), random.random(), dataset[0]["image"][0].item()

    first = draws(7, 1, 0)
    assert draws(7, 1, 0) == first
    for other in (draws(7, 2, 0), draws(7, 1, 1), draws(8, 1, 0)):
        assert all(one != two for one, two in zip(first, other, strict=True))


def test_newest_loadable_checkpoint_is_used(tmp_path, caplog):
    whole = run_with_checkpoints(tmp_path, 0)
    newest = checkpoints_in(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:200])
    resumed = run_with_checkpoints(tmp_path, 0)
    assert resumed == {iteration: whole[iteration] for iteration in (9, 10, 11, 12)}
    assert f"{newest}: does not load" in caplog.text


def test_other_settings_are_refused_by_name(tmp_path):
    run_with_checkpoints(tmp_path, 0, settings={"batch_size": 2, "seed": 7})
    with pytest.raises(
        ValueError, match=r"checkpoint_epoch=3\.pt: made with other settings \(batch_size: 2 there, 4 here\)"
    ):
        run_with_checkpoints(tmp_path, 0, settings={"batch_size": 4, "seed": 7})
    run_with_checkpoints(tmp_path, 0, settings={"batch_size": 4, "seed": 7}, force=True)


def test_checkpoint_of_another_network_is_named(tmp_path):
    run_with_checkpoints(tmp_path, 0)
    network = nn.Linear(2, 3)
    trainer, optimizer, _ = make_trainer([], network)
    ResumableCheckpoint(tmp_path, {"network": network, "optimizer": optimizer}).attach(trainer)
    with pytest.raises(
        ValueError, match=r"checkpoint_epoch=3\.pt: expected a checkpoint of this configuration.*'network'"
    ):
        trainer.run()


def test_missing_resume_path_is_an_error_and_never_starts_anew(tmp_path):
    run_with_checkpoints(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: expected a checkpoint named by --resume"):
        run_with_checkpoints(tmp_path, 0, resume=str(tmp_path / "absent.pt"))
    assert min(run_with_checkpoints(tmp_path, 0, resume="never")) == 1


def test_finished_run_is_left_alone_and_can_be_extended(tmp_path):
    run_with_checkpoints(tmp_path, 0)
    assert run_with_checkpoints(tmp_path, 0) == {}
    network = linear()
    trainer, optimizer, _ = make_trainer([], network, epochs=4)
    ResumableCheckpoint(tmp_path, {"network": network, "optimizer": optimizer}).attach(trainer)
    losses = record_losses(trainer)
    trainer.run()
    assert sorted(losses) == [13, 14, 15, 16]


class Poison(nn.Module):
    """Passes the input through until the given call, which gives NaN."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.linear = linear()
        self.call, self.calls = call, 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (float("nan") if self.calls == self.call else 1.0)


@pytest.mark.reliability(4)
def test_guard_stops_before_the_step_and_names_items(tmp_path):
    network = Poison(call=3)
    trainer, _, _ = make_trainer([GradientGuard()], network)
    states = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: states.append({k: v.clone() for k, v in network.state_dict().items()})
    )
    with pytest.raises(NonFiniteLossError, match=r"item \d, item \d: expected a finite loss.*epoch 1, iteration 3"):
        trainer.run()
    for name, value in network.state_dict().items():
        assert torch.equal(value, states[-1][name])
        assert torch.isfinite(value).all()


@pytest.mark.reliability(4)
def test_guard_can_skip_a_step_and_go_on(caplog):
    network = Poison(call=3)
    trainer, optimizer, _ = make_trainer([GradientGuard(policy="skip")], network)
    states = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: states.append(network.linear.weight.detach().clone()))
    trainer.run()
    assert torch.equal(states[2], states[1])
    assert not torch.equal(states[3], states[2])
    assert torch.isfinite(network.linear.weight).all()
    assert "step skipped" in caplog.text


def test_guard_clips_the_total_norm():
    network = linear()
    norms = []
    trainer, _, _ = make_trainer([GradientGuard(max_norm=1e-3)], network, epochs=1)
    total = lambda: torch.stack([p.grad.norm() for p in network.parameters()]).norm().item()  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: norms.append(total()))
    trainer.run()
    assert max(norms) <= 1e-3 * (1 + 1e-4)


def test_guard_clips_only_when_accumulated_gradients_are_used():
    """The first half of an accumulated gradient must reach the sum as it is."""
    network = linear()
    trainer, _, _ = make_trainer([GradientGuard(max_norm=1e-3)], network, epochs=1, accumulation_steps=2)
    norms = {}
    total = lambda: torch.stack([p.grad.norm() for p in network.parameters()]).norm().item()  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: norms.update({e.state.iteration: total()}))
    trainer.run()
    assert norms[1] > 1e-3
    assert norms[2] <= 1e-3 * (1 + 1e-4)


def test_guard_policy_is_checked():
    with pytest.raises(ValueError, match="policy: expected one of stop, skip, got 'ignore'"):
        GradientGuard(policy="ignore")


def test_batch_files_come_from_metadata_without_folders():
    from monai.data import MetaTensor

    image = MetaTensor(torch.zeros(1), meta={"filename_or_obj": ["/data/p10/a.png", "/data/p11/b.png"]})
    assert batch_files({"image": image}) == ["a.png", "b.png"]


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = linear().requires_grad_(False), linear()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        return self.trained(self.frozen(x))


def test_average_follows_its_formula_and_leaves_frozen_bits():
    network = HalfFrozen()
    ema = TrainedWeightsAverage(network, decay=0.9)
    network.frozen.weight.data += 1.0
    network.scale.fill_(3.0)
    trainer, _, _ = make_trainer([ema], network, epochs=2)
    expected = network.trained.weight.detach().clone()

    def follow(engine):
        nonlocal expected
        decay = min(0.9, (1 + engine.state.iteration) / (10 + engine.state.iteration))
        expected = expected * decay + network.trained.weight.detach() * (1 - decay)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    trainer.run()
    torch.testing.assert_close(ema.ema_model.trained.weight, expected)
    assert not torch.equal(ema.ema_model.trained.weight, network.trained.weight)
    assert torch.equal(ema.ema_model.frozen.weight, network.frozen.weight)
    assert ema.ema_model.scale.item() == 3.0
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())


def test_average_counts_optimizer_steps_when_gradients_are_accumulated():
    """4 iterations an epoch, 3 accumulated: steps after the third and the last, so two an epoch."""
    network = HalfFrozen()
    ema = TrainedWeightsAverage(network, decay=0.9)
    trainer, _, _ = make_trainer([ema], network, epochs=2, accumulation_steps=3)
    expected, steps, changes = network.trained.weight.detach().clone(), 0, []

    def follow(engine):
        nonlocal expected, steps
        if engine.state.iteration in (3, 4, 7, 8):
            steps += 1
            decay = min(0.9, (1 + steps) / (10 + steps))
            expected = expected * decay + network.trained.weight.detach() * (1 - decay)
        changes.append(torch.allclose(ema.ema_model.trained.weight, expected, rtol=1e-5))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)
    trainer.run()
    assert changes == [True] * 8


def test_best_weights_are_finite_described_and_resumable(tmp_path, caplog):
    network = linear()
    best = SaveBest(tmp_path / "model.pt", network, "error")
    trainer, _, _ = make_trainer([best], network, epochs=4)
    values = iter([0.5, float("nan"), 0.7, 0.4])
    trainer._event_handlers[Events.EPOCH_COMPLETED].insert(
        0, (lambda: trainer.state.metrics.__setitem__("error", next(values)), (), {})
    )
    saved = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: saved.append(json.loads((tmp_path / "model.json").read_text())["epoch"])
    )
    trainer.run()
    assert saved == [1, 1, 1, 4]
    assert "error is nan in epoch 2" in caplog.text
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(state["weight"], network.weight)
    other = SaveBest(tmp_path / "other.pt", network, "error")
    other.load_state_dict(best.state_dict())
    assert other.best == 0.4


def test_curves_hold_every_epoch_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    for start, epochs in ((0, 3), (1, 3)):
        trainer, _, _ = make_trainer([MetricsCsv(path, phase="train")], linear(), epochs=epochs)

        def jump(engine, start=start):
            engine.state.epoch, engine.state.iteration = start, 4 * start

        trainer.add_event_handler(Events.STARTED, jump)
        trainer.run()
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "loss"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["iteration"] for row in rows] == ["4", "8", "12"]
    assert all(float(row["value"]) > 0 for row in rows)


def test_manifest_records_configuration_and_versions(tmp_path):
    from monai.bundle import ConfigParser

    config = {
        "manifest": {
            "_target_": "shared.handlers.manifest.RunManifest",
            "output_dir": str(tmp_path),
            "task": "test",
            "settings": {"seed": 3},
        }
    }
    manifest = ConfigParser(config).get_parsed_content("manifest")
    assert isinstance(manifest, RunManifest)
    trainer, _, _ = make_trainer([manifest], linear(), epochs=1)
    trainer.run()
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["settings"] == {"seed": 3}
    assert written["software"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_preview_is_a_grid_and_leaves_the_random_state(tmp_path):
    images = torch.zeros(3, 1, 4, 6)
    images[2] = 1.0
    handler = PreviewGrid(lambda: images + torch.rand(()) * 0, tmp_path, name="x", interval=2, columns=2)
    trainer, _, _ = make_trainer([handler], linear(), epochs=3)
    trainer.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0002_x.png", "epoch_0003_x.png"]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    handler._save(trainer)
    assert torch.equal(torch.rand(1), expected)


def test_grid_places_pictures_row_by_row(tmp_path):
    from PIL import Image

    images = torch.stack([torch.full((1, 4, 6), value) for value in (0.0, 0.5, 2.0)])
    save_grid(images, tmp_path / "grid.png", columns=2, gap=2)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (14, 10)
    assert "synthetic" in picture.text["Comment"]
    assert [picture.getpixel(xy) for xy in ((0, 0), (8, 0), (0, 6), (8, 6))] == [0, 128, 255, 255]
