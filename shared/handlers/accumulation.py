# SPDX-License-Identifier: Apache-2.0
"""Which iterations end in an optimizer step when gradients are accumulated."""

from __future__ import annotations

import math
from typing import Any


def completes_step(engine: Any) -> bool:
    """Whether the trainer's current iteration ends in an optimizer step, by the rule of ``SupervisedTrainer``.

    Every ``accumulation_steps``-th iteration of an epoch does, and the last one, so that no gradient is lost.
    """
    steps, length = _steps(engine), engine.state.epoch_length
    position = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
    return position % steps == 0 or position == length


def completed_steps(engine: Any) -> int:
    """Optimizer steps of the whole training up to and including the current iteration."""
    steps, length, iteration = _steps(engine), engine.state.epoch_length, engine.state.iteration
    if not length:
        return iteration // steps
    epochs, position = divmod(iteration, length)
    return epochs * math.ceil(length / steps) + position // steps


def _steps(engine: Any) -> int:
    # MONAI's own trainer accumulates only since 1.6.
    return getattr(engine, "accumulation_steps", 1)
