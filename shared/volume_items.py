# SPDX-License-Identifier: Apache-2.0
"""What to translate: the volumes of a dataset folder, of any folder, or one file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.datalist import FILE_NAME, PATH_KEYS, load_datalist
from shared.transforms.volumes import PICTURE_SUFFIX, VOLUME_SUFFIXES

KEPT = ("t1w", "mask", "subject", "session", "intensity")
PATTERN = "flair"


def inference_items(
    source: str | os.PathLike, *, section: str = "test", condition_keys: str | Sequence[str] = ("flair",)
) -> list[dict[str, Any]]:
    """Items for inference, each with the condition image(s) under `image`.

    - A folder with `datalist.json`: the items of a section.
    - Another folder: every `*FLAIR*.nii[.gz]` in it, at any depth (upper or lower case); where no name has FLAIR, every
      NIfTI; where there is no NIfTI, the same for PNG slices. Left out are hidden files and what an earlier run made
      (the JSON beside it says so), so that a run whose outputs lie in its input folder can be repeated.
    - A file: that file.

    Args:
        source: folder or file.
        section: section of `datalist.json`: `training`, `validation` or `test`.
        condition_keys: keys of `datalist.json` whose images are the condition; several become channels in this order.

    Returns:
        Per volume `image` (a path, or a list of paths for several contrasts), `subject`, and of a data list also
        `t1w`, `mask`, `session` and `intensity` where the item has them. Without a data list `subject` is the path
        inside the folder without its suffix, `/` replaced by `_`. Sorted by path, or in the order of the list.

    Raises:
        FileNotFoundError: no such source, or no image in the folder.
        ValueError: neither NIfTI nor PNG, several `condition_keys` without a data list, or an item without one of
            them. The message starts with the path or the argument.
    """
    keys = [condition_keys] if isinstance(condition_keys, str) else list(condition_keys)
    if not keys or any(key not in PATH_KEYS for key in keys):
        raise ValueError(f"condition_keys: expected one or more of {', '.join(PATH_KEYS)}, but got {keys}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a dataset folder, a folder of FLAIR volumes or a file, but it does not exist; "
            "correct the path"
        )
    if (path / FILE_NAME).is_file():
        return [_from_datalist(item, keys) for item in load_datalist(path, section, required=keys)]
    if len(keys) > 1:
        raise ValueError(
            f"{path}: expected {FILE_NAME} in the folder, as {len(keys)} images per subject are asked for "
            f"({', '.join(keys)}) and file names do not say which belong together; write a list with these keys "
            "(python -m tools.prepare brain_pairs, or by hand)"
        )
    if path.is_file():
        if not path.name.lower().endswith((*VOLUME_SUFFIXES, PICTURE_SUFFIX)):
            raise ValueError(f"{path}: expected a file .nii, .nii.gz or .png; convert it (dcm2niix for DICOM)")
        return [{"image": os.path.abspath(path), "subject": _without_suffix(path.name)}]
    return [
        {
            "image": os.path.abspath(file),
            "subject": _without_suffix(file.relative_to(path).as_posix()).replace("/", "_"),
        }
        for file in _find(path)
    ]


def _from_datalist(item: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    images = [path for key in keys for path in (item[key] if isinstance(item[key], list) else [item[key]])]
    kept = {key: item[key] for key in KEPT if item.get(key) not in (None, "", [])}
    return {"image": images if len(images) > 1 else images[0], **kept}


def _find(folder: Path) -> list[Path]:
    made = made_by_a_model(folder)
    for suffixes in (VOLUME_SUFFIXES, (PICTURE_SUFFIX,)):
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.name.lower().endswith(suffixes) and not file.name.startswith(".") and file not in made
            if file.is_file()
        )
        if files:
            return [file for file in files if PATTERN in file.name.lower()] or files
    raise FileNotFoundError(
        f"{folder}: expected {FILE_NAME}, or .nii, .nii.gz or .png files at any depth, but there are none"
        f"{' but synthetic ones' if made else ''}; name another folder"
    )


def made_by_a_model(folder: Path) -> set[Path]:
    """Files that a JSON beside them (`shared.transforms.volume_saving`) lists as synthetic."""
    made: set[Path] = set()
    for sidecar in folder.rglob("*.json"):
        text = sidecar.read_text(encoding="utf-8", errors="replace")
        if '"synthetic": true' in text:
            made.update(sidecar.with_name(name) for name in json.loads(text).get("files", {}).values())
    return made


def _without_suffix(name: str) -> str:
    suffix = next(s for s in (*VOLUME_SUFFIXES, PICTURE_SUFFIX) if name.lower().endswith(s))
    return name[: -len(suffix)]
