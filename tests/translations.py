# SPDX-License-Identifier: Apache-2.0
"""Pairs of a real and a generated slice, as an evaluation collects them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

X, Y = 40, 56


def smooth(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(n, 1, 6, 7, generator=generator), size=(X, Y), mode="bilinear")


def mask(n: int) -> torch.Tensor:
    mask = torch.zeros(n, 1, X, Y)
    mask[..., 10:30, 12:44] = 1
    return mask


def collected(subjects: list[str], *, seed: int = 0, noise: float = 0.05, **more: Any) -> dict[str, Any]:
    n = len(subjects)
    real = 0.2 + 0.6 * smooth(n, seed)
    error = noise * (2 * torch.rand(n, 1, X, Y, generator=torch.Generator().manual_seed(seed + 1)) - 1)
    info = {"subject": subjects, "slice": [subjects[:i].count(name) for i, name in enumerate(subjects)]}
    return {"image": real, "pred": real + error, "condition": 1 - real, "info": info, "clamped": {}, **more}
