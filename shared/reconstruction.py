# SPDX-License-Identifier: Apache-2.0
"""Reconstruction as an inferer."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer


class PosteriorMeanReconstruction(Inferer):
    """Decode the posterior mean: the deterministic reconstruction by which an autoencoder is judged.

    ``SimpleInferer`` would return ``AutoencoderKL``'s triple, decoded from a random draw.
    """

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        mean, _ = network.encode(inputs)
        return network.decode(mean)


class QuantizedReconstruction(Inferer):
    """Decode the nearest codes of the continuous latent: the reconstruction by which a VQ-GAN is judged."""

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return network.decode(network.encode(inputs))


class DecodedLatents(Inferer):
    """Decode what a network predicts as latents, so that an encoder is judged by the pictures it leads to.

    Args:
        autoencoder: frozen, with ``decode``.
    """

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.autoencoder.decode(network(inputs))
