# SPDX-License-Identifier: Apache-2.0
"""The end of a training that no longer improves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events

from shared.distributed import from_main_process

logger = logging.getLogger(__name__)


class EarlyStopping:
    """End a training after a number of validations in a row without a better metric.

    ``monai.handlers.EarlyStopHandler`` does not fit: it takes the trainer as an argument, which closes a cycle in a
    config; it takes NaN for an improvement; and it has no state, so that a resumed run counts from zero. Attach this
    one to the trainer, behind the validation. The epoch in which the training ends is validated, saved and written like
    any other; a run that had ended ends at once when it is resumed.

    Args:
        evaluator: engine whose runs are counted, so that epochs without validation count for nothing.
        metric: name in ``evaluator.state.metrics``.
        patience: validations without improvement after which the training ends; ``None``, 0 or "" (MONAI's command line
            drops ``None``) never ends it.
        lower_is_better: whether a smaller value improves.
        min_delta: least change that counts as an improvement, in the unit of the metric.

    Raises:
        ValueError: for a negative patience or ``min_delta``, or a metric that the evaluator does not have.
    """

    def __init__(
        self,
        *,
        evaluator: Engine,
        metric: str,
        patience: int | str | None,
        lower_is_better: bool = True,
        min_delta: float = 0.0,
    ) -> None:
        patience = patience or 0
        if not isinstance(patience, int) or patience < 0:
            raise ValueError(f'patience: expected a number of validations, got {patience!r}; give "" for no limit.')
        if not min_delta >= 0:
            raise ValueError(f"min_delta: expected a change of at least 0, got {min_delta}; 0 takes any improvement.")
        self.evaluator, self.metric, self.patience = evaluator, metric, patience
        self.lower_is_better, self.min_delta = lower_is_better, min_delta
        self.best: float | None = None
        self.count = 0
        self._trainer: Engine | None = None

    def attach(self, engine: Engine) -> None:
        self._trainer = engine
        # When the evaluator ends, not the trainer's epoch: that may have no validation, and where it has one, its
        # checkpoint, which is written in between, must hold the new count.
        self.evaluator.add_event_handler(Events.COMPLETED, self._compare)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_over)

    def state_dict(self) -> dict[str, float | int | None]:
        return {"best": self.best, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.count = state["best"], state["count"]
        # A checkpoint is read when the training starts: here, as its handler may stand in front of or behind this one.
        if self._trainer is not None:
            self._stop_if_over(self._trainer)

    def _compare(self, evaluator: Any) -> None:
        metrics = evaluator.state.metrics
        if self.metric not in metrics:
            raise ValueError(
                f"metric: expected one of {', '.join(sorted(metrics)) or 'the metrics (there are none)'}, got "
                f"{self.metric!r}; name a metric of the validation."
            )
        # One value: ranks that end after different epochs would wait for each other for ever.
        value = from_main_process(float(metrics[self.metric]))
        sign = 1.0 if self.lower_is_better else -1.0
        if math.isfinite(value) and (self.best is None or sign * (self.best - value) > self.min_delta):
            self.best, self.count = value, 0
        else:
            self.count += 1

    def _stop_if_over(self, engine: Engine) -> None:
        if self.patience and self.count >= self.patience:
            best = "no finite value" if self.best is None else f"the best is {self.best:.6g}"
            logger.info("%s has not improved in %d validations (%s); the training ends", self.metric, self.count, best)
            engine.terminate()
