# SPDX-License-Identifier: Apache-2.0
"""How networks run in inference: compiled, and in which memory format."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from monai.networks.nets import ControlNet, DiffusionModelUNet
from torch import nn

from shared.networks.film_unet import FiLMUNet

Network = TypeVar("Network", bound=nn.Module)

STEPPED = (DiffusionModelUNet, ControlNet, FiLMUNet)
"""What samplers call in every step; the rest runs once and is not worth a compilation."""


def compile_in_place(network: Network, enabled: bool = True, **options: Any) -> Network:
    """Compile the networks that a sampler calls in every step, where they lie.

    ``torch.compile`` of the whole model would do nothing: samplers look inside wrappers, for the methods of the
    network, and would call what is not compiled. ``nn.Module.compile`` wraps nothing: names of weights, methods and
    types stay, and weights may be loaded before or after.

    Compilation takes place in the first step, again for another shape, and takes minutes; it pays for many samples of
    one size. It needs a C++ compiler on a CPU.

    Args:
        network: a model that holds U-Nets (``STEPPED``), or one of them.
        enabled: false returns the network as it is.
        options: of ``torch.compile``, such as ``mode`` or ``backend``.

    Returns:
        The network.

    Raises:
        ValueError: for a network without U-Nets.
    """
    if not enabled:
        return network
    stepped = [module for module in network.modules() if isinstance(module, STEPPED)]
    if not stepped:
        raise ValueError(
            f"compile: expected a model with a U-Net, got {type(network).__name__} without one; set it to False."
        )
    for module in stepped:
        module.compile(**options)
    return network


def channels_last(network: Network, enabled: bool = True) -> Network:
    """Let the 2-D convolutions of a network compute with the channels of a pixel beside one another in memory.

    Results differ by rounding (1e-6), but on a CPU in float32 by up to 4e-3 for planes of 256 x 256, where torch's
    group norm is less exact. It pays where convolutions are large: on a CPU 1.04 for 64 x 64 latents in
    float32 and bfloat16, but 0.8 for 20 x 28 under bfloat16 autocast; training gains nothing there. Measure before use.

    Args:
        network: any module; only the strides of its weights change, in place, so weights may be loaded afterwards.
        enabled: false returns the network as it is.
    """
    return network.to(memory_format=torch.channels_last) if enabled else network
