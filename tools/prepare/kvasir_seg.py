# SPDX-License-Identifier: Apache-2.0
"""Kvasir-SEG (1000 endoscopy pictures, polyps) -> dataset folder of sdseg."""

from __future__ import annotations

from collections.abc import Sequence

from tools.prepare.mask_coding import MaskCoding
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


def kvasir_seg(
    source: str,
    out: str,
    *,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
) -> None:
    """Prepare Kvasir-SEG: JPEG masks to clean one-channel PNG, split by picture.

    Reads `images/*.jpg` and `masks/*.jpg` (at any depth, as in `Kvasir-SEG/images`). The set carries no patient number:
    the unit of the split is the picture (drawn by a hash of its name, so it does not depend on the order of files), and
    pictures of one patient may be in two sections. Only pictures of equal content are kept together. The masks are
    JPEG, whose edges are grey; they are cut at half.

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, labels/, datalist.json, preparation.json (what was dropped and why).
        seed: of the split.
        fractions: share of the pictures for training, validation and test; published: 800, 100, 100.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    folder, target = check_places(source, out)
    preparation = Preparation("kvasir_seg", {"seed": seed, "fractions": fractions})
    files = list_files(folder, IMAGE_SUFFIXES, out=target)
    images, masks = (
        index_files([f for f in files if f.parent.name.lower() == name], lambda f: f.stem, preparation, what=what)
        for name, what in (("images", "image"), ("masks", "mask"))
    )
    if not images or not masks:
        raise FileNotFoundError(f"{folder}: expected the folders 'images' and 'masks' with pictures, but found "
                                f"{len(images)} images and {len(masks)} masks; unpack kvasir-seg.zip "
                                "there")  # fmt: skip
    names = match_names(images, masks, preparation)
    pairs = [Pair(images[name], masks[name], name, name) for name in names]
    coding = MaskCoding()

    def one(pair: Pair) -> Outcome:
        return convert_picture(pair, target, coding.read_picture)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    write_sections(
        entries, target, preparation, what="pictures", seed=seed, fractions=fractions,
        description="Kvasir-SEG polyps; split by picture, as no patient numbers are published",
        licence="see the terms of use on datasets.simula.no/kvasir-seg (research and education)",
        num_classes=1, labels={"0": "background", "1": "polyp"},
    )  # fmt: skip
