# SPDX-License-Identifier: Apache-2.0
"""Which diffusion MRI to turn into NODDI maps: of a dataset folder, of any folder, or one file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel

from shared.datalist import FILE_NAME, load_datalist
from shared.transforms.volumes import VOLUME_SUFFIXES
from shared.volume_items import made_by_a_model

logger = logging.getLogger(__name__)

_KEPT = ("mask", "ndi", "odi", "fwf", "subject")
# Names of gradient files that go with the one DWI of their folder (HCP, FSL), and what a DWI's own end in.
_ENDINGS = {"bval": (".bval", ".bvals"), "bvec": (".bvec", ".bvecs")}
_SHARED = {"bval": ("bvals", "bval"), "bvec": ("bvecs", "bvec")}
_SHARED_MASKS = ("mask", "nodif_brain_mask")
# Parts of a path that say what is in it, not whose it is.
_GENERIC = frozenset({"data", "dwi", "dmri", "dti", "diffusion", "t1w", "image"})
_DWI_SUFFIXES = ("_dwi", "-dwi")


def inference_items(source: str | os.PathLike, *, section: str = "test") -> list[dict[str, Any]]:
    """Items for inference, each a diffusion MRI (DWI) with its gradients.

    - A folder with `datalist.json`: the items of a section.
    - Another folder: the DWI in it at any depth: each NIfTI with four axes that has its gradients beside it. These have
      its name (`sub-01_dwi.nii.gz`, `sub-01_dwi.bval`, `sub-01_dwi.bvec`), or, where the folder holds one such DWI,
      the names of FSL and HCP (`data.nii.gz`, `bvals`, `bvecs`; of several 4-D files the one with as many volumes as
      there are b-values is meant). Left out are hidden files and what an earlier run made.
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


def gradients_of(path: str | os.PathLike) -> dict[str, str]:
    """Gradient files beside a DWI: `bval` and `bvec`, absolute paths; rules as `inference_items`.

    Raises:
        FileNotFoundError: none, or one of the two is missing. The message starts with the DWI.
        ValueError: several that may be meant.
    """
    file = Path(os.path.abspath(path))
    found = _own_gradients(file)
    if found:
        return found
    shared = _shared_gradients(file.parent)
    if shared:
        rivals = [f for f in _dwi_like(file.parent, made=frozenset()) if not _own_gradients(f)]
        if file in _meant(rivals, shared):
            return shared
        raise ValueError(
            f"{file}: expected as many volumes as {shared['bval']} has b-values ({_count(shared['bval'])}), got "
            f"{_volumes(file)}; name the gradients of this file {_stem(file.name)}.bval and .bvec"
        )
    raise FileNotFoundError(
        f"{file}: expected its gradients beside it, {_stem(file.name)}.bval and {_stem(file.name)}.bvec (or bvals and "
        "bvecs, as FSL and HCP have them), but there are none; copy them there"
    )


def _from_datalist(folder: Path, item: dict[str, Any]) -> dict[str, Any]:
    dwi = item["dwi"]
    if not isinstance(dwi, str):
        raise ValueError(
            f"{folder / FILE_NAME}: expected one 4-D file under 'dwi', but got a list of {len(dwi)}; merge them "
            "(fslmerge -t, mrcat) with their gradients"
        )
    given = [key for key in _ENDINGS if item.get(key)]
    if len(given) == 1:
        raise ValueError(
            f"{folder / FILE_NAME}: expected both 'bval' and 'bvec', or none of them, for {dwi}, but got "
            f"{given[0]!r} alone; add the other one"
        )
    gradients = {key: item[key] for key in given} or gradients_of(dwi)
    kept = {key: item[key] for key in _KEPT if item.get(key) not in (None, "", [])}
    return {"dwi": dwi, **gradients, **kept}


def _of_file(file: Path) -> dict[str, Any]:
    if not file.name.lower().endswith(VOLUME_SUFFIXES):
        raise ValueError(
            f"{file}: expected a diffusion MRI, .nii or .nii.gz with its gradients beside it; convert it (dcm2niix for "
            "DICOM)"
        )
    if not _volumes(file):
        raise ValueError(
            f"{file}: expected a diffusion MRI of four axes, several volumes, but got the shape {_shape(file)}; name "
            "the file that holds all volumes"
        )
    file = Path(os.path.abspath(file))
    return {"dwi": str(file), **gradients_of(file), **_mask_of(file)}


