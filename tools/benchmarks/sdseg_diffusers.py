# SPDX-License-Identifier: Apache-2.0
"""The U-Net of SDSeg as diffusers builds it, with the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.networks.film_unet import FiLMUNet

_TOP = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "conv_in": "conv_in",
    "norm_out": "conv_norm_out", "conv_out": "conv_out",
}  # fmt: skip
_RESIDUAL = {
    "norm1": "norm1", "conv1": "conv1", "embed": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
_ATTENTION = {
    "norm": "group_norm", "attn.to_q": "to_q", "attn.to_k": "to_k", "attn.to_v": "to_v", "attn.out_proj": "to_out.0",
}  # fmt: skip


def diffusers_unet(ours: FiLMUNet) -> nn.Module:
    """``diffusers.UNet2DModel`` with the weights of a U-Net without labels and cross-attention.

    Its attention has one head width for all levels, where the published network has one number of heads: where the two
    differ it is not the same network.

    Raises:
        ValueError: for a U-Net that diffusers cannot build.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # interfaces that the releases of its dependencies deprecate
        from diffusers import UNet2DModel
        from diffusers.models.attention_processor import Attention
    if ours.num_classes is not None or ours.cross_attention_dim is not None:
        raise ValueError("unet: expected one without labels and cross-attention, got one with them.")
    levels = len(ours.channels)
    blocks = len(ours.up) // levels - 1
    attends = [ours.down[level * (blocks + 1)].attention is not None for level in range(levels)]
    groups = ours.norm_out.num_groups
    theirs: Any = UNet2DModel(
        in_channels=ours.in_channels,
        out_channels=ours.conv_out.out_channels,
        block_out_channels=ours.channels,
        layers_per_block=blocks,
        down_block_types=tuple("AttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=ours.channels[0] // ours.num_heads,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    for module in theirs.modules():
        if isinstance(module, Attention):
            # The published number of heads; the projections are the same whatever it is.
            module.heads = ours.num_heads
            module.scale = (module.to_q.out_features // ours.num_heads) ** -0.5
    state = ours.state_dict()
    theirs.load_state_dict({name: state[key] for key, name in _names(ours).items()}, strict=True)
    return theirs.to(next(ours.parameters()).device)


def in_our_names(values: Mapping[str, torch.Tensor], ours: FiLMUNet) -> dict[str, torch.Tensor]:
    """Weights or gradients of :func:`diffusers_unet` by the names that they have in ``ours``."""
    return {key: values[name] for key, name in _names(ours).items()}


def _names(ours: FiLMUNet) -> dict[str, str]:
    """Our weight -> the one of diffusers."""
    levels = len(ours.channels)
    blocks = len(ours.up) // levels - 1
    layers = dict(_TOP)

    def add(stage: str, part: str, theirs: str) -> None:
        table = _ATTENTION if part == "attention" else _RESIDUAL
        layers.update({f"{stage}.{part}.{own}": f"{theirs}.{other}" for own, other in table.items()})

    for level in range(levels):
        for index in range(blocks):
            add(f"down.{level * (blocks + 1) + index}", "resblock", f"down_blocks.{level}.resnets.{index}")
            add(f"down.{level * (blocks + 1) + index}", "attention", f"down_blocks.{level}.attentions.{index}")
            add(f"up.{level * (blocks + 1) + index}", "resblock", f"up_blocks.{level}.resnets.{index}")
            add(f"up.{level * (blocks + 1) + index}", "attention", f"up_blocks.{level}.attentions.{index}")
        add(f"down.{level * (blocks + 1) + blocks}", "resblock", f"down_blocks.{level}.downsamplers.0")
        add(f"up.{level * (blocks + 1) + blocks}", "resblock", f"up_blocks.{level}.resnets.{blocks}")
        add(f"up.{level * (blocks + 1) + blocks}", "attention", f"up_blocks.{level}.attentions.{blocks}")
        add(f"up.{level * (blocks + 1) + blocks}", "upsample", f"up_blocks.{level}.upsamplers.0")
    add("middle.0", "resblock", "mid_block.resnets.0")
    add("middle.0", "attention", "mid_block.attentions.0")
    add("middle.1", "resblock", "mid_block.resnets.1")
    names = {}
    for key in ours.state_dict():
        layer, _, leaf = key.rpartition(".")
        names[key] = f"{layers[layer]}.{leaf}"
    return names
