# SPDX-License-Identifier: Apache-2.0
"""The encoder through which SDSeg sees the image to segment (Lin et al., arXiv:2406.18361, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers import Conv
from torch import nn

from shared.networks.kl_autoencoder import KLEncoder


class VisionEncoder(nn.Module):
    """The autoencoder's encoder, trainable, and a 1x1 convolution to the channels of a latent.

    Its output joins the noisy latent of the mask as it is: nothing is sampled and no scale factor applied. As
    published, dropout sits in the residual blocks and the 1x1 convolution starts at random, while `start_from` copies
    the rest from the autoencoder. The defaults fit kl-f8: 256 x 256 becomes 4 x 32 x 32; 34.16 M parameters.

    Args:
        spatial_dims, in_channels, channels, num_res_blocks, attention_levels, norm_num_groups, norm_eps,
            with_encoder_nonlocal_attn, use_flash_attention: as for ``KLAutoencoder``.
        latent_channels: L; the encoder itself ends in 2L channels.
        dropout: in each residual block, between SiLU and second convolution.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        num_res_blocks: Sequence[int] | int = 2,
        channels: Sequence[int] = (128, 256, 512, 512),
        attention_levels: Sequence[bool] = (False, False, False, False),
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = True,
        dropout: float = 0.2,
        use_flash_attention: bool = True,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = KLEncoder(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            channels=channels,
            out_channels=2 * latent_channels,
            num_res_blocks=num_res_blocks,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            attention_levels=attention_levels,
            with_nonlocal_attn=with_encoder_nonlocal_attn,
            use_flash_attention=use_flash_attention,
            dropout=dropout,
        )
        self.head = Conv[Conv.CONV, spatial_dims](2 * latent_channels, latent_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image ``(B, 1|C, H, W)`` in [0, 1] to the condition ``(B, L, h, w)``.

        Raises:
            ValueError: for another number of channels, or a size that the levels cannot halve evenly.
        """
        return self.head(self.encoder(image))

    def start_from(self, autoencoder: nn.Module) -> None:
        """Copy the weights of the autoencoder's encoder.

        Raises:
            ValueError: when the two encoders are configured unlike; nothing is copied then.
        """
        theirs = autoencoder.get_submodule("encoder").state_dict()
        ours = self.encoder.state_dict()
        differ = [key for key in {**ours, **theirs} if key not in ours or key not in theirs]
        differ += [key for key in ours if key not in differ and ours[key].shape != theirs[key].shape]
        if differ:
            raise ValueError(
                f"vision_encoder_def: expected the channels, blocks and attention of autoencoder_def, but {differ[0]} "
                f"and {len(differ) - 1} more weights differ; configure both alike."
            )
        self.encoder.load_state_dict(theirs, strict=True)
