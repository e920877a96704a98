# SPDX-License-Identifier: Apache-2.0
"""Find what is wrong with a dataset folder before a training meets it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image, UnidentifiedImageError

from shared.datalist import FILE_NAME, PATH_KEYS, SINGLE_KEYS, as_paths, find_leaks, read_datalist, read_description
from shared.dmri_check import diffusion_problems
from shared.files import sha256_of_file
from shared.mask_check import MaskCounts, stated_classes
from shared.nifti_files import check_length, verified
from shared.pair_checks import check_same_grid, check_voxel_size
from shared.transforms.pixels import read_pixels
from shared.transforms.segmentation_images import check_suffix
from shared.transforms.text import check_text, read_report
from shared.transforms.volumes import unreadable

_VOLUMES = (".nii", ".nii.gz")
_TEXTS = ("report", "bval", "bvec")
_LABELS = ("label", "mask")  # may be constant: no tumour, whole image
_SAME_GRID = {"image": ("label",), "t1w": ("flair", "t2w", "pdw", "mask")}  # first key: reference


@dataclass
class DataCheck:
    """Result of `check_dataset`: how many items each section has, one line per problem, and what the masks hold."""

    items: dict[str, int] = field(default_factory=dict)
    files: int = 0
    problems: list[str] = field(default_factory=list)
    masks: MaskCounts | None = None

    def summary(self) -> str:
        """One line: counts of problems, items and files, and of masks where the data list states its classes."""
        sections = ", ".join(f"{count} {section}" for section, count in self.items.items())
        total = sum(self.items.values())
        count = len(self.problems)
        line = f"{count or 'no'} problem{'' if count == 1 else 's'} in {total} items ({sections}), {self.files} files"
        return f"{line}; {masks}" if self.masks is not None and (masks := self.masks.summary()) else line


def read_volume(path: str | os.PathLike, *, constant_ok: bool = False) -> tuple[np.ndarray, Any]:
    """Read a NIfTI file completely and check what any use of it needs.

    Returns:
        Voxels as they are stored with the header's slope applied (any numeric type), and the nibabel image for its
        affine and header.

    Raises:
        ValueError: unreadable, empty, not numbers, NaN or infinite voxels, constant, or an affine that is not finite
            and invertible. The message starts with the path.
    """
    try:
        image: Any = nibabel.load(path)
        check_length(path, image.dataobj)
        with verified(path, image.dataobj) as proxy:
            values = np.asanyarray(proxy)
    except Exception as error:  # gzip, zlib, nibabel and struct each raise their own kind
        raise unreadable(path, error, kind="NIfTI file") from error
    if 0 in values.shape:
        raise ValueError(f"{path}: expected voxels, but got the shape {values.shape}; export it anew")
    if values.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected one real number per voxel, but got {values.dtype}; export it as grey image")
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"{path}: expected finite voxels, but {count} are NaN or infinite; repair or remove the item")
    if not constant_ok and values.min() == values.max():
        raise ValueError(f"{path}: expected an image, but all voxels are {values.min():g}; remove the item")
    affine = np.asarray(image.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: expected a finite, invertible affine, but got {affine.tolist()}; export it anew")
    try:
        check_voxel_size(affine)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair the header or export the file anew") from error
    return values, image


def check_volume(path: str | os.PathLike, *, constant_ok: bool = False) -> tuple[int, ...]:
    """Read a NIfTI file completely and return its shape; raises what `read_volume` raises."""
    return tuple(read_volume(path, constant_ok=constant_ok)[0].shape)


def check_image(path: str | os.PathLike, *, constant_ok: bool = False, colour: bool = False) -> tuple[int, ...]:
    """Read a picture, DICOM or NIfTI file and return its shape without channels; see `check_volume` and `read_pixels`.

    Args:
        path: the file.
        constant_ok: all pixels may be equal.
        colour: DICOM files may be in colour.
    """
    name = os.fspath(path).lower()
    if name.endswith(_VOLUMES):
        return check_volume(path, constant_ok=constant_ok)
    try:
        return read_pixels(path, colour=colour).shape[:2]
    except ValueError as error:
        if constant_ok and "all pixels are" in str(error):
            return (0, 0)
        raise


def _affine(path: Path) -> np.ndarray:
    image: Any = nibabel.load(path)
    return np.asarray(image.affine, dtype=float)


def _of_channels(count: int) -> str:
    return f"a picture of {count} channel{'' if count == 1 else 's'}"


def _kind(path: Path, shape: Sequence[int]) -> str:
    """What must be the same for all files of a key: channels of pictures, dimensions of volumes."""
    if path.name.lower().endswith(_VOLUMES):
        return f"a {len(shape)}-D volume"
    try:
        with Image.open(path) as picture:
            return "a palette picture" if picture.mode == "P" else _of_channels(len(picture.getbands()))
    except UnidentifiedImageError:  # DICOM: elsewhere it is checked whether it may be in colour
        return _of_channels(1)


def _check_text(where: str, item: Mapping[str, Any], folder: Path) -> Iterator[str]:
    text, report = item.get("text"), item.get("report")
    try:
        if text is not None:
            check_text(text, key="text", where=where)
        if isinstance(report, str) and _size(folder / report) > 0:
            read_report(folder / report)
    except ValueError as error:
        yield str(error)


def _size(file: Path) -> int:
    """Bytes of a file; 0 where there is none. Unlike pathlib's, this question has an answer for any name."""
    return os.path.getsize(file) if os.path.isfile(file) else 0


