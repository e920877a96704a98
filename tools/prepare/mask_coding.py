# SPDX-License-Identifier: Apache-2.0
"""What a user says about odd masks (levels, colours, class numbers), applied to mask files: class indices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.transforms.mask_levels import binary_mask, class_indices, read_levels
from shared.transforms.pixels import UnfitError, decoding, open_picture

_LOSSY_SUFFIXES = (".jpg", ".jpeg")
_LOSSY_DISTANCE = 48  # levels that JPEG may move a colour; its rings beside edges reach about 40 at quality 75


def read_colours(path: str | os.PathLike) -> np.ndarray:
    """A picture as (H, W, 3) uint8, upright; grey is repeated, alpha is ignored, palettes are resolved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, or more than 8 bits. The message starts with the path.
    """
    with decoding(path):
        picture = open_picture(path)
        if picture.mode == "F" or picture.mode.startswith("I"):
            raise UnfitError(f"a mask with 8 bits per channel, but got the mode {picture.mode}")
        return np.asarray(picture.convert("RGB"))


def parse_colour(value: str | None) -> tuple[int, int, int] | None:
    """`#RRGGBB` -> three levels; None stays None.

    Raises:
        ValueError: something else; the message starts with `--mask_colour`.
    """
    if value is None:
        return None
    digits = str(value).removeprefix("#")
    try:
        red, green, blue = bytes.fromhex(digits)
    except ValueError as error:
        raise ValueError(f"--mask_colour: expected a colour like '#FF0000', but got {value!r}; quote it") from error
    return red, green, blue


def parse_levels(value: object) -> tuple[int, ...] | None:
    """`255` or `1,2,4` as fire passes them -> whole numbers; None stays None.

    Raises:
        ValueError: something else; the message starts with `--foreground`.
    """
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    try:
        levels = tuple(int(str(part)) for part in parts)
    except ValueError as error:
        raise ValueError(f"--foreground: expected levels such as 255 or 1,2,4, but got {value!r}") from error
    if not levels or len(set(levels)) < len(levels) or min(levels) < 0:
        raise ValueError(f"--foreground: expected different levels of at least 0, but got {value!r}")
    return levels


@dataclass(frozen=True)
class MaskCoding:
    """How the levels of mask files become class indices.

    Attributes:
        num_classes: 1 = binary (0, 1); N >= 2 = indices 0..N-1 with background 0.
        foreground: binary: the levels that are foreground; multi-class: the levels of the classes 1..N-1 in order.
            Every other level is background. None: the rules of `shared.transforms.mask_levels`.
        colour: binary: the colour that is foreground; every other one is background.

    Raises:
        ValueError: arguments that contradict each other. The message starts with the option.
    """

    num_classes: int = 1
    foreground: tuple[int, ...] | None = None
    colour: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        count = self.num_classes
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 255:
            raise ValueError(f"--num_classes: expected 1 (binary) or 2..255 with background, but got {count!r}")
        if self.colour is not None and (count > 1 or self.foreground is not None):
            raise ValueError("--mask_colour: expected binary masks and no --foreground; leave one of them out")
        if self.foreground is not None and count > 1 and len(self.foreground) != count - 1:
            raise ValueError(f"--foreground: expected {count - 1} levels for --num_classes {count} (the classes 1.."
                             f"{count - 1} in order), but got {len(self.foreground)}")  # fmt: skip

    def read_picture(self, path: Path) -> tuple[np.ndarray, str]:
        """Class indices of a mask picture.

        Returns:
            ((H, W) uint8 indices, what a user should look at or "").

        Raises:
            FileNotFoundError: no such file.
            ValueError: unreadable, or its levels do not fit. The message starts with the path.
        """
        lossy = path.suffix.lower() in _LOSSY_SUFFIXES
        if self.colour is not None:
            distance = np.abs(read_colours(path).astype(int) - np.asarray(self.colour)).max(2)
            return (distance <= (_LOSSY_DISTANCE if lossy else 0)).astype(np.uint8), ""
        if lossy and (self.num_classes > 1 or self.foreground is not None):
            raise ValueError(f"{path}: expected a lossless mask, since JPEG moves levels; export it as PNG")
        levels, palette = read_levels(path)
        return self.encode(levels, path, label_map=palette)

    def encode(self, levels: np.ndarray, path: Path, *, label_map: bool = True) -> tuple[np.ndarray, str]:
        """Class indices of whole numbers of any shape, such as a volume's; see `read_picture`.

        Args:
            levels: of the mask.
            path: its file, for messages.
            label_map: see `shared.transforms.mask_levels.binary_mask`.
        """
        if self.foreground is not None:
            result = np.zeros(levels.shape, np.uint8)
            for index, level in enumerate(self.foreground, start=1):
                result[levels == level] = index if self.num_classes > 1 else 1
            return result, ""
        if self.num_classes > 1:
            return class_indices(levels, self.num_classes, name=str(path)), ""
        several = len(np.unique(levels[levels > 0])) > 1
        remark = "several labels joined to one foreground" if label_map else "grey levels in the mask, cut at half"
        return binary_mask(levels, name=str(path), label_map=label_map), remark if several else ""
