# SPDX-License-Identifier: Apache-2.0
"""Segmentation by latent diffusion (SDSeg, arXiv:2406.18361)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import Scheduler
from monai.utils import StrEnum
from torch import nn
from typing_extensions import Self

from shared.diffusion import PredictionType
from shared.inferers import seeded_noise
from shared.networks.activation_checkpointing import checkpoint_activations
from shared.networks.latent_diffusion import LatentDiffusionModel
from shared.networks.vision_encoder import VisionEncoder
from shared.weights import load_weights


class ConditionMode(StrEnum):
    """How the latent of the image reaches the U-Net.

    ``concat`` puts it beside the noisy latent, as published. ``crossattn`` hands its pixels over as context of
    cross-attention, the arm of the ablation.
    """

    CONCAT = "concat"
    CROSSATTN = "crossattn"


class SegmentationModel(LatentDiffusionModel):
    """A mask, coded as a picture by a frozen autoencoder, denoised next to the latent of the image.

    Trained are the U-Net and the vision encoder. MONAI core has neither the model nor a container for its parts.
    Images and decoded masks are in [0, 1] outside the networks.

    Args:
        autoencoder: ``shared.networks.kl_autoencoder.KLAutoencoder``; frozen.
        unet: ``shared.networks.film_unet.FiLMUNet``.
        vision_encoder: ``shared.networks.vision_encoder.VisionEncoder``.
        scheduler: noise schedule of training; ``forward`` takes its last level.
        num_classes: 1 segments one thing; N >= 2 are N classes with the background as class 0, one pass each, and the
            U-Net needs a class embedding of N.
        condition_mode: a ``ConditionMode``.
        train_vision_encoder: false freezes the vision encoder (ablation).

    Raises:
        ValueError: for an unknown mode, a schedule that does not predict noise, or a U-Net without the class embedding.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        unet: nn.Module,
        vision_encoder: VisionEncoder,
        *,
        scheduler: Scheduler,
        num_classes: int = 1,
        condition_mode: str = ConditionMode.CONCAT,
        train_vision_encoder: bool = True,
    ) -> None:
        super().__init__(autoencoder, unet)
        if condition_mode not in list(ConditionMode):
            raise ValueError(f"condition_mode: expected {' or '.join(ConditionMode)}, got {condition_mode!r}.")
        if str(scheduler.prediction_type) != PredictionType.EPSILON:
            raise ValueError(
                f"prediction_type: expected epsilon, got {str(scheduler.prediction_type)!r}; the latent estimate of "
                "SDSeg is written for predicted noise."
            )
        embedded = getattr(unet, "num_classes", None)
        if embedded != (num_classes if num_classes > 1 else None):
            raise ValueError(
                f"num_classes: expected a U-Net with {num_classes if num_classes > 1 else 'no'} embedded classes, got "
                f"{embedded}; give unet_def the same number (null for 1)."
            )
        self.vision_encoder = vision_encoder.requires_grad_(train_vision_encoder)
        self.train_vision_encoder = train_vision_encoder
        self.num_classes = num_classes
        self.condition_mode = ConditionMode(condition_mode)
        self.last_timestep = scheduler.num_train_timesteps - 1
        alpha_bar = scheduler.alphas_cumprod[-1].double().item()
        self._alpha, self._sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.vision_encoder.train(mode and self.train_vision_encoder)
        return self

    @property
    def trained(self) -> nn.ModuleDict:
        """What a checkpoint holds: all but the autoencoder, which lies in a file of its own already.

        A frozen vision encoder belongs to it too: its last convolution is random and in no other file.
        """
        return nn.ModuleDict({"unet": self.unet, "vision_encoder": self.vision_encoder})

    def parameter_groups(self, learning_rate: float, class_factor: float = 1.0) -> list[dict[str, Any]]:
        """Trained parameters for an optimizer; the class embedding, new in a pretrained U-Net, learns faster.

        Args:
            learning_rate: of all but the class embedding.
            class_factor: times ``learning_rate`` for the class embedding (published: 100).
        """
        is_class = {name: ".class_embedding." in f".{name}" for name, _ in self.named_parameters()}
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        groups = [{"params": [p for name, p in trained if not is_class[name]], "lr": learning_rate}]
        if classes := [p for name, p in trained if is_class[name]]:
            groups.append({"params": classes, "lr": learning_rate * class_factor})
        return groups

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 1|3, H, W)`` in [0, 1] to their latents ``(B, C, h, w)``, neither sampled nor scaled.

        Raises:
            ValueError: when the encoder cannot halve the sides.
        """
        condition = self.vision_encoder(image)
        factor = round(image.shape[-1] / condition.shape[-1])
        if [side * factor for side in condition.shape[2:]] != list(image.shape[2:]):
            raise ValueError(
                f"image: expected sides that are multiples of {factor}, got {tuple(image.shape[2:])}; resize the image "
                "to image_size (ResizeInPlaned in preprocessing)."
            )
        return condition

    def forward(
        self,
        image: torch.Tensor | None,
        noisy: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Segment in one reverse step; or, given noisy latents, predict their noise.

        Args:
            image: ``(B, 1|3, H, W)`` in [0, 1]; ``None`` with ``condition``.
            noisy: noisy scaled latents of masks ``(B, C, h, w)``; ``None`` segments ``image``.
            timesteps: integers ``(B,)`` for ``noisy``.
            class_labels: integers ``(B,)`` for ``noisy``, with several classes.
            condition: ``encode_image(image)``, when it is at hand.

        Returns:
            Without ``noisy`` scores ``(B, num_classes, H, W)`` in [-1, 1]: > 0 is foreground for one class, the largest
            wins for several. They start from one fixed noise and are deterministic in evaluation mode. With ``noisy``
            its noise ``(B, C, h, w)``.

        Raises:
            ValueError: without image and condition, for noisy latents without timesteps, for sides that cannot be
                halved.
        """
        if condition is None:
            if image is None:
                raise ValueError("image: expected an image or its condition, got neither; pass one of the two.")
            condition = self.encode_image(image)
        if noisy is not None:
            if timesteps is None:
                raise ValueError("timesteps: expected one per noisy latent, got none; pass the level of the noise.")
            return self._noise(noisy, timesteps, condition, class_labels)
        count = len(condition)
        # Not the condition's type: as in the sampler, mixed precision must not round the noise.
        noise = seeded_noise([0], condition.shape[1:]).to(condition.device)
        condition, class_labels = self.class_passes(condition)
        noise = noise.expand(condition.shape)
        timesteps = torch.full((len(condition),), self.last_timestep, device=condition.device)
        predicted = self._noise(noise, timesteps, condition, class_labels)
        latents = (noise.float() - self._sigma * predicted.float()) / self._alpha
        return self.scores(self.decode(latents).clamp(0.0, 1.0), count)

    def _noise(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        if self.condition_mode == ConditionMode.CONCAT:
            return self.unet(torch.cat((noisy, condition), dim=1), timesteps, class_labels=class_labels)
        return self.unet(noisy, timesteps, context=condition.flatten(2).mT, class_labels=class_labels)

    def class_passes(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Repeat ``(B, ...)`` for the pass of every class: ``(B * num_classes, ...)`` and the classes, or ``None``."""
        if self.num_classes == 1:
            return condition, None
        classes = torch.arange(self.num_classes, device=condition.device).repeat(len(condition))
        return condition.repeat_interleave(self.num_classes, dim=0), classes

    def scores(self, masks: torch.Tensor, count: int) -> torch.Tensor:
        """Decoded masks ``(count * num_classes, 3, H, W)`` in [0, 1] to scores ``(count, num_classes, H, W)``.

        The channels are averaged and brought to [-1, 1]. Class 0 was trained on all that is foreground, so its score is
        negated: it becomes the background.
        """
        scores = (2.0 * masks.mean(dim=1) - 1.0).unflatten(0, (count, self.num_classes))
        if self.num_classes == 1:
            return scores
        return torch.cat((-scores[:, :1], scores[:, 1:]), dim=1)


def probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Scores ``(B, N, H, W)`` in [-1, 1] to values in [0, 1]: ``(score + 1) / 2`` for one class, softmax for several.

    Both as published. The softmax of scores that end at -1 and 1 is flat: with 9 classes no value exceeds 0.49.
    """
    return (scores + 1.0) / 2.0 if scores.shape[1] == 1 else scores.softmax(dim=1)


def recompute_activations(network: SegmentationModel, enabled: bool = True) -> SegmentationModel:
    """Train in less memory: keep what enters the stages of the U-Net and the blocks of the vision encoder, and compute
    what lies inside a second time, in place. Gradients are equal.

    Args:
        network: with a ``shared.networks.film_unet.FiLMUNet``.
        enabled: false undoes it.

    Returns:
        The network.
    """
    network.unet.use_checkpoint = enabled  # type: ignore[assignment]
    if network.train_vision_encoder:
        checkpoint_activations(network.vision_encoder, enabled)
    return network


def start_from_pretrained(
    network: SegmentationModel,
    autoencoder: str | Path,
    *,
    unet: str | Path | None = None,
    model: str | Path | None = None,
    remedy: str = "",
) -> SegmentationModel:
    """Load what training starts from; returns the network.

    The vision encoder starts as the autoencoder's encoder.

    Args:
        network: the model to fill.
        autoencoder: weights of the first stage.
        unet: weights of an unconditional U-Net; ``None`` or "" starts from random ones. Where the U-Net has more input
            channels than the file, the additional ones start at zero, so that it begins as the pretrained one.
        model: a whole model to go on from, e.g. a binary one for the training of several classes; its class embedding,
            if any, is kept only when it fits, and the scale factor is measured anew.
        remedy: what the user can do when the autoencoder is missing.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is of another configuration.
    """
    load_weights(network.autoencoder, autoencoder, remedy)
    network.vision_encoder.start_from(network.autoencoder)
    if unet:
        load_weights(network.unet, unet, adapt=network.unet.widened)  # type: ignore[arg-type]
    if model:
        load_weights(network, model, adapt=lambda state: _with_new_classes(state, network))
    return network


def _with_new_classes(state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    own = network.state_dict()
    kept = {name: value for name, value in own.items() if name.startswith("unet.class_embedding.")}
    old = {name: value for name, value in state.items() if not name.startswith("unet.class_embedding.")}
    same = {name: state[name] for name in kept if name in state and state[name].shape == kept[name].shape}
    return {**old, **kept, **same}