def _paths(item: Mapping[str, Any], key: str) -> list[str]:
    value = item.get(key)
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v]


class _Checker:
    """Walks through the items once; remembers shapes and hashes to compare items with each other."""

    def __init__(self, folder: Path, images: bool, num_classes: int | None) -> None:
        self.folder, self.images = folder, images
        self.masks = None if num_classes is None else MaskCounts(num_classes)
        self.result = DataCheck(masks=self.masks)
        self.kinds: dict[str, dict[str, list[str]]] = {}
        self.hashes: dict[str, dict[str, str]] = {}
        self.seen: dict[Path, str | None] = {}  # file -> digest; None where the file cannot be used

    def check_file(self, where: str, section: str, key: str, written: str) -> tuple[int, ...] | None:
        """Check one file; its shape where it is an image that could be read."""
        file = Path(os.path.normpath(self.folder / written))  # as it is loaded
        if file in self.seen:
            if (digest := self.seen[file]) is not None:
                self.hashes.setdefault(digest, {}).setdefault(section, str(file))
            return None
        self.seen[file] = None
        self.result.files += 1
        if not os.path.isfile(file):
            hint = "; the path is absolute, write it relative to the folder" if os.path.isabs(written) else ""
            self.result.problems.append(f"{file}: expected this file ({key!r} of {where}), but it does not exist{hint}")
            return None
        if file.stat().st_size == 0:
            self.result.problems.append(f"{file}: expected content, but the file is empty; copy it anew")
            return None
        if not self.images or key in _TEXTS:
            return None
        try:
            if key == "label" and self.masks is not None:
                shape = self.masks.add(file, section)
            else:
                if self.masks is not None and key == "image":
                    check_suffix(str(file))
                shape = check_image(file, constant_ok=key in _LABELS, colour=self.masks is not None)
        except (ValueError, OSError) as error:
            self.result.problems.append(str(error))
            return None
        if key not in _LABELS:
            self.seen[file] = digest = sha256_of_file(file)
            self.hashes.setdefault(digest, {}).setdefault(section, str(file))
        # Where masks are drawn, grey pictures are repeated to three channels: they may stand beside colour ones.
        any_picture = self.masks is not None and not file.name.lower().endswith(_VOLUMES)
        kind = "a picture" if any_picture else _kind(file, shape)
        self.kinds.setdefault(key, {}).setdefault(kind, []).append(str(file))
        return shape if all(shape) else None

    def check_item(self, where: str, section: str, item: Mapping[str, Any], common: Sequence[str]) -> None:
        """Check one item: its keys, its text, its files, and that its grids agree."""
        missing = [keys for keys in common if all(item.get(key) in (None, "", []) for key in keys.split(" or "))]
        if missing:
            self.result.problems.append(f"{where}: expected the keys {', '.join(missing)}, which most items have")
        if not any(key in item for key in PATH_KEYS):
            self.result.problems.append(f"{where}: expected a file key ({', '.join(PATH_KEYS)}), but it has none")
        self.result.problems.extend(_check_text(where, item, self.folder))
        grids: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        for key in PATH_KEYS:
            if item.get(key) not in (None, "", []) and as_paths(item[key], key) is None:
                wanted = "a path" if key in SINGLE_KEYS else "a path or a list of paths"
                self.result.problems.append(
                    f"{where}: expected {wanted} under {key!r}, but got {type(item[key]).__name__}"
                )
                continue
            for written in _paths(item, key):
                shape = self.check_file(where, section, key, written)
                if shape is not None:
                    grids.setdefault(key, []).append((self.folder / written, shape))
        for first, seconds in _SAME_GRID.items():
            for second in seconds:
                for file, shape in grids.get(second, []) if first in grids else []:
                    self.check_pair(first, grids[first][0], file, shape)
        if item.get("dwi"):
            named = {problem.split(": expected")[0] for problem in self.result.problems}
            found = diffusion_problems(item, self.folder, images=self.images)
            self.result.problems.extend(line for line in found if line.split(": expected")[0] not in named)

    def check_pair(self, first: str, reference: tuple[Path, tuple[int, ...]], file: Path, shape: Sequence[int]) -> None:
        """Compare the grids of two files of an item: shapes, and for two volumes also affines."""
        volumes = all(path.name.lower().endswith(_VOLUMES) for path in (reference[0], file))
        affines = [_affine(path) if volumes else np.eye(4) for path in (reference[0], file)]
        try:
            check_same_grid(file, shape, affines[1], reference=repr(first), reference_shape=reference[1],
                            reference_affine=affines[0])  # fmt: skip
        except ValueError as error:
            self.result.problems.append(str(error))

    def compare(self, sections: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """What only the whole list shows: mixed kinds of files, images or subjects in two sections."""
        for key, kinds in self.kinds.items():
            usual = max(kinds, key=lambda kind: len(kinds[kind]))
            for kind, files in kinds.items():
                if kind != usual:
                    self.result.problems.extend(
                        f"{file}: expected {usual} like most files of {key!r}, but got {kind}; convert it"
                        for file in files
                    )
        for places in self.hashes.values():
            if len(places) > 1:
                (section, file), *others = places.items()
                self.result.problems.extend(
                    f"{other}: expected an image of its own in {name}, but {file} in {section} has the same content"
                    for name, other in others
                )
        if self.masks is not None and (missing := self.masks.missing("training")):
            self.result.problems.append(
                f"{self.folder / FILE_NAME}: expected every class in the masks of 'training', but none shows "
                f"{', '.join(map(str, missing))}; split the data again or correct num_classes"
            )
        for subject, names in find_leaks(sections).items():
            self.result.problems.append(
                f"{self.folder / FILE_NAME}: expected each subject in one section, but {subject!r} is in "
                f"{', '.join(names)}; split by subject (shared.datalist.split_by_subject)"
            )


def check_dataset(dataset_dir: str | os.PathLike, *, images: bool = True) -> DataCheck:
    """Check a dataset folder: `datalist.json`, every file it names, and what may not be shared between sections.

    Found: missing and empty files, keys that most items have but one lacks, empty texts and reports, subjects in two
    sections; with `images` also unreadable, non-finite and constant images, mixed channels or dimensions within a key,
    grids (shape, orientation, affine) that differ within an item, and images of equal content (SHA-256 of the file) in
    two sections. Where the data list states `num_classes` (or `labels`), every `label` is read as
    `shared.transforms.masks` does, and the classes are counted.

    Args:
        dataset_dir: folder with `datalist.json`.
        images: also decode every image (slow for large sets).

    Returns:
        The problems, one line each, starting with the file; nothing is changed.

    Raises:
        FileNotFoundError, ValueError: there is no list to check, see `shared.datalist.read_datalist`.
    """
    folder = Path(dataset_dir)
    sections = read_datalist(folder)
    checker = _Checker(folder, images, stated_classes(read_description(folder)))
    items = [item for part in sections.values() for item in part]
    usage = Counter(key for item in items for key in item)
    common = [key for key in ("subject", *PATH_KEYS, "text") if usage[key] > len(items) / 2]
    if usage["text"] and usage["report"]:  # either will do
        common = [*(key for key in common if key not in ("text", "report")), "text or report"]
    for section, part in sections.items():
        checker.result.items[section] = len(part)
        if not part:
            checker.result.problems.append(
                f"{folder / FILE_NAME}: expected items in {section!r}, but the list is empty"
            )
        for index, item in enumerate(part):
            checker.check_item(f"{folder / FILE_NAME}: {section}[{index}]", section, item, common)
    checker.compare(sections)
    return checker.result
