# SPDX-License-Identifier: Apache-2.0
"""Training in less memory: what lies inside a network's blocks is computed a second time instead of kept."""

from __future__ import annotations

import types
from typing import Any, TypeVar

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, SpatialTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

Network = TypeVar("Network", bound=nn.Module)

BLOCKS = (DiffusionUNetResnetBlock, SpatialTransformer, SpatialAttentionBlock, AEKLResBlock)
"""What is computed twice: residual and attention blocks of U-Nets, ControlNets and autoencoders, in 2-D and 3-D."""


def checkpoint_activations(network: Network, enabled: bool = True) -> Network:
    """Let the blocks of a network keep nothing but their inputs for the backward pass, in place.

    ``DiffusionModelUNet`` and ``ControlNet`` of MONAI have no such option, and ``use_checkpoint`` of its
    ``AutoencoderKL`` takes encoder and decoder as one block each, whose activations are all there again while it goes
    backwards. ``torch``'s ``checkpoint_wrapper`` fits neither: it puts modules around the blocks, whose types and
    attributes others look at. Here only the call of a block changes: state dict, types and hooks stay, a deep copy
    (an average of weights) does the same, and ``DistributedDataParallel`` may be put around it.

    Gradients are equal, and so is what comes out. Where no gradients are on, nothing changes.

    Args:
        network: any module that holds such networks; see ``BLOCKS``. Frozen parts count too: gradients pass through
            the U-Net's decoder to its ControlNets.
        enabled: false undoes it.

    Returns:
        The network.

    Raises:
        ValueError: when enabled for a network without such blocks.
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    if enabled and not blocks:
        raise ValueError(
            f"gradient_checkpointing: expected a U-Net, ControlNet or AutoencoderKL of MONAI, got "
            f"{type(network).__name__} without any of their blocks; set it to False."
        )
    for block in blocks:
        if enabled:
            # A bound method, because a deep copy of it is bound to the copy of the block.
            block.forward = types.MethodType(_forward_twice, block)  # type: ignore[method-assign]
        else:
            block.__dict__.pop("forward", None)
    return network


def _forward_twice(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
