# SPDX-License-Identifier: Apache-2.0
"""Keep NaN out of the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import StrEnum

from shared.distributed import from_all_processes, mean_over_processes
from shared.handlers.accumulation import completes_step

logger = logging.getLogger(__name__)


class NonFinitePolicy(StrEnum):
    """What to do with a step whose loss or gradient is not finite."""

    STOP = "stop"
    SKIP = "skip"


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was NaN or infinite; the weights are those before the step."""


class GradientGuard:
    """Clip gradients, and refuse a step whose loss or gradient norm is not finite.

    ``ignite.handlers.TerminateOnNan`` acts after the optimizer's step, when NaN is already in the weights; this handler
    acts between the backward pass and the step. In distributed runs all ranks refuse a step that one of them must.

    Args:
        max_norm: gradients are scaled down to this total L2 norm; ``None`` measures without clipping.
        policy: ``stop`` raises :class:`NonFiniteLossError`; ``skip`` drops the gradients, so that the optimizer leaves
            weights and moments as they are, and goes on.
        max_skips: with ``skip``, the number of consecutive refused steps after which the run stops all the same.
    """

    def __init__(self, max_norm: float | None = 1.0, policy: str = NonFinitePolicy.STOP, max_skips: int = 20) -> None:
        if policy not in set(NonFinitePolicy):
            raise ValueError(f"policy: expected one of {', '.join(NonFinitePolicy)}, got {policy!r}.")
        self.max_norm = max_norm
        self.policy = NonFinitePolicy(policy)
        self.max_skips = max_skips
        self._skipped = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check)
        engine.add_event_handler(Events.STARTED, self._reset)

    def _reset(self, engine: Engine) -> None:
        self._skipped = 0

    def _check(self, engine: Any) -> None:
        optimizer = getattr(engine, "stepping", engine.optimizer)
        if engine.amp and engine.scaler is not None and engine.scaler.is_enabled():
            if not completes_step(engine):
                return
            engine.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.max_norm if self.max_norm is not None and completes_step(engine) else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if optimizer is engine.optimizer:
            # The curve shows the network's norm, not that of a discriminator which steps after it.
            engine.state.gradient_norm = norm
        loss = torch.as_tensor(engine.state.output["loss"])
        # One number crosses from the device to the host: the sum is finite only if both are, on every rank.
        if bool(torch.isfinite(mean_over_processes(norm + loss.detach().float().sum()))):
            self._skipped = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self._refuse(engine, float(norm), float(loss.detach()))

    def _refuse(self, engine: Any, norm: float, loss: float) -> None:
        terms = {name: float(value.detach()) for name, value in getattr(engine.state, "losses", {}).items()}
        # A gradient is an average over the ranks, so only the losses tell whose batch it was.
        by_rank = from_all_processes((loss, terms, batch_files(engine.state.batch)))
        broken = [entry for entry in by_rank if not math.isfinite(entry[0])]
        loss, terms = (broken or by_rank)[0][:2]
        files = ", ".join(name for entry in broken or by_rank for name in entry[2]) or "unknown files"
        message = (
            f"{files}: expected a finite loss and gradient, got loss {loss} (terms {terms}) and gradient "
            f"norm {norm} in epoch {engine.state.epoch}, iteration {engine.state.iteration}; the weights are unchanged."
            " Check these files with `python -m tools.check_data`, lower learning_rate, or give "
            "--non_finite_policy skip."
        )
        self._skipped += 1
        if self.policy == NonFinitePolicy.STOP or self._skipped > self.max_skips:
            raise NonFiniteLossError(message)
        logger.warning("step skipped. %s", message)


def batch_files(batch: Any) -> list[str]:
    """Names of the files a batch was read from, as far as its tensors' metadata tell; folders are left out."""
    items = batch if isinstance(batch, list) else [batch]
    names: list[str] = []
    for item in items:
        values = item.values() if isinstance(item, Mapping) else []
        for value in values:
            found = getattr(value, "meta", {}).get("filename_or_obj", []) if hasattr(value, "meta") else []
            names.extend(Path(name).name for name in ([found] if isinstance(found, str) else found))
        if not names and isinstance(item, Mapping) and "item_id" in item:
            ids = item["item_id"]
            names.extend(f"item {index}" for index in ([ids] if isinstance(ids, str) else ids))
    return list(dict.fromkeys(names))
