# SPDX-License-Identifier: Apache-2.0
"""STS-3D (cone-beam CT of teeth) -> dataset folder of sdseg."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shared.datalist import split_by_subject
from shared.transforms.volumes import VOLUME_SUFFIXES
from tools.prepare.labelled_volumes import convert_volume, parse_window, remove_small_parts
from tools.prepare.mask_pairs import (
    Outcome,
    Pair,
    check_places,
    convert_pairs,
    index_files,
    list_files,
    match_names,
    stem_of,
)
from tools.prepare.preparation import Preparation, as_numbers, check_workers
from tools.prepare.stored_split import write_sections

# Published: 0001-0009 for training, and 0010-0012 for validation *and* test. Here the test set stays, and validation
# is two of the nine (200 slices each).
TEST = ("0010", "0011", "0012")
VALIDATION = ("0007", "0008")
_PUBLISHED_NAME = r"Teeth_(\d{4})"


def foreground(levels: np.ndarray, path: object) -> tuple[np.ndarray, str]:
    """All tooth labels as 1, as the published loader has it (> 0.5)."""
    return (levels > 0).astype(np.uint8), ""


def sts3d(
    source: str,
    out: str,
    *,
    window: str | Sequence[float] = (-100, 1100),
    min_component: int = 64,
    seed: int = 42,
    fractions: str | Sequence[float] | None = None,
    workers: int = 0,
) -> None:
    """Prepare STS-3D: one window for all, cleaned labels for training, split by patient with validation != test.

    Reads `labelled/image/*.nii.gz` and `labelled/label/*.nii.gz` (same name; an ending _0000 of the image is ignored).
    With the published names Teeth_0001..0012 the split is fixed: 0010-0012 test as published, 0007-0008 validation
    (the published experiment validated on its test patients), the others training. Other names are drawn by a hash.

    Labels for training lose connected parts (26 neighbours) of fewer than `min_component` voxels and what lies where
    the windowed image is black; labels for validation and test stay as published.

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, labels/ (uncompressed NIfTI), datalist.json, preparation.json.
        window: LOW,HIGH in the units of the files that become 0 and 1, for every volume.
        min_component: see above; 0 leaves all labels as published.
        seed: of a drawn split.
        fractions: share of the patients for training, validation and test, instead of the fixed split.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    limits = parse_window(window)
    if isinstance(min_component, bool) or not isinstance(min_component, int) or min_component < 0:
        raise ValueError(f"--min_component: expected a number of voxels or 0, but got {min_component!r}")
    folder, target = check_places(source, out)
    if limits is None:
        raise ValueError("--window: expected two numbers such as -100,1100, but got None")
    preparation = Preparation("sts3d", {"window": limits, "min_component": min_component, "seed": seed,
                                        "fractions": fractions})  # fmt: skip
    files = list_files(folder, VOLUME_SUFFIXES, out=target)
    images, labels = (
        index_files([f for f in files if f.parent.name.lower() in names],
                    lambda f: stem_of(f).removesuffix("_0000"), preparation, what=names[0])
        for names in (("image", "images"), ("label", "labels"))
    )  # fmt: skip
    if not images or not labels:
        raise FileNotFoundError(f"{folder}: expected 'labelled/image' and 'labelled/label' with NIfTI volumes, but "
                                f"found {len(images)} and {len(labels)}; unpack the labelled part there")  # fmt: skip
    pairs = _with_sections([Pair(images[name], labels[name], name, name)
                            for name in match_names(images, labels, preparation)],
                           preparation, seed=seed, fractions=fractions)  # fmt: skip

    def clean(label: np.ndarray, image: np.ndarray) -> np.ndarray:
        return np.where(image > limits[0], remove_small_parts(label, voxels=min_component), 0).astype(np.uint8)

    def one(pair: Pair) -> Outcome:
        cleaned = clean if pair.section == "training" and min_component else None
        return convert_volume(pair, target, foreground, window=limits, clean=cleaned)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    write_sections(
        entries, target, preparation, what="volumes", seed=seed, fractions=(),
        description="STS-3D teeth in cone-beam CT; split by patient; labels of the training section cleaned",
        licence="STS challenge (Zenodo): see its terms",
        num_classes=1, labels={"0": "background", "1": "tooth"},
    )  # fmt: skip


def _with_sections(
    pairs: Sequence[Pair], preparation: Preparation, *, seed: int, fractions: str | Sequence[float] | None
) -> list[Pair]:
    """Pairs with sections, needed before the conversion as only training labels are cleaned."""
    numbers = [re.fullmatch(_PUBLISHED_NAME, pair.name) for pair in pairs]
    if fractions is None and all(numbers):
        found = [match.group(1) for match in numbers if match is not None]
        return [
            replace(pair, section="test" if n in TEST else "validation" if n in VALIDATION else "training")
            for pair, n in zip(pairs, found, strict=True)
        ]
    if fractions is None:
        preparation.warn("names are not Teeth_0001..0012: sections drawn", pairs[0].name if pairs else "none")
    return draw_sections(pairs, as_numbers((0.6, 0.2, 0.2) if fractions is None else fractions), seed)


def draw_sections(pairs: Sequence[Pair], fractions: Sequence[float], seed: int) -> list[Pair]:
    """Pairs with drawn sections, by `shared.datalist.split_by_subject`."""
    if not pairs:
        return []
    split = split_by_subject([{"subject": pair.subject} for pair in pairs], fractions, seed)
    section = {item["subject"]: name for name, part in split.items() for item in part}
    return [replace(pair, section=section[pair.subject]) for pair in pairs]
