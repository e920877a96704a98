# SPDX-License-Identifier: Apache-2.0
"""The list of a dataset folder: `datalist.json` in Decathlon form (`training`, `validation`, `test`).

Paths inside are relative to the folder, so that a data set can be moved, mounted or copied as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.files import save_json

FILE_NAME = "datalist.json"
SECTIONS = ("training", "validation", "test")
SINGLE_KEYS = ("dwi", "bval", "bvec", "ndi", "odi", "fwf")  # of the others, a list means channels
PATH_KEYS = ("image", "label", "report", "t1w", "flair", "t2w", "pdw", "mask", *SINGLE_KEYS)


def as_paths(value: object, key: str) -> list[str] | None:
    """A path, or a list of paths where the key may have one, as a list; None where the value is neither."""
    values = value if isinstance(value, list) and key not in SINGLE_KEYS else [value]
    paths = [v for v in values if isinstance(v, str) and v]
    return paths if paths and len(paths) == len(values) else None


def read_datalist(dataset_dir: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
    """Read the sections of `dataset_dir/datalist.json` as they are written (relative paths, nothing checked on disk).

    A bare path in a section (the Decathlon form of `test`) becomes `{"image": path}`. Other top-level entries
    (`name`, `description`, ...) are left out; `read_description` has them.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is not JSON, has none of the sections, or an item is not an object.
    """
    file = Path(dataset_dir) / FILE_NAME
    content = _read_content(Path(dataset_dir))
    sections: dict[str, list[dict[str, Any]]] = {}
    for section in SECTIONS:
        if section not in content:
            continue
        items = content[section]
        if not isinstance(items, list):
            raise ValueError(f"{file}: expected a list under {section!r}, but got {type(items).__name__}")
        sections[section] = []
        for index, item in enumerate(items):
            item = {"image": item} if isinstance(item, str) else item
            if not isinstance(item, dict):
                raise ValueError(
                    f"{file}: expected an object at {section}[{index}], but got {type(item).__name__}; "
                    'an item looks like {"image": "images/1.png", "text": "...", "subject": "1"}'
                )
            sections[section].append(dict(item))
    return sections


def _read_content(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a dataset folder, but it does not exist; set `dataset_dir` to a folder that holds "
            f"{FILE_NAME} (python -m tools.prepare makes one)"
        )
    file = folder / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: expected this file in the dataset folder, but it does not exist; python -m tools.prepare "
            "writes one, or write it by hand (docs: Decathlon form, paths relative to the folder)"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8, and of integers without end
        raise ValueError(f"{file}: expected JSON in UTF-8, but {error}; correct the file or write it anew") from error
    if not isinstance(content, dict) or not any(section in content for section in SECTIONS):
        raise ValueError(
            f"{file}: expected an object with the lists {', '.join(SECTIONS)}, but got "
            f"{sorted(content) if isinstance(content, dict) else type(content).__name__}; rename the lists"
        )
    return content


def read_description(dataset_dir: str | os.PathLike) -> dict[str, Any]:
    """Top-level entries beside the sections (`name`, `num_classes`, `labels`, ...); errors as `read_datalist`."""
    return {key: value for key, value in _read_content(Path(dataset_dir)).items() if key not in SECTIONS}


def _check_required(where: str, item: Mapping[str, Any], required: str | Sequence[str]) -> None:
    if not any(key in item for key in PATH_KEYS):
        raise ValueError(
            f"{where}: expected at least one file key of {', '.join(PATH_KEYS)}, but got the keys {sorted(item)}"
        )
    for alternatives in [required] if isinstance(required, str) else required:
        keys = alternatives.split("|")
        if not any(item.get(key) not in (None, "", []) for key in keys):
            raise ValueError(
                f"{where}: expected {' or '.join(repr(key) for key in keys)}, but got the keys {sorted(item)}; "
                "add it to the item or remove the item"
            )


def _missing_file(where: str, key: str, written: str, full: str) -> FileNotFoundError:
    if os.path.isabs(written):
        hint = "the path is absolute and seems to belong to another machine; write it relative to the dataset folder"
    elif "\\" in written:
        hint = "the path holds backslashes; write forward slashes"
    else:
        hint = "correct the path (it is relative to the dataset folder) or remove the item"
    return FileNotFoundError(f"{full}: expected this file ({key!r} of {where}), but it does not exist; {hint}")


def load_datalist(
    dataset_dir: str | os.PathLike,
    section: str = "training",
    *,
    required: str | Sequence[str] = (),
    check_files: bool = True,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Load one section of a dataset folder with absolute paths.

    `monai.data.load_decathlon_datalist` does not fit: for every key but `image` it joins *any* string that happens to
    name something in the folder (a subject "p10" beside a folder `p10`, a text "test"), it leaves a missing report or
    mask as a relative path, and it fails with an IndexError on an empty `test` list.

    Args:
        dataset_dir: folder that holds `datalist.json`.
        section: `training`, `validation` or `test`.
        required: keys each item must have with a value; `"text|report"` means one of both. Every item needs at least
            one file key (`PATH_KEYS`) in any case.
        check_files: look for each file now (one `stat` per file), so that a missing one stops the run at its start.
        limit: only the first so many items of the section, which alone are then checked; None loads all.

    Returns:
        A list of items, new dictionaries; values of `PATH_KEYS` (a path or a list of paths) are absolute strings,
        all other values are as written.

    Raises:
        FileNotFoundError: the folder, `datalist.json` or a file of an item is missing.
        ValueError: not JSON, section absent or empty, a required key absent, a path that is not a string, or a limit
            below 1.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: expected a number of items of at least 1, or null for all, but got {limit!r}")
    folder = Path(dataset_dir)
    sections = read_datalist(folder)
    file = folder / FILE_NAME
    if section not in sections:
        raise ValueError(
            f"{file}: expected a section {section!r}, but the file has {', '.join(sections)}; "
            "split the data again (python -m tools.prepare) or name another section"
        )
    if not sections[section]:
        raise ValueError(f"{file}: expected items in section {section!r}, but the list is empty; give it a fraction "
                         "of the subjects when the data set is prepared")  # fmt: skip
    root = os.path.abspath(folder)
    items = sections[section][:limit]
    for index, item in enumerate(items):
        where = f"{file}: {section}[{index}]"
        _check_required(where, item, required)
        for key in PATH_KEYS:
            if key not in item:
                continue
            written = as_paths(item[key], key)
            if written is None:
                wanted, got = "a path" if key in SINGLE_KEYS else "a path or a list of paths", item[key]
                raise ValueError(
                    f"{where}: expected {wanted} under {key!r}, but got {got!r}; correct it or remove the key"
                )
            full = [os.path.normpath(os.path.join(root, path)) for path in written]
            if check_files:
                for path, absolute in zip(written, full, strict=True):
                    if not os.path.isfile(absolute):
                        raise _missing_file(where, key, path, absolute)
            item[key] = full if isinstance(item[key], list) else full[0]
    return items


def split_by_subject(
    items: Iterable[Mapping[str, Any]],
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 42,
    *,
    sections: Sequence[str] = SECTIONS,
) -> dict[str, list[dict[str, Any]]]:
    """Split items so that no subject is in two sections (an image-level split puts a patient in train and test).

    Subjects are ordered by the SHA-256 of seed and subject and cut by the fractions, so the result depends neither on
    the order of the items nor on a random generator's version, and a few subjects more move only the subjects
    at the cuts. `monai.data.partition_dataset` does not fit: it shuffles positions, and its rounding leaves
    small validation sets empty.

    Args:
        items: dictionaries with a non-empty `subject`.
        fractions: share of the *subjects* per section, each >= 0; they are divided by their sum.
        seed: another seed gives another split.
        sections: names of the parts, as many as fractions.

    Returns:
        Section name -> items, sorted by subject, then by content. A section whose fraction is above 0 gets at least one
        subject.

    Raises:
        ValueError: item without subject, bad fractions, or fewer subjects than sections with a fraction above 0.
    """
    if len(fractions) != len(sections) or any(f < 0 for f in fractions) or not 0 < sum(fractions) < math.inf:
        raise ValueError(f"fractions: expected {len(sections)} numbers >= 0 with a sum above 0, but got {fractions}")
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for index, item in enumerate(items):
        subject = item.get("subject")
        if subject is None or subject == "":
            raise ValueError(
                f"subject: expected one per item (the unit of the split), but item {index} has none; give each item "
                "its patient number, or the image's own name where patients are unknown"
            )
        by_subject.setdefault(str(subject), []).append(dict(item))
    wanted = [section for section, fraction in zip(sections, fractions, strict=True) if fraction > 0]
    if len(by_subject) < len(wanted):
        raise ValueError(
            f"fractions: expected at least {len(wanted)} subjects for {', '.join(wanted)}, but got {len(by_subject)}; "
            "set a fraction to 0 or add subjects"
        )

    def order(subject: str) -> bytes:
        return hashlib.sha256(f"{seed}:{subject}".encode()).digest()

    ranked = sorted(by_subject, key=order)
    # one subject is set aside for each wanted part; the rest is shared out by cumulative rounding
    counts, total, cumulated, given = [], sum(fractions), 0.0, 0
    for fraction in fractions:
        cumulated += fraction / total
        until = round(cumulated * len(ranked))
        counts.append(max(until - given, 0))
        given += counts[-1]
    for index, fraction in enumerate(fractions):
        if fraction > 0 and counts[index] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[index] = 1
    split: dict[str, list[dict[str, Any]]] = {}
    start = 0
    for section, count in zip(sections, counts, strict=True):
        chosen = sorted(ranked[start : start + count])
        start += count
        split[section] = [
            item
            for subject in chosen
            for item in sorted(by_subject[subject], key=lambda i: json.dumps(i, sort_keys=True, default=str))
        ]
    return split


def find_leaks(datalist: Mapping[str, Any], *, key: str = "subject") -> dict[str, list[str]]:
    """Values of `key` (patients, say) that occur in more than one section -> the names of those sections.

    Compared as text: a subject 7 and a subject "7" are the same.
    """
    seen: dict[str, list[str]] = {}
    for section in SECTIONS:
        for item in datalist.get(section, []):
            value = item.get(key) if isinstance(item, Mapping) else None
            if value not in (None, "") and section not in (found := seen.setdefault(str(value), [])):
                found.append(section)
    return {value: found for value, found in seen.items() if len(found) > 1}


def write_datalist(
    dataset_dir: str | os.PathLike, sections: Mapping[str, Sequence[Mapping[str, Any]]], **description: Any
) -> Path:
    """Write `dataset_dir/datalist.json` atomically.

    Args:
        dataset_dir: existing or new folder.
        sections: section name -> items; paths relative to the folder, or absolute and inside it (then shortened).
        description: further top-level entries, such as `name`, `description`, `licence`.

    Returns:
        The path of the written file.

    Raises:
        ValueError: a path outside the folder, or a subject in two sections.
    """
    folder = Path(dataset_dir)
    file = folder / FILE_NAME
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise ValueError(f"{file}: expected the sections {', '.join(SECTIONS)}, but got {sorted(unknown)}")
    leaks = find_leaks(sections)
    if leaks:
        subject = next(iter(leaks))
        raise ValueError(
            f"{file}: expected each subject in one section, but {len(leaks)} are in several, the first {subject!r} in "
            f"{', '.join(leaks[subject])}; split with shared.datalist.split_by_subject"
        )
    root = os.path.abspath(folder)
    content: dict[str, Any] = dict(description)
    for section in SECTIONS:
        if section not in sections:
            continue
        content[section] = []
        for index, item in enumerate(sections[section]):
            written = dict(item)
            for key in PATH_KEYS:
                paths = as_paths(written.get(key), key)
                if paths is None:
                    continue
                relative = [os.path.relpath(os.path.join(root, path), root) for path in paths]
                if any(path.split(os.sep)[0] == os.pardir for path in relative):
                    raise ValueError(
                        f"{file}: expected paths inside the dataset folder, but {key!r} of {section}[{index}] is "
                        f"{written[key]!r}; copy the file into the folder"
                    )
                posix = [path.replace(os.sep, "/") for path in relative]
                written[key] = posix if isinstance(written[key], list) else posix[0]
            content[section].append(written)
    save_json(content, file)
    return file
