# SPDX-License-Identifier: Apache-2.0
"""One subject with diffusion data and NODDI maps: read, check, halve the resolution of the signal, write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.datalist import PATH_KEYS
from shared.files import save_json, sha256_of_file
from shared.gradient_axes import check_axes
from shared.gradients import GradientTable, read_gradients
from shared.nifti_files import grid_image, save_image
from shared.resolution import block_average, doubled_affine, halved_affine, kspace_downsample
from tools.prepare.dmri_subjects import MAPS, Subject, UnfitSubjectError
from tools.prepare.dmri_volumes import (
    check_grid,
    crop,
    encode,
    open_volume,
    read_map,
    read_mask_on,
    read_signal,
    write_table,
)

METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"kspace": kspace_downsample, "block": block_average}
RECORD = "prepared.json"
_VERSION = 2  # of what is written; another one prepares anew


@dataclass(frozen=True)
class Recipe:
    """What is done to every subject; see `dmri_pairs` for the meaning."""

    method: str = "kspace"
    low_resolution: bool = False
    fix_axes: bool = False
    allow_flipped: bool = False


@dataclass
class Prepared:
    """One subject in the dataset folder.

    Attributes:
        item: for the data list, paths relative to the dataset folder.
        digest: SHA-256 of the written diffusion data: equal data under two names must not fall into two sections.
        warnings: (reason, line) of what is doubtful.
    """

    item: dict[str, Any]
    digest: str
    warnings: list[tuple[str, str]] = field(default_factory=list)


def _check_axes(
    signal: np.ndarray, table: GradientTable, inside: np.ndarray, affine: np.ndarray, subject: Subject, recipe: Recipe
) -> tuple[GradientTable, list[tuple[str, str]]]:
    """The table, its axes corrected where that is wanted; a table with clearly wrong axes is refused otherwise."""
    try:
        result = check_axes(signal, table, inside, affine=affine)
    except ValueError as error:
        if str(error).startswith("gradient table"):  # too few directions for a tensor: there is nothing to judge by
            return table, [("axes not checked", f"{subject.files['bvec']}: {error}")]
        raise UnfitSubjectError("signal", f"{subject.files['dwi']}: {error}") from error
    bvec = subject.files["bvec"]
    if not result.clearly_wrong:
        return table, [("axes not confirmed", f"{bvec}: {result.reason}")] if result.reason else []
    line = (
        f"{bvec}: expected directions along the axes of the volumes, but fibres are more coherent with the axes "
        f"{result.best} ({result.best_score:.3f} against {result.given_score:.3f})"
    )
    if recipe.fix_axes:
        return result.corrected(table), [("axes corrected", f"{line}; corrected (--fix_axes)")]
    if recipe.allow_flipped:
        return table, [("axes look wrong", f"{line}; kept (--allow_flipped)")]
    raise UnfitSubjectError(
        "axes look wrong",
        f"{line}; export the table again, give --fix_axes to correct it, or --allow_flipped to keep it as it is",
    )


def _prepare(subject: Subject, recipe: Recipe, folder: Path) -> Prepared:
    """Prepare and write one subject; paths of the item are names inside `folder`."""
    files = subject.files
    image, grid, shape = open_volume(files["dwi"])
    if len(shape) != 4 or shape[3] < 2:
        raise UnfitSubjectError("not 4-D", f"{files['dwi']}: expected a series of volumes (4-D), but got the shape "
                                f"{shape}; merge the volumes (fslmerge -t)")  # fmt: skip
    try:
        table = read_gradients(files["bval"], files["bvec"], num_volumes=shape[3])
    except (ValueError, OSError) as error:
        raise UnfitSubjectError("gradient table", str(error)) from error
    high, low = (open_volume(files["ndi"])[1], grid) if recipe.low_resolution else (grid, None)
    even = high.even()
    if min(even.shape) < 2:
        raise UnfitSubjectError("too small", f"{high.path}: expected at least 2 voxels per axis, but got "
                                f"{' x '.join(map(str, high.shape))}; nothing can be halved")  # fmt: skip
    halved = replace(even, shape=tuple(size // 2 for size in even.shape), affine=halved_affine(high.affine))
    if low is not None:
        check_grid(low, halved, reference=f"half the resolution of {high.path}")
    warnings: list[tuple[str, str]] = []
    if high.code == 0:
        line = (
            f"{high.path}: expected an orientation in the header (sform or qform code above 0), but there is none; "
            "left and right are a guess, check them and set the header (fslorient, nibabel)"
        )
        warnings.append(("no orientation in the header", line))
    inside = read_mask_on(files["mask"], high, low)
    maps = {key: read_map(files[key], high, inside) for key in MAPS}

    def reduce(volume: np.ndarray) -> np.ndarray:
        if low is not None:
            return np.maximum(volume, 0)
        # The magnitude of a scanner; interpolation of the source and ringing make a few voxels negative.
        return np.abs(METHODS[recipe.method](np.ascontiguousarray(crop(volume, even))))

    signal = read_signal(image, files["dwi"], shape[3], reduce)
    brain = block_average(inside.astype(np.float32)) > 0
    table, found = _check_axes(signal, table, brain, halved.affine, subject, recipe)
    levels, slope = encode(signal, brain)
    if levels is signal:
        found.append(("stored as float32", f"{files['dwi']}: 16 bits are too coarse beside its brightest voxel"))
    del signal  # a second copy of the series, while the file is packed in memory
    save_image(grid_image(levels, halved.affine, code=high.code, slope=slope), folder / "dwi.nii.gz")
    write_table(folder, table)
    # From the affine of the halved grid, so that a reader who doubles it gets the same numbers.
    affine = doubled_affine(halved.affine)
    for key, values in {"mask": inside.astype(np.uint8), **maps}.items():
        save_image(grid_image(values, affine, code=high.code), folder / f"{key}.nii.gz")
    shells = table.shells()
    item: dict[str, Any] = {key: f"{key}.nii.gz" for key in ("dwi", "mask", *MAPS)}
    item |= {"bval": "dwi.bval", "bvec": "dwi.bvec", "subject": subject.name}
    item["shells"] = [round(shell.b / 10) * 10 for shell in shells]
    item["directions"] = [len(shell.indices) for shell in shells]
    return Prepared(item, sha256_of_file(folder / "dwi.nii.gz"), warnings + found)


def _fingerprint(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    stats = {key: (file.resolve(), file.stat()) for key, file in subject.files.items()}
    files = {key: [str(file), stat.st_size, stat.st_mtime_ns] for key, (file, stat) in stats.items()}
    return {"version": _VERSION, "recipe": asdict(recipe), "files": files}


def _stored(record: Path, made_from: dict[str, Any]) -> Prepared | None:
    """What an earlier run finished from the same files with the same recipe; None if there is none, or not whole."""
    if not record.is_file():
        return None
    stored = json.loads(record.read_text(encoding="utf-8"))
    if stored["made_from"] != made_from:
        return None
    names = [name for key, name in stored["item"].items() if key in PATH_KEYS]
    if not all((record.parent / name).is_file() for name in names):
        return None
    return Prepared(stored["item"], stored["digest"], [(reason, line) for reason, line in stored["warnings"]])


def prepare_subject(subject: Subject, recipe: Recipe, out: Path) -> Prepared:
    """Prepare one subject in `out/images/<subject>`; what an earlier run finished in the same way is kept.

    Raises:
        UnfitSubjectError: it cannot be used; the message starts with the file.
    """
    folder = out / "images" / subject.name
    made_from = _fingerprint(subject, recipe)
    prepared = _stored(folder / RECORD, made_from)
    if prepared is None:
        # Written last: a run that is stopped in between leaves no record and does this subject again.
        (folder / RECORD).unlink(missing_ok=True)
        prepared = _prepare(subject, recipe, folder)
        save_json({"made_from": made_from, "item": prepared.item, "digest": prepared.digest,
                   "warnings": prepared.warnings}, folder / RECORD)  # fmt: skip
    place = folder.relative_to(out)
    item = {k: (place / v).as_posix() if k in PATH_KEYS else v for k, v in prepared.item.items()}
    return replace(prepared, item=item)