def _find(folder: Path) -> list[dict[str, Any]]:
    made = frozenset(Path(os.path.abspath(file)) for file in made_by_a_model(folder))
    root = Path(os.path.abspath(folder))
    files = [file for place in sorted({f.parent for f in root.rglob("*")} | {root}) for file in _dwi_like(place, made)]
    items, others = [], []
    for place, inside in _by_folder(files).items():
        owners = [file for file in inside if _own_gradients(file)]
        _check_stems(owners)
        rest = [file for file in inside if file not in owners]
        shared = _shared_gradients(place)
        meant = _meant(rest, shared) if shared and rest else []
        if shared and rest and not meant:
            raise ValueError(
                f"{rest[0]}: expected as many volumes as {shared['bval']} has b-values ({_count(shared['bval'])}), got "
                f"{_volumes(rest[0])}; correct the gradients or remove what does not belong to them"
            )
        others += [file for file in rest if file not in meant]
        items += [{"dwi": str(file), **gradients_of(file), **_mask_of(file)} for file in sorted([*owners, *meant])]
    if not items:
        if others:
            gradients_of(others[0])  # says what is missing
        raise FileNotFoundError(
            f"{folder}: expected {FILE_NAME}, or diffusion MRI (.nii or .nii.gz of four axes with .bval and .bvec "
            f"beside it) at any depth, but there is none{' but synthetic files' if made else ''}; name another folder"
        )
    if others:
        logger.warning(
            "left out %d files of four axes without gradients beside them (functional MRI and the like)", len(others)
        )
    return sorted(items, key=lambda item: item["dwi"])


def _check_stems(files: Sequence[Path]) -> None:
    for stem, count in Counter(_stem(file.name) for file in files).items():
        if count > 1:
            raise ValueError(
                f"{files[0].with_name(stem)}: expected one diffusion MRI for its gradients, but there are {stem}.nii "
                f"and {stem}.nii.gz; remove one"
            )


def _by_folder(files: Sequence[Path]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    return folders


def _dwi_like(folder: Path, made: frozenset[Path]) -> list[Path]:
    """NIfTI files with several volumes in a folder itself."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(VOLUME_SUFFIXES) and not file.name.startswith(".") and file not in made
        if file.is_file() and _volumes(file)
    )


def _meant(files: Sequence[Path], shared: dict[str, str]) -> list[Path]:
    """Of 4-D files in one folder the one that the folder's gradients belong to."""
    count = _count(shared["bval"])
    fitting = [file for file in files if _volumes(file) == count]
    if len(fitting) > 1:
        raise ValueError(
            f"{fitting[0].parent}: expected one diffusion MRI for {Path(shared['bval']).name}, but "
            f"{', '.join(file.name for file in fitting)} all have {count} volumes; name the gradients after their file "
            "(<name>.bval, <name>.bvec), or write a datalist.json"
        )
    return fitting


def _own_gradients(file: Path) -> dict[str, str]:
    """`<stem>.bval` and `<stem>.bvec`; empty where there is neither."""
    return _pair({key: [_stem(file.name) + end for end in ends] for key, ends in _ENDINGS.items()}, file.parent, file)


def _shared_gradients(folder: Path) -> dict[str, str]:
    return _pair({key: list(names) for key, names in _SHARED.items()}, folder, folder)


def _pair(names: dict[str, list[str]], folder: Path, where: Path) -> dict[str, str]:
    found = {key: [folder / name for name in those if (folder / name).is_file()] for key, those in names.items()}
    for files in found.values():
        if len(files) > 1:
            raise ValueError(
                f"{where}: expected one file of each kind of gradients, but there are "
                f"{' and '.join(file.name for file in files)}; remove one"
            )
    if any(found.values()) and not all(found.values()):
        missing = next(key for key, files in found.items() if not files)
        raise FileNotFoundError(
            f"{where}: expected b-values and directions beside it, but {' or '.join(names[missing])} is missing; copy "
            "it there"
        )
    return {key: os.path.abspath(files[0]) for key, files in found.items() if files}


def _mask_of(file: Path) -> dict[str, str]:
    stem = _stem(file.name)
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


def _shape(file: Path) -> tuple[int, ...]:
    try:
        image: Any = nibabel.load(file)
        return tuple(int(n) for n in image.shape)
    except Exception as error:  # gzip, struct and nibabel each raise their own kind
        raise ValueError(
            f"{file}: expected a readable NIfTI file, but got ({type(error).__name__}: {error}); copy it anew or "
            "remove it"
        ) from error


def _volumes(file: Path) -> int:
    """Length of the fourth axis; 0 of a file that is no series of volumes."""
    shape = _shape(file)
    return shape[3] if len(shape) == 4 and shape[3] > 1 else 0


def _count(bval: str) -> int:
    return len(Path(bval).read_text(encoding="utf-8", errors="replace").replace(",", " ").split())


def _stem(name: str) -> str:
    suffix = next((s for s in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: -len(suffix)] if suffix else name


def _parts(parts: Sequence[str]) -> list[str]:
    """Parts of a path to a DWI, the last one without suffix and `_dwi`."""
    last = _stem(parts[-1])
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
