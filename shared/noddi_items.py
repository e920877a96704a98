# SPDX-License-Identifier: Apache-2.0
"""Which diffusion MRI to turn into NODDI maps: of a dataset folder, of any folder, or one file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.datalist import FILE_NAME, load_datalist
from shared.gradient_files import gradients_beside, gradients_in, num_volumes, series_in, shape_of, stem_of
from shared.transforms.volumes import VOLUME_SUFFIXES
from shared.volume_items import made_by_a_model

logger = logging.getLogger(__name__)

_KEPT = ("mask", "ndi", "odi", "fwf", "subject")
_SHARED_MASKS = ("mask", "nodif_brain_mask")
# Parts of a path that say what is in it, not whose it is.
_GENERIC = frozenset({"data", "dwi", "dmri", "dti", "diffusion", "t1w", "image"})
_DWI_SUFFIXES = ("_dwi", "-dwi")


def inference_items(source: str | os.PathLike, *, section: str = "test") -> list[dict[str, Any]]:
    """Items for inference, each a diffusion MRI (DWI) with its gradients.

    - A folder with `datalist.json`: the items of a section.
    - Another folder: the DWI in it at any depth: each NIfTI with four axes that has its gradients beside it, as
      `shared.gradient_files.gradients_beside` finds them. Left out are hidden files and what an earlier run made.
    - A file: that DWI.

    A mask is taken where it is called `<DWI's name>_mask.nii[.gz]`, `mask.nii[.gz]` or `nodif_brain_mask.nii[.gz]`.

    Args:
        source: folder or file.
        section: section of `datalist.json`: `training`, `validation` or `test`.

    Returns:
        Per DWI `dwi`, `bval`, `bvec` (absolute paths), `mask` where there is one, and `name`: unique among the items,
        of the file without `_dwi`, or of the folder where the file is called `dwi` or `data`; of a data list also
        `subject` and the true maps `ndi`, `odi`, `fwf` where the item has them. Sorted by path, or in the order of the
        list.

    Raises:
        FileNotFoundError: no such source, no DWI in the folder, or gradients missing.
        ValueError: not a NIfTI of four axes, unreadable, or several files that may be meant. The message starts with
            the path.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a dataset folder, a folder with diffusion MRI or a file, but it does not exist; correct "
            "the path"
        )
    if (path / FILE_NAME).is_file():
        return _with_names([_from_datalist(path, item) for item in load_datalist(path, section, required="dwi")], path)
    if path.is_file():
        return _with_names([_of_file(path)], path.parent)
    return _with_names(_find(path), path)


def name_of(path: str | os.PathLike) -> str:
    """What the results of a DWI are called: `.../sub-01_dwi.nii.gz` -> `sub-01`, `.../100307/T1w/Diffusion/data.nii.gz`
    -> `100307`; `dwi` where no part of the path tells more.
    """
    file = Path(os.path.abspath(path))
    return _own_name(_parts([*file.parent.parts[1:], file.name])) or "dwi"


def _from_datalist(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    dwi = item["dwi"]
    given = [key for key in ("bval", "bvec") if item.get(key)]
    if len(given) == 1:
        raise ValueError(
            f"{folder / FILE_NAME}: expected both 'bval' and 'bvec', or none of them, for {dwi}, but got "
            f"{given[0]!r} alone; add the other one"
        )
    gradients = {key: item[key] for key in given} or gradients_beside(dwi)
    kept = {key: item[key] for key in _KEPT if item.get(key) not in (None, "", [])}
    return {"dwi": dwi, **gradients, **kept}


def _of_file(file: Path) -> dict[str, Any]:
    if not file.name.lower().endswith(VOLUME_SUFFIXES):
        raise ValueError(
            f"{file}: expected a diffusion MRI, .nii or .nii.gz with its gradients beside it; convert it (dcm2niix for "
            "DICOM)"
        )
    shape = shape_of(file)
    if not num_volumes(shape):
        raise ValueError(
            f"{file}: expected a diffusion MRI of four axes, several volumes, but got the shape {shape}; name the file "
            "that holds all volumes"
        )
    file = Path(os.path.abspath(file))
    return {"dwi": str(file), **gradients_beside(file), **mask_beside(file)}


def _find(folder: Path) -> list[dict[str, Any]]:
    made = frozenset(Path(os.path.abspath(file)) for file in made_by_a_model(folder))
    root = Path(os.path.abspath(folder))
    items, others = [], []
    for place in sorted({file.parent for file in root.rglob("*")} | {root}):
        files = series_in(place, made)
        found = gradients_in(place, files)
        others += [file for file in files if file not in found]
        items += [{"dwi": str(file), **gradients, **mask_beside(file)} for file, gradients in found.items()]
    if not items:
        if others:
            gradients_beside(others[0])  # says what is missing
        raise FileNotFoundError(
            f"{folder}: expected {FILE_NAME}, or diffusion MRI (.nii or .nii.gz of four axes with .bval and .bvec "
            f"beside it) at any depth, but there is none{' but synthetic files' if made else ''}; name another folder"
        )
    if others:
        logger.warning(
            "left out %d files of four axes without gradients beside them (functional MRI and the like)", len(others)
        )
    return sorted(items, key=lambda item: item["dwi"])


def mask_beside(file: Path) -> dict[str, str]:
    stem = stem_of(file.name)
    short = next((stem[: -len(end)] for end in _DWI_SUFFIXES if stem.lower().endswith(end)), stem)
    for names in ({f"{stem}_mask", f"{short}_mask"}, set(_SHARED_MASKS)):
        found = [p for name in sorted(names) for s in VOLUME_SUFFIXES if (p := file.with_name(name + s)).is_file()]
        if len(found) > 1:
            raise ValueError(
                f"{file}: expected one mask beside it, but there are {' and '.join(p.name for p in found)}; remove "
                "one, or write a datalist.json"
            )
        if found:
            return {"mask": str(found[0])}
    return {}


def _parts(parts: Sequence[str]) -> list[str]:
    """Parts of a path to a DWI, the last one without suffix and `_dwi`."""
    last = stem_of(parts[-1])
    end = next((e for e in _DWI_SUFFIXES if last.lower().endswith(e)), "")
    return [*parts[:-1], last[: -len(end)] if end else last]


def _own_name(parts: Sequence[str]) -> str:
    """The last part that says more than what is in the file; empty where none does."""
    return next((part for part in reversed(parts) if part.lower() not in {*_GENERIC, os.pardir}), "")


def _with_names(items: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Shortest name that is unique among all: file or folder, then all that tells, then the whole path."""
    root = os.path.abspath(folder)
    inside = [Path(os.path.relpath(item["dwi"], root)).parts for item in items]
    telling = ["_".join(p for p in _parts(parts) if p.lower() not in {*_GENERIC, os.pardir}) for parts in inside]
    candidates = [
        [_own_name(_parts(parts)) or name_of(item["dwi"]) for parts, item in zip(inside, items, strict=True)],
        [name or name_of(item["dwi"]) for name, item in zip(telling, items, strict=True)],
        ["_".join(parts).replace(".", "_") for parts in inside],
    ]
    counts = [Counter(names) for names in candidates]
    for index, item in enumerate(items):
        names = [names[index] for names in candidates]
        item["name"] = next((n for n, count in zip(names, counts, strict=True) if count[n] == 1), names[-1])
    twice = [name for name, count in Counter(item["name"] for item in items).items() if count > 1]
    if twice:
        raise ValueError(
            f"{folder}: expected each diffusion MRI once, but {twice[0]!r} occurs several times; remove the repeated "
            "item or rename the file"
        )
    return items
