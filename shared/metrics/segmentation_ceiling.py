# SPDX-License-Identifier: Apache-2.0
"""The mask that an autoencoder gives back of the true one: no segmentation through it can be better by much."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.networks.segmentation import probabilities

CEILING = "autoencoder's ceiling"
_BATCH = 8


@torch.no_grad()
def reconstructed_mask(
    label: torch.Tensor,
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    *,
    num_classes: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Code the true mask as SDSeg codes masks, class by class, and decode it again.

    Args:
        label: (h, w[, Z]) class index.
        reconstruct: pictures (B, 3, h, w) of 0 and 1 -> their reconstructions, the same shape, in [0, 1].
        num_classes: 1 for one foreground class, else the number of classes including background 0, whose picture is
            that of all foreground, as in training.
        device: where ``reconstruct`` runs.

    Returns:
        (N, h, w[, Z]) probabilities on the CPU.
    """
    slices = (label if label.ndim == 3 else label[..., None]).movedim(-1, 0)
    pictures = [slices > 0] if num_classes == 1 else [slices > 0, *(slices == c for c in range(1, num_classes))]
    masks = torch.stack(pictures, dim=1)
    decoded = [
        reconstruct(part[:, None].expand(-1, 3, -1, -1).float().to(device)).mean(dim=1).clamp(0, 1).cpu()
        for part in masks.flatten(0, 1).split(_BATCH)
    ]
    scores = 2 * torch.cat(decoded).float().reshape(masks.shape) - 1
    if num_classes > 1:
        scores[:, 0] *= -1
    result = probabilities(scores).movedim(0, -1)
    return result if label.ndim == 3 else result[..., 0]
