# SPDX-License-Identifier: Apache-2.0
"""How well a mask agrees with the truth: overlap and borders, by class, with conventions for empty masks.

The published evaluation (SDSeg, after TransUNet) gave 1 to a false alarm in an image without foreground and 0 to the
correct empty mask of it. Here it is the other way round; see ``CONVENTIONS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from monai.metrics import compute_dice, compute_iou

from shared.metrics.surface import surface_distance

MEAN = "mean of classes"
CONVENTIONS = {
    "both masks empty": "Dice and IoU are {empty_score:g} and the image is flagged (both_empty); a mean without such "
    "images stands beside the mean; it has no surface distance",
    "exactly one mask empty": "Dice and IoU are 0; surface distances are infinite: counted (one_empty), not averaged",
    "unit of evaluation": "a picture, or a whole volume",
    "mean of classes": "mean over the foreground classes that are present in the image's truth or prediction; of its "
    "surface distances, over the classes present in both",
    "native resolution": "probabilities are resized bilinearly within the slice to the label's size, then thresholded "
    "above {threshold:g} (one class) or their largest is taken (several)",
    "working size": "the label is resized to the network's size by nearest neighbour",
    "surface distances": "at native resolution; of volumes in 3-D and mm, of pictures in pixels of the native image; "
    "HD95: the larger of both directions' 95th percentiles; ASSD: mean over both directions' distances",
}


@dataclass(frozen=True)
class MaskScore:
    """Agreement of one class (or of all, then ``name`` is ``MEAN``) in one image or volume.

    Attributes:
        name: of the class.
        dice, iou: in [0, 1].
        hd95, assd: see :class:`~shared.metrics.surface.SurfaceDistance`; None where they were not asked for.
        true_pixels, predicted_pixels: foreground pixels or voxels.
        both_empty: whether neither mask has foreground.
        one_empty: in how many classes exactly one mask has foreground (0 or 1 for a single class).
    """

    name: str
    dice: float
    iou: float
    hd95: float | None
    assd: float | None
    true_pixels: int
    predicted_pixels: int
    both_empty: bool
    one_empty: int


def foreground_names(
    num_classes: int, class_names: Mapping[str, str] | Mapping[int, str] | Sequence[str] | None
) -> dict[int, str]:
    """Class index -> name of each foreground class.

    Args:
        num_classes: 1 for one foreground class, else the number of classes including background 0.
        class_names: all names in order, with or without the background's, or index -> name as in a datalist's
            ``labels``; None names them "foreground" or "class 1", "class 2", ...

    Raises:
        ValueError: names of another number, missing, or equal to one another.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    indices = [1] if num_classes == 1 else list(range(1, num_classes))
    if class_names is None:
        return {index: "foreground" if num_classes == 1 else f"class {index}" for index in indices}
    if isinstance(class_names, Mapping):
        known = {int(index): str(name) for index, name in class_names.items()}
    else:
        first = 1 if len(class_names) == len(indices) else 0
        known = dict(enumerate(map(str, class_names), start=first))
    names = {index: known[index] for index in indices if index in known}
    if set(known) - {0} != set(indices):
        raise ValueError(f"class_names: expected names for the classes {indices}, got {known}; num_classes decides")
    if len({*names.values(), MEAN}) <= len(names):
        raise ValueError(f"class_names: expected different names, none of them {MEAN!r}, got {list(names.values())}")
    return names


def mask_scores(
    prediction: torch.Tensor,
    truth: torch.Tensor,
    names: Mapping[int, str],
    *,
    spacing: Sequence[float] | None = None,
    surface: bool = True,
    empty_score: float = 1.0,
) -> list[MaskScore]:
    """Scores of each class; with several classes, their mean comes first.

    Overlap is MONAI's ``compute_dice`` and ``compute_iou``, on booleans, whose sums are exact at any size.

    Args:
        prediction: (H, W[, Z]) class index.
        truth: the same.
        names: class index -> name, see :func:`foreground_names`.
        spacing: of the pixels along each axis for the surface distances; None counts pixels.
        surface: whether surface distances are measured.
        empty_score: Dice and IoU where both masks are empty.

    Raises:
        ValueError: different shapes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: expected the shape of truth {tuple(truth.shape)}, got {tuple(prediction.shape)}")
    scores = []
    prediction, truth = _cropped(prediction.cpu(), truth.cpu())
    for index, name in names.items():
        masks = _cropped(prediction == index, truth == index)
        pixels = [int(mask.sum()) for mask in masks]
        both, one = not any(pixels), 0 in pixels and any(pixels)
        dice, iou = (
            empty_score if both else float(measure(masks[0][None, None], masks[1][None, None], ignore_empty=False))
            for measure in (compute_dice, compute_iou)
        )
        distance = surface_distance(masks[0], masks[1], spacing=spacing) if surface else None
        hd95, assd = distance if distance is not None else (None, None)
        scores.append(MaskScore(name, dice, iou, hd95, assd, pixels[1], pixels[0], both, int(one)))
    return scores if len(scores) == 1 else [_mean_of_classes(scores, surface, empty_score), *scores]


def _cropped(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the box around their foreground: no measure changes, and an organ is a small part of a volume.

    One pixel wider, so that an axis has length 1 only where it has so in the image (see ``surface_distance``).
    """
    union = (one > 0) | (other > 0)
    box = []
    for axis in range(union.ndim):
        found = union.any(dim=[other_axis for other_axis in range(union.ndim) if other_axis != axis]).nonzero()
        if not len(found):
            return one, other
        box.append(slice(max(0, int(found[0]) - 1), int(found[-1]) + 2))
    return one[tuple(box)], other[tuple(box)]


def _mean_of_classes(scores: Sequence[MaskScore], surface: bool, empty_score: float) -> MaskScore:
    present = [score for score in scores if not score.both_empty]
    missed = sum(score.one_empty for score in present)
    dice, iou = (
        sum(getattr(score, name) for score in present) / len(present) if present else empty_score
        for name in ("dice", "iou")
    )
    nothing = math.inf if missed else math.nan
    measured = [score for score in present if not score.one_empty]
    distances: list[float | None] = [None, None]
    if surface:
        columns = [[getattr(score, name) for score in measured] for name in ("hd95", "assd")]
        distances = [sum(values) / len(values) if values else nothing for values in columns]
    return MaskScore(
        MEAN,
        dice,
        iou,
        distances[0],
        distances[1],
        true_pixels=sum(score.true_pixels for score in scores),
        predicted_pixels=sum(score.predicted_pixels for score in scores),
        both_empty=not present,
        one_empty=missed,
    )
