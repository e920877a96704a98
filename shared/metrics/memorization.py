# SPDX-License-Identifier: Apache-2.0
"""Does a generator repeat its training images? Nearest training neighbour of each sample, against held-out images.

Published work found copies of about a third of the training patients in models of this kind (Dar et al.,
arXiv:2307.01148). A distance alone means nothing: all chest X-rays resemble one another. The yardstick is how near
*test* images, which cannot be copies, come to their nearest training image; a sample is flagged when it is nearer than
nearly all of them (``percentile``), in any of the views below. A flag asks for a look, it is no proof; by construction
about ``percentile`` % of honest samples are flagged in each view. No flag is no proof either: the views are coarse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Descriptors = dict[str, torch.Tensor]
_METRICS = {"pixel": "l2", "feature": "cosine"}


@dataclass(frozen=True)
class CopyReport:
    """Result of :func:`find_copies`; n samples, m held-out images, V views.

    Attributes:
        distances: view -> (n,) distance of each sample to its nearest training image.
        indices: view -> (n,) row of that training image.
        reference: view -> (m,) the same distances of the held-out images.
        thresholds: view -> distance below which a sample is flagged.
        flagged: (n,) bool, nearer than the threshold in at least one view.
        num_training: training images compared with.
    """

    distances: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    thresholds: dict[str, float]
    flagged: np.ndarray
    num_training: int


def nearest_neighbours(
    queries: torch.Tensor, references: torch.Tensor, *, metric: str = "cosine", chunk: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest reference of each query, references worked off in chunks.

    Args:
        queries: (n, F).
        references: (m, F), m >= 1.
        metric: ``cosine`` (1 - cosine of the angle, 0 to 2) or ``l2`` (root mean square difference).
        chunk: references compared in one product.

    Returns:
        Distances (n,) float32 and reference rows (n,) int64.

    Raises:
        ValueError: shapes that do not agree, no reference, an unknown metric, or values that are not finite.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1] or len(references) == 0:
        raise ValueError(
            f"references: expected (m >= 1, {queries.shape[-1]}) for queries {tuple(queries.shape)}, "
            f"got {tuple(references.shape)}"
        )
    if metric not in ("cosine", "l2"):
        raise ValueError(f"metric: expected 'cosine' or 'l2', got {metric!r}")
    if not (torch.isfinite(queries).all() and torch.isfinite(references).all()):
        raise ValueError("queries: expected finite descriptors of all images, got NaN or Inf; check the images")
    queries = queries.float()
    if metric == "cosine":
        queries = F.normalize(queries, dim=1)
    best = queries.new_full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(references), chunk):
        part = references[start : start + chunk].to(queries)
        if metric == "cosine":
            distance = 1 - queries @ F.normalize(part, dim=1).T
        else:
            # Differences, not the expanded square: near copies are what counts, and there it cancels.
            distance = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
            distance = distance / part.shape[1] ** 0.5
        value, row = distance.min(dim=1)
        nearer = value < best
        best = torch.where(nearer, value, best)
        index = torch.where(nearer, row + start, index)
    return best.clamp_min(0), index


def describe(
    batches: Iterable[torch.Tensor],
    *,
    feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None = None,
    pixel_size: int = 48,
) -> Descriptors:
    """Compact descriptors of images that arrive in batches, so that a large training set need not be in memory.

    Args:
        batches: (B, 1, H, W) in [0, 1] each.
        feature_extractor: gives the view ``feature``; None leaves it out.
        pixel_size: images are averaged down to this square for the views ``pixel`` and ``correlation``.

    Returns:
        View -> (N, F) float32 on the CPU.

    Raises:
        ValueError: no image, or a batch of another shape.
    """
    pixels, features = [], []
    for batch in batches:
        if batch.ndim != 4 or batch.shape[1] != 1:
            raise ValueError(f"batches: expected (B, 1, H, W), got {tuple(batch.shape)}")
        images = batch.detach().as_subclass(torch.Tensor).float().clamp(0, 1)
        small = F.interpolate(images, size=(pixel_size, pixel_size), mode="bilinear", antialias=True)
        pixels.append(small.flatten(1).cpu())
        if feature_extractor is not None:
            features.append(feature_extractor(images).float().cpu())
    if not pixels:
        raise ValueError("batches: expected at least one image, got none")
    views = {"pixel": torch.cat(pixels)}
    if features:
        views["feature"] = torch.cat(features)
    return views


def _shifted(small: torch.Tensor, down: float, right: float) -> torch.Tensor:
    """Small images (N, 1, P, P) moved by a fraction of a pixel, borders repeated."""
    offset = [[1.0, 0.0, -2 * right / small.shape[-1]], [0.0, 1.0, -2 * down / small.shape[-2]]]
    grid = F.affine_grid(torch.tensor([offset]).expand(len(small), 2, 3), list(small.shape), align_corners=False)
    return F.grid_sample(small, grid, mode="bicubic", padding_mode="border", align_corners=False)


def _nearest_by_correlation(
    queries: torch.Tensor, training: torch.Tensor, *, shifts: Sequence[float], chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - correlation of what is particular to an image, the best over small shifts of the query and its mirror image.

    Brightness and contrast of each image go first, then the mean training image. Subtracting what is left of each
    image's own mean makes the cosine a correlation over pixels. One pixel is cut from each side, where shifted images
    have no data.
    """
    side = math.isqrt(training.shape[1])

    def standardised(flat: torch.Tensor) -> torch.Tensor:
        spread, mean = torch.std_mean(flat, dim=1, keepdim=True)
        return ((flat - mean) / spread.clamp_min(1e-6)).view(-1, 1, side, side)

    small, references = standardised(queries), standardised(training)
    centre = references.mean(dim=0, keepdim=True)

    def particular(images: torch.Tensor) -> torch.Tensor:
        rest = (images - centre)[..., 1:-1, 1:-1].flatten(1)
        return rest - rest.mean(dim=1, keepdim=True)

    references = particular(references)
    best = torch.full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for seen, down, right in itertools.product((small, small.flip(-1)), shifts, shifts):
        moved = particular(_shifted(seen, down, right) if down or right else seen)
        distance, row = nearest_neighbours(moved, references, metric="cosine", chunk=chunk)
        index = torch.where(distance < best, row, index)
        best = torch.minimum(distance, best)
    return best, index


