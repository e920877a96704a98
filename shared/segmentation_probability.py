# SPDX-License-Identifier: Apache-2.0
"""From probabilities of classes to a mask, in one place for files, pictures and measures."""

from __future__ import annotations

import torch


def split_agreement(
    pred: torch.Tensor, *, num_classes: int = 1, num_samples: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take what the sampler returns for one image apart.

    Args:
        pred: ``(N, ...)``, or ``(N + 1, ...)`` with several samples: the last channel is the agreement.
        num_classes: N; 1 for one foreground.
        num_samples: samples per image.

    Returns:
        Probabilities ``(N, ...)``, and the agreement ``(...)`` or ``None`` with one sample.

    Raises:
        ValueError: another number of channels.
    """
    expected = num_classes + (num_samples > 1)
    if pred.shape[0] != expected:
        raise ValueError(
            f"pred: expected {expected} channels ({num_classes} of probabilities"
            f"{', one of agreement' if num_samples > 1 else ''}), got {pred.shape[0]}; give num_classes and "
            "num_samples as the sampler has them."
        )
    return (pred[:-1], pred[-1]) if num_samples > 1 else (pred, None)


def mask_of(probability: torch.Tensor, *, threshold: float = 0.5) -> torch.Tensor:
    """Class index of each pixel.

    Args:
        probability: ``(N, ...)`` of one image in [0, 1]. N = 1: of the foreground; else of each class.
        threshold: foreground is above it; classes are not compared with it, the most probable one wins.

    Returns:
        ``(...)`` uint8: 0 or 1 of one foreground, else 0 to N - 1.
    """
    chosen = probability[0] > threshold if probability.shape[0] == 1 else probability.argmax(dim=0)
    return chosen.to(torch.uint8)


def chosen_probability(probability: torch.Tensor) -> torch.Tensor:
    """``(N, ...)`` -> ``(...)``: the probability of the foreground (N = 1), else of the most probable class."""
    return probability[0] if probability.shape[0] == 1 else probability.amax(dim=0)
