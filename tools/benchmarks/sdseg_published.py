# SPDX-License-Identifier: Apache-2.0
"""The published training step of SDSeg, restated from its description (sections 3.3 to 3.5 of the project's notes)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from monai.networks.schedulers import Scheduler
from torch import nn

from shared.networks.segmentation import SegmentationModel

LEARNING_RATE = 4e-5
EMA_DECAY = 0.9999
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PublishedAverage:
    """Moving average of the U-Net's weights, one tensor after the other; the network itself is not averaged."""

    def __init__(self, unet: nn.Module) -> None:
        self.shadow = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def update(self, unet: nn.Module) -> None:
        self.updates += 1
        rest = 1.0 - min(EMA_DECAY, (1 + self.updates) / (10 + self.updates))
        for name, parameter in unet.named_parameters():
            average = self.shadow[name]
            average.sub_(rest * (average - parameter))


def training_steps(
    model: SegmentationModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    scheduler: Scheduler,
    average: PublishedAverage,
    seed: int,
    unet: nn.Module | None = None,
    denoise: Denoise | None = None,
) -> torch.Tensor:
    """One optimizer step for each batch, in float32, as published.

    Args:
        model: gives the frozen autoencoder, the vision encoder and the U-Net.
        optimizer: of vision encoder and U-Net.
        batches: images and masks as pictures, both ``(B, 3, H, W)`` in [0, 1].
        scheduler: the noise schedule.
        average: of the U-Net.
        seed: ``seed + step`` seeds torch before each step, so that other programs can draw the same numbers.
        unet: another U-Net in the place of the model's.
        denoise: how ``unet`` is called; ``None``: as the model's.

    Returns:
        The losses by step.
    """
    unet = model.unet if unet is None else unet
    predict = unet if denoise is None else denoise
    alpha_bar = scheduler.alphas_cumprod
    device = next(unet.parameters()).device
    losses = []
    model.train()
    unet.train()
    for step, (images, masks) in enumerate(batches):
        torch.manual_seed(seed + step)
        images, masks = images.to(device), masks.to(device)
        timesteps = torch.randint(0, len(alpha_bar), (len(images),), device=device)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            mean, sigma = model.autoencoder.encode(masks)
            # By shape, not "like" them: in another memory layout the same numbers would lie elsewhere.
            clean = (mean + sigma * torch.randn(mean.shape, device=device)) * model.scale_factor
        noise = torch.randn(clean.shape, device=device)
        alpha, rest = (
            value.sqrt().to(device)[timesteps][:, None, None, None] for value in (alpha_bar, 1.0 - alpha_bar)
        )
        noisy = alpha * clean + rest * noise
        predicted = predict(torch.cat((noisy, model.encode_image(images)), dim=1), timesteps)
        estimate = (noisy - rest * predicted) / alpha
        loss = (predicted - noise).abs().mean() + (estimate - clean).abs().mean()
        loss.backward()
        optimizer.step()
        average.update(unet)
        losses.append(loss.detach())
    return torch.stack(losses).cpu()
