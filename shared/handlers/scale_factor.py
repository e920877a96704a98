# SPDX-License-Identifier: Apache-2.0
"""Put the measured scale factor into the network."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Engine, Events

from shared.distributed import from_main_process
from shared.handlers.given_weights import GivenWeights
from shared.latent_cache import LatentDataset, measure_scale_factor

logger = logging.getLogger(__name__)


class MeasureScaleFactor:
    """Set ``model.scale_factor`` from the training latents when a training starts.

    Place it before the checkpoint handler: a resumed run keeps the value of its checkpoint. In distributed runs every
    rank uses the value of rank 0.

    Weights that were put into the network after the training was built carry the factor they were trained with, and it
    is kept: a federated client measures in its first round at most, and MONAI Label goes on with the model's. Only
    where they hold the 1 of a network that was never trained is it measured.

    Args:
        model: network with a 0-dimensional buffer ``scale_factor``.
        dataset: training latents.
        max_items: images measured, evenly spaced.
    """

    def __init__(self, model: Any, dataset: LatentDataset, max_items: int = 4096) -> None:
        self.model, self.dataset, self.max_items = model, dataset, max_items
        self._weights = GivenWeights(model)

    def attach(self, engine: Engine) -> None:
        self._weights.watch()
        engine.add_event_handler(Events.STARTED, self._measure)

    def _measure(self, engine: Any) -> None:
        if self._weights.given and self.model.scale_factor != 1.0:
            logger.info("scale factor %.6f, kept with the weights it came with", self.model.scale_factor)
            return
        value = from_main_process(measure_scale_factor(self.dataset, self.max_items))
        self.model.scale_factor.copy_(torch.tensor(value))
        logger.info("scale factor %.6f, measured on up to %d training images", value, self.max_items)
