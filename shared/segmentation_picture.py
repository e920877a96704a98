# SPDX-License-Identifier: Apache-2.0
"""Masks over images: contours and translucent fill, rows that compare, and mosaics of the slices of a volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate, max_pool2d, pad

from shared.pictures import arrange, caption, spread_indices
from shared.segmentation_probability import chosen_probability, mask_of

# 14 of the 15 colours that Martin Krzywinski chose to be told apart with colour-blind eyes (black is left out);
# first eight bright ones that lie furthest apart, as most sets have no more classes.
PALETTE = (
    (0x24, 0xFF, 0x24), (0xFF, 0x6D, 0xB6), (0x00, 0x6D, 0xDB), (0xFF, 0xFF, 0x6D), (0xDB, 0x6D, 0x00),
    (0x00, 0x92, 0x92), (0xB6, 0xDB, 0xFF), (0x92, 0x49, 0x00), (0xB6, 0x6D, 0xFF), (0x92, 0x00, 0x00),
    (0x6D, 0xB6, 0xFF), (0x49, 0x00, 0x92), (0xFF, 0xB6, 0xDB), (0x00, 0x49, 0x49),
)  # fmt: skip
# viridis at 0, 1/8, ... 1; matplotlib, which has it, is no dependency.
_HEAT = (
    (0x44, 0x01, 0x54), (0x47, 0x2D, 0x7B), (0x3B, 0x52, 0x8B), (0x2C, 0x72, 0x8E), (0x21, 0x91, 0x8C),
    (0x28, 0xAE, 0x80), (0x5E, 0xC9, 0x62), (0xAD, 0xDC, 0x30), (0xFD, 0xE7, 0x25),
)  # fmt: skip


def overlay(image: torch.Tensor, mask: torch.Tensor, *, opacity: float = 0.3, width: int | None = None) -> torch.Tensor:
    """Show each class of a mask in a colour of its own over an image: solid contour, translucent inside.

    ``monai.visualize.blend_images`` does not fit: it has no contours, needs matplotlib and stretches the image;
    ``monai.transforms.LabelToContour`` knows binary masks, one width, and draws along the border of the image.

    Args:
        image: ``(1 or 3, H, W)`` in [0, 1], rows first; values outside are clamped.
        mask: ``(H, W)`` class index, 0 is the background; of any type.
        opacity: of the fill, 0 for contours alone.
        width: of the contour in pixels, inside of the class; ``None``: 1 for each 256 pixels of the shorter side.

    Returns:
        ``(3, H, W)`` float32 in [0, 1], on the CPU.

    Raises:
        ValueError: other shapes, or more classes than there are colours.
    """
    picture = _as_colour(image)
    classes = _plain(mask).long()
    if classes.shape != picture.shape[1:]:
        raise ValueError(
            f"mask: expected (H, W) = {tuple(picture.shape[1:])} as the image, got {tuple(classes.shape)}."
        )
    top = int(classes.max()) if classes.numel() else 0
    if top > len(PALETTE) or int(classes.min()) < 0:
        raise ValueError(f"mask: expected class indices 0 to {len(PALETTE)}, got {int(classes.min())} to {top}.")
    colours = (torch.tensor([(0, 0, 0), *PALETTE]) / 255)[classes].permute(2, 0, 1)
    edge = _contour(classes, width or max(1, round(min(classes.shape) / 256)))
    weight = torch.where(edge, 1.0, torch.where(classes > 0, opacity, 0.0))
    return picture * (1 - weight) + colours * weight


def heat_map(values: torch.Tensor) -> torch.Tensor:
    """``(H, W)`` in [0, 1] -> ``(3, H, W)``: dark violet is 0, green a half, yellow 1 (viridis); others are clamped."""
    anchors = torch.tensor(_HEAT) / 255
    position = _plain(values).float().clamp(0, 1) * (len(anchors) - 1)
    low = position.long().clamp(max=len(anchors) - 2)
    part = (position - low)[..., None]
    return (anchors[low] * (1 - part) + anchors[low + 1] * part).permute(2, 0, 1)


def comparison_row(
    image: torch.Tensor,
    label: torch.Tensor | None,
    probability: torch.Tensor,
    *,
    agreement: torch.Tensor | None = None,
    threshold: float = 0.5,
    captions: bool = True,
) -> torch.Tensor:
    """Image | truth | prediction | probability | agreement, side by side in one picture.

    Args:
        image: ``(1 or 3, H, W)`` in [0, 1].
        label: ``(H, W)`` or ``(1, H, W)`` class index; ``None`` leaves its panel out.
        probability: ``(N, H, W)`` in [0, 1]: N = 1 of the foreground, else of each class, of which the most probable
            one's is shown.
        agreement: ``(H, W)`` in [0.5, 1], share of the samples that agree with the majority, shown from 0.5 (dark)
            to 1; ``None`` leaves its panel out.
        threshold: see ``mask_of``.
        captions: write above each panel what it shows.

    Returns:
        ``(3, H', W')`` in [0, 1], on the CPU.
    """
    probability = _plain(probability).float()
    panels = {"image": _as_colour(image)}
    if label is not None:
        panels["truth"] = overlay(image, _plain(label).reshape(probability.shape[1:]), opacity=0)
    panels["prediction"] = overlay(image, mask_of(probability, threshold=threshold), opacity=0)
    panels["probability"] = heat_map(chosen_probability(probability))
    if agreement is not None:
        panels["agreement"] = heat_map(2 * _plain(agreement).float() - 1)
    if captions:
        panels = {name: torch.cat((caption(name, panel.shape[2]), panel), dim=1) for name, panel in panels.items()}
    return arrange(torch.stack(list(panels.values())), columns=len(panels))


def mosaic(
    volume: torch.Tensor,
    mask: torch.Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0),
    max_slices: int = 16,
    columns: int = 4,
) -> torch.Tensor:
    """Slices of a volume that contain mask, evenly spread, with the mask over them; of an empty mask any slices.

    Args:
        volume: ``(1, H, W, Z)`` in [0, 1], upright: rows down, columns right, slices along the last axis.
        mask: ``(H, W, Z)`` class index.
        spacing: size of a pixel along H and W; the coarser side is enlarged until pixels are square.
        max_slices: most slices shown.
        columns: slices in a row, of as few rows as this needs.

    Returns:
        ``(3, H', W')`` in [0, 1], on the CPU.
    """
    volume, mask = _plain(volume).float(), _plain(mask)
    found = mask.flatten(0, 1).any(dim=0).nonzero().flatten().tolist() or list(range(mask.shape[2]))
    shown = [found[index] for index in spread_indices(len(found), max_slices)]
    size = [round(n * side / min(spacing)) for n, side in zip(mask.shape[:2], spacing, strict=True)]
    panels = []
    for index in shown:
        image, classes = volume[None, ..., index], mask[None, None, ..., index].float()
        if size != list(mask.shape[:2]):
            image = interpolate(image, size=size, mode="bilinear", align_corners=False)
            classes = interpolate(classes, size=size, mode="nearest-exact")
        panels.append(overlay(image[0], classes[0, 0]))
    return arrange(torch.stack(panels), columns=columns)


def _contour(classes: torch.Tensor, width: int) -> torch.Tensor:
    """Pixels of a class > 0 within ``width`` of another class; the border of the image is no contour."""
    padded = pad(classes[None, None].float(), [width] * 4, mode="replicate")
    size = 2 * width + 1
    differs = max_pool2d(padded, size, stride=1) != -max_pool2d(-padded, size, stride=1)
    return differs[0, 0] & (classes > 0)


def _plain(values: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values).detach().cpu().as_subclass(torch.Tensor)


def _as_colour(image: torch.Tensor) -> torch.Tensor:
    values = _plain(image).float().clamp(0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"image: expected (1 or 3, H, W), got {tuple(values.shape)}.")
    return values.expand(3, -1, -1)
