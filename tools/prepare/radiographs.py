# SPDX-License-Identifier: Apache-2.0
"""What the preparations of radiographs with text have in common: their conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from shared.transforms.images import ResizeShorterSide, read_radiograph
from tools.prepare.preparation import Preparation, check_workers, split_and_write, write_png

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


@dataclass
class Candidate:
    """One radiograph to convert: source file, target relative to the dataset folder, and its other item keys."""

    source: Path
    target: str
    item: dict[str, Any]


def _is_done(path: Path, size: int, bits: int) -> bool:
    """Whether an earlier run left this output with the wanted size and depth (only the header is read)."""
    try:
        with Image.open(path) as picture:
            return min(picture.size) == size and picture.mode.startswith("L" if bits == 8 else "I")
    except (OSError, SyntaxError):
        return False


def convert(candidate: Candidate, out: Path, *, size: int, bits: int) -> tuple[bool, str]:
    """Convert one radiograph unless it is there already.

    Returns:
        (whether the output exists now, "" or the error that names the file).
    """
    target = out / candidate.target
    if _is_done(target, size, bits):
        return True, ""
    try:
        image = torch.from_numpy(read_radiograph(candidate.source)).unsqueeze(0)
    except (ValueError, FileNotFoundError) as error:
        return False, str(error)
    write_png(target, ResizeShorterSide(size)(image), bits=bits)
    return True, ""


def check_options(*, size: int, bits: int, workers: int) -> None:
    """Refuse impossible options before the first file is read."""
    if bits not in (8, 16):
        raise ValueError(f"--bits: expected 8 or 16, but got {bits!r}")
    if not isinstance(size, int) or size < 16:
        raise ValueError(f"--size: expected at least 16 pixels, but got {size!r}")
    check_workers(workers)


def finish(
    candidates: Sequence[Candidate],
    out: Path,
    preparation: Preparation,
    *,
    size: int,
    bits: int,
    seed: int,
    fractions: str | Sequence[float],
    workers: int,
    **description: Any,
) -> Preparation:
    """Convert the images, split by subject, write `datalist.json` and `preparation.json`.

    Raises:
        ValueError: no image is left, two images have the same target, or there are too few subjects to split.
    """
    targets: dict[str, Path] = {}
    for candidate in candidates:
        if candidate.target in targets:
            raise ValueError(
                f"{candidate.source}: expected a name of its own, but {targets[candidate.target]} would also become "
                f"{candidate.target}; rename one"
            )
        targets[candidate.target] = candidate.source

    def one(candidate: Candidate) -> tuple[bool, str]:
        return convert(candidate, out, size=size, bits=bits)

    # Threads suffice: decoding, resizing and encoding all release Python's lock.
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        running = pool.map(one, candidates) if workers else map(one, candidates)
        results = list(tqdm(running, total=len(candidates), desc=preparation.name, unit="image", disable=None))
    items = []
    for candidate, (done, error) in zip(candidates, results, strict=True):
        if done:
            items.append({"image": candidate.target, **candidate.item})
        else:
            preparation.drop("unreadable image", error)
    return split_and_write(items, out, preparation, what="images", seed=seed, fractions=fractions, **description)


def positive_labels(labels: Mapping[str, str], names: Iterable[str]) -> dict[str, float]:
    """Label columns that hold a number: 1 positive, 0 negative, -1 uncertain."""
    return {name: float(labels[name]) for name in names if labels.get(name, "") not in ("", "-")}
