# SPDX-License-Identifier: Apache-2.0
"""Keep NaN out of the weights."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import StrEnum
from torch import nn

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
    """Clip gradients, and refuse a step whose loss, gradient norm or learning rate is not finite.

    ``ignite.handlers.TerminateOnNan`` acts after the optimizer's step, when NaN is already in the weights; this handler
    acts between the backward pass and the step. What the forward pass has changed, such as running statistics of batch
    normalisation, it puts back; buffers that are not finite end the run at the start of an epoch. In distributed runs
    all ranks refuse a step that one of them must.

    Args:
        max_norm: gradients are scaled down to this total L2 norm; ``None`` measures without clipping.
        policy: ``stop`` raises :class:`NonFiniteLossError`; ``skip`` drops the gradients, so that the optimizer leaves
            weights and moments as they are, and goes on.
        max_skips: with ``skip``, the number of consecutive refused steps of an optimizer after which the run stops all
            the same.
    """

    def __init__(self, max_norm: float | None = 1.0, policy: str = NonFinitePolicy.STOP, max_skips: int = 20) -> None:
        if policy not in set(NonFinitePolicy):
            raise ValueError(f"policy: expected one of {', '.join(NonFinitePolicy)}, got {policy!r}.")
        self.max_norm = max_norm
        self.policy = NonFinitePolicy(policy)
        self.max_skips = max_skips
        self._skipped: Counter[bool] = Counter()
        self._buffers: list[tuple[bool, nn.Module, str]] = []
        self._kept: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._check)
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.EPOCH_STARTED, self._check_buffers)
        engine.add_event_handler(Events.ITERATION_STARTED, self._keep_buffers)

    def _reset(self, engine: Any) -> None:
        self._skipped.clear()
        networks = ((True, engine.network), (False, getattr(engine, "discriminator", None)))
        self._buffers = [
            (main, module, name)
            for main, network in networks
            if network is not None
            for module in network.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer is not None
        ]

    def _keep_buffers(self, engine: Engine) -> None:
        self._kept = [getattr(module, name).clone() for _, module, name in self._buffers]

    def _check_buffers(self, engine: Engine) -> None:
        """A scale of latents that is infinite makes zeros of them, which no loss shows."""
        for _, module, name in self._buffers:
            if not bool(torch.isfinite(getattr(module, name)).all()):
                raise NonFiniteLossError(
                    f"{type(module).__name__}.{name}: expected finite numbers at the start of epoch "
                    f"{engine.state.epoch}, got NaN or infinity; go on from an older checkpoint (--resume PATH) or "
                    "start anew (--resume never)."
                )

    @torch.no_grad()
    def _put_back_buffers(self, *, main: bool) -> None:
        # A discriminator has seen what the network made, but not the other way round.
        for (of_network, module, name), kept in zip(self._buffers, self._kept, strict=True):
            if main or not of_network:
                getattr(module, name).copy_(kept)

    def _check(self, engine: Any) -> None:
        optimizer = getattr(engine, "stepping", engine.optimizer)
        main = optimizer is engine.optimizer
        if engine.amp and engine.scaler is not None and engine.scaler.is_enabled():
            if not completes_step(engine):
                return
            engine.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.max_norm if self.max_norm is not None and completes_step(engine) else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if main:
            # The curve shows the network's norm, not that of a discriminator which steps after it.
            engine.state.gradient_norm = norm
        loss = torch.as_tensor(engine.state.output["loss"])
        rate = sum(group["lr"] for group in optimizer.param_groups)
        # One number crosses from the device to the host: the sum is finite only if all are, on every rank.
        if bool(torch.isfinite(mean_over_processes(norm + loss.detach().float().sum() + 0.0 * rate))):
            self._skipped[main] = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self._put_back_buffers(main=main)
        self._skipped[main] += 1
        self._refuse(engine, float(norm), float(loss.detach()), float(rate), self._skipped[main])

    def _refuse(self, engine: Any, norm: float, loss: float, rate: float, skipped: int) -> None:
        terms = {name: float(value.detach()) for name, value in getattr(engine.state, "losses", {}).items()}
        # A gradient is an average over the ranks, so only the losses tell whose batch it was.
        loader = getattr(engine, "data_loader", None)
        files = batch_files(engine.state.batch, getattr(getattr(loader, "dataset", None), "data", ()))
        by_rank = from_all_processes((loss, terms, files))
        broken = [entry for entry in by_rank if not math.isfinite(entry[0])]
        loss, terms = (broken or by_rank)[0][:2]
        named = ", ".join(name for entry in broken or by_rank for name in entry[2]) or "unknown files"
        steps = "" if math.isfinite(rate) else f" and learning rate {rate}"
        message = (
            f"{named}: expected a finite loss and gradient, got loss {loss} (terms {terms}) and gradient "
            f"norm {norm}{steps} in epoch {engine.state.epoch}, iteration {engine.state.iteration}; the weights are "
            "unchanged. Check these files with `python -m tools.check_data`, lower learning_rate, or give "
            "--non_finite_policy skip."
        )
        if self.policy == NonFinitePolicy.STOP or skipped > self.max_skips:
            raise NonFiniteLossError(message)
        logger.warning("step skipped. %s", message)


def batch_files(batch: Any, data: Sequence[Any] = ()) -> list[str]:
    """Names of the files a batch was read from, not their whole paths.

    Args:
        batch: what the data loader gave: tensors with ``filename_or_obj`` in their metadata, or paths, or positions in
            ``data`` as ``item_id``.
        data: items of the data set.
    """
    items = batch if isinstance(batch, list) else [batch]
    names: list[str] = []
    for item in items:
        if not isinstance(item, Mapping):
            continue
        found = [Path(name).name for value in item.values() for name in _listed(_origin(value))] or _files_of(item)
        if not found:
            for index in _listed(item.get("item_id", [])):
                known = index.isdecimal() and int(index) < len(data) and isinstance(data[int(index)], Mapping)
                found += (_files_of(data[int(index)]) if known else []) or [f"item {index}"]
        names += found
    return list(dict.fromkeys(names))


def _origin(value: Any) -> Any:
    return getattr(value, "meta", {}).get("filename_or_obj", [])


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []


def _files_of(item: Mapping[Any, Any]) -> list[str]:
    """The files to which an item has paths, with the folder they lie in: its name may tell the subject."""
    texts = [text for value in item.values() for text in _listed(value) if isinstance(text, str)]
    # What is no path, such as a report, can be too long for one; os.path then says no, pathlib raises.
    return ["/".join(Path(text).parts[-2:]) for text in texts if os.path.isfile(text)]
