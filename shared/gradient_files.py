# SPDX-License-Identifier: Apache-2.0
"""Which gradient files belong to which diffusion MRI: one rule for data lists, folders, files and MONAI Label."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import nibabel

from shared.transforms.volumes import VOLUME_SUFFIXES, unreadable

# What a DWI's own gradients end in (dcm2niix, BIDS), and names that go with the one DWI of their folder (HCP, FSL).
_ENDINGS = {"bval": (".bval", ".bvals"), "bvec": (".bvec", ".bvecs")}
_SHARED = {"bval": ("bvals", "bval"), "bvec": ("bvecs", "bvec")}


def gradients_beside(dwi: str | os.PathLike) -> dict[str, str]:
    """Gradient files beside a DWI.

    These have its name (`sub-01_dwi.nii.gz`, `sub-01_dwi.bval`, `sub-01_dwi.bvec`), or the names of FSL and HCP
    (`data.nii.gz`, `bvals`, `bvecs`), which belong to the one series of their folder with so many volumes.

    Returns:
        `bval` and `bvec`, absolute paths.

    Raises:
        FileNotFoundError: none, or one of the two is missing.
        ValueError: several that may be meant, or none that fits. The message starts with the DWI or its folder.
    """
    file = Path(os.path.abspath(dwi))
    if own := _own_gradients(file):
        return own
    stem = stem_of(file.name)
    if not (shared := _shared_gradients(file.parent)):
        raise FileNotFoundError(
            f"{file}: expected its gradients beside it, {stem}.bval and {stem}.bvec (or bvals and bvecs, as FSL and "
            "HCP have them), but there are none; copy them there (dcm2niix writes both) or name them in the item"
        )
    if file in _meant([other for other in series_in(file.parent) if not _own_gradients(other)], shared):
        return shared
    raise _misfit(file, shared)


def gradients_in(folder: Path, files: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """Gradient files, as `gradients_beside` says, of those series of one folder that have some.

    Args:
        folder: where the files are.
        files: series, absolute paths (`series_in`).

    Raises:
        FileNotFoundError, ValueError: as `gradients_beside`.
    """
    found = {file: own for file in files if (own := _own_gradients(file))}
    for stem, count in Counter(stem_of(file.name) for file in found).items():
        if count > 1:
            raise ValueError(
                f"{folder / stem}: expected one diffusion MRI for its gradients, but there are {stem}.nii and "
                f"{stem}.nii.gz; remove one"
            )
    rest = [file for file in files if file not in found]
    if rest and (shared := _shared_gradients(folder)):
        if not (meant := _meant(rest, shared)):
            raise _misfit(rest[0], shared)
        found[meant[0]] = shared
    return found


def series_in(folder: Path, made: Collection[Path] = ()) -> list[Path]:
    """NIfTI files with several volumes in a folder itself, but for hidden ones and those that a model `made`; sorted.

    Raises:
        ValueError: a file is unreadable. The message starts with it.
    """
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(VOLUME_SUFFIXES) and not file.name.startswith(".") and file not in made
        if file.is_file() and num_volumes(shape_of(file))
    )


def shape_of(file: Path) -> tuple[int, ...]:
    """Shape of a NIfTI file, all axes.

    Raises:
        ValueError: unreadable. The message starts with the file.
    """
    try:
        image: Any = nibabel.load(file)
        return tuple(int(n) for n in image.shape)
    except Exception as error:  # gzip, struct and nibabel each raise their own kind
        raise unreadable(file, error, kind="NIfTI file") from error


def num_volumes(shape: Sequence[int]) -> int:
    """Length of the fourth axis; 0 of what is no series of volumes."""
    return shape[3] if len(shape) == 4 and shape[3] > 1 else 0


def stem_of(name: str) -> str:
    """Name of a file without `.nii` or `.nii.gz`, in any case."""
    suffix = next((s for s in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: -len(suffix)] if suffix else name


def _own_gradients(file: Path) -> dict[str, str]:
    """`<stem>.bval` and `<stem>.bvec`; empty where there is neither."""
    stem = stem_of(file.name)
    return _pair({key: [stem + end for end in ends] for key, ends in _ENDINGS.items()}, file.parent, file)


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
            f"{where}: expected its gradients beside it, but {' or '.join(names[missing])} is missing; copy it there"
        )
    return {key: str(files[0]) for key, files in found.items() if files}


def _meant(files: Sequence[Path], shared: dict[str, str]) -> list[Path]:
    """Of the series in one folder the one that the folder's gradients belong to; empty where none fits."""
    count = _count(shared)
    fitting = [file for file in files if num_volumes(shape_of(file)) == count]
    if len(fitting) > 1:
        raise ValueError(
            f"{fitting[0].parent}: expected one diffusion MRI for {Path(shared['bval']).name}, but "
            f"{', '.join(file.name for file in fitting)} all have {count} volumes; name the gradients after their file "
            "(<name>.bval, <name>.bvec), or write a datalist.json"
        )
    return fitting


def _misfit(file: Path, shared: dict[str, str]) -> ValueError:
    stem = stem_of(file.name)
    return ValueError(
        f"{file}: expected as many volumes as {shared['bval']} has b-values ({_count(shared)}), got "
        f"{num_volumes(shape_of(file))}; correct them, or name those of this file {stem}.bval and {stem}.bvec"
    )


def _count(shared: dict[str, str]) -> int:
    return len(Path(shared["bval"]).read_text(encoding="utf-8", errors="replace").replace(",", " ").split())
