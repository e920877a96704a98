# SPDX-License-Identifier: Apache-2.0
"""The end of a training by a clock that the tests set."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from ignite.engine import Engine, Events

from shared.handlers import time_limit
from shared.handlers.time_limit import TimeLimit

ITERATIONS = 4


class Clock:
    """Seconds since an arbitrary moment, as ``time.monotonic`` gives them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1234.5
        monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def training(
    clock: Clock, minutes: float, *, iteration_s: float, validation_s: float = 0.0
) -> tuple[Engine, list[str]]:
    """A training whose iterations and validations take that long, and the list of what happens in it."""
    happened: list[str] = []

    def step(engine: Engine, batch: int) -> None:
        clock.now += iteration_s
        happened.append("step")

    def validate(engine: Engine) -> None:
        clock.now += validation_s
        happened.append(f"validated {engine.state.epoch}")

    trainer = Engine(step)
    # Whether the others come before or after it must not matter.
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    TimeLimit(minutes).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: happened.append(f"saved {engine.state.epoch}"))
    trainer.add_event_handler(Events.COMPLETED, lambda engine: happened.append("completed"))
    return trainer, happened


def whole_epochs(count: int) -> list[str]:
    return [e for n in range(1, count + 1) for e in (*["step"] * ITERATIONS, f"validated {n}", f"saved {n}")]


def test_the_epoch_in_which_the_time_passes_is_finished_validated_and_saved(clock):
    """Epochs of 4 x 15 s = 1 minute: 2.5 minutes pass within the third."""
    trainer, happened = training(clock, 2.5, iteration_s=15)
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert happened == [*whole_epochs(3), "completed"]
    assert trainer.state.epoch == 3


def test_a_time_that_is_reached_exactly_is_over(clock):
    trainer, _ = training(clock, 2, iteration_s=15)
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert trainer.state.epoch == 2


def test_validation_counts(clock):
    trainer, _ = training(clock, 4, iteration_s=15, validation_s=60)
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert trainer.state.epoch == 2


def test_at_least_one_epoch_is_trained(clock):
    trainer, happened = training(clock, 1e-6, iteration_s=15)
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert happened == [*whole_epochs(1), "completed"]


def test_all_epochs_run_within_the_time(clock):
    trainer, happened = training(clock, 10, iteration_s=15)
    trainer.run(range(ITERATIONS), max_epochs=4)
    assert happened == [*whole_epochs(4), "completed"]


def test_time_counts_from_the_start_of_the_run(clock):
    """Loading data and encoding masks, before the run, is not training; a second run has its own time."""
    trainer, _ = training(clock, 2, iteration_s=15)
    clock.now += 3600
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert trainer.state.epoch == 2
    clock.now += 3600
    trainer.run(range(ITERATIONS), max_epochs=10)
    assert trainer.state.epoch == 4


def test_the_log_says_why_it_ends(clock, caplog):
    trainer, _ = training(clock, 1.5, iteration_s=15)
    with caplog.at_level(logging.INFO, logger="shared.handlers.time_limit"):
        trainer.run(range(ITERATIONS), max_epochs=10)
    assert caplog.messages == ["epoch 2: 2.0 of 1.5 minutes have passed; the training ends"]


@pytest.mark.parametrize(("main", "epochs"), [(0.0, 5), (99.0, 1)])
def test_the_clock_of_the_main_process_decides(clock, monkeypatch, main, epochs):
    """Ranks that end after different epochs would wait for each other for ever."""
    monkeypatch.setattr(time_limit, "from_main_process", lambda value: main)
    trainer, _ = training(clock, 2, iteration_s=15)
    trainer.run(range(ITERATIONS), max_epochs=5)
    assert trainer.state.epoch == epochs


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_a_time_that_is_not_positive_is_refused(minutes):
    with pytest.raises(
        ValueError, match=rf'^max_minutes: expected a positive time, got {minutes}; give "" for no limit'
    ):
        TimeLimit(minutes)
