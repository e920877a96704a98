# SPDX-License-Identifier: Apache-2.0
"""Which files of a subject folder are the diffusion data, the gradient table, the mask and the NODDI maps."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.prepare.pair_finder import check_pattern

KEYS = ("dwi", "bval", "bvec", "mask", "ndi", "odi", "fwf")
MAPS = ("ndi", "odi", "fwf")
LAYOUTS = ("auto", "hcp", "folders")
_HCP = "T1w/Diffusion"
# Folders below that of the subject. AMICO writes AMICO/NODDI into the folder it was given.
_DATA_FOLDERS = {"hcp": (_HCP,), "folders": (".", "dwi")}
_MAP_FOLDERS = {
    "hcp": (_HCP, f"{_HCP}/AMICO/NODDI", f"{_HCP}/NODDI", "NODDI", "AMICO/NODDI"),
    "folders": (".", "AMICO/NODDI", "NODDI", "dwi", "dwi/AMICO/NODDI", "dwi/NODDI"),
}
# Names without .nii or .nii.gz, any case, after an optional "..._": AMICO 1 FIT_ICVF/FIT_OD/FIT_ISOVF, AMICO 2
# fit_NDI/fit_ODI/fit_FWF, NODDI toolbox *_ficvf/*_odi/*_fiso.
_WORDS = {
    "dwi": "dwi|data|dmri",
    "mask": "mask",
    "ndi": "ndi|icvf|ficvf",
    "odi": "odi|od",
    "fwf": "fwf|isovf|fiso",
}
_WANTED = {
    "dwi": "the diffusion volumes (*dwi.nii.gz or data.nii.gz)",
    "bval": "b-values (*.bval or bvals)",
    "bvec": "gradient directions (*.bvec or bvecs)",
    "mask": "a brain mask (*mask.nii.gz)",
    "ndi": "the neurite density (FIT_ICVF, FIT_NDI, *_ficvf or ndi, .nii.gz)",
    "odi": "the orientation dispersion (FIT_OD, FIT_ODI, *_odi or odi, .nii.gz)",
    "fwf": "the free water fraction (FIT_ISOVF, FIT_FWF, *_fiso or fwf, .nii.gz)",
}


class UnfitSubjectError(ValueError):
    """A subject that cannot be used: `reason` in a few words, and a message that starts with the file."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Subject:
    """One subject: its name and its files by the keys of the data list (`KEYS`)."""

    name: str
    files: dict[str, Path] = field(default_factory=dict)


def check_patterns(patterns: Mapping[str, str | None]) -> dict[str, str]:
    """The given patterns (item key, or `low_resolution_dwi` -> pattern below the source with {subject}), checked.

    Raises:
        ValueError: {subject} is missing, {session} occurs, the pattern is absolute or leaves the source, or both a
            `dwi` and a `low_resolution_dwi` are given.
    """
    given = {key: check_pattern(value, f"--{key}") for key, value in patterns.items() if value is not None}
    for key, pattern in given.items():
        if "{subject}" not in pattern or "{session}" in pattern:
            raise ValueError(
                f"--{key}: expected a pattern with {{subject}} alone, such as '{{subject}}/dwi/*.nii.gz', "
                f"but got {pattern!r}; choose one session by its name"
            )
    if "dwi" in given and "low_resolution_dwi" in given:
        raise ValueError("--low_resolution_dwi: expected it without --dwi, but got both; the one is measured, the "
                         "other is downsampled")  # fmt: skip
    return given


def subject_names(source: Path, out: Path, chosen: str | Sequence[object] | None) -> list[str]:
    """Names of the subject folders below the source, sorted; or the chosen ones, which must be there.

    Args:
        source: folder of the subject folders.
        out: dataset folder, which is none of them.
        chosen: names with commas between, as fire passes them, or a text file with one name per line; None takes all.

    Raises:
        ValueError: a subject is listed twice, or there is no folder at all.
        FileNotFoundError: a chosen subject has no folder.
    """
    found = sorted(
        folder.name
        for folder in source.iterdir()
        if folder.is_dir() and not folder.name.startswith(".") and folder.resolve() != out.resolve()
    )
    if not found:
        raise ValueError(f"{source}: expected one folder per subject, but there is none; name the folder above them")
    if chosen is None:
        return found
    if isinstance(chosen, str) and Path(chosen).is_file():
        chosen = Path(chosen).read_text(encoding="utf-8").split()
    words: Iterable[object] = chosen.split(",") if isinstance(chosen, str) else chosen
    names = [str(word).strip() for word in (words if isinstance(words, Iterable) else [words])]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--subjects: expected each subject once, but {name!r} is listed {names.count(name)} "
                             "times; remove the repetition")  # fmt: skip
        if name not in found:
            raise FileNotFoundError(f"{source / name}: expected this folder (--subjects), but it does not exist; "
                                    "correct the list")  # fmt: skip
    return names


