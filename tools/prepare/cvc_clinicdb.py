# SPDX-License-Identifier: Apache-2.0
"""CVC-ClinicDB (612 colonoscopy frames of 29 sequences, polyps) -> dataset folder of sdseg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from tools.prepare.preparation import Preparation, check_workers, read_table
from tools.prepare.stored_split import write_sections

# First frame of each of the 29 sequences. The publishers' table was not at hand: these were written from memory, and
# every boundary was then seen to coincide with a change of scene in the frames. 23 patients gave the 29 sequences, and
# which is not known here, so that the split is by sequence, not certainly by patient.
FIRST_FRAMES = (1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448,
                467, 479, 504, 529, 547, 572, 592)  # fmt: skip
LAST_FRAME = 612
# Blocks of consecutive sequences: neighbours are more likely to be of one patient than others.
FIRST_SEQUENCE = {"training": 1, "validation": 20, "test": 23}  # 408, 58 and 146 frames


def sequence_of(frame: int) -> int:
    """Sequence 1..29 of a frame 1..612.

    Raises:
        ValueError: another number.
    """
    if not 1 <= frame <= LAST_FRAME:
        raise ValueError(f"frame: expected 1..{LAST_FRAME}, but got {frame}")
    return sum(first <= frame for first in FIRST_FRAMES)


def _section_of(sequence: int) -> str:
    return next(name for name in ("test", "validation", "training") if sequence >= FIRST_SEQUENCE[name])


def _kind_of(file: Path) -> str:
    parts = [part.lower().replace("_", " ") for part in file.parent.parts]
    return "mask" if "ground truth" in parts else "image" if "original" in parts else ""


def _mirror_sequences(folder: Path) -> dict[int, str]:
    """Frame -> sequence by the table that one mirror adds (metadata.csv); empty where there is none."""
    table = next(iter(sorted(folder.rglob("metadata.csv"))), None)
    if table is None:
        return {}
    rows = read_table(table, ["frame_id", "sequence_id"])
    return {int(row["frame_id"]): row["sequence_id"] for row in rows if row["frame_id"].isdigit()}


def cvc_clinicdb(
    source: str,
    out: str,
    *,
    seed: int = 42,
    fractions: str | Sequence[float] | None = None,
    workers: int = 0,
) -> None:
    """Prepare CVC-ClinicDB: masks to one channel, split by video sequence.

    Reads `Original/*` and `Ground Truth/*` (png or tif) at any depth, as in the official archive and in the Kaggle copy
    (`PNG/Original`, ...; where both formats are there, PNG is taken). The split is fixed: sequences 1-19 for training,
    20-22 for validation, 23-29 for test. Which frame belongs to which sequence is a table from memory whose boundaries
    coincide with scene changes; a `metadata.csv` with frame_id and sequence_id is used in addition (what either table
    joins stays together). Sequences of one patient may still be in two sections (23 patients, 29 sequences).

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, labels/, datalist.json, preparation.json (what was dropped and why).
        seed: of the split, with fractions.
        fractions: share of the sequences for training, validation and test, instead of the fixed split.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    folder, target = check_places(source, out)
    preparation = Preparation("cvc_clinicdb", {"seed": seed, "fractions": fractions})
    files: dict[str, list[Path]] = {"image": [], "mask": [], "": []}
    for file in list_files(folder, IMAGE_SUFFIXES, out=target):
        files[_kind_of(file.relative_to(folder.parent))].append(file)
    if not files["image"] or not files["mask"]:
        raise FileNotFoundError(f"{folder}: expected the folders 'Original' and 'Ground Truth' with pictures, but "
                                f"found {len(files['image'])} images and {len(files['mask'])} masks; "
                                "unpack the archive there")  # fmt: skip
    named: dict[str, dict[str, Path]] = {}
    for what in ("image", "mask"):
        formats = {file.suffix.lower() for file in files[what]}
        chosen = [f for f in files[what] if f.suffix.lower() == ".png"] if ".png" in formats else files[what]
        named[what] = index_files(chosen, lambda file: file.stem, preparation, what=what)
    others = _mirror_sequences(folder)
    pairs = []
    for name in match_names(named["image"], named["mask"], preparation):
        if not name.isdigit() or not 1 <= int(name) <= LAST_FRAME:
            preparation.drop(f"not named by a frame 1..{LAST_FRAME}", str(named["image"][name]))
            continue
        frame = int(name)
        sequence = sequence_of(frame)
        section = None if fractions is not None else _section_of(sequence)
        links = (f"sequence of metadata.csv:{others[frame]}",) if frame in others else ()
        pairs.append(Pair(named["image"][name], named["mask"][name], f"{frame:03d}", f"sequence-{sequence:02d}",
                          section, links))  # fmt: skip
    coding = MaskCoding()

    def one(pair: Pair) -> Outcome:
        return convert_picture(pair, target, coding.read_picture)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    write_sections(
        entries, target, preparation, what="pictures", seed=seed, fractions=fractions or (0.7, 0.1, 0.2),
        description="CVC-ClinicDB polyps; split by video sequence (table from memory), not surely by patient",
        licence="none found in public copies; owners: Hospital Clinic and Computer Vision Center, Barcelona",
        num_classes=1, labels={"0": "background", "1": "polyp"},
    )  # fmt: skip
