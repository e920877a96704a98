# SPDX-License-Identifier: Apache-2.0
"""REFUGE2 (fundus photographs, optic cup and disc) -> dataset folder of sdseg."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tools.prepare.mask_coding import read_colours
from tools.prepare.mask_pairs import (
    IMAGE_SUFFIXES,
    Outcome,
    Pair,
    check_places,
    convert_pairs,
    convert_picture,
    index_files,
    list_files,
    match_names,
)
from tools.prepare.preparation import Preparation, check_workers
from tools.prepare.stored_split import write_sections

_ROLES = {"g": "training", "n": "training", "v": "validation", "t": "test"}  # first letter of the published names
_TOLERANCE = 8  # levels; some copies of the masks went through colour management


def cup_and_disc(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cup and disc (with the cup) of a mask file.

    Grey masks have the challenge's coding: 0 cup, 128 disc, 255 background; masks in colour that of MNet_DeepCDR's disc
    crop: red 255 disc with cup, green 255 cup.

    Returns:
        Two (H, W) bool.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, other levels, or the background is no background. The message starts with the path.
    """
    colours = read_colours(path)
    if (colours != colours[..., :1]).any():
        disc, cup = colours[..., 0] > 255 - _TOLERANCE, colours[..., 1] > 255 - _TOLERANCE
        odd = bool(((colours > _TOLERANCE) & (colours < 255 - _TOLERANCE)).any())
        if odd or (cup & ~disc).any():
            raise ValueError(f"{path}: expected red 255 for the disc and green 255 for the cup inside it, but got "
                             f"{'other levels' if odd else 'a cup outside of the disc'}; "
                             "use the masks as published")  # fmt: skip
        return cup, disc
    levels = colours[..., 0]
    distance = np.abs(levels.astype(int)[..., None] - np.array([0, 128, 255]))
    index = distance.argmin(-1)
    edge = float((np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]]) == 2).mean())
    if distance.min(-1).max() > _TOLERANCE or edge < 0.5:
        raise ValueError(f"{path}: expected 0 for the cup, 128 for the disc and 255 around them, but got the levels "
                         f"{', '.join(map(str, np.unique(levels)[:6]))} with {edge:.0%} background at the edge; "
                         "use the masks as published")  # fmt: skip
    return index == 0, index < 2


def disc_box(path: Path, *, margin: float) -> tuple[slice, slice]:
    """Rows and columns of a square around the disc of a mask file, inside the picture.

    Args:
        path: file of the mask.
        margin: on each side, in the disc's larger diameter.

    Raises:
        ValueError: no disc. The message starts with the path.
    """
    _, disc = cup_and_disc(path)
    if not disc.any():
        raise ValueError(f"{path}: expected an optic disc to crop to, but the mask has none; remove the picture")
    spans = [np.flatnonzero(disc.any(axis=axis)) for axis in (1, 0)]
    side = round(max(int(span[-1] - span[0]) + 1 for span in spans) * (1 + 2 * margin))
    box = []
    for span, size in zip(spans, disc.shape, strict=True):
        length = min(side, size)
        start = int(np.clip(round((span[0] + span[-1] + 1 - length) / 2), 0, size - length))
        box.append(slice(start, start + length))
    return box[0], box[1]


def _role(file: Path, folder: Path) -> str | None:
    """Section by the published name (g0001, n0001: training; V0001; T0001), else by a folder's name."""
    if re.fullmatch(r"[gnvtGNVT]\d{3,4}", file.stem):
        return _ROLES[file.stem[0].lower()]
    for part in reversed(file.relative_to(folder).parent.parts):
        for start, section in (("train", "training"), ("val", "validation"), ("test", "test")):
            if start in part.lower() and "crop" not in part.lower():
                return section
    return None


def _is_mask(file: Path, folder: Path) -> bool:
    parts = [part.lower() for part in file.relative_to(folder).parent.parts]
    return file.suffix.lower() == ".bmp" or any("mask" in part for part in parts)


def refuge2(
    source: str,
    out: str,
    *,
    target: str = "cup",
    crop_disc: bool = False,
    margin: float = 0.5,
    workers: int = 0,
) -> None:
    """Prepare REFUGE2 with the challenge's own sections: 400 for training, 400 for validation, 400 for test.

    Understands the challenge's archives (images .jpg; masks .bmp with 0 = cup, 128 = disc, 255 = background, in a
    folder with `Mask` in its name) and the layout of the published experiments (`Train_crop/images` and
    `Train_crop/masks`, cropped to the disc with MNet_DeepCDR; red = disc, green = cup). Names tell the section: g* and
    n* training, V* validation, T* test; other names go by folders called train, val, test. The published experiment
    also trained on the V* pictures and validated on the T* ones; here each has one role. No patient numbers are
    published.

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, labels/, datalist.json, preparation.json (what was dropped and why).
        target: cup (as published) or disc (with the cup).
        crop_disc: crop whole photographs to a square around the disc of the *mask*. For new photographs, which have no
            mask, another program must find the disc first; a figure on cropped test pictures takes that for granted.
        margin: of that square on each side, in widths of the disc.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    if target not in ("cup", "disc"):
        raise ValueError(f"--target: expected cup or disc, but got {target!r}")
    if not isinstance(crop_disc, bool):
        raise ValueError(f"--crop_disc: expected True or False, but got {crop_disc!r}")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= 10:
        raise ValueError(f"--margin: expected a number of disc widths from 0 to 10, but got {margin!r}")
    folder, place = check_places(source, out)
    preparation = Preparation("refuge2", {"target": target, "crop_disc": crop_disc, "margin": margin})
    files = list_files(folder, IMAGE_SUFFIXES, out=place)
    images, masks = (
        index_files([f for f in files if _is_mask(f, folder) == mask], lambda f: f.stem, preparation, what=what)
        for mask, what in ((False, "image"), (True, "mask"))
    )
    if not images or not masks:
        raise FileNotFoundError(f"{folder}: expected photographs and masks (.bmp, or in a folder with 'mask' in its "
                                f"name), but found {len(images)} and {len(masks)}; unpack the archives "
                                "there")  # fmt: skip
    pairs = []
    for name in match_names(images, masks, preparation):
        section = _role(images[name], folder)
        if section is None:
            preparation.drop("neither name nor folder tells the section", str(images[name]))
        else:
            pairs.append(Pair(images[name], masks[name], name, name, section))

    def read(path: Path) -> tuple[np.ndarray, str]:
        cup, disc = cup_and_disc(path)
        return (cup if target == "cup" else disc).astype(np.uint8), ""

    def crop(path: Path) -> tuple[slice, slice]:
        return disc_box(path, margin=float(margin))

    def one(pair: Pair) -> Outcome:
        return convert_picture(pair, place, read, crop=crop if crop_disc else None)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    cropped = "; cropped by the disc of the mask: at test time another program must find the disc" if crop_disc else ""
    write_sections(
        entries, place, preparation, what="pictures", seed=0, fractions=(),
        description=f"REFUGE2 optic {target}; the challenge's own sections, no patient numbers exist{cropped}",
        licence="REFUGE challenge: see its terms (research; refuge.grand-challenge.org)",
        num_classes=1, labels={"0": "background", "1": f"optic {target}"},
    )  # fmt: skip
