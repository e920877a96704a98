# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation: which images stand beside one another.

- ``samples.png``: generated images;
- ``reconstructions.png``: real images over their reconstructions;
- ``translation.png``: a line per example, spread evenly over the set: each channel of the condition | generated | true
  | absolute difference, twice as bright as it is;
- ``failures.png``: the worst reconstructions under their originals; samples whose finding is not the prompted one under
  the real image of that row; the translations of lowest PSNR, laid out as in ``translation.png``, several to a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.pictures import save_grid

# Errors are small beside the image; so many times as bright they can be seen.
DIFFERENCE_GAIN = 2


def write_pictures(
    folder: Path,
    images: Mapping[str, torch.Tensor],
    measured: Mapping[str, Sequence[Any]],
    *,
    columns: int = 8,
    grid_images: int = 32,
    display: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write the pictures for which there are images, and delete those of an earlier evaluation for which there are not.

    Args:
        folder: where the PNG files go.
        images: ``image``, ``pred``, ``reconstruction`` (N, 1, H, W) and ``condition`` (N, C, H, W), in [0, 1]; all are
            optional.
        measured: columns of N values that say what failed: ``reconstruction_ms_ssim``, ``psnr``, ``prompted_finding``
            with ``predicted_finding``; all are optional.
        columns: images in a row, and the number of worst cases of a kind.
        grid_images: most images of a kind in a grid.
        display: turns pictures (N, 1, H, W) the way people look at them; None shows them as they are.
    """
    strips = _translations(images)
    width = strips.shape[1] if strips is not None else 0
    wide = max(columns, width)  # of failures.png, which has rows of several kinds
    samples = images["pred"][:grid_images] if "pred" in images else None
    grids: dict[str, tuple[list[torch.Tensor], int]] = {
        "samples": ([] if samples is None else [samples], columns),
        "reconstructions": ([], columns),
        "translation": ([], width),
        "failures": ([], wide),
    }
    failures = grids["failures"][0]
    if {"image", "reconstruction"} <= images.keys():
        real, reconstruction = images["image"], images["reconstruction"]
        grids["reconstructions"][0].extend(_over(real[:grid_images], reconstruction[:grid_images], columns))
        worst = _lowest(measured.get("reconstruction_ms_ssim"), columns)
        failures += _over(real[worst], reconstruction[worst], wide)
    prompted, predicted = (measured.get(f"{kind}_finding", []) for kind in ("prompted", "predicted"))
    wrong = [i for i, (p, q) in enumerate(zip(prompted, predicted, strict=True)) if p is not None and p != q]
    wrong = wrong[:grid_images]
    if wrong:
        failures += _over(images.get("image", images["pred"])[wrong], images["pred"][wrong], wide)
    if strips is not None:
        shown = torch.linspace(0, len(strips) - 1, max(1, min(grid_images // width, len(strips)))).round().long()
        grids["translation"][0].append(_pictures(strips[shown]))
        for line in strips[_lowest(measured.get("psnr"), columns)].split(wide // width):
            failures.append(_filled(_pictures(line), wide))
    for name, (parts, across) in grids.items():
        path = folder / f"{name}.png"
        grid = torch.cat(parts) if parts else torch.empty(0)
        if len(grid):
            save_grid(grid if display is None else display(grid), path, columns=across)
        else:  # a picture of an earlier evaluation in this folder would be misread
            path.unlink(missing_ok=True)


def _translations(images: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """(N, C + 3, H, W): condition | generated | true | difference; None where one of them is absent."""
    if not {"condition", "pred", "image"} <= images.keys():
        return None
    condition, pred, real = images["condition"].clamp(0, 1), images["pred"], images["image"]
    return torch.cat((condition, pred, real, DIFFERENCE_GAIN * (pred - real).abs()), dim=1)


def _pictures(strips: torch.Tensor) -> torch.Tensor:
    """(N, K, H, W) -> (N K, 1, H, W)."""
    return strips.flatten(0, 1).unsqueeze(1)


def _lowest(values: Sequence[Any] | None, count: int) -> list[int]:
    """Rows of the lowest values, worst first; rows without a value are left out."""
    known = [(value, row) for row, value in enumerate(values or ()) if value is not None]
    return [row for _, row in sorted(known)[:count]]


def _over(upper: torch.Tensor, lower: torch.Tensor, columns: int) -> list[torch.Tensor]:
    """Alternating full grid rows of ``upper`` and ``lower``; white where a row is not full."""
    pairs = zip(upper.split(columns), lower.split(columns), strict=True)
    return [_filled(part, columns) for pair in pairs for part in pair]


def _filled(images: torch.Tensor, columns: int) -> torch.Tensor:
    """(n, 1, H, W), n <= columns, and white images after them."""
    return torch.cat((images, images.new_ones(columns - len(images), *images.shape[1:])))
