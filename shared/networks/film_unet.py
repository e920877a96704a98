# SPDX-License-Identifier: Apache-2.0
"""The U-Net of unconditional latent diffusion, with scale-shift time conditioning (FiLM).

Architecture: Dhariwal and Nichol, arXiv:2105.05233 (section 3 and appendix A), in the configuration of
arXiv:2112.10752 for LSUN churches, which SDSeg (arXiv:2406.18361) starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding, zero_module
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared.networks.film_blocks import NORM_EPS, FiLMResBlock, FiLMStage, SpatialCrossAttention

# Parts of keys that a pretrained unconditional U-Net does not have.
_ADDED = ("class_embedding.", ".cross_attention.")


class FiLMUNet(nn.Module):
    """The published U-Net of latent diffusion on LSUN churches, with SDSeg's inputs.

    ``monai.networks.nets.DiffusionModelUNet`` does not fit: no scale-shift conditioning, no dropout, no number of
    attention heads, and no class embedding of this size. Its attention blocks do and are used. The defaults have
    294.97 M parameters with ``in_channels=8``.

    Args:
        in_channels: channels of ``x``; 8 are 4 of the noisy latent and, after them, 4 of the condition.
        out_channels: channels of the prediction.
        channels: width of each level, each half the size of the one before; the time embedding is four times the first.
        num_res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_levels: which levels have self-attention; the middle always has.
        num_heads: heads of every attention.
        dropout: before the last convolution of each residual block.
        norm_num_groups: groups of every normalisation.
        num_classes: size of the class embedding, which is added to the time embedding; None for no labels.
        cross_attention_dim: D of the context; None for no cross-attention. With it, a cross-attention follows each
            self-attention.
        use_checkpoint: keep no activations inside the stages in training and compute them twice.

    Raises:
        ValueError: for lists of different length, or channels that groups or heads do not divide.
    """

    input_convolution_name = "conv_in.weight"

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        channels: Sequence[int] = (192, 384, 384, 768, 768),
        num_res_blocks: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, True, False),
        num_heads: int = 8,
        dropout: float = 0.2,
        norm_num_groups: int = 32,
        num_classes: int | None = None,
        cross_attention_dim: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(attention_levels) != len(channels):
            raise ValueError(
                f"attention_levels: expected one for each of {len(channels)} channels, got {len(attention_levels)}."
            )
        with_attention = {width for width, wanted in zip(channels, attention_levels, strict=True) if wanted}
        if any(width % norm_num_groups for width in channels):
            raise ValueError(
                f"channels: expected multiples of norm_num_groups {norm_num_groups}, got {list(channels)}."
            )
        if any(width % num_heads for width in {*with_attention, channels[-1]}):
            raise ValueError(f"channels: expected multiples of num_heads {num_heads}, got {list(channels)}.")
        self.in_channels = in_channels
        self.channels = tuple(channels)
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.cross_attention_dim = cross_attention_dim
        self.use_checkpoint = use_checkpoint
        embed_dim = 4 * channels[0]
        block: dict[str, Any] = {"embed_dim": embed_dim, "norm_num_groups": norm_num_groups, "dropout": dropout}

        def stage(width_in: int, width: int, attends: bool, upsample: bool = False) -> FiLMStage:
            attention = cross = None
            if attends:
                attention = SpatialAttentionBlock(
                    2, width, width // num_heads, norm_num_groups, NORM_EPS, use_flash_attention=True
                )
                zero_module(attention.attn.out_proj)
            if attends and cross_attention_dim is not None:
                cross = SpatialCrossAttention(
                    width, num_heads=num_heads, context_dim=cross_attention_dim, norm_num_groups=norm_num_groups
                )
            up = FiLMResBlock(width, width, resample="up", **block) if upsample else None
            return FiLMStage(FiLMResBlock(width_in, width, **block), attention, cross, up)

        self.time_embed = nn.Sequential(nn.Linear(channels[0], embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.class_embedding = nn.Embedding(num_classes, embed_dim) if num_classes is not None else None
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        self.down = nn.ModuleList()
        width = channels[0]
        skips = [width]
        for level, level_width in enumerate(channels):
            for _ in range(num_res_blocks):
                self.down.append(stage(width, level_width, attention_levels[level]))
                width = level_width
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(FiLMStage(FiLMResBlock(width, width, resample="down", **block)))
                skips.append(width)

        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for index in range(num_res_blocks + 1):
                upsample = level > 0 and index == num_res_blocks
                self.up.append(stage(width + skips.pop(), channels[level], attention_levels[level], upsample))
                width = channels[level]

        self.norm_out = nn.GroupNorm(norm_num_groups, width, eps=NORM_EPS)
        self.conv_out = zero_module(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the target of the noise schedule.

        Args:
            x: ``(B, in_channels, h, w)``.
            timesteps: ``(B,)``.
            context: ``(B, L, D)``; exactly with ``cross_attention_dim``.
            class_labels: integers ``(B,)`` below ``num_classes``; exactly with ``num_classes``.

        Returns:
            ``(B, out_channels, h, w)``.

        Raises:
            ValueError: for a size that the levels cannot halve evenly, or a condition that is missing or not known.
        """
        divisor = 2 ** (len(self.channels) - 1)
        if any(size % divisor for size in x.shape[2:]):
            raise ValueError(
                f"latent: expected sizes divisible by {divisor} for {len(self.channels)} levels, got "
                f"{tuple(x.shape)}; set image_size to multiples of {divisor} times the autoencoder's factor."
            )
        _exactly_with("context", context, "cross_attention_dim", self.cross_attention_dim)
        _exactly_with("class_labels", class_labels, "num_classes", self.num_classes)

        waves = get_timestep_embedding(timesteps, self.channels[0])  # cosines, then sines; longest period 10000
        embedding = self.time_embed(waves.to(x.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)

        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding, context)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding, context)
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), embedding, context)
        # In float32 under autocast too: at the noisiest step an error of the noise counts 39 times in the latent.
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_out(F.silu(self.norm_out(h.float())))

    def widened(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to load of a pretrained unconditional U-Net, as ``adapt`` of ``shared.weights.load_weights``.

        The first convolution gets zeros for the further input channels; class embedding and cross-attention, if it has
        none, keep their own values (spec sdseg 3.2). The network then starts as if nothing had been added.

        Args:
            state: state dict of a `FiLMUNet` of the same options but for ``in_channels``, ``num_classes`` and
                ``cross_attention_dim``. What else does not fit stays, for a strict load to name.
        """
        added = {key: value for key, value in self.state_dict().items() if any(part in key for part in _ADDED)}
        state = {**added, **state}
        first = state.get(self.input_convolution_name)
        if first is not None and first.ndim == 4 and first.shape[1] < self.in_channels:
            state[self.input_convolution_name] = extend_input_conv(first, self.in_channels)
        return state

    def _run(self, stage: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


def extend_input_conv(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """First convolution's ``weight (out, C, k, k)`` for ``in_channels`` >= C inputs: zeros for those that are new.

    The network starts as if the new channels were not there.

    Raises:
        ValueError: for fewer channels than the weight has.
    """
    if in_channels < weight.shape[1]:
        raise ValueError(f"in_channels: expected at least the {weight.shape[1]} pretrained ones, got {in_channels}.")
    zeros = weight.new_zeros(weight.shape[0], in_channels - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, zeros], dim=1)


def _exactly_with(name: str, value: torch.Tensor | None, option: str, setting: int | None) -> None:
    if (value is None) != (setting is None):
        expected, got = ("none", "one") if setting is None else ("one", "none")
        raise ValueError(f"{name}: expected {expected} with {option} {setting}, got {got}.")
