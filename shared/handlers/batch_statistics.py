# SPDX-License-Identifier: Apache-2.0
"""One set of running statistics of batch normalisation for all processes."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from shared.distributed import mean_over_processes, unwrapped


class MeanBatchStatistics:
    """Average the running statistics of batch normalisation over the processes at the end of each epoch's training.

    Each process normalises its share of the batch and keeps statistics of its own, so without this every process would
    validate another network than the one rank 0 saves, and a resumed run would validate differently. It comes before
    validation and before the moving average copies the buffers. ``torch.nn.SyncBatchNorm`` does not fit: it exists for
    GPUs alone, and waits for all processes in every layer. In a process of its own nothing changes.

    Args:
        network: what is trained; one without batch normalisation stays as it is.
    """

    def __init__(self, network: Any) -> None:
        layers = [layer for layer in unwrapped(network).modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [
            buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
        ]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._average)

    @torch.no_grad()
    def _average(self, engine: Any) -> None:
        if not self.buffers or engine.state.iteration % engine.state.epoch_length:
            return
        flat = mean_over_processes(torch.cat([buffer.flatten() for buffer in self.buffers]))
        for buffer, part in zip(self.buffers, flat.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
