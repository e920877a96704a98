# SPDX-License-Identifier: Apache-2.0
"""Tri-planar pictures of NODDI maps: axial, coronal and sagittal slices of several volumes side by side.

Volumes are in RAS. Pictures are **radiological**: axial slices with anterior up, coronal ones with superior up, the
patient's right on the left of both; sagittal ones with superior up and anterior on the left. Letters at the first
column say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

from shared.pictures import arrange, caption
from shared.transforms.volumes import for_display

# Errors and deviations are small beside the maps; so many times as bright they can be seen.
ERROR_GAIN = 4
# The axis that a plane cuts at one index, and what is at the left and at the right of its picture.
PLANES = {"axial": (2, "R", "L"), "coronal": (1, "R", "L"), "sagittal": (0, "A", "P")}
_LEAST_SIDE = 120  # pixels of the longest side: captions need them


def map_panels(
    true: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    own: tuple[str, torch.Tensor],
    deviation: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What is shown of a map: true | others | own | \\|own - true\\| x 4 | deviation x 4.

    Args:
        true: (X, Y, Z) in [0, 1].
        others: caption -> map of another method.
        own: caption and map of what is evaluated.
        deviation: standard deviation over samples; None without.
    """
    name, estimate = own
    panels = {"true": true, **others, name: estimate, f"|error| x {ERROR_GAIN}": ERROR_GAIN * (estimate - true).abs()}
    if deviation is not None:
        panels[f"sd x {ERROR_GAIN}"] = ERROR_GAIN * deviation
    return panels


def centre_of(mask: torch.Tensor) -> tuple[int, int, int]:
    """Voxel in the middle of a mask (X, Y, Z): the mean index along each axis; of an empty mask, of all voxels."""
    found = (mask > 0.5).nonzero().double()
    if not len(found):
        found = torch.ones_like(mask).nonzero().double()
    x, y, z = (int(index) for index in found.mean(0).round())
    return x, y, z


def tri_planar(
    panels: Mapping[str, torch.Tensor], centre: Sequence[int], *, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> torch.Tensor:
    """Rows axial, coronal, sagittal; a column for each volume, with its caption.

    Args:
        panels: caption -> volume (X, Y, Z) in RAS, [0, 1]; values outside are clamped. All of one size.
        centre: voxel through which the three planes go.
        spacing: voxel size along the axes; pictures get square pixels. Small volumes are enlarged.

    Returns:
        (1, H, W) in [0, 1] on the CPU.

    Raises:
        ValueError: no panel, or volumes of different sizes.
    """
    shapes = {tuple(volume.shape) for volume in panels.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(f"panels: expected volumes (X, Y, Z) of one size, got {sorted(shapes)}")
    shape = shapes.pop()
    smallest = min(spacing)
    lengths = [length * step / smallest for length, step in zip(shape, spacing, strict=True)]
    enlarged = max(1, math.ceil(_LEAST_SIDE / max(lengths)))
    size = [round(length * enlarged) for length in lengths]
    width = max(size[0], size[1])  # of axial and coronal slices, and of sagittal ones
    rows = []
    for axis, left, right in PLANES.values():
        across, up = (other for other in range(3) if other != axis)
        slices = [volume.detach().cpu().select(axis, centre[axis]) for volume in panels.values()]
        pictures = [_fitted(for_display(part), (size[up], size[across]), width) for part in slices]
        pictures[0] = _lettered(pictures[0], left, right)
        rows.append(torch.stack(pictures))
    captions = torch.stack([caption(text, width)[:1] for text in panels])
    strips = [arrange(part, columns=len(panels)) for part in (captions, *rows)]
    gap = torch.ones(1, 2, strips[0].shape[2])
    return torch.cat([part for strip in strips for part in (strip, gap)][:-1], dim=1)


def _fitted(picture: torch.Tensor, size: tuple[int, int], width: int) -> torch.Tensor:
    """(H, W) -> (1, size[0], width): enlarged without smoothing, black at both sides."""
    fitted = interpolate(picture[None, None].float(), size=size, mode="nearest-exact")[0].clamp(0, 1)
    left = (width - size[1]) // 2
    return torch.nn.functional.pad(fitted, (left, width - size[1] - left))


def _lettered(picture: torch.Tensor, left: str, right: str) -> torch.Tensor:
    """White letters half-way up at both sides."""
    image = Image.fromarray((picture[0] * 255).round().byte().numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for text, x, anchor in ((left, 2, "lm"), (right, image.width - 3, "rm")):
        draw.text((x, image.height / 2), text, fill=255, font=font, anchor=anchor, stroke_width=1, stroke_fill=0)
    return torch.from_numpy(np.array(image))[None].float() / 255
