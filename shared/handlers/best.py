# SPDX-License-Identifier: Apache-2.0
"""Release the weights of the best epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from shared.files import atomic_path, remove_incomplete, save_json, sha256_of_file
from shared.provenance import software_versions

logger = logging.getLogger(__name__)


class SaveBest:
    """Write a network's state dict whenever a validation metric improves, with a JSON description beside it.

    ``monai.handlers.CheckpointSaver(save_key_metric=True)`` does not fit: it writes in place, forgets the best value
    when a run is resumed, and would take NaN for a value. The file holds plain tensors (``weights_only=True,
    strict=True`` loads it); the JSON holds its SHA-256, epoch, metric and versions. Attach to the evaluator.

    Args:
        path: file to write, e.g. ``models/model.pt``.
        network: network to release, e.g. the moving average.
        metric: name in ``engine.state.metrics``.
        lower_is_better: whether a smaller value improves.
        settings: plain values recorded in the description.
    """

    def __init__(
        self,
        path: str | Path,
        network: nn.Module,
        metric: str,
        *,
        lower_is_better: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.metric = metric
        self.lower_is_better = lower_is_better
        self.settings = dict(settings or {})
        self.best: float | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compare)

    def state_dict(self) -> dict[str, float | None]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.best = state["best"]

    def _compare(self, engine: Any) -> None:
        value = float(engine.state.metrics[self.metric])
        if not math.isfinite(value):
            logger.warning(
                "%s is %s in epoch %d: the best weights stay as they are", self.metric, value, engine.state.epoch
            )
            return
        sign = 1.0 if self.lower_is_better else -1.0
        if self.best is not None and sign * value >= sign * self.best:
            return
        self.best = value
        if engine.state.rank == 0:
            self._write(value, engine.state.epoch)

    def _write(self, value: float, epoch: int) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        broken = [
            name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
        ]
        if broken:
            raise ValueError(
                f"{self.path}: expected finite weights, got NaN or infinity in {broken[0]}; nothing was written."
            )
        described = self.path.with_suffix(".json")
        remove_incomplete(self.path.parent)
        with atomic_path(self.path, needed=sum(tensor.nbytes for tensor in state.values())) as temporary:
            torch.save(state, temporary)
            description = {
                "sha256": sha256_of_file(temporary),
                "epoch": epoch,
                "metric": {self.metric: value},
                "settings": self.settings,
                "software": software_versions(),
            }
            # Whenever the process is killed, no weights lie beside the description of others, which would be refused.
            described.unlink(missing_ok=True)
        save_json(description, described)
        logger.info("%s: saved, %s %.6g in epoch %d", self.path, self.metric, value, epoch)
