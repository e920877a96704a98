# SPDX-License-Identifier: Apache-2.0
"""Any folder of radiographs with texts -> dataset folder of cxr_ldm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.reports import report_sentences, split_sentences
from tools.prepare.preparation import Preparation, check_folder, decode_text, read_table
from tools.prepare.radiographs import IMAGE_SUFFIXES, Candidate, check_options, finish


def _text(raw: str) -> str:
    """Findings and impression where the text has such headers, else all of it."""
    return " ".join(report_sentences(raw) or split_sentences(raw))


def _rows_of_table(folder: Path, table: Path, preparation: Preparation) -> list[tuple[Path, dict[str, str]]]:
    rows = []
    for row in read_table(table, ["image", "text"]):
        file = folder / row["image"]
        if not row["image"] or not file.is_file():
            preparation.drop("image file missing", str(file))
            continue
        keys = ("subject", "study", "view")
        rows.append((file, {"text": row["text"]} | {key: row[key] for key in keys if row.get(key)}))
    return rows


def _rows_of_files(folder: Path, out: Path, preparation: Preparation) -> list[tuple[Path, dict[str, str]]]:
    rows = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES or out.resolve() in file.resolve().parents:
            continue
        words = file.with_suffix(".txt")
        if not words.is_file():
            preparation.drop("text file missing", str(words))
            continue
        try:
            rows.append((file, {"text": decode_text(words.read_bytes(), words)}))
        except ValueError as error:
            preparation.drop("unreadable text", str(error))
    return rows


def _inside(file: Path, folder: Path) -> Path:
    try:
        return file.resolve().relative_to(folder.resolve())
    except ValueError:
        return Path(file.name)


def image_text_folder(
    source: str,
    out: str,
    *,
    table: str | None = None,
    size: int = 512,
    bits: int = 8,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
) -> None:
    """Prepare a folder of PNG, JPEG or DICOM radiographs with texts: resize, clean the text, split by subject.

    Texts come from a CSV table (columns image, text, and optionally subject, study, view; image paths relative to
    `source`) or, without a table, from files of the same name that end in .txt. Where no subject is given, each image
    is a subject of its own: then the same person may be in two parts, so give subjects if you know them.

    Args:
        source: folder with the images.
        out: dataset folder to make: images/, datalist.json, preparation.json (what was dropped and why).
        table: the CSV file; by default the only .csv file in `source`.
        size: pixels of the shorter side; the aspect ratio is kept.
        bits: depth of the written PNG, 8 or 16.
        seed: of the split.
        fractions: share of the subjects for training, validation and test.
        workers: threads; 0 works in the main thread.
    """
    check_options(size=size, bits=bits, workers=workers)
    folder, target = check_folder(source, "--source"), Path(str(out))
    tables = [Path(table)] if table else sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise ValueError(f"{folder}: expected one .csv file, but got {', '.join(t.name for t in tables)}; "
                         "name one with --table")  # fmt: skip
    preparation = Preparation(
        "image_text_folder",
        {"table": tables[0] if tables else None, "size": size, "bits": bits, "seed": seed, "fractions": fractions},
    )
    if tables and not tables[0].is_file():
        raise FileNotFoundError(f"{tables[0]}: expected a table (--table), but it does not exist; correct the path")
    rows = _rows_of_table(folder, tables[0], preparation) if tables else _rows_of_files(folder, target, preparation)
    candidates = []
    for file, values in rows:
        text = _text(values.pop("text"))
        if not text:
            preparation.drop("empty text", str(file))
            continue
        place = _inside(file, folder).with_suffix("")
        item = {"text": text, "subject": place.as_posix()} | values
        candidates.append(Candidate(file, f"images/{place.as_posix()}.png", item))
    finish(
        candidates, target, preparation, size=size, bits=bits, seed=seed, fractions=fractions, workers=workers,
        description="Images with text of a folder; split by subject",
    )  # fmt: skip
