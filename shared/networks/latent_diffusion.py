# SPDX-License-Identifier: Apache-2.0
"""Modules that hold every network a latent diffusion model needs at inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Self


class LatentDiffusionModel(nn.Module):
    """A frozen autoencoder, a denoising U-Net and the number that couples them, under one state dict.

    MONAI Label and ``monai.bundle.load`` read a single ``models/model.pt`` into a single ``network_def``; MONAI core
    has no container for the parts of a latent diffusion model, and its inferers take them one by one. The module
    therefore only holds the parts and ``scale_factor``, the reciprocal standard deviation of the latents
    (arXiv:2112.10752, appendix G), measured by training and carried by the weights.

    The autoencoder is frozen: it takes no gradient and stays in evaluation mode.

    Args:
        autoencoder: ``monai.networks.nets.AutoencoderKL`` or an object with ``encode(x) -> (mean, sigma)`` and
            ``decode``.
        unet: ``monai.networks.nets.DiffusionModelUNet`` with cross-attention.
    """

    scale_factor: torch.Tensor

    def __init__(self, autoencoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder.requires_grad_(False).eval()
        self.unet = unet
        self.register_buffer("scale_factor", torch.tensor(1.0))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.autoencoder.eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that take a gradient, in module order."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents ``(B, C, h, w)`` to images ``(B, 1, H, W)``; nominal range [0, 1], not clamped."""
        return self.autoencoder.decode(latents / self.scale_factor)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images ``(B, 1, H, W)`` in [0, 1] and decode the posterior mean; not clamped."""
        mean, _ = self.autoencoder.encode(images)
        return self.autoencoder.decode(mean)


class TextToImageModel(LatentDiffusionModel):
    """Latent diffusion that listens to a text.

    Args:
        autoencoder: see :class:`LatentDiffusionModel`.
        unet: likewise.
        text_encoder: maps token ids ``(B, L)`` to embeddings ``(B, L, D)``; trained with the U-Net unless it is frozen.
    """

    def __init__(self, autoencoder: nn.Module, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__(autoencoder, unet)
        self.text_encoder = text_encoder

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        tokens: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the target of the noise schedule for noisy latents.

        Args:
            x: noisy scaled latents ``(B, C, h, w)``.
            timesteps: integers ``(B,)``.
            tokens: token ids ``(B, L)``, embedded here when ``context`` is not given.
            context: text embeddings ``(B, L, D)``.

        Returns:
            The prediction ``(B, C, h, w)``: noise, velocity or clean latent, as the schedule says.

        Raises:
            ValueError: when neither ``tokens`` nor ``context`` is given.
        """
        if context is None:
            if tokens is None:
                raise ValueError("context: expected text embeddings or tokens, got neither; pass one of the two.")
            context = self.encode_text(tokens)
        return self.unet(x, timesteps=timesteps, context=context)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids ``(B, L)`` to context embeddings ``(B, L, D)``."""
        return self.text_encoder(tokens)


class ConstantPromptModel(LatentDiffusionModel):
    """Latent diffusion under one constant prompt: in effect unconditional, with the weights of a text-to-image U-Net.

    Args:
        autoencoder: see :class:`LatentDiffusionModel`.
        unet: likewise.
        prompt: ``shared.networks.constant_prompt.ConstantPrompt``.
    """

    def __init__(self, autoencoder: nn.Module, unet: nn.Module, prompt: nn.Module) -> None:
        super().__init__(autoencoder, unet)
        self.prompt = prompt

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        null_prompt: torch.Tensor | None = None,
        down_residuals: Sequence[torch.Tensor] | None = None,
        middle_residual: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the target of the noise schedule for noisy latents.

        Args:
            x: noisy scaled latents ``(B, C, h, w)``.
            timesteps: integers ``(B,)``.
            null_prompt: booleans ``(B,)``, true where the null prompt replaces the constant one; ``None``: nowhere.
            down_residuals: added to the U-Net's skip connections, e.g. by ControlNets; ``None``: nothing is added.
            middle_residual: added to the output of its middle block.
            context: what ``prompt`` gave for ``null_prompt``, which is not looked at then.

        Returns:
            The prediction ``(B, C, h, w)``.
        """
        return self.unet(
            x,
            timesteps=timesteps,
            context=self.prompt(len(x), null_prompt) if context is None else context,
            down_block_additional_residuals=None if down_residuals is None else tuple(down_residuals),
            mid_block_additional_residual=middle_residual,
        )
