# SPDX-License-Identifier: Apache-2.0
"""Blocks of the U-Net with scale-shift time conditioning (Dhariwal and Nichol, arXiv:2105.05233)."""

from __future__ import annotations

import torch
from monai.networks.blocks import CrossAttentionBlock
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import nn
from torch.nn import functional as F

NORM_EPS = 1e-5
"""Of every group normalisation in the published U-Net; MONAI core has 1e-6."""


class FiLMResBlock(nn.Module):
    """Residual block whose second normalisation the time embedding scales and shifts (arXiv:2105.05233, AdaGN).

    ``monai.networks.nets.diffusion_model_unet.DiffusionUNetResnetBlock`` does not fit: it only adds the embedding, and
    has no dropout. The last convolution starts at zero: the block starts as its skip connection.

    Args:
        resample: "down" (average of 2 x 2) or "up" (nearest, twice the size), between the first activation and the
            first convolution and on the skip connection; None keeps the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embed_dim: int,
        norm_num_groups: int,
        dropout: float,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """``x (B, in, h, w)`` and ``embedding (B, embed_dim)`` to ``(B, out, h', w')``."""
        h = self._resampled(F.silu(self.norm1(x)))
        h = self.conv1(h)
        scale, shift = self.embed(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(self._resampled(x)) + h

    def _resampled(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class SpatialCrossAttention(nn.Module):
    """Attention of all pixels to a context ``(B, L, D)``, added to the input; starts as the identity.

    MONAI's ``CrossAttentionBlock`` works on sequences; ``SpatialTransformer``, which wraps it for images, brings a
    second self-attention and a feed-forward network with it.
    """

    def __init__(self, channels: int, *, num_heads: int, context_dim: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=NORM_EPS)
        self.attn = CrossAttentionBlock(
            channels, num_heads, context_input_size=context_dim, qkv_bias=True, use_flash_attention=True
        )
        zero_module(self.attn.out_proj)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """``x (B, C, h, w)`` and ``context (B, L, D)`` to ``(B, C, h, w)``."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attn(tokens, context).transpose(1, 2).reshape(x.shape)


class FiLMStage(nn.Module):
    """One residual block, then self-attention, cross-attention and upsampling, each if there is one."""

    def __init__(
        self,
        resblock: FiLMResBlock,
        attention: nn.Module | None = None,
        cross_attention: nn.Module | None = None,
        upsample: FiLMResBlock | None = None,
    ) -> None:
        super().__init__()
        self.resblock = resblock
        self.attention = attention
        self.cross_attention = cross_attention
        self.upsample = upsample

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = self.resblock(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context)
        if self.upsample is not None:
            x = self.upsample(x, embedding)
        return x
