# SPDX-License-Identifier: Apache-2.0
"""Put the measured mean and standard deviation of latents into the network."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Engine, Events

from shared.distributed import from_main_process, is_main_process, unwrapped
from shared.handlers.given_weights import GivenWeights
from shared.latent_cache import LatentDataset, latent_statistics

logger = logging.getLogger(__name__)


class MeasureLatentStatistics:
    """Set ``network.latent_mean`` and ``network.latent_std`` from the training latents when a training starts.

    The same data and autoencoder give the same values, so that a resumed run measures what it had, unless its
    checkpoint holds the buffers: place it before the checkpoint handler, which then has the last word. In distributed
    runs rank 0 measures and every rank uses its values.

    Weights that were put into the network after the training was built carry the values they were trained with, and
    they are kept (see ``shared.handlers.scale_factor.MeasureScaleFactor``), unless all means are 0 and all deviations
    1, as in a network that was never trained.

    Args:
        network: network with buffers ``latent_mean`` and ``latent_std`` ``(C,)``.
        dataset: training latents.
        ema_model: copy of the network, e.g. a moving average, that gets the same values; ``None`` where there is none,
            or where its handler copies buffers when a training starts (``TrainedWeightsAverage``).
        max_items: items measured, evenly spaced.

    Raises:
        ValueError: for a constant or infinite channel, or another number of channels than the buffers have.
    """

    def __init__(self, network: Any, dataset: LatentDataset, *, ema_model: Any = None, max_items: int = 512) -> None:
        self.networks = [unwrapped(part) for part in (network, ema_model) if part is not None]
        self.dataset, self.max_items = dataset, max_items
        self._weights = GivenWeights(network)

    def attach(self, engine: Engine) -> None:
        self._weights.watch()
        engine.add_event_handler(Events.STARTED, self._measure)

    @torch.no_grad()
    def _measure(self, engine: Any) -> None:
        if self._weights.given and self._is_measured():
            logger.info("latents have the mean and standard deviation that came with the weights")
            return
        measured: Any = latent_statistics(self.dataset, self.max_items) if is_main_process() else None
        mean, std = from_main_process(measured)
        for network in self.networks:
            if network.latent_mean.shape != mean.shape:
                raise ValueError(
                    f"latent_mean: expected {len(network.latent_mean)} channels of latents, as the network has, got "
                    f"{len(mean)}; give network and autoencoder the same embedding_dim."
                )
            network.latent_mean.copy_(mean)
            network.latent_std.copy_(std)
        logger.info(
            "latents have mean %s and standard deviation %s, measured on up to %d training items",
            _row(mean), _row(std), self.max_items,
        )  # fmt: skip

    def _is_measured(self) -> bool:
        mean, std = self.networks[0].latent_mean, self.networks[0].latent_std
        return bool((mean != 0.0).any() or (std != 1.0).any())


def _row(values: torch.Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"
