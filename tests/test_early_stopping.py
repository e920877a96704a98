# SPDX-License-Identifier: Apache-2.0
"""The end of a training that no longer improves, with scripted validation metrics and the handlers of a real one."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn

from shared.handlers.best import SaveBest
from shared.handlers.checkpoint import ResumableCheckpoint, checkpoints_in
from shared.handlers.early_stopping import EarlyStopping
from shared.handlers.metrics_csv import MetricsCsv

NAN = float("nan")


def run(
    folder: Path,
    values: Sequence[float],
    *,
    interval: int = 1,
    position: int = 2,
    metric: str = "error",
    resume: str = "auto",
    **options: Any,
) -> tuple[SupervisedTrainer, EarlyStopping]:
    """A training of len(values) epochs; epoch n, if validated, has the metric values[n - 1]. The handler stands behind
    the checkpoint (2), or in front of it (1)."""
    network = nn.Linear(1, 1)
    loader = DataLoader([{"image": torch.ones(1), "label": torch.ones(1)}] * 2, batch_size=1)

    def report(engine: Engine) -> None:
        engine.state.metrics["error"] = values[engine.state.epoch - 1]

    best = SaveBest(folder / "model.pt", network, "error", lower_is_better=options.get("lower_is_better", True))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=network,
        val_handlers=[MetricsCsv(folder / "metrics.csv", phase="validation"), best],
        decollate=False,
    )
    # In front of the handlers, where ignite's metrics are computed.
    evaluator._event_handlers[Events.EPOCH_COMPLETED].insert(0, (report, (evaluator,), {}))
    stopping = EarlyStopping(evaluator=evaluator, metric=metric, **options)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    state = {"network": network, "best": best, "early_stopping": stopping}
    handlers = [
        ValidationHandler(validator=evaluator, interval=interval, epoch_level=True),
        MetricsCsv(folder / "metrics.csv", phase="train"),
        ResumableCheckpoint(folder / "checkpoints", state, resume=resume),
    ]
    handlers.insert(position + 1, stopping)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=len(values),
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        decollate=False,
    )
    trainer.run()
    return trainer, stopping


def rows(folder: Path, phase: str) -> list[int]:
    with (folder / "metrics.csv").open() as file:
        found = [int(row["epoch"]) for row in csv.DictReader(file) if row["phase"] == phase]
    return sorted(set(found))


def test_the_training_ends_after_patience_validations_without_improvement(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="shared.handlers.early_stopping"):
        trainer, stopping = run(tmp_path, [5, 4, 4.5, 3, 3, 3.5, 9, 1], patience=3)
    assert trainer.state.epoch == 7
    assert (stopping.best, stopping.count) == (3, 3)
    assert [r.getMessage() for r in caplog.records if r.name.endswith("early_stopping")] == [
        "error has not improved in 3 validations (the best is 3); the training ends"
    ]


def test_a_training_that_improves_goes_on_to_its_end(tmp_path):
    trainer, stopping = run(tmp_path, [5, 6, 4, 5, 3, 4], patience=2)
    assert trainer.state.epoch == 6
    assert stopping.count == 1


@pytest.mark.parametrize("position", [1, 2], ids=["before the checkpoint", "behind it"])
def test_the_last_epoch_is_complete_wherever_the_handler_stands(tmp_path, position):
    trainer, _ = run(tmp_path, [3, 4, 4, 1, 1], patience=2, position=position)
    assert trainer.state.epoch == 3
    assert rows(tmp_path, "train") == rows(tmp_path, "validation") == [1, 2, 3]
    saved = torch.load(checkpoints_in(tmp_path / "checkpoints")[-1], weights_only=True)
    assert saved["engine"]["epoch"] == 3
    assert saved["early_stopping"] == {"best": 3.0, "count": 2}


def test_epochs_without_validation_do_not_count(tmp_path):
    """Validated are the epochs 3, 6, 9 and 12."""
    values = [0, 0, 5, 0, 0, 6, 0, 0, 7, 0, 0, 1, 0, 0, 1]
    trainer, stopping = run(tmp_path, values, patience=2, interval=3)
    assert trainer.state.epoch == 9
    assert (stopping.best, stopping.count) == (5, 2)


def test_a_training_without_any_validation_goes_on(tmp_path):
    trainer, stopping = run(tmp_path, [1, 1, 1, 1], patience=1, interval=9)
    assert trainer.state.epoch == 4
    assert (stopping.best, stopping.count) == (None, 0)


def test_larger_may_be_better(tmp_path):
    trainer, stopping = run(tmp_path, [0.5, 0.6, 0.55, 0.5, 0.9], patience=2, lower_is_better=False)
    assert trainer.state.epoch == 4
    assert stopping.best == 0.6


@pytest.mark.parametrize(("lower", "sign"), [(True, 1.0), (False, -1.0)])
def test_a_change_below_min_delta_is_no_improvement(tmp_path, lower, sign):
    """From 8 on each step is 0.25; against the best, 8, the third makes 0.75 > 0.5."""
    values = [sign * v for v in (8, 7.75, 7.5, 7.25, 7.0, 7.0)]
    trainer, stopping = run(tmp_path, values, patience=3, min_delta=0.5, lower_is_better=lower)
    assert trainer.state.epoch == 6
    assert stopping.best == sign * 7.25
    trainer, _ = run(tmp_path / "2", values, patience=2, min_delta=0.5, lower_is_better=lower)
    assert trainer.state.epoch == 3


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("lower", [True, False])
def test_what_is_not_finite_never_counts_as_better(tmp_path, bad, lower):
    trainer, stopping = run(tmp_path, [bad, 2, bad, bad, 1], patience=2, lower_is_better=lower)
    assert trainer.state.epoch == 4
    assert stopping.best == 2


def test_nothing_but_nan_ends_too(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="shared.handlers.early_stopping"):
        trainer, _ = run(tmp_path, [NAN] * 5, patience=2)
    assert trainer.state.epoch == 2
    assert "error has not improved in 2 validations (no finite value)" in caplog.text


@pytest.mark.parametrize("position", [1, 2], ids=["before the checkpoint", "behind it"])
def test_a_resumed_run_counts_on(tmp_path, position):
    values = [3, 4, 4, 4, 4, 4, 4]
    run(tmp_path, values[:2], patience=3, position=position)
    trainer, stopping = run(tmp_path, values, patience=3, position=position)
    assert trainer.state.epoch == 4
    assert (stopping.best, stopping.count) == (3, 3)
    whole, _ = run(tmp_path / "whole", values, patience=3)
    assert whole.state.epoch == 4


@pytest.mark.parametrize("position", [1, 2], ids=["before the checkpoint", "behind it"])
def test_a_run_that_had_ended_ends_at_once_when_resumed(tmp_path, position):
    values = [3, 4, 4, 4, 4]
    first, _ = run(tmp_path, values, patience=2, position=position)
    again, _ = run(tmp_path, values, patience=2, position=position)
    assert first.state.epoch == again.state.epoch == 3
    assert again.state.iteration == first.state.iteration
    assert rows(tmp_path, "train") == [1, 2, 3]


def test_with_more_patience_it_goes_on(tmp_path):
    values = [3, 4, 4, 4, 4, 4]
    run(tmp_path, values, patience=2)
    trainer, stopping = run(tmp_path, values, patience=4)
    assert trainer.state.epoch == 5
    assert stopping.count == 4


@pytest.mark.parametrize("patience", [0, None, ""])
def test_without_patience_it_never_ends_a_training(tmp_path, patience):
    trainer, stopping = run(tmp_path, [1, 2, 3, 4, 5], patience=patience)
    assert trainer.state.epoch == 5
    assert stopping.count == 4


def test_a_metric_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="^metric: expected one of error, got 'eror'; name a metric of the validation"):
        run(tmp_path, [1, 1], patience=1, metric="eror")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": -1}, "^patience: expected a number of validations, got -1"),
        ({"patience": 2.5}, "^patience: expected a number of validations, got 2.5"),
        ({"patience": 2, "min_delta": -0.1}, "^min_delta: expected a change of at least 0, got -0.1"),
        ({"patience": 2, "min_delta": NAN}, "^min_delta: expected a change of at least 0, got nan"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(evaluator=Engine(lambda engine, batch: None), metric="error", **options)


def test_the_value_of_the_main_process_decides(tmp_path, monkeypatch):
    """Ranks that end after different epochs would wait for each other for ever."""
    monkeypatch.setattr("shared.handlers.early_stopping.from_main_process", lambda value: 1.0)
    trainer, _ = run(tmp_path, [5, 4, 3, 2, 1], patience=2)
    assert trainer.state.epoch == 3
