# SPDX-License-Identifier: Apache-2.0
"""Equal time for methods that are compared."""

from __future__ import annotations

import logging
import time

from ignite.engine import Engine, Events

from shared.distributed import from_main_process

logger = logging.getLogger(__name__)


class TimeLimit:
    """End a training after the epoch in which a time has passed.

    ``ignite.handlers.TimeLimit`` does not fit: it stops within an epoch, before that is validated and saved.

    Args:
        minutes: wall-clock time from the start of this process' training, validation included; in distributed runs
            that of rank 0.

    Raises:
        ValueError: for a time that is not positive.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f'max_minutes: expected a positive time, got {minutes}; give "" for no limit.')
        self.minutes = minutes
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_late)

    def _start(self, engine: Engine) -> None:
        self._started = time.monotonic()

    def _stop_if_late(self, engine: Engine) -> None:
        # One clock: ranks that end after different epochs would wait for each other for ever.
        passed = from_main_process((time.monotonic() - self._started) / 60.0)
        if passed >= self.minutes:
            logger.info(
                "epoch %d: %.1f of %g minutes have passed; the training ends", engine.state.epoch, passed, self.minutes
            )
            engine.terminate()
