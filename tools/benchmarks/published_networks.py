# SPDX-License-Identifier: Apache-2.0
"""The networks of monai-generative 0.2.3, which the published programs use, with the weights of MONAI core's.

The baselines of all latent diffusion bundles are built from these. The package is frozen and uses interfaces that its
dependencies deprecate; of its parts only the networks can still be imported.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.checkpoints import convert_state_dict

# What MONAI core's networks call differently.
RENAMED = {"channels": "num_channels"}
# Kernels that need xformers there; the published programs leave them off.
LEFT_OUT = ("use_flash_attention",)


def published_network(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The network of monai-generative that equals one of MONAI core.

    Args:
        network: ``AutoencoderKL``, ``DiffusionModelUNet`` or ``ControlNet`` of MONAI core, on the CPU.
        options: the arguments that it was built with, as a configuration has them.

    Returns:
        The class of the same name with the same weights, in evaluation mode if ``network`` is.

    Raises:
        ValueError: when the two have different weights; the message starts with the class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from generative.networks import nets

        build = getattr(nets, type(network).__name__)
        known = inspect.signature(build).parameters
        renamed = {RENAMED.get(key, key): value for key, value in options.items() if key not in LEFT_OUT}
        published = build(**{key: value for key, value in renamed.items() if key in known})
    published.load_state_dict(_published_weights(published, network))
    return published.train(network.training)


def some_in_core_order(values: Mapping[str, torch.Tensor], network: nn.Module, count: int = 256) -> torch.Tensor:
    """About ``count`` numbers of each weight or gradient, evenly spaced, as one vector on the CPU.

    Args:
        values: by name, of a published network or of MONAI core's.
        network: MONAI core's, whose order counts.
        count: of each weight.
    """
    converted = convert_state_dict(values, network).values()
    return torch.cat([value.flatten()[:: max(1, value.numel() // count)].cpu() for value in converted])


def _published_weights(published: nn.Module, network: nn.Module) -> dict[str, torch.Tensor]:
    """The conversion the other way round: each weight is marked with its number, converted, and found again."""
    before = published.state_dict()
    marked = {key: torch.full_like(value, number) for number, (key, value) in enumerate(before.items())}
    source = {int(value.flatten()[0]): key for key, value in convert_state_dict(marked, network).items()}
    weights = network.state_dict()
    missing = [key for number, key in enumerate(before) if number not in source]
    if missing:
        raise ValueError(f"{type(network).__name__}: expected weights for {missing[:3]}, found none in MONAI core's.")
    return {key: weights[source[number]] for number, key in enumerate(before)}


def spread_zeros(network: nn.Module, seed: int) -> nn.Module:
    """Random numbers in place for weights that are all zero before training, behind which every difference would hide.

    Returns:
        The network.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return network
