# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data of the `sdseg` bundle: coloured pictures with exact masks, as a ready dataset folder.

    python -m tools.phantoms sdseg --out DIR --num_images 400 [--size 160,128] [--seed 0] [--kind polyp|fundus|both]
        [--split 0.7,0.15,0.15]

`polyp`: endoscopy pictures, several of a recording, the mask is the visible part of the polyp. `fundus`: photographs of
the back of the eye around the optic disc, several of an eye, the mask is the optic cup (as in REFUGE2's use by SDSeg).
Made of formulas; no patient and no picture stands behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.datalist import FILE_NAME, split_by_subject, write_datalist
from shared.files import atomic_path
from tools.phantoms import fundus, polyps
from tools.phantoms.dataset_folder import empty_folder, numbers, shares_of

__all__ = ["KINDS", "make_dataset", "make_group"]

SCENES = {"polyp": polyps, "fundus": fundus}
KINDS = {"polyp": ("polyp",), "fundus": ("fundus",), "both": ("polyp", "fundus")}
TARGETS = {"polyp": "polyp", "fundus": "optic cup", "both": "polyp or optic cup"}
MAX_PICTURES = 6  # of a group
MIN_SIDE = 32
# last words of the seed sequence: independent streams for the groups and their pictures
_GROUP, _PICTURE = 4, 5


def make_dataset(
    out: str,
    num_images: int = 400,
    size: Sequence[int] | str = (160, 128),
    seed: int = 0,
    kind: str = "polyp",
    split: Sequence[float] | str = (0.7, 0.15, 0.15),
    overwrite: bool = False,
) -> str:
    """Write a dataset folder: `images/g0001_1.png` (RGB), `masks/g0001_1.png` (0 or 255) and `datalist.json`.

    A group (the pictures of one recording or one eye, 2 to `MAX_PICTURES` of them) shares anatomy and lighting and is
    never split. Picture k of a group is the same for every number of pictures (only its section moves); the same
    arguments give the same bytes. A few pictures show no target and have an empty mask.

    Args:
        out: folder to write; made if absent.
        num_images: number of pictures.
        size: height and width in pixels, at least `MIN_SIDE`.
        seed: seed of everything, >= 0.
        kind: what the pictures show: `polyp`, `fundus`, or `both` (every other group).
        split: shares of the groups for training, validation and test, summing to 1.
        overwrite: replace a dataset that this function wrote into `out` before.

    Returns:
        Path of `datalist.json`. Its items hold `image`, `label`, `group` (also as `subject`) and `kind`.

    Raises:
        ValueError: an illegal option, named first in the message.
        FileExistsError: `out` is not empty and `overwrite` is false.
    """
    sides = numbers("size", size, count=2)
    shares = shares_of(split)
    if any(side != int(side) for side in sides) or min(sides) < MIN_SIDE:
        raise ValueError(f"size: expected height and width as whole numbers of at least {MIN_SIDE}, got {size!r}")
    if num_images < (needed := MAX_PICTURES * sum(share > 0 for share in shares)):
        raise ValueError(
            f"num_images: expected at least {needed}, {MAX_PICTURES} for each section with a share, got {num_images}"
        )
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    folder = empty_folder(Path(out), overwrite=overwrite, made=(FILE_NAME, "images/g????_?.png", "masks/g????_?.png"))
    height_width = (int(sides[0]), int(sides[1]))
    items: list[dict[str, Any]] = []
    number = 0
    while len(items) < num_images:
        number += 1
        left = num_images - len(items)
        items += _write_group(folder, number, limit=left, size=height_width, seed=seed, kind=kind)
    sections = split_by_subject(items, shares, seed=seed)
    # written last and renamed into place: a folder with a datalist is complete
    return str(
        write_datalist(
            folder,
            sections,
            name="sdseg phantoms",
            description=f"Synthetic pictures with masks: num_images={num_images}, size={list(height_width)}, "
            f"seed={seed}, kind={kind}, split={shares}",
            num_classes=1,
            labels={"0": "background", "1": TARGETS[kind]},
        )
    )


def make_group(
    number: int, *, size: tuple[int, int] = (160, 128), seed: int = 0, kind: str = "polyp"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pictures of group `number` (from 1): pairs of uint8 (H, W, 3) and mask uint8 (H, W), 0 or 255.

    Options as in `make_dataset`.
    """
    scene = SCENES[_kind_of_group(number, kind)]
    rng = np.random.default_rng([seed, number, _GROUP])
    count = int(rng.integers(2, MAX_PICTURES + 1))
    shared = scene.draw_sequence(rng)
    pairs = []
    for position in range(count):
        picture, mask = scene.render(shared, size, np.random.default_rng([seed, number, position, _PICTURE]))
        pairs.append((picture, mask.astype(np.uint8) * 255))
    return pairs


def _kind_of_group(number: int, kind: str) -> str:
    return KINDS[kind][number % len(KINDS[kind])]


def _write_group(folder: Path, number: int, *, limit: int, **options: Any) -> list[dict[str, Any]]:
    group = f"g{number:04d}"
    kind = _kind_of_group(number, options["kind"])
    items = []
    for position, arrays in enumerate(make_group(number, **options)[:limit], start=1):
        name = f"{group}_{position}.png"
        for place, array in zip(("images", "masks"), arrays, strict=True):
            with atomic_path(folder / place / name) as temporary:
                Image.fromarray(array).save(temporary, format="PNG")
        # a group is a subject here: the split goes by `subject`, evaluation by `group`
        files = {"image": f"images/{name}", "label": f"masks/{name}"}
        items.append(files | {"subject": group, "group": group, "kind": kind})
    return items