def find_copies(
    samples: Descriptors,
    training: Descriptors,
    reference: Descriptors,
    *,
    percentile: float = 1.0,
    shifts: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    chunk: int = 4096,
) -> CopyReport:
    """Flag samples that are nearer to a training image than held-out images are.

    Views: ``pixel`` (root mean square difference of the small images), ``correlation`` (1 - correlation after the mean
    training image is subtracted: unlike the plain one it sees what is particular to an image; it ignores brightness
    and contrast, tolerates shifts of up to about 2 % of the side and exchanged sides, as training with flips would
    leave them), and ``feature`` (cosine distance) where given.

    Args:
        samples, training, reference: from :func:`describe`, with the same settings; reference are held-out real images.
        percentile: of the reference distances that is the threshold, in (0, 50). With m reference images a value below
            100 / m means: nearer than nearly the nearest of them.
        shifts: of the small images, in their pixels, tried in both directions by the view ``correlation``, for samples
            and held-out images alike; ``(0.0,)`` is 25 times faster.
        chunk: training images compared in one product.

    Raises:
        ValueError: different views, fewer than 2 reference images, or a percentile outside (0, 50).
    """
    if not set(samples) == set(training) == set(reference):
        raise ValueError(f"samples: expected the views {sorted(training)} in all three sets, got {sorted(samples)}")
    if len(reference["pixel"]) < 2:
        raise ValueError(f"reference: expected at least 2 held-out images, got {len(reference['pixel'])}")
    if not 0 < percentile < 50:
        raise ValueError(f"percentile: expected a value in (0, 50), got {percentile}")

    def nearest(queries: Descriptors, view: str) -> tuple[torch.Tensor, torch.Tensor]:
        if view == "correlation":
            return _nearest_by_correlation(queries["pixel"], training["pixel"], shifts=shifts, chunk=chunk)
        return nearest_neighbours(queries[view], training[view], metric=_METRICS[view], chunk=chunk)

    distances, indices, references, thresholds = {}, {}, {}, {}
    flagged = np.zeros(len(samples["pixel"]), dtype=bool)
    for view in ("pixel", "correlation", *sorted(set(training) - {"pixel"})):
        distance, index = nearest(samples, view)
        held_out, _ = nearest(reference, view)
        distances[view], indices[view], references[view] = distance.numpy(), index.numpy(), held_out.numpy()
        thresholds[view] = float(np.percentile(references[view], percentile))
        flagged |= distances[view] < thresholds[view]
    return CopyReport(distances, indices, references, thresholds, flagged, len(training["pixel"]))
