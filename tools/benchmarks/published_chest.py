# SPDX-License-Identifier: Apache-2.0
"""The published chest X-ray program, restated from its description: what a user of it runs today.

Training step, sampler, diversity and Fréchet distance, and the way of a film from its file to the network; see the
sections 1.1 and 1.5 to 1.7 of the program's description in the project's notes. Nothing is made slower than it was:
what the program left out (average of weights, clipping) is left out here, and lists that it read from files in every
turn are in memory.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch
from monai.metrics import MultiScaleSSIMMetric
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    Flipd,
    Lambdad,
    LoadImaged,
    RandAffined,
    Rotate90d,
    ScaleIntensityRanged,
)
from torch import nn

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205,
    "prediction_type": "v_prediction", "clip_sample": False,
}  # fmt: skip
SCALE_FACTOR = 0.3
LEARNING_RATE = 2.5e-5

Embed = Callable[[torch.Tensor], torch.Tensor]


def training_steps(
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    latents_of: Embed,
    context_of: Embed,
    seed: int,
) -> torch.Tensor:
    """Stage 2: one optimizer step a batch; half precision with a gradient scaler on a GPU, as published.

    Args:
        unet: called ``unet(x, timesteps=, context=)``.
        optimizer: of the U-Net alone.
        batches: images (or what ``latents_of`` takes) and token ids.
        latents_of: a draw of the latents, not scaled; without a graph.
        context_of: the text encoder; its graph is kept, as published, if its weights take gradients.
        seed: ``seed + step`` seeds torch before each step, so that other programs can draw the same numbers.

    Returns:
        The losses by step.
    """
    device = next(unet.parameters()).device
    scheduler = DDPMScheduler(**SCHEDULE)
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    losses = []
    unet.train()
    for step, (images, tokens) in enumerate(batches):
        torch.manual_seed(seed + step)
        images, tokens = images.to(device), tokens.to(device)
        timesteps = torch.randint(0, scheduler.num_train_timesteps, (len(images),), device=device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.float16, enabled=half):
            with torch.no_grad():
                latents = latents_of(images) * SCALE_FACTOR
            context = context_of(tokens)
            noise = torch.randn_like(latents)
            noisy = scheduler.add_noise(original_samples=latents, noise=noise, timesteps=timesteps)
            prediction = unet(noisy, timesteps=timesteps, context=context)
            target = scheduler.get_velocity(latents, noise, timesteps)
            loss = nn.functional.mse_loss(prediction.float(), target.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


def ddim_timesteps(steps: int) -> torch.Tensor:
    """Of 1000: 995, 990, ..., 0 for 200 steps. MONAI core lays them out otherwise since 1.6."""
    return torch.arange(0, steps).flip(0) * (1000 // steps)


@torch.no_grad()
def sample_images(
    unet: nn.Module,
    autoencoder: Any,
    text_encoder: Embed,
    tokens: Sequence[torch.Tensor],
    *,
    seeds: Sequence[int],
    latent_shape: Sequence[int],
    guidance_scale: float,
    scale_factor: float,
    steps: int,
) -> torch.Tensor:
    """Guided sampling, one image after another: text encoded, DDIM on a batch of both halves, decoded.

    Args:
        unet: called ``unet(x, timesteps=, context=)``.
        autoencoder: with ``decode``.
        text_encoder: token ids ``(2, L)`` to embeddings.
        tokens: for each image ids ``(2, L)``: null prompt, prompt.
        seeds: one for each image; the noise of a seed is that of ``shared.inferers.seeded_noise``.
        latent_shape: ``(C, h, w)``.
        guidance_scale: evaluated as a doubled batch, whatever it is.
        scale_factor: of the latents.
        steps: a divisor of 1000.

    Returns:
        Images ``(N, 1, H, W)`` in [0, 1].
    """
    device = next(unet.parameters()).device
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = ddim_timesteps(steps)
    images = []
    for pair, seed in zip(tokens, seeds, strict=True):
        context = text_encoder(pair.to(device))
        x = torch.randn((1, *latent_shape), generator=torch.Generator().manual_seed(seed)).to(device)
        for timestep in scheduler.timesteps:
            level = torch.full((2,), int(timestep), dtype=torch.long, device=device)
            both = unet(torch.cat([x] * 2), timesteps=level, context=context)
            unconditional, conditional = both.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
            x, _ = scheduler.step(velocity, int(timestep), x)
        images.append(autoencoder.decode(x / scale_factor).clamp(0.0, 1.0))
    return torch.cat(images)


def ordered_pairs(count: int) -> list[tuple[int, int]]:
    """All (i, j) with i != j, both (i, j) and (j, i), in the order of the published loops."""
    return list(itertools.permutations(range(count), 2))


def pair_similarities(images: torch.Tensor, pairs: Sequence[tuple[int, int]], *, kernel_size: int = 11) -> torch.Tensor:
    """MS-SSIM of pairs of ``images (N, 1, H, W)`` in [0, 1], each by a call of its own.

    The published metric is that of monai-generative, which MONAI core has taken over.
    """
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel_size)
    return torch.cat([torch.as_tensor(metric(images[i : i + 1], images[j : j + 1])).flatten() for i, j in pairs])


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of features ``(n, F)`` by a matrix root, as ``monai.metrics.FIDMetric`` computes it.

    Restated because MONAI asks SciPy for the root by an argument that SciPy has removed.
    """
    a, b = a.double(), b.double()
    covariances = torch.cov(a.T), torch.cov(b.T)
    root = scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy())
    shift = a.mean(dim=0) - b.mean(dim=0)
    traces = covariances[0].trace() + covariances[1].trace()
    return float(shift.dot(shift) + traces) - 2.0 * float(np.trace(root).real)


def film_transforms(size: Sequence[int], *, augmented: float = 0.1) -> Compose:
    """From the path of a film, whose shorter side has the right length already, to ``image (1, *size)`` in [0, 1].

    Args:
        size: rows and columns.
        augmented: share of films that are turned and moved a little, in every epoch anew.
    """
    with warnings.catch_warnings():
        # It looks for readers of other formats, and says which are not installed.
        warnings.simplefilter("ignore")
        load = LoadImaged("image", reader="PILReader", image_only=True)
    return Compose(
        [
            load,
            EnsureChannelFirstd("image"),
            Lambdad("image", first_channel),
            Rotate90d("image", k=-1, spatial_axes=(0, 1)),
            Flipd("image", spatial_axis=1),
            ScaleIntensityRanged("image", a_min=0.0, a_max=255.0, b_min=0.0, b_max=1.0, clip=True),
            CenterSpatialCropd("image", roi_size=size),
            RandAffined(
                "image",
                prob=augmented,
                rotate_range=[(-np.pi / 36, np.pi / 36)],
                translate_range=[(-2, 2), (-2, 2)],
                scale_range=[(-0.01, 0.01), (-0.01, 0.01)],
                spatial_size=tuple(size),
            ),
        ]
    )


def first_channel(image: torch.Tensor) -> torch.Tensor:
    """``(C, H, W)`` to ``(1, H, W)``."""
    return image[:1]
