# SPDX-License-Identifier: Apache-2.0
"""Pictures of generated images: grey levels, grids, which to show, and the words that say what they are."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from shared.files import atomic_path, sha256_of_file

INTENDED_USE = "research only, not for diagnosis"
SYNTHETIC_NOTE = f"Synthetic image made by a generative model, not an image of a patient. Use: {INTENDED_USE}."
GRID_NOTE = f"contains synthetic images; {INTENDED_USE}"


def to_grey(image: torch.Tensor | np.ndarray, bits: int) -> np.ndarray:
    """Picture ``(1, H, W)`` in [0, 1] to unsigned integers ``(H, W)``, rounded to nearest, full range of ``bits``."""
    values = np.asarray(torch.as_tensor(image).detach().cpu().float())
    if values.ndim != 3 or values.shape[0] != 1:
        raise ValueError(f"pred: expected a picture (1, H, W), got {values.shape}.")
    dtype = np.uint8 if bits == 8 else np.uint16
    return (values[0].clip(0.0, 1.0) * np.iinfo(dtype).max).round().astype(dtype)


def save_marked_png(grey: np.ndarray, path: str | os.PathLike, marks: Mapping[str, str]) -> None:
    """Write ``(H, W)`` uint8 or uint16, or ``(H, W, 3)`` uint8, as a PNG with text chunks; whole or not at all.

    A copied picture leaves its JSON behind; what it is travels inside it.
    """
    chunks = PngInfo()
    for name, text in marks.items():
        chunks.add_text(name, text)
    with atomic_path(path) as temporary:
        Image.fromarray(grey).save(temporary, format="PNG", pnginfo=chunks)


def picture_marks(description: Mapping[str, Any], *, software: str, comment: str = SYNTHETIC_NOTE) -> dict[str, str]:
    """Text chunks of a picture: the comment, the software and each entry of ``description`` as JSON."""
    return {
        "Comment": comment,
        "Software": software,
        **{name: json.dumps(value) for name, value in description.items()},
    }


def save_grid(
    images: torch.Tensor,
    path: str | os.PathLike,
    *,
    columns: int = 8,
    gap: int = 2,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Write images ``(N, 1 or 3, H, W)`` in [0, 1] as one 8-bit PNG, row by row; values outside are clamped.

    Args:
        images: pictures of one size, rows first; one channel is grey, three are red, green, blue.
        path: file to write.
        columns: pictures in a row.
        gap: white pixels between pictures.
        marks: text chunks; ``None`` says that the picture contains synthetic images.
    """
    pixels = (arrange(images, columns=columns, gap=gap) * 255).round().byte().permute(1, 2, 0).numpy()
    save_marked_png(pixels[..., 0] if pixels.shape[2] == 1 else pixels, path, marks or {"Comment": GRID_NOTE})


def arrange(images: torch.Tensor, *, columns: int = 8, gap: int = 2) -> torch.Tensor:
    """Images ``(N, C, H, W)``, row by row with white between, as one picture ``(C, H', W')`` on the CPU.

    Values are clamped to [0, 1].
    """
    images = images.detach().float().cpu().clamp(0, 1)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def caption(text: str, width: int) -> torch.Tensor:
    """``(3, 20, width)`` on the CPU: ``text`` black on white, as large as fits, at most 16 pixels."""
    size = 16
    while size > 4 and ImageFont.load_default(size).getlength(text) > width - 4:
        size -= 1
    strip = Image.new("L", (width, 20), 255)
    ImageDraw.Draw(strip).text((width / 2, 10), text, fill=0, font=ImageFont.load_default(size), anchor="mm")
    return (torch.tensor(np.asarray(strip))[None] / 255).expand(3, -1, -1)


def spread_indices(length: int, count: int) -> list[int]:
    """Middles of ``count`` equal parts of ``range(length)``; all indices where there are no more than ``count``."""
    count = min(count, length)
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]


def made_with(weights_path: str | os.PathLike | None) -> dict[str, Any]:
    """SHA-256 of the weights (``None`` without ``weights_path``) and the versions of MONAI and PyTorch.

    Raises:
        FileNotFoundError: when ``weights_path`` does not exist.
    """
    if weights_path is not None and not Path(weights_path).is_file():
        raise FileNotFoundError(f"{weights_path}: expected the weights of the samples, found no file.")
    return {
        "weights_sha256": None if weights_path is None else sha256_of_file(weights_path),
        "monai_version": importlib.metadata.version("monai"),
        "torch_version": str(torch.__version__),
    }
