# SPDX-License-Identifier: Apache-2.0
"""ControlNets on a diffusion U-Net (Zhang et al., arXiv:2302.05543)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import ControlNet
from monai.networks.utils import copy_model_state
from torch import nn
from typing_extensions import Self

from shared.networks.latent_diffusion import ConstantPromptModel
from shared.weights import load_weights


class ControlNetModel(nn.Module):
    """A frozen diffusion model steered by one or several ControlNets, under one state dict.

    ``monai.networks.nets.ControlNet`` embeds its condition in every call. Its embedding network is taken out of it and
    kept in ``embeddings``: a sampler embeds the condition, at full resolution the most expensive part, once and not
    once a step. ``monai.inferers.ControlNetLatentDiffusionInferer`` does not fit: it resizes the condition to the size
    of the latents, which an embedding that downsamples cannot take, and knows one ControlNet.

    Args:
        diffusion: the model of stage 2; frozen and in evaluation mode, except for its U-Net with ``unlock_unet``.
        controlnets: one or several, each as the U-Net but for the decoder; their residuals are summed with weights
            (Multi-ControlNet).
        condition_channels: for each ControlNet the channels of the condition that it sees; ``None``: all see all.
        unlock_unet: train the U-Net too; the authors of ControlNet advise a fifth of the learning rate then.

    Raises:
        ValueError: for another number of channel lists than ControlNets, or a ControlNet that is given twice.
    """

    def __init__(
        self,
        diffusion: ConstantPromptModel,
        controlnets: Sequence[ControlNet],
        *,
        condition_channels: Sequence[Sequence[int]] | None = None,
        unlock_unet: bool = False,
    ) -> None:
        super().__init__()
        if condition_channels is not None and len(condition_channels) != len(controlnets):
            raise ValueError(
                f"condition_channels: expected a list for each of {len(controlnets)} ControlNets, got "
                f"{len(condition_channels)}; give one list of channel numbers each, or null for all channels."
            )
        if len(set(controlnets)) != len(controlnets):
            raise ValueError(
                f"controlnet_defs: expected {len(controlnets)} different ControlNets, got one of them twice; refer to "
                "a definition with % (a copy), not with @ (the same object)."
            )
        self.diffusion = diffusion.requires_grad_(False)
        self.diffusion.unet.requires_grad_(unlock_unet)
        self.unlock_unet = unlock_unet
        self.condition_channels = condition_channels
        self.embeddings = nn.ModuleList(net.controlnet_cond_embedding for net in controlnets)
        for net in controlnets:
            net.controlnet_cond_embedding = nn.Identity()  # type: ignore[assignment]
        self.controlnets = nn.ModuleList(controlnets)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.diffusion.eval()
        self.diffusion.unet.train(mode and self.unlock_unet)
        return self

    @property
    def autoencoder(self) -> Any:
        return self.diffusion.autoencoder

    @property
    def scale_factor(self) -> torch.Tensor:
        return self.diffusion.scale_factor

    @property
    def prompt(self) -> Any:
        """Gives the context of a batch, see ``ConstantPrompt``."""
        return self.diffusion.prompt

    @property
    def trained(self) -> nn.ModuleDict:
        """The parts that take gradients, for checkpoints: the frozen ones lie in the file of stage 2 already."""
        parts: dict[str, nn.Module] = {"controlnets": self.controlnets, "embeddings": self.embeddings}
        return nn.ModuleDict({**parts, "unet": self.diffusion.unet} if self.unlock_unet else parts)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that take a gradient, in module order."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def start_from_unet(self) -> None:
        """Copy the U-Net's encoder and middle block into every ControlNet (arXiv:2302.05543, section 3.2).

        Raises:
            ValueError: when one of the two has a weight there that the other has not, or other attention heads, because
                the ControlNet was configured unlike the U-Net.
        """
        unet: Any = self.diffusion.unet
        encoder = {name for name in unet.state_dict() if not name.startswith(("up_blocks.", "out."))}
        for net in self.controlnets:
            _, copied, unchanged = copy_model_state(net, unet)
            own = {name for name in unchanged if not name.startswith(("controlnet_down_blocks", "controlnet_mid"))}
            # A ControlNet with less than the U-Net would fill its place too; heads leave no trace in the weights.
            differ = sorted(own | encoder - set(copied))
            if _heads(net) != _heads(unet):
                differ.append("num_head_channels")
            if differ:
                raise ValueError(
                    "controlnet_def: expected the channels, blocks and attention of unet_def, but "
                    f"{differ[0]} differs; configure both alike."
                )

    def embed_condition(self, condition: torch.Tensor) -> list[torch.Tensor]:
        """Condition ``(B, K, H, W)`` in [0, 1] to what each ControlNet adds to its first layer ``(B, C, h, w)``.

        Raises:
            ValueError: for another number of channels than the embedding networks were configured for, or
                ``condition_channels`` that the condition does not have.
        """
        inputs = []
        count = condition.shape[1]
        for index, embedding in enumerate(self.embeddings):
            channels = range(count) if self.condition_channels is None else self.condition_channels[index]
            if any(not 0 <= channel < count for channel in channels):
                raise ValueError(
                    f"condition_channels: expected numbers from 0 to {count - 1} for ControlNet {index}, got "
                    f"{list(channels)}; the condition has {count} channels."
                )
            part = condition[:, list(channels)]
            expected = next(embedding.parameters()).shape[1]
            if part.shape[1] != expected:
                raise ValueError(
                    f"condition_keys: expected a condition of {expected} channels for ControlNet {index}, got "
                    f"{part.shape[1]}; make conditioning_embedding_in_channels the number of condition images."
                )
            inputs.append(embedding(part))
        return inputs

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        condition: torch.Tensor | None = None,
        embedded: Sequence[torch.Tensor] | None = None,
        null_prompt: torch.Tensor | None = None,
        conditioning_scale: float | Sequence[float] = 1.0,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the target of the noise schedule for noisy latents.

        Args:
            x: noisy scaled latents ``(B, C, h, w)``.
            timesteps: integers ``(B,)``.
            condition: images ``(B, K, H, W)`` in [0, 1], embedded here when ``embedded`` is not given.
            embedded: result of ``embed_condition``.
            null_prompt: booleans ``(B,)``, see ``ConstantPromptModel``.
            conditioning_scale: factor of the residuals, one for all ControlNets or one each; 0 leaves the U-Net alone.
            context: what ``prompt`` gave for ``null_prompt``, which is not looked at then.

        Raises:
            ValueError: when neither ``condition`` nor ``embedded`` is given, or the number of scales is wrong.
        """
        scales = self._scales(conditioning_scale)
        if embedded is None:
            if condition is None:
                raise ValueError("condition: expected images or their embeddings, got neither; pass one of the two.")
            embedded = self.embed_condition(condition)
        if context is None:
            context = self.prompt(len(x), null_prompt)
        down: list[torch.Tensor] | None = None
        middle: torch.Tensor | None = None
        for net, hint, scale in zip(self.controlnets, embedded, scales, strict=True):
            if scale == 0.0:
                continue
            more_down, more_middle = net(x, timesteps, controlnet_cond=hint, conditioning_scale=scale, context=context)
            down = more_down if down is None else [a + b for a, b in zip(down, more_down, strict=True)]
            middle = more_middle if middle is None else middle + more_middle
        return self.diffusion(x, timesteps, down_residuals=down, middle_residual=middle, context=context)

    def _scales(self, value: float | Sequence[float]) -> list[float]:
        scales = list(value) if isinstance(value, Sequence) else [float(value)] * len(self.controlnets)
        if len(scales) != len(self.controlnets):
            raise ValueError(
                f"conditioning_scale: expected one number, or one for each of {len(self.controlnets)} ControlNets, got "
                f"{len(scales)}."
            )
        return [float(scale) for scale in scales]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents ``(B, C, h, w)`` to images ``(B, 1, H, W)``; nominal range [0, 1], not clamped."""
        return self.diffusion.decode(latents)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images ``(B, 1, H, W)`` in [0, 1] and decode the posterior mean; not clamped."""
        return self.diffusion.reconstruct(images)


def _heads(net: Any) -> list[int]:
    """Channels of an attention head at each level that has attention, and in the middle, which takes the last."""
    levels = zip(net.num_head_channels, net.attention_levels, strict=True)
    return [*(channels for channels, attention in levels if attention), net.num_head_channels[-1]]


def start_from_diffusion(network: ControlNetModel, path: str | Path, remedy: str = "") -> ControlNetModel:
    """Load the diffusion model of stage 2 and copy its U-Net into the ControlNets; returns the network.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is of another configuration, or the ControlNets are configured unlike the U-Net.
    """
    load_weights(network.diffusion, path, remedy)
    network.start_from_unet()
    return network
