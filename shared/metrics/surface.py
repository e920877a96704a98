# SPDX-License-Identifier: Apache-2.0
"""How far the borders of two masks lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance


class SurfaceDistance(NamedTuple):
    """Distances in the unit of the spacing: NaN where neither mask has a border, infinite where one has none.

    Attributes:
        hd95: the larger of the 95th percentiles of the distances from one border to the other and back.
        assd: mean over all these distances, those from prediction to truth and those back together.
    """

    hd95: float
    assd: float


def surface_distance(
    prediction: torch.Tensor, truth: torch.Tensor, *, spacing: Sequence[float] | None = None
) -> SurfaceDistance:
    """95th percentile of the Hausdorff distance and average symmetric surface distance of two masks.

    MONAI's edges and distances; its ``compute_hausdorff_distance`` and ``compute_average_surface_distance`` give the
    same numbers (a test holds both), but each finds the edges anew, warns of an argument that MONAI 1.6 itself passes,
    and leaves empty masks to a warning and NaN or infinity by cases. Border pixels are foreground pixels with a
    background neighbour or at the edge of the image. Axes of length 1 are left out: along them every pixel is a border.

    Args:
        prediction: (H, W[, Z]) boolean.
        truth: the same shape.
        spacing: distance of neighbours along each axis; None counts pixels.

    Raises:
        ValueError: different shapes, or a spacing of another length.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: expected the shape of truth {tuple(truth.shape)}, got {tuple(prediction.shape)}")
    steps = [1.0] * truth.ndim if spacing is None else [float(step) for step in spacing]
    if len(steps) != truth.ndim:
        raise ValueError(f"spacing: expected {truth.ndim} numbers, one per axis, got {len(steps)}")
    filled = (bool(prediction.any()), bool(truth.any()))
    if not all(filled):
        value = math.inf if any(filled) else math.nan
        return SurfaceDistance(value, value)
    wide = [axis for axis, size in enumerate(truth.shape) if size > 1]
    if not wide:
        return SurfaceDistance(0.0, 0.0)
    shape = [truth.shape[axis] for axis in wide]
    scale = [steps[axis] for axis in wide]
    edges = get_mask_edges(*(mask.bool().reshape(shape).cpu() for mask in (prediction, truth)))
    there, back = (
        np.asarray(get_surface_distance(one, other, spacing=scale), dtype=np.float64)
        for one, other in (edges, edges[::-1])
    )
    hd95 = max(float(np.percentile(part, 95)) for part in (there, back))
    return SurfaceDistance(hd95, float(np.concatenate((there, back)).mean()))
