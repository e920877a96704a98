# SPDX-License-Identifier: Apache-2.0
"""What training steps leave behind, and whether two programs trained alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from tools.benchmarks.workload import relative_difference

HALF = "bfloat16"
"""In the names of ways that compute in half precision."""


class Trained(NamedTuple):
    """What a run of training steps gives.

    Attributes:
        losses: by step.
        gradients: of the last step, one vector of all weights or of some of each, in the same order in all programs.
        updates: by how much all steps have changed the same numbers of the weights.
    """

    losses: torch.Tensor
    gradients: torch.Tensor
    updates: torch.Tensor


# Relative, of losses, gradients and updates. Of a gradient near zero little more than the sign decides Adam's first
# updates, so that rounding shows in them most.
SINGLE_LIMITS = (1e-4, 2e-3, 0.05)


def equally_trained(
    results: Mapping[str, Trained], *, half_limits: tuple[float, float, float], half: bool = False
) -> str:
    """How much losses, gradients and updates differ from the baseline's, the first one's.

    Args:
        results: by way.
        half_limits: as ``SINGLE_LIMITS``, of ways in half precision, whose names hold ``HALF``.
        half: all ways may be in half precision, as the bundles are on a GPU.

    Raises:
        ValueError: for a larger difference than a way's arithmetic explains; the message starts with its name.
    """
    names = list(results)
    worst: dict[bool, list[float]] = {}
    for name in names[1:]:
        in_half = half or HALF in name
        limits = half_limits if in_half else SINGLE_LIMITS
        differences = [relative_difference(a, b) for a, b in zip(results[name], results[names[0]], strict=True)]
        for what, difference, limit in zip(Trained._fields, differences, limits, strict=True):
            if not difference <= limit:
                raise ValueError(
                    f"{name}: expected {what} within {limit:g} of {names[0]}, got {difference:.2g}; the two programs "
                    "train differently."
                )
        worst[in_half] = [max(pair) for pair in zip(differences, worst.get(in_half, differences), strict=True)]
    sentences = [
        (f"in {HALF} " if in_half else "")
        + ", ".join(f"{what} within {value:.0e}" for what, value in zip(Trained._fields, values, strict=True))
        for in_half, values in sorted(worst.items())
    ]
    return f"{'; '.join(sentences)} (relative)"
