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