def _stem(file: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", file.name, flags=re.IGNORECASE)


def _files(folders: Iterable[Path]) -> list[Path]:
    unique = {folder.resolve(): folder for folder in folders if folder.is_dir()}
    return [file for folder in unique.values() for file in sorted(folder.iterdir()) if file.is_file()]


def _is_volume(file: Path, key: str) -> bool:
    stem = _stem(file)
    return stem != file.name and re.fullmatch(rf"(.*[_.-])?({_WORDS[key]})", stem, re.IGNORECASE) is not None


def _is_table(file: Path, key: str) -> bool:
    return re.fullmatch(rf"(.*\.)?{key}s?", file.name, re.IGNORECASE) is not None


def _one(key: str, found: Sequence[Path], looked: Sequence[Path], name: str) -> Path:
    if len(found) == 1:
        return found[0]
    if found:
        raise UnfitSubjectError(
            "ambiguous",
            f"{found[0]}: expected one file for {key!r} of {name}, but got {len(found)}: "
            f"{', '.join(file.name for file in found)}; choose with --{key} (pattern)",
        )
    places = ", ".join(str(place) for place in looked)
    raise UnfitSubjectError(
        f"{key} missing",
        f"{looked[0]}: expected {_WANTED[key]} of {name}, but found none in {places}; add the file or name it with "
        f"--{key} (pattern)",
    )


def find_subject(source: Path, name: str, *, layout: str, patterns: Mapping[str, str]) -> Subject:
    """Files of one subject; nothing is guessed where several files fit.

    Args:
        source: folder of the subject folders.
        name: of the subject's folder.
        layout: `hcp` (`T1w/Diffusion/data.nii.gz`, ...), `folders` (files in the subject's folder or its `dwi`), or
            `auto`: hcp where there is a `T1w/Diffusion`.
        patterns: from `check_patterns`; they replace the search for their key.

    Raises:
        UnfitSubjectError: a file is missing, ambiguous, or stands for two keys.
    """
    folder = source / name
    if layout == "auto":
        layout = "hcp" if (folder / _HCP).is_dir() else "folders"
    files: dict[str, Path] = {}
    for key in KEYS:
        option = "low_resolution_dwi" if key == "dwi" and "low_resolution_dwi" in patterns else key
        if option in patterns:
            filled = patterns[option].replace("[", "[[]").replace("{subject}", glob.escape(name))
            found = sorted(file for file in source.glob(filled) if file.is_file())
            files[key] = _one(option if option in KEYS else key, found, [source / filled], name)
            continue
        places = [folder / place for place in (_MAP_FOLDERS if key in MAPS else _DATA_FOLDERS)[layout]]
        if key in ("bval", "bvec"):
            beside = files["dwi"].parent
            own = [beside / f"{_stem(files['dwi'])}.{key}{s}" for s in ("", "s")]
            places = [beside, *(place for place in places if place.resolve() != beside.resolve())]
            found = [file for file in own if file.is_file()] or [f for f in _files(places) if _is_table(f, key)]
        else:
            found = [file for file in _files(places) if _is_volume(file, key)]
        files[key] = _one(key, found, places, name)
    for key, file in files.items():
        twice = [other for other in KEYS if other != key and files[other] == file]
        if twice:
            raise UnfitSubjectError("ambiguous", f"{file}: expected a file of its own for {key!r} and {twice[0]!r} of "
                                    f"{name}, but both are this one; correct --{key} or --{twice[0]}")  # fmt: skip
    return Subject(name, files)
