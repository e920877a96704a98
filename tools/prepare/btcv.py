# SPDX-License-Identifier: Apache-2.0
"""BTCV "Beyond the Cranial Vault" (abdominal CT, 13 organs; Synapse) -> dataset folder of sdseg."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.transforms.volumes import VOLUME_SUFFIXES
from tools.prepare.labelled_volumes import convert_volume, parse_window
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
from tools.prepare.preparation import Preparation, check_workers
from tools.prepare.stored_split import write_sections

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
          "inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal gland",
          "left adrenal gland")  # fmt: skip
# Published label -> class of the eight-organ task; the other five organs are background.
EIGHT = {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)  # the published 12 of the 30 volumes
VALIDATION = (37, 39, 40)  # three of the published 18 training volumes, which had no validation part


def class_table(classes: str) -> tuple[np.ndarray, dict[str, str], int]:
    """Class of each published label 0..13, the names of the classes, and `num_classes`.

    Raises:
        ValueError: not 8, 13 or binary; the message starts with `--classes`.
    """
    table = np.zeros(len(ORGANS) + 1, np.uint8)
    names = {"0": "background"}
    if classes not in ("8", "13", "binary"):
        raise ValueError(f"--classes: expected 8, 13 or binary, but got {classes!r}")
    for label, organ in enumerate(ORGANS, start=1):
        index = label if classes == "13" else EIGHT.get(label, 0)
        if classes == "binary":
            table[label] = index > 0
        elif index:
            table[label], names[str(index)] = index, organ
    if classes == "binary":
        names["1"] = "any of eight organs"
    return table, names, 1 if classes == "binary" else len(names)


def _number(file: Path) -> str:
    match = re.fullmatch(r"(?:img|label)(\d+)", stem_of(file).lower())
    return f"{int(match.group(1)):04d}" if match else stem_of(file)


def btcv(
    source: str,
    out: str,
    *,
    classes: str | int = "8",
    window: str | Sequence[float] = (-175, 250),
    workers: int = 0,
) -> None:
    """Prepare BTCV: the published test volumes, one window for all sections, 13 labels to the classes asked for.

    Reads `RawData/Training/img/img00XX.nii.gz` and `RawData/Training/label/label00XX.nii.gz` at any depth. Test are
    the published twelve (0001 0002 0003 0004 0008 0022 0025 0029 0032 0035 0036 0038), validation 0037 0039 0040, which
    were among the published eighteen for training, and the other fifteen are for training. The published experiment
    trained with the window -175..250 but tested with -125..275; here it is one.

    Args:
        source: folder of the download (syn3193805, Abdomen/RawData.zip).
        out: dataset folder to make: images/, labels/ (uncompressed NIfTI), datalist.json, preparation.json.
        classes: 8 (spleen, kidneys, gallbladder, liver, stomach, aorta, pancreas: the published task), 13 (all), or
            binary (any of the eight).
        window: LOW,HIGH in Hounsfield units that become 0 and 1.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    limits = parse_window(window)
    if limits is None:
        raise ValueError("--window: expected two numbers such as -175,250, but got None")
    table, names, num_classes = class_table(str(classes))
    folder, target = check_places(source, out)
    preparation = Preparation("btcv", {"classes": str(classes), "window": limits})
    files = list_files(folder, VOLUME_SUFFIXES, out=target)
    images, labels = (
        index_files([f for f in files if f.parent.name.lower() == part and "testing" not in
                     [p.lower() for p in f.relative_to(folder).parts]], _number, preparation, what=part)
        for part in ("img", "label")
    )  # fmt: skip
    if not images or not labels:
        raise FileNotFoundError(f"{folder}: expected 'RawData/Training/img' and 'RawData/Training/label' with NIfTI "
                                f"volumes, but found {len(images)} and {len(labels)}; unpack RawData.zip "
                                "there")  # fmt: skip
    pairs = []
    for name in match_names(images, labels, preparation):
        if not name.isdigit():
            preparation.drop("not named img00XX", str(images[name]))
            continue
        number = int(name)
        section = "test" if number in TEST else "validation" if number in VALIDATION else "training"
        pairs.append(Pair(images[name], labels[name], f"img{name}", name, section))

    def encode(levels: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
        if levels.max() >= len(table):
            raise ValueError(f"{path}: expected the labels 0..{len(table) - 1} of BTCV, but got {levels.max()}; "
                             "use the labels as published")  # fmt: skip
        return table[levels], ""

    def one(pair: Pair) -> Outcome:
        return convert_volume(pair, target, encode, window=limits)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    write_sections(
        entries, target, preparation, what="volumes", seed=0, fractions=(),
        description="BTCV abdominal CT; the published test volumes, validation 0037 0039 0040; split by patient",
        licence="BTCV: see the terms of Synapse syn3193805",
        num_classes=num_classes, labels=names,
    )  # fmt: skip
