# SPDX-License-Identifier: Apache-2.0
"""A learning-rate schedule that counts optimizer steps."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import LrScheduleHandler
from torch.optim.lr_scheduler import LRScheduler

from shared.handlers.accumulation import completes_step


class StepSchedule(LrScheduleHandler):
    """Move a learning-rate schedule on after each optimizer step.

    ``LrScheduleHandler`` counts iterations, of which several make a step when gradients are accumulated: a warm-up
    would then be over earlier than with the same batch in one piece.

    Args:
        lr_scheduler: schedule of torch whose unit is the optimizer step.
    """

    def __init__(self, lr_scheduler: LRScheduler) -> None:
        # MONAI's annotation names the base class that torch had before 2.0.
        super().__init__(lr_scheduler, print_lr=False, epoch_level=False)  # type: ignore[arg-type]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if completes_step(engine):
            super().__call__(engine)
