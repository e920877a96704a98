# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on seed and epoch only, so that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.utils import set_determinism


class EpochSeeds:
    """Seed Python, NumPy, torch and the datasets' random transforms at the start of every epoch.

    A checkpoint then needs no random state: weights, optimizer and epoch number determine everything that follows.
    MONAI seeds a data loader's transforms once at construction, so a resumed run would replay the first epoch's draws.

    Args:
        seed: seed of the run.
        datasets: datasets whose random transforms are seeded for loaders without workers (workers seed themselves from
            torch's generator, which is seeded here).
        deterministic: ask torch for deterministic algorithms (slower on GPUs).
    """

    def __init__(self, seed: int, datasets: Sequence[Any] = (), deterministic: bool = False) -> None:
        self.seed = seed
        self.datasets = tuple(datasets)
        self.deterministic = deterministic

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed)

    def _seed(self, engine: Any) -> None:
        # Ranks must draw different noise; 2**20 epochs keep their seeds apart.
        seed = (self.seed + engine.state.epoch + (engine.state.rank << 20)) % 2**32
        set_determinism(seed=seed, use_deterministic_algorithms=True if self.deterministic else None)
        if torch.cuda.is_available() and not self.deterministic:
            torch.backends.cudnn.deterministic = False
            torch.backends.cudnn.benchmark = True
        for dataset in self.datasets:
            set_rnd(dataset, seed)
