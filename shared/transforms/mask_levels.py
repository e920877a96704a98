# SPDX-License-Identifier: Apache-2.0
"""From the levels stored in mask files to class indices, or to an error that says what the file holds instead."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from shared.transforms.pixels import UnfitError, decoding, open_picture

_LOSSY_SHARE = 0.98  # of the pixels must lie near black or white before a grey mask is cut at half
_NEAR = 1 / 8  # of the range: how far compression may move a level away from black or white
_SHOWN = 8


def read_levels(path: str | os.PathLike) -> tuple[np.ndarray, bool]:
    """Read a mask picture as stored, upright.

    Args:
        path: PNG, TIFF, BMP or JPEG, one frame.

    Returns:
        ((H, W) whole numbers, whether they are indices of a palette). 1-bit: 0 and 1; 8 and 16 bit: the levels; equal
        colour channels become one, an opaque alpha channel is dropped. A palette gives its indices, unless all colours
        in use are grey and index 0 is not the darkest, where 0 would not be the background: then the grey levels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, fractions, transparent pixels, or channels that differ. The message
            starts with the path.
    """
    name = os.fspath(path)
    with decoding(name):
        picture = open_picture(name)
        if picture.mode == "P":
            return _palette_levels(picture)
        values = np.asarray(picture)
        if picture.mode in ("1", "L") or picture.mode.startswith("I"):
            return values.astype(np.int64), False
        if picture.mode == "F":
            if not np.isfinite(values).all():
                raise UnfitError(f"finite levels, but {int((~np.isfinite(values)).sum())} are NaN or infinite")
            if (values != np.round(values)).any():
                raise UnfitError(f"whole numbers as labels, but got fractions ({_listed(values)}); threshold them")
            return values.astype(np.int64), False
        if picture.mode in ("LA", "RGBA", "PA"):
            alpha = values[..., -1]
            if alpha.min() < 255:
                share = float((alpha < 255).mean())
                raise UnfitError(
                    f"an opaque mask, but {share:.1%} of its pixels are transparent, which may mean background or "
                    "nothing; export it without alpha channel"
                )
            values = values[..., :-1]
            if picture.mode != "RGBA":
                return values[..., 0].astype(np.int64), picture.mode == "PA"
        elif picture.mode != "RGB":
            raise UnfitError(f"a grey, palette or RGB mask, but got the mode {picture.mode}; export it as grey PNG")
        if (values != values[..., :1]).any():
            raise UnfitError(
                f"a mask of one channel or of equal ones, but got colours ({_colours(values)}); choose the one that is "
                "the foreground (python -m tools.prepare image_mask_folder --mask_colour) or export it as grey PNG"
            )
        return values[..., 0].astype(np.int64), False


def _palette_levels(picture: Image.Image) -> tuple[np.ndarray, bool]:
    indices = np.asarray(picture).astype(np.int64)
    colours = np.asarray(picture.getpalette("RGB"), dtype=np.int64).reshape(-1, 3)
    used = np.unique(indices)
    if used[-1] < len(colours) and (colours[used] == colours[used, :1]).all():
        levels = colours[:, 0]
        if levels[0] > levels[used].min():
            return levels[indices], False
    return indices, True


def _listed(values: np.ndarray) -> str:
    different = np.unique(values)
    more = " ..." if len(different) > _SHOWN else ""
    return ", ".join(f"{value:g}" for value in different[:_SHOWN]) + more


def _colours(values: np.ndarray) -> str:
    different, counts = np.unique(values.reshape(-1, 3), axis=0, return_counts=True)
    usual = different[np.argsort(-counts, kind="stable")][:4]
    return ", ".join("#" + bytes(c.tolist()).hex().upper() for c in usual) + (" ..." if len(different) > 4 else "")


def binary_mask(levels: np.ndarray, *, name: str, label_map: bool) -> np.ndarray:
    """Foreground of a binary mask.

    Args:
        levels: whole numbers of any shape.
        name: what an error message starts with: the path.
        label_map: the numbers are indices (NIfTI, palette): all that are not 0 are foreground, as in the published
            binary runs on multi-organ labels. False, grey levels: 0 and one other level v are background and
            foreground (0/1, 0/255, 0/65535, ...). More levels are cut at half of the range 0..255 (or 0..65535) if
            that is safe: at least 98 % of the pixels lie within an eighth of either end, and there are levels just
            below the top, which lossy compression leaves and class indices do not.

    Returns:
        uint8 of the same shape, 0 and 1; all 0 for an empty mask.

    Raises:
        ValueError: negative numbers, or grey levels that do not tell what is foreground.
    """
    different = np.unique(levels)
    if different.size and different[0] < 0:
        raise ValueError(f"{name}: expected labels of at least 0, but got {_listed(levels)}; correct the labels")
    if label_map or len(different[different > 0]) <= 1:
        return (levels > 0).astype(np.uint8)
    top = 255 if different[-1] <= 255 else 65535
    near = top * _NEAR
    share = float(((levels <= near) | (levels >= top - near)).mean())
    blurred = ((different >= top - near) & (different < top)).any()
    if share >= _LOSSY_SHARE and blurred and different[-1] <= top:
        return (levels > top / 2).astype(np.uint8)
    raise ValueError(
        f"{name}: expected a binary mask of 0 and one other level, but got {len(different)} levels ({_listed(levels)});"
        " say which are foreground (python -m tools.prepare image_mask_folder --foreground), or set num_classes if "
        "they are class indices"
    )


def class_indices(levels: np.ndarray, num_classes: int, *, name: str) -> np.ndarray:
    """Class indices 0..num_classes-1 as uint8; a ValueError that starts with `name` for any other number."""
    different = np.unique(levels)
    if different.size and (different[0] < 0 or different[-1] >= num_classes):
        hint = " (0 and 255 are a binary mask: num_classes 1)" if set(different.tolist()) <= {0, 255} else ""
        raise ValueError(
            f"{name}: expected class indices 0..{num_classes - 1} (num_classes {num_classes}), but got "
            f"{_listed(levels)}{hint}; correct num_classes or renumber the labels (python -m tools.prepare)"
        )
    return levels.astype(np.uint8)


def whole_numbers(values: np.ndarray, *, name: str) -> np.ndarray:
    """float32 labels of a volume as int64; a ValueError that starts with `name` where they have fractions."""
    whole = np.round(values)
    if (values != whole).any():
        raise ValueError(
            f"{name}: expected whole numbers as labels, but got fractions ({_listed(values)}); the file was resampled "
            "with interpolation or holds probabilities: resample the labels with nearest neighbour, or threshold them"
        )
    return whole.astype(np.int64)
