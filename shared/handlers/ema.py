# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from shared.distributed import unwrapped
from shared.handlers.accumulation import completed_steps, completes_step


class TrainedWeightsAverage(EMAHandler):
    """``ignite.handlers.EMAHandler`` for networks with frozen parts, with a warm-up that depends on the step alone.

    ignite averages every parameter, which rewrites frozen ones by rounding, one kernel per tensor; and its warm-up is
    linear. Here only parameters that take a gradient are averaged, in one fused operation, and the rest is copied. The
    decay after ``n`` optimizer steps is ``min(decay, (1 + n) / (10 + n))``: early averages forget the random start.

    When other weights are loaded into the network (a federated client gets the server's before each round, MONAI Label
    loads those it goes on from), the average moves by as much as the weights do. In a federation the mean of the
    clients' averages stays what it was, since the server's weights are the mean of theirs; and weights that are equal
    change nothing.

    Args:
        model: network whose copy ``ema_model`` holds the average; made at construction, so load pretrained weights
            first.
        decay: limit of the decay, e.g. 0.9999.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__(model=model, momentum=1.0 - decay, handle_buffers="copy")
        self.decay = decay
        # A copy for validation and release: it takes no gradient, whatever the original does.
        self.ema_model.requires_grad_(False)

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        network = unwrapped(self.model)
        network.register_load_state_dict_pre_hook(self._subtract_weights)
        network.register_load_state_dict_post_hook(self._add_weights)
        engine.add_event_handler(Events.STARTED, self._copy_frozen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)

    @torch.no_grad()
    def _copy_frozen(self, engine: Engine) -> None:
        for average, parameter in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            if not parameter.requires_grad:
                average.copy_(parameter)
        self._copy_buffers()

    @torch.no_grad()
    def _subtract_weights(self, *args: Any) -> None:
        averages, parameters = self._trained()
        torch._foreach_sub_(averages, parameters)

    @torch.no_grad()
    def _add_weights(self, *args: Any) -> None:
        averages, parameters = self._trained()
        torch._foreach_add_(averages, parameters)

    def _trained(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        pairs = zip(self.ema_model.parameters(), self.model.parameters(), strict=True)
        averages, parameters = zip(*((a, p) for a, p in pairs if p.requires_grad), strict=True)
        return averages, parameters

    @torch.no_grad()
    def _update(self, engine: Engine) -> None:
        if not completes_step(engine):
            return
        step = completed_steps(engine)
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        averages, parameters = self._trained()
        torch._foreach_lerp_(averages, parameters, 1.0 - decay)
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        for average, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)
