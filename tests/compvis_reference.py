# SPDX-License-Identifier: Apache-2.0
"""The published latent diffusion networks as functions of a state dict with the published (CompVis) keys.

Written for the tests from the description in the papers and the keys, apart from the networks and key tables that are
tested against them: no module, no table, only `torch.nn.functional`. Images are in [-1, 1] here, as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def conv(shapes: Shapes, key: str, n_in: int, n_out: int, *kernel: int) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (n_out, n_in, *kernel), (n_out,)


def norm(shapes: Shapes, key: str, n: int) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (n,), (n,)


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Every weight random with zero mean; normalisations about 1. What starts at zero would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        value = torch.randn(shape, generator=generator) * scale
        is_norm = len(shape) == 1 and key.endswith("weight")
        state[key] = 1 + value if is_norm else value
    return state


# ----------------------------------------------------------------------------------------------------------------------
# autoencoder
# ----------------------------------------------------------------------------------------------------------------------
def _res_shapes(shapes: Shapes, key: str, n_in: int, n_out: int) -> None:
    norm(shapes, f"{key}.norm1", n_in)
    conv(shapes, f"{key}.conv1", n_in, n_out, 3, 3)
    norm(shapes, f"{key}.norm2", n_out)
    conv(shapes, f"{key}.conv2", n_out, n_out, 3, 3)
    if n_in != n_out:
        conv(shapes, f"{key}.nin_shortcut", n_in, n_out, 1, 1)


def _middle_shapes(shapes: Shapes, key: str, n: int) -> None:
    _res_shapes(shapes, f"{key}.block_1", n, n)
    norm(shapes, f"{key}.attn_1.norm", n)
    for letter in ("q", "k", "v", "proj_out"):
        conv(shapes, f"{key}.attn_1.{letter}", n, n, 1, 1)
    _res_shapes(shapes, f"{key}.block_2", n, n)


def encoder_shapes(channels: Sequence[int], blocks: int = 2, latent: int = 4) -> Shapes:
    shapes: Shapes = {}
    conv(shapes, "encoder.conv_in", 3, channels[0], 3, 3)
    width = channels[0]
    for level, n in enumerate(channels):
        for index in range(blocks):
            _res_shapes(shapes, f"encoder.down.{level}.block.{index}", width, n)
            width = n
        if level < len(channels) - 1:
            conv(shapes, f"encoder.down.{level}.downsample.conv", n, n, 3, 3)
    _middle_shapes(shapes, "encoder.mid", width)
    norm(shapes, "encoder.norm_out", width)
    conv(shapes, "encoder.conv_out", width, 2 * latent, 3, 3)
    return shapes


def autoencoder_shapes(channels: Sequence[int], blocks: int = 2, latent: int = 4) -> Shapes:
    shapes = encoder_shapes(channels, blocks, latent)
    width = channels[-1]
    conv(shapes, "decoder.conv_in", latent, width, 3, 3)
    _middle_shapes(shapes, "decoder.mid", width)
    for level in reversed(range(len(channels))):
        for index in range(blocks + 1):
            _res_shapes(shapes, f"decoder.up.{level}.block.{index}", width, channels[level])
            width = channels[level]
        if level > 0:
            conv(shapes, f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    norm(shapes, "decoder.norm_out", width)
    conv(shapes, "decoder.conv_out", width, 3, 3, 3)
    conv(shapes, "quant_conv", 2 * latent, 2 * latent, 1, 1)
    conv(shapes, "post_quant_conv", latent, latent, 1, 1)
    return shapes


class Autoencoder:
    """Encoder, decoder and the convolutions between them."""

    def __init__(self, state: State, groups: int) -> None:
        self.state, self.groups = state, groups

    def conv(self, key: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], **options)

    def norm(self, key: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.state[f"{key}.weight"], self.state[f"{key}.bias"], eps=1e-6)

    def res(self, key: str, x: Tensor) -> Tensor:
        h = self.conv(f"{key}.conv1", F.silu(self.norm(f"{key}.norm1", x)), padding=1)
        h = self.conv(f"{key}.conv2", F.silu(self.norm(f"{key}.norm2", h)), padding=1)
        return (self.conv(f"{key}.nin_shortcut", x) if f"{key}.nin_shortcut.weight" in self.state else x) + h

    def middle(self, key: str, x: Tensor) -> Tensor:
        x = self.res(f"{key}.block_1", x)
        h = self.norm(f"{key}.attn_1.norm", x)
        q, k, v = (self.conv(f"{key}.attn_1.{letter}", h).flatten(2) for letter in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        h = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return self.res(f"{key}.block_2", x + self.conv(f"{key}.attn_1.proj_out", h))

    def encoder(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(20):
            for index in range(20):
                if f"encoder.down.{level}.block.{index}.conv1.weight" in self.state:
                    x = self.res(f"encoder.down.{level}.block.{index}", x)
            if f"encoder.down.{level}.downsample.conv.weight" in self.state:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("encoder.conv_out", x, padding=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        mean, log_variance = self.conv("quant_conv", self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(20)):
            for index in range(20):
                if f"decoder.up.{level}.block.{index}.conv1.weight" in self.state:
                    x = self.res(f"decoder.up.{level}.block.{index}", x)
            if f"decoder.up.{level}.upsample.conv.weight" in self.state:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# U-Net
# ----------------------------------------------------------------------------------------------------------------------
def unet_shapes(
    channels: Sequence[int],
    attention: Sequence[bool],
    *,
    blocks: int = 2,
    inputs: int = 8,
    outputs: int = 4,
    classes: int | None = None,
) -> Shapes:
    shapes: Shapes = {}
    embed = 4 * channels[0]

    def res(key: str, n_in: int, n_out: int) -> None:
        norm(shapes, f"{key}.in_layers.0", n_in)
        conv(shapes, f"{key}.in_layers.2", n_in, n_out, 3, 3)
        conv(shapes, f"{key}.emb_layers.1", embed, 2 * n_out)
        norm(shapes, f"{key}.out_layers.0", n_out)
        conv(shapes, f"{key}.out_layers.3", n_out, n_out, 3, 3)
        if n_in != n_out:
            conv(shapes, f"{key}.skip_connection", n_in, n_out, 1, 1)

    def attn(key: str, n: int) -> None:
        norm(shapes, f"{key}.norm", n)
        conv(shapes, f"{key}.qkv", n, 3 * n, 1)
        conv(shapes, f"{key}.proj_out", n, n, 1)

    conv(shapes, "time_embed.0", channels[0], embed)
    conv(shapes, "time_embed.2", embed, embed)
    if classes is not None:
        shapes["label_emb.weight"] = (classes, embed)
    conv(shapes, "input_blocks.0.0", inputs, channels[0], 3, 3)
    number, width, skips = 1, channels[0], [channels[0]]
    for level, n in enumerate(channels):
        for _ in range(blocks):
            res(f"input_blocks.{number}.0", width, n)
            if attention[level]:
                attn(f"input_blocks.{number}.1", n)
            number, width = number + 1, n
            skips.append(n)
        if level < len(channels) - 1:
            res(f"input_blocks.{number}.0", n, n)
            number += 1
            skips.append(n)
    res("middle_block.0", width, width)
    attn("middle_block.1", width)
    res("middle_block.2", width, width)
    number = 0
    for level in reversed(range(len(channels))):
        for index in range(blocks + 1):
            place = 1
            res(f"output_blocks.{number}.0", width + skips.pop(), channels[level])
            width = channels[level]
            if attention[level]:
                attn(f"output_blocks.{number}.1", width)
                place = 2
            if level > 0 and index == blocks:
                res(f"output_blocks.{number}.{place}", width, width)
            number += 1
    norm(shapes, "out.0", width)
    conv(shapes, "out.2", width, outputs, 3, 3)
    return shapes


class UNet:
    """The U-Net of unconditional latent diffusion; `legacy` is the order of rows in its attention as published."""

    def __init__(self, state: State, *, groups: int, heads: int, levels: int, blocks: int = 2) -> None:
        self.state, self.groups, self.heads, self.levels, self.blocks = state, groups, heads, levels, blocks

    def norm(self, key: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.state[f"{key}.weight"], self.state[f"{key}.bias"], eps=1e-5)

    def linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"])

    def conv(self, key: str, x: Tensor) -> Tensor:
        weight = self.state[f"{key}.weight"]
        return F.conv2d(x, weight, self.state[f"{key}.bias"], padding=weight.shape[-1] // 2)

    def res(self, key: str, x: Tensor, embedding: Tensor, resample: str = "") -> Tensor:
        h = F.silu(self.norm(f"{key}.in_layers.0", x))
        if resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif resample == "up":
            h, x = (t.repeat_interleave(2, -1).repeat_interleave(2, -2) for t in (h, x))
        h = self.conv(f"{key}.in_layers.2", h)
        scale, shift = self.linear(f"{key}.emb_layers.1", F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(f"{key}.out_layers.0", h) * (1 + scale) + shift
        h = self.conv(f"{key}.out_layers.3", F.silu(h))
        return (self.conv(f"{key}.skip_connection", x) if f"{key}.skip_connection.weight" in self.state else x) + h

    def attn(self, key: str, x: Tensor) -> Tensor:
        count, width, *size = x.shape
        flat = self.norm(f"{key}.norm", x).reshape(count, width, -1)
        qkv = F.conv1d(flat, self.state[f"{key}.qkv.weight"], self.state[f"{key}.qkv.bias"])
        per_head = qkv.reshape(count * self.heads, 3 * width // self.heads, -1)
        q, k, v = per_head.chunk(3, dim=1)
        scale = (width // self.heads) ** -0.25
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(count, width, -1)
        h = F.conv1d(h, self.state[f"{key}.proj_out.weight"], self.state[f"{key}.proj_out.bias"])
        return x + h.reshape(count, width, *size)

    def block(self, key: str, x: Tensor, embedding: Tensor, resample: str) -> Tensor:
        """Everything under one number: a residual block, perhaps attention, perhaps one more block that upsamples."""
        for place in range(3):
            if f"{key}.{place}.qkv.weight" in self.state:
                x = self.attn(f"{key}.{place}", x)
            elif f"{key}.{place}.emb_layers.1.weight" in self.state:
                moves = (place == 0) == (resample == "down")
                x = self.res(f"{key}.{place}", x, embedding, resample if moves else "")
        return x

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.state["time_embed.0.weight"].shape[1] // 2
        angles = timesteps[:, None].float() * 10000.0 ** (-torch.arange(half) / half)
        embedding = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        embedding = self.linear("time_embed.2", F.silu(embedding))
        if labels is not None:
            embedding = embedding + self.state["label_emb.weight"][labels]
        h = self.conv("input_blocks.0.0", x)
        skips = [h]
        for number in range(1, self.levels * (self.blocks + 1)):
            h = self.block(f"input_blocks.{number}", h, embedding, "" if number % (self.blocks + 1) else "down")
            skips.append(h)
        h = self.res("middle_block.0", h, embedding)
        h = self.res("middle_block.2", self.attn("middle_block.1", h), embedding)
        for number in range(self.levels * (self.blocks + 1)):
            h = self.block(f"output_blocks.{number}", torch.cat([h, skips.pop()], dim=1), embedding, "up")
        return self.conv("out.2", F.silu(self.norm("out.0", h)))
