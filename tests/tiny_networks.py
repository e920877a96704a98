# SPDX-License-Identifier: Apache-2.0
"""A ControlNet on a diffusion model, small enough for every test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from torch import nn

from shared.networks.constant_prompt import ConstantPrompt
from shared.networks.controlnet import ControlNetModel
from shared.networks.latent_diffusion import ConstantPromptModel

IMAGE_SIZE = (32, 48)
LATENT_SHAPE = (3, 8, 12)
AUTOENCODER: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [4, 4, 8], "latent_channels": 3,
    "num_res_blocks": 1, "norm_num_groups": 4, "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
}  # fmt: skip
UNET: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 3, "out_channels": 3, "channels": [8, 16], "num_res_blocks": 1,
    "norm_num_groups": 4, "attention_levels": [False, True], "num_head_channels": [0, 8],
    "with_conditioning": True, "cross_attention_dim": 6,
}  # fmt: skip
CONTROLNET: dict[str, Any] = {key: value for key, value in UNET.items() if key != "out_channels"}
CONTROLNET["conditioning_embedding_num_channels"] = [4, 4, 8]


def spread(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    """Random numbers for weights that start at zero, behind which every error would hide."""
    with torch.no_grad():
        for parameter in parameters:
            if not parameter.any():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def diffusion_model(seed: int = 0) -> ConstantPromptModel:
    """A ConstantPromptModel whose U-Net predicts something: MONAI's last convolution starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompt = ConstantPrompt(length=5, embedding_size=6)
        model = ConstantPromptModel(AutoencoderKL(**AUTOENCODER), DiffusionModelUNet(**UNET), prompt)
        with torch.no_grad():
            # Far enough apart for the null prompt to show in the output.
            prompt.embeddings.mul_(50)
    spread(model.parameters(), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # Grey images: what is clamped at 0 hides differences.
        model.autoencoder.decoder.blocks[-1].conv.bias.fill_(0.5)
    model.scale_factor.fill_(0.5)
    return model


def controlnet_model(
    condition_sizes: Iterable[int] = (1,), *, seed: int = 0, silent: bool = False, **options: Any
) -> ControlNetModel:
    """A ControlNetModel that was started from its U-Net, with a ControlNet for each number of condition channels.

    Args:
        condition_sizes: channels that each ControlNet's embedding takes.
        seed: of all weights.
        silent: zero convolutions as at the start of training; otherwise they are random.
        options: of ControlNetModel.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        nets = [ControlNet(**CONTROLNET, conditioning_embedding_in_channels=size) for size in condition_sizes]
    model = ControlNetModel(diffusion_model(seed), nets, **options)
    model.start_from_unet()
    if not silent:
        spread([*model.controlnets.parameters(), *model.embeddings.parameters()], torch.Generator().manual_seed(seed))
        with torch.no_grad():
            # A random embedding network passes on little of its input.
            for embedding in model.embeddings:
                embedding.conv_out.conv.weight.mul_(30)
    return model


def inputs(count: int = 2, channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps and condition images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, *LATENT_SHAPE), generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    return x, timesteps, torch.rand((count, channels, *IMAGE_SIZE), generator=generator)
