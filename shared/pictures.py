# SPDX-License-Identifier: Apache-2.0
"""Pictures of generated images: grey levels, grids, and the words that say what they are."""

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
from PIL import Image
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
    """Write ``(H, W)`` uint8 or uint16 as a PNG that carries ``marks`` as text chunks, whole or not at all.

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
    """Write images ``(N, 1, H, W)`` in [0, 1] as one 8-bit grey PNG, row by row; values outside are clamped.

    Args:
        images: pictures of one size, rows first.
        path: file to write.
        columns: pictures in a row.
        gap: white pixels between pictures.
        marks: text chunks; ``None`` says that the picture contains synthetic images.
    """
    values = images.detach().float().cpu().clamp(0, 1).numpy()[:, 0]
    count, height, width = values.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap), dtype=np.float32)
    for index, value in enumerate(values):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = value
    save_marked_png((grid * 255).round().astype(np.uint8), path, marks or {"Comment": GRID_NOTE})


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
