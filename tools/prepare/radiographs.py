# SPDX-License-Identifier: Apache-2.0
"""What the preparations of radiographs with text have in common: conversion, counting, split and writing."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from shared.datalist import find_leaks, split_by_subject, write_datalist
from shared.files import atomic_path, save_json
from shared.transforms.images import ResizeShorterSide, read_radiograph

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


@dataclass
class Candidate:
    """One radiograph to convert: source file, target relative to the dataset folder, and its other item keys."""

    source: Path
    target: str
    item: dict[str, Any]


@dataclass
class Preparation:
    """Record of what was kept and what was dropped and why; it becomes `preparation.json`."""

    name: str
    options: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        """Note that `what` (a file, study or image id) is left out for `reason`."""
        self.dropped.setdefault(reason, []).append(what)

    def write(self, out: Path) -> Path:
        """Write `preparation.json` atomically."""
        content = {
            "name": self.name,
            "options": {key: str(value) if isinstance(value, Path) else value for key, value in self.options.items()},
            "counts": self.counts | {f"dropped: {reason}": len(what) for reason, what in self.dropped.items()},
            "dropped": self.dropped,
        }
        save_json(content, out / "preparation.json")
        return out / "preparation.json"

    def __str__(self) -> str:
        lines = [f"{self.name}: " + ", ".join(f"{count} {what}" for what, count in self.counts.items())]
        lines += [f"  dropped, {reason}: {len(what)} (first: {what[0]})" for reason, what in self.dropped.items()]
        return "\n".join(lines)


def write_png(path: Path, image: torch.Tensor, *, bits: int = 8) -> None:
    """Write (1, H, W) in [0, 1] as grey PNG, lossless but for the rounding to 8 or 16 bits, atomically.

    `monai.data.PILWriter` does not fit: it transposes, knows 8 bits only and writes in place.
    """
    levels = np.rint(image[0].numpy().astype(np.float64) * (2**bits - 1))
    encoded = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8 if bits == 8 else np.uint16)).save(encoded, "PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


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
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"--workers: expected 0 or a number of threads, but got {workers!r}")


def as_numbers(value: str | Sequence[float]) -> tuple[float, ...]:
    """`0.8,0.1,0.1` from the command line, as fire passes it (a tuple) or as a string."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--fractions: expected three numbers like 0.8,0.1,0.1, but got {value!r}") from error


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
    preparation.counts["images"] = len(items)
    preparation.counts["subjects"] = len({item["subject"] for item in items})
    out.mkdir(parents=True, exist_ok=True)
    if not items:
        record = preparation.write(out)
        raise ValueError(f"{record}: expected images to keep, but none is left; this file says why each was dropped")
    split = split_by_subject(items, as_numbers(fractions), seed)
    assert not find_leaks(split)
    preparation.counts |= {section: len(part) for section, part in split.items()}
    write_datalist(out, split, name=preparation.name, **description)
    preparation.write(out)
    print(preparation)
    return preparation


def read_table(file: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file (`.gz` too), after checking that the columns are there.

    Raises:
        ValueError: a column is missing, or the file is not text; the message names file and column.
    """
    try:
        with (
            gzip.open(file, "rt", newline="", encoding="utf-8-sig")
            if file.suffix == ".gz"
            else open(file, newline="", encoding="utf-8-sig") as stream
        ):
            reader = csv.DictReader(stream)
            missing = [column for column in columns if column not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(
                    f"{file}: expected the column {missing[0]!r}, but got {', '.join(reader.fieldnames or ['none'])}; "
                    "use the table as published or rename its columns"
                )
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if key is not None}
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{file}: expected a CSV table in UTF-8, but {error}; download it anew") from error


def decode_text(content: bytes, name: str | os.PathLike) -> str:
    """Content of a text file, which must be UTF-8 (plain ASCII is).

    Raises:
        ValueError: it is not; the message names the file. Guessing would put wrong letters into the training text.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8, but {error.reason} at byte {error.start}; convert it "
                         "(iconv -f latin1 -t utf-8)") from error  # fmt: skip


def check_folder(path: str | os.PathLike, option: str) -> Path:
    """The folder behind an option, which must exist."""
    folder = Path(str(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder ({option}), but it does not exist; correct the path")
    return folder


def positive_labels(labels: Mapping[str, str], names: Iterable[str]) -> dict[str, float]:
    """Label columns that hold a number: 1 positive, 0 negative, -1 uncertain."""
    return {name: float(labels[name]) for name in names if labels.get(name, "") not in ("", "-")}
