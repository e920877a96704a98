# SPDX-License-Identifier: Apache-2.0
"""One axial slice of a translation: condition, result, truth, difference and standard deviation side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping

import nibabel
import numpy as np
import torch
from torch.nn.functional import interpolate

from shared.intensity import scale_intensity
from shared.pair_checks import grid_distance
from shared.pictures import save_grid
from shared.transforms.volumes import VolumeFile, for_display, open_volume, scaling_of

# Errors are small beside the image; so many times as bright they can be seen.
DIFFERENCE_GAIN = 2
DEVIATION_GAIN = 4


def comparison_panels(
    condition: str | os.PathLike,
    generated: np.ndarray,
    deviation: np.ndarray | None = None,
    *,
    true: str | os.PathLike | None = None,
) -> dict[str, torch.Tensor]:
    """The axial slice with the most signal in the condition, as radiologists look at it.

    Args:
        condition: file of the condition.
        generated: ``(X, Y, Z)`` in [0, 1] in file orientation, on the grid of the condition.
        deviation: standard deviation on the same grid, ``None`` without.
        true: file of the true image on the same grid, ``None`` where it is not known.

    Returns:
        What a panel shows -> picture ``(1, H, W)``: anterior up, the patient's right on the left, square pixels.

    Raises:
        ValueError: a file is unreadable, or ``true`` lies on another grid; the message starts with its path.
    """
    file = open_volume(condition)
    shown = {"FLAIR": _scaled(file), "generated": generated}
    if true is not None:
        truth = open_volume(true)
        truth.check_same_grid_as(file)
        shown["true"] = _scaled(truth)
        shown[f"difference x {DIFFERENCE_GAIN}"] = DIFFERENCE_GAIN * np.abs(generated - shown["true"])
    if deviation is not None:
        shown[f"standard deviation x {DEVIATION_GAIN}"] = DEVIATION_GAIN * deviation
    axes = nibabel.io_orientation(file.affine)
    turned = {name: nibabel.apply_orientation(values, axes) for name, values in shown.items()}
    index = int(turned["FLAIR"].sum(axis=(0, 1), dtype=np.float64).argmax())
    # The voxel size along each axis of the reoriented volume.
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)[np.argsort(axes[:, 0])]
    return {name: _picture(values[..., index], spacing[:2]) for name, values in turned.items()}


def on_same_grid(first: str | os.PathLike, second: str | os.PathLike) -> bool:
    """Whether two files have the same shape and place each voxel within 0.01 mm of one another."""
    one, two = open_volume(first), open_volume(second)
    return one.shape == two.shape and grid_distance(one.shape, one.affine, two.affine) <= 1e-2


def save_comparison(panels: Mapping[str, torch.Tensor], path: str | os.PathLike, *, marks: Mapping[str, str]) -> None:
    """Write the panels in one row, left to right, as a PNG with text chunks ``marks``."""
    save_grid(torch.stack(list(panels.values())), path, columns=len(panels), marks=marks)


def _scaled(file: VolumeFile) -> np.ndarray:
    values = file.read()
    return scale_intensity(values, *scaling_of(values, name=file.path))


def _picture(image: np.ndarray, spacing: np.ndarray) -> torch.Tensor:
    """``(X, Y)`` to ``(1, H, W)``; the coarser side is enlarged where pixels are not square."""
    picture = for_display(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None])
    x, y = spacing / spacing.min()
    size = (round(picture.shape[1] * y), round(picture.shape[2] * x))
    if size == tuple(picture.shape[1:]):
        return picture
    return interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]
