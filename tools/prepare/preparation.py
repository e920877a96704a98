# SPDX-License-Identifier: Apache-2.0
"""What all preparations have in common: counting what is kept and dropped, tables, split and writing."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.datalist import find_leaks, split_by_subject, write_datalist
from shared.files import atomic_path, save_json


@dataclass
class Preparation:
    """Record of what was kept, and what was dropped or is doubtful and why; it becomes `preparation.json`."""

    name: str
    options: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        """Note that `what` (a file, study or image id) is left out for `reason`."""
        self.dropped.setdefault(reason, []).append(what)

    def warn(self, reason: str, what: str) -> None:
        """Note that `what` is kept, but that the user should look at it."""
        self.warnings.setdefault(reason, []).append(what)

    def write(self, out: Path) -> Path:
        """Write `preparation.json` atomically."""
        content = {
            "name": self.name,
            "options": {key: str(value) if isinstance(value, Path) else value for key, value in self.options.items()},
            "counts": self.counts
            | {f"dropped: {reason}": len(what) for reason, what in self.dropped.items()}
            | {f"warning: {reason}": len(what) for reason, what in self.warnings.items()},
            "dropped": self.dropped,
            "warnings": self.warnings,
        }
        save_json(content, out / "preparation.json")
        return out / "preparation.json"

    def __str__(self) -> str:
        lines = [f"{self.name}: " + ", ".join(f"{count} {what}" for what, count in self.counts.items())]
        lines += [f"  dropped, {reason}: {len(what)} (first: {what[0]})" for reason, what in self.dropped.items()]
        lines += [f"  warning, {reason}: {len(what)} (first: {what[0]})" for reason, what in self.warnings.items()]
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


def as_numbers(value: str | Sequence[float]) -> tuple[float, ...]:
    """`0.8,0.1,0.1` from the command line, as fire passes it (a tuple) or as a string."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--fractions: expected three numbers like 0.8,0.1,0.1, but got {value!r}") from error


def check_workers(workers: int) -> None:
    """Refuse an impossible number of threads."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"--workers: expected 0 or a number of threads, but got {workers!r}")


def split_and_write(
    items: Sequence[Mapping[str, Any]],
    out: Path,
    preparation: Preparation,
    *,
    what: str,
    seed: int,
    fractions: str | Sequence[float],
    **description: Any,
) -> Preparation:
    """Split items by subject, write `datalist.json` and `preparation.json`, and print the counts.

    Args:
        items: datalist items with `subject`; their files are written already.
        out: dataset folder.
        preparation: the record, to which the counts are added.
        what: what an item is called in the counts and in the error: images, pairs.
        seed: of the split.
        fractions: share of the subjects for training, validation and test.
        description: further top-level entries of `datalist.json`.

    Raises:
        ValueError: no item is left, or there are too few subjects to split.
    """
    preparation.counts[what] = len(items)
    preparation.counts["subjects"] = len({item["subject"] for item in items})
    out.mkdir(parents=True, exist_ok=True)
    if not items:
        record = preparation.write(out)
        raise ValueError(f"{record}: expected {what} to keep, but none is left; this file says why each was dropped")
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
