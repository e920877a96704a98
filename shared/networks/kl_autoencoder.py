# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of latent diffusion as it was published (Rombach et al., arXiv:2112.10752, kl-f8)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.nets.autoencoderkl import AEKLResBlock, AutoencoderKL, Decoder, Encoder
from monai.utils import ensure_tuple_rep
from torch import nn
from torch.nn import functional as F

from shared.networks.upsampling_convolution import UpsampledConvolution


class SiLUGroupNorm(nn.GroupNorm):
    """Group normalisation, then SiLU.

    The published encoder and decoder end in normalisation, SiLU, convolution; those of MONAI core 1.6 leave the SiLU
    out. As one module in the place of the normalisation it changes no key of the state dict.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(input))


def add_silu_before_last_conv(blocks: nn.ModuleList) -> None:
    """Replace the last normalisation of MONAI's ``Encoder`` or ``Decoder``, in place."""
    norm = blocks[-2]
    if not isinstance(norm, nn.GroupNorm):
        raise TypeError(f"blocks: expected a GroupNorm before the last convolution, got {type(norm).__name__}")
    blocks[-2] = SiLUGroupNorm(norm.num_groups, norm.num_channels, norm.eps)


class KLEncoder(Encoder):
    """MONAI's ``Encoder`` with the published last SiLU and, for the vision encoder, dropout.

    Args:
        dropout: probability of the dropout between SiLU and second convolution of each residual block; MONAI's blocks
            have none. The keys of the state dict are the same with and without it.
        spatial_dims, in_channels, channels, out_channels, num_res_blocks, norm_num_groups, norm_eps, attention_levels,
            with_nonlocal_attn, use_flash_attention: of MONAI's ``Encoder``; ``num_res_blocks`` also as one number.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        num_res_blocks: Sequence[int] | int,
        norm_num_groups: int,
        norm_eps: float,
        attention_levels: Sequence[bool],
        with_nonlocal_attn: bool = True,
        use_flash_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            channels=channels,
            out_channels=out_channels,
            num_res_blocks=ensure_tuple_rep(num_res_blocks, len(channels)),
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            attention_levels=attention_levels,
            with_nonlocal_attn=with_nonlocal_attn,
            use_flash_attention=use_flash_attention,
        )
        add_silu_before_last_conv(self.blocks)
        if dropout:
            for block in self.blocks:
                if isinstance(block, AEKLResBlock):
                    # MONAI's Convolution is a Sequential with the one entry "conv"; so is this, after the dropout.
                    layers: Any = OrderedDict(dropout=nn.Dropout(dropout), conv=block.conv2.conv)
                    block.conv2 = nn.Sequential(layers)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Picture ``(B, 1|C, H, W)`` in [0, 1] to features ``(B, out_channels, h, w)``.

        One channel is repeated to the ``in_channels`` of the network, and [0, 1] becomes the published [-1, 1].

        Raises:
            ValueError: for another number of channels, or a size that the levels cannot halve evenly.
        """
        if x.shape[1] == 1 and self.in_channels > 1:
            x = x.expand(-1, self.in_channels, *x.shape[2:])
        divisor = 2 ** (len(self.channels) - 1)
        if x.shape[1] != self.in_channels or any(size % divisor for size in x.shape[2:]):
            raise ValueError(
                f"image: expected {self.in_channels} channels (or 1) and sizes divisible by {divisor}, got "
                f"{tuple(x.shape)}; set image_size to multiples of {divisor}."
            )
        return super().forward(2.0 * x - 1.0)


class KLAutoencoder(AutoencoderKL):
    """``AutoencoderKL`` of MONAI core with the published architecture, so that published weights fit exactly.

    What core's class cannot express: the encoder ends in ``2 * latent_channels`` channels, from which 1x1 convolutions
    make mean and log-variance (published as one convolution 2L -> 2L, here as its two halves); the decoder has one
    residual block per level more than the encoder; SiLU before both last convolutions. Everything else is core's.

    Images are in [0, 1] outside and [-1, 1] inside. The defaults are kl-f8 of arXiv:2112.10752 (OpenImages), 83.65 M
    parameters: 256 x 256 becomes 4 x 32 x 32.

    Args:
        spatial_dims, in_channels, out_channels, num_res_blocks, channels, attention_levels, latent_channels,
            norm_num_groups, norm_eps, with_encoder_nonlocal_attn, with_decoder_nonlocal_attn, use_checkpoint: of
            ``AutoencoderKL``; ``num_res_blocks`` is the encoder's.
        use_flash_attention: attention by ``scaled_dot_product_attention``, the same numbers in less memory.

    Raises:
        ValueError: for channels that ``norm_num_groups`` does not divide, or lists of different length.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        num_res_blocks: Sequence[int] | int = 2,
        channels: Sequence[int] = (128, 256, 512, 512),
        attention_levels: Sequence[bool] = (False, False, False, False),
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = True,
        with_decoder_nonlocal_attn: bool = True,
        use_checkpoint: bool = False,
        use_flash_attention: bool = True,
    ) -> None:
        with torch.device("meta"):  # checks the arguments; every part is replaced below
            super().__init__(
                spatial_dims=spatial_dims,
                in_channels=in_channels,
                out_channels=out_channels,
                num_res_blocks=num_res_blocks,
                channels=channels,
                attention_levels=attention_levels,
                latent_channels=latent_channels,
                norm_num_groups=norm_num_groups,
                norm_eps=norm_eps,
                use_checkpoint=use_checkpoint,
            )
        blocks_per_level = ensure_tuple_rep(num_res_blocks, len(channels))
        self.encoder = KLEncoder(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            channels=channels,
            out_channels=2 * latent_channels,
            num_res_blocks=blocks_per_level,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            attention_levels=attention_levels,
            with_nonlocal_attn=with_encoder_nonlocal_attn,
            use_flash_attention=use_flash_attention,
        )
        decoder = Decoder(
            spatial_dims=spatial_dims,
            channels=channels,
            in_channels=latent_channels,
            out_channels=out_channels,
            num_res_blocks=[count + 1 for count in blocks_per_level],
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            attention_levels=attention_levels,
            with_nonlocal_attn=with_decoder_nonlocal_attn,
            use_flash_attention=use_flash_attention,
        )
        add_silu_before_last_conv(decoder.blocks)
        if spatial_dims == 2:
            for index, block in enumerate(decoder.blocks):
                if isinstance(block, UpSample):
                    decoder.blocks[index] = UpsampledConvolution(block)
        self.decoder = decoder
        self.quant_conv_mu = _pointwise(spatial_dims, 2 * latent_channels, latent_channels)
        self.quant_conv_log_sigma = _pointwise(spatial_dims, 2 * latent_channels, latent_channels)
        self.post_quant_conv = _pointwise(spatial_dims, latent_channels, latent_channels)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, L, h, w)``, not scaled, to images ``(B, C, H, W)``; nominal range [0, 1], not clamped."""
        return (super().decode(z) + 1.0) / 2.0


def _pointwise(spatial_dims: int, in_channels: int, out_channels: int) -> Convolution:
    return Convolution(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=1,
        padding=0,
        conv_only=True,
    )
