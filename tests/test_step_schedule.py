# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.utils import min_version, optional_import

from shared.handlers.step_schedule import StepSchedule
from tests.bundle_tools import TRAINING, label, read

ACCUMULATES = optional_import("monai", "1.6", min_version)[1]


def rates(accumulation: int, iterations: int, *, epochs: int = 1) -> list[float]:
    """Learning rates with which the optimizer stepped, during a warm-up of five steps."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    used: list[float] = []
    optimizer.register_step_post_hook(lambda *args: used.append(optimizer.param_groups[0]["lr"]))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[{"image": torch.ones(2, 1), "label": torch.ones(2, 1)}] * iterations,
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
        train_handlers=[StepSchedule(schedule)],
        **({"accumulation_steps": accumulation} if accumulation > 1 else {}),
    )
    trainer.run()
    return used


def test_each_step_has_the_rate_of_its_number():
    assert rates(1, 7) == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0, 1.0])


@pytest.mark.skipif(not ACCUMULATES, reason="MONAI accumulates gradients since 1.6")
@pytest.mark.parametrize(("accumulation", "iterations"), [(2, 14), (3, 20)])
def test_accumulated_steps_have_the_rates_of_whole_ones(accumulation, iterations):
    # The last iteration of an epoch ends in a step, too: 20 iterations by threes are seven steps.
    assert rates(accumulation, iterations) == pytest.approx(rates(1, 7))


@pytest.mark.skipif(not ACCUMULATES, reason="MONAI accumulates gradients since 1.6")
def test_steps_at_the_ends_of_epochs_count():
    assert rates(4, 5, epochs=3) == pytest.approx(rates(1, 6))


@pytest.mark.parametrize("path", [path for path in TRAINING if "warmup_steps" in read(path)], ids=label)
def test_warm_ups_count_steps(path):
    config = read(path)
    handlers = [handler["_target_"] for handler in config["train"]["handlers"]]
    assert "shared.handlers.step_schedule.StepSchedule" in handlers
    assert "LrScheduleHandler" not in handlers
