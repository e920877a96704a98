# SPDX-License-Identifier: Apache-2.0
"""A bar of the epoch's progress."""

from __future__ import annotations

from typing import Any

try:
    from ignite.handlers import ProgressBar
except ImportError:  # ignite 0.4, which MONAI 1.5 and with it MONAI Label ask for
    from ignite.contrib.handlers import ProgressBar


class EpochProgress(ProgressBar):
    """``ignite.handlers.ProgressBar`` that in distributed runs only rank 0 shows: bars of several processes would
    overwrite each other. Takes its arguments."""

    def attach(self, engine: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if engine.state.rank == 0:
            super().attach(engine, *args, **kwargs)
