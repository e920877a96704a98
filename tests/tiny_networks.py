# SPDX-License-Identifier: Apache-2.0
"""A ControlNet on a diffusion model, and SDSeg's segmentation model, small enough for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, ControlNet, DiffusionModelUNet
from torch import nn

from shared.networks.constant_prompt import ConstantPrompt
from shared.networks.controlnet import ControlNetModel
from shared.networks.film_unet import FiLMUNet
from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.latent_diffusion import ConstantPromptModel
from shared.networks.segmentation import SegmentationModel
from shared.networks.vision_encoder import VisionEncoder
from shared.schedulers import DDIMScheduler

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

# The published schedule of SDSeg: its last level is sqrt(alpha_bar) = 0.02586.
SEGMENTATION_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0155,
    "prediction_type": "epsilon",
}  # fmt: skip
KL_AUTOENCODER: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "channels": [4, 4, 8], "latent_channels": 3, "num_res_blocks": 1,
    "norm_num_groups": 4, "attention_levels": [False, False, False],
}  # fmt: skip
VISION_ENCODER: dict[str, Any] = {key: value for key, value in KL_AUTOENCODER.items() if key != "out_channels"}
FILM_UNET: dict[str, Any] = {
    "in_channels": 6, "out_channels": 3, "channels": [8, 16], "num_res_blocks": 1, "attention_levels": [False, True],
    "num_heads": 2, "norm_num_groups": 4, "dropout": 0.0,
}  # fmt: skip


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


def segmentation_scheduler() -> DDIMScheduler:
    """The published schedule, for training and sampling."""
    return DDIMScheduler(**SEGMENTATION_SCHEDULE)


def film_unet(
    num_classes: int = 1, *, condition_mode: str = "concat", seed: int = 0, silent: bool = False, **options: Any
) -> FiLMUNet:
    """A U-Net for ``segmentation_model``; ``silent`` leaves at zero what starts at zero."""
    crossattn = {"in_channels": LATENT_SHAPE[0], "cross_attention_dim": LATENT_SHAPE[0]}
    arguments = {**FILM_UNET, **(crossattn if condition_mode == "crossattn" else {}), **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed + 2)
        unet = FiLMUNet(**arguments, num_classes=num_classes if num_classes > 1 else None)
    if not silent:
        spread(unet.parameters(), torch.Generator().manual_seed(seed))
    return unet


def segmentation_model(
    num_classes: int = 1,
    *,
    condition_mode: str = "concat",
    seed: int = 0,
    silent: bool = False,
    dropout: float = 0.0,
    **options: Any,
) -> SegmentationModel:
    """A SegmentationModel in evaluation mode whose masks depend on the image, the noise and the class.

    Args:
        num_classes: 1, or N with a class embedding.
        condition_mode: "concat" or "crossattn".
        seed: of all weights.
        silent: what starts at zero stays at zero, the U-Net's output too.
        dropout: of the vision encoder.
        options: of SegmentationModel.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = KLAutoencoder(**KL_AUTOENCODER)
        vision_encoder = VisionEncoder(**VISION_ENCODER, dropout=dropout)
        with torch.no_grad():
            # A random encoder tells images apart by little.
            vision_encoder.head.weight.mul_(20)
    model = SegmentationModel(
        autoencoder,
        film_unet(num_classes, condition_mode=condition_mode, seed=seed, silent=silent),
        vision_encoder,
        scheduler=segmentation_scheduler(),
        num_classes=num_classes,
        condition_mode=condition_mode,
        **options,
    )
    spread((p for p in autoencoder.parameters() if p.ndim == 1), torch.Generator().manual_seed(seed))
    model.scale_factor.fill_(0.5)
    return model.eval()


class PoolingAutoencoder(nn.Module):
    """Pictures ``(B, 3, 4 h, 4 w)`` in [0, 1] to their means ``(B, 3, h, w)`` in [-1, 1] and back, in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = nn.functional.avg_pool2d(2.0 * x - 1.0, 4) * self.scale
        return mean, torch.full_like(mean, 1e-3)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate((z * self.scale + 1.0) / 2.0, scale_factor=4.0, mode="nearest")


class PoolingEncoder(nn.Module):
    """As the vision encoder: pictures ``(B, 1|3, 4 h, 4 w)`` in [0, 1] to their means ``(B, 3, h, w)``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(image, 4).expand(-1, 3, -1, -1) * self.scale


class OracleUNet(nn.Module):
    """Predicts the noise that leads to known latents from every level: ``n = (x - sqrt(ab) z) / sqrt(1 - ab)``.

    Args:
        latents: ``(x, condition (B, 3, h, w), class labels (B,) or None)`` to the scaled clean latents ``z``.
        num_classes: as FiLMUNet's.

    Attributes:
        calls: ``(x, condition, timesteps, class labels)`` of each call.
    """

    def __init__(
        self, latents: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor], num_classes: int = 1
    ) -> None:
        super().__init__()
        self.latents = latents
        self.num_classes = num_classes if num_classes > 1 else None
        self.alphas_bar = segmentation_scheduler().alphas_cumprod.double()
        self.calls: list[tuple[Any, ...]] = []

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        noisy, condition = x.chunk(2, dim=1)
        self.calls.append((noisy.clone(), condition.clone(), timesteps.clone(), class_labels))
        alpha_bar = self.alphas_bar[timesteps].view(-1, 1, 1, 1)
        clean = self.latents(noisy, condition, class_labels).double()
        return ((noisy.double() - alpha_bar.sqrt() * clean) / (1.0 - alpha_bar).sqrt()).float()


def oracle_model(
    latents: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor] = lambda x, condition, classes: condition,
    num_classes: int = 1,
) -> SegmentationModel:
    """A SegmentationModel that finds ``latents`` in one step and decodes them exactly; scale factor 1."""
    unet, encoder = OracleUNet(latents, num_classes), PoolingEncoder()
    scheduler = segmentation_scheduler()
    model = SegmentationModel(PoolingAutoencoder(), unet, encoder, scheduler=scheduler, num_classes=num_classes)  # type: ignore[arg-type]
    return model.eval()


def pictures(count: int = 2, channels: int = 3, seed: int = 0, size: tuple[int, int] = IMAGE_SIZE) -> torch.Tensor:
    """Pictures in [0, 1], each of rough noise under an edge in a row of its own."""
    noise = torch.rand((count, channels, *size), generator=torch.Generator().manual_seed(seed))
    edges = torch.linspace(4, size[0] - 4, count).view(-1, 1, 1, 1)
    return noise * (torch.arange(size[0])[:, None] < edges)
