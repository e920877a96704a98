# SPDX-License-Identifier: Apache-2.0
"""One T1w/FLAIR pair: read, check, scale, cut to a slab and write."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.intensity import is_scaled, robust_range, scale_intensity
from shared.pair_checks import check_not_mirrored, check_same_grid
from tools.prepare.brain_volumes import (
    BRAIN_HEIGHT,
    Volume,
    bounding_box,
    cut,
    find_brain,
    find_head,
    read_ras,
    resample,
    write_volume,
)
from tools.prepare.pair_finder import NAMES, Pair
from tools.prepare.preparation import write_png

# Published volumes and their resampled copies agree to rounding; a tenth of a voxel is far below what a model sees.
GRID_TOLERANCE = 0.1  # mm


@dataclass(frozen=True)
class Recipe:
    """What is done to every pair; see `brain_pairs` for the meaning."""

    mask: str | None
    apply_mask: bool
    spacing: float | None
    interpolation: str
    slices: int
    slab: tuple[int, int] | None
    size: tuple[int, int] | None
    png: bool
    allow_mirrored: bool


@dataclass
class Outcome:
    """Of one pair: its datalist item, or why there is none; and what is doubtful. Reason and line each."""

    item: dict[str, Any] | None = None
    dropped: tuple[str, str] | None = None
    warnings: list[tuple[str, str]] = field(default_factory=list)


class _DropError(Exception):
    """(reason, line that starts with the file)."""


def _read(pair: Pair, recipe: Recipe, outcome: Outcome) -> tuple[dict[str, Volume], np.ndarray | None]:
    """Volumes of a pair and its brain mask, checked: readable, one grid, not mirrored."""
    volumes: dict[str, Volume] = {}
    try:
        for key, path in pair.files.items():
            volumes[key] = read_ras(path, constant_ok=key == "mask")
    except ValueError as error:
        raise _DropError("unusable volume", str(error)) from error
    t1w = volumes["t1w"]
    if t1w.code == 0:
        line = (
            f"{t1w.path}: expected an orientation in the header (sform or qform code above 0), but there is none; left "
            "and right are a guess, check them and set the header (fslorient, nibabel)"
        )
        outcome.warnings.append(("no orientation in the header", line))
    for key, volume in volumes.items():
        try:
            check_same_grid(
                volume.path, volume.values.shape, volume.affine, reference=str(t1w.path),
                reference_shape=t1w.values.shape, reference_affine=t1w.affine, tolerance=GRID_TOLERANCE,
            )  # fmt: skip
        except ValueError as error:
            raise _DropError("grids differ", str(error)) from error
        if key in ("t1w", "mask"):
            continue
        try:
            check_not_mirrored(
                volume.path, volume.values, reference=str(t1w.path), first=t1w.values, spacing=t1w.spacing.tolist()
            )
        except ValueError as error:
            if not recipe.allow_mirrored:
                raise _DropError("mirrored", str(error)) from error
            outcome.warnings.append(("mirrored", str(error)))
    given = volumes.pop("mask", None)
    if recipe.mask == "nonzero":
        try:
            return volumes, find_brain(list(volumes.values()))
        except ValueError as error:
            raise _DropError("not skull-stripped", str(error)) from error
    if given is None:
        if recipe.apply_mask:
            raise _DropError("mask missing", f"{t1w.path}: expected a brain mask for --apply_mask, but there is none")
        return volumes, None
    # A map of probabilities is cut at one half, a label map or a masked image at zero.
    inside = given.values > (0.5 if given.values.max() <= 1 else 0)
    if not inside.any():
        raise _DropError("unusable volume", f"{given.path}: expected a brain mask, but it is empty; make it anew")
    return volumes, inside


def _choose_slab(recipe: Recipe, found: np.ndarray, thickness: float, whole_brain: bool) -> tuple[int, int]:
    """First slice and the one after the last, in RAS voxel indices; ValueError (without the file) if there are none."""
    depth = found.shape[2]
    if recipe.slab is not None:
        if recipe.slab[1] > depth:
            raise ValueError(f"expected at least {recipe.slab[1]} slices for --slab, but got {depth}")
        return recipe.slab
    low, high = bounding_box(found)[2]
    if recipe.slices == 0:
        return low, high
    if recipe.slices > depth:
        raise ValueError(f"expected at least {recipe.slices} slices for --slices, but got {depth}")
    if not whole_brain:  # a neck in the field of view would pull the centre down
        low = max(low, high - round(BRAIN_HEIGHT / thickness))
    start = min(max((low + high - recipe.slices) // 2, 0), depth - recipe.slices)
    return start, start + recipe.slices


def _write_slices(folder: Path, name: str, volume: Volume) -> None:
    """The published PNG layout: 8 bits, rows = X (left to right), columns = Y (back to front), slices from 0."""
    for index in range(volume.values.shape[2]):
        image = torch.from_numpy(np.ascontiguousarray(volume.values[None, :, :, index]))
        write_png(folder / name.format(index), image)


def _prepare(pair: Pair, recipe: Recipe, out: Path, outcome: Outcome) -> dict[str, Any]:
    """Prepare and write one pair; returns its datalist item."""
    volumes, mask = _read(pair, recipe, outcome)
    t1w = volumes["t1w"]
    if mask is not None and recipe.apply_mask:
        volumes = {key: replace(volume, values=volume.values * mask) for key, volume in volumes.items()}
    masked = None if mask is None else replace(t1w, values=mask.astype(np.float32))
    if recipe.spacing is not None:
        volumes = {key: resample(v, recipe.spacing, mode=recipe.interpolation) for key, v in volumes.items()}
        masked = None if masked is None else resample(masked, recipe.spacing, mode="nearest")
    mask = None if masked is None else masked.values > 0.5
    intensity: dict[str, list[float]] = {}
    for key, volume in volumes.items():
        try:
            low, high = (0.0, 1.0) if is_scaled(volume.values) else robust_range(volume.values, name=str(volume.path))
        except ValueError as error:
            raise _DropError("unusable volume", str(error)) from error
        intensity[key] = [low, high]
        scaled = scale_intensity(volume.values, low, high)
        if mask is not None and recipe.apply_mask:
            scaled *= mask
        volumes[key] = replace(volume, values=scaled)
    t1w = volumes["t1w"]
    head = mask if mask is not None and recipe.apply_mask else find_head(t1w.values)
    try:
        first, last = _choose_slab(recipe, head if mask is None else mask, float(t1w.spacing[2]), mask is not None)
        box = bounding_box(head[:, :, first:last])
    except ValueError as error:
        raise _DropError("slab not in the volume", f"{t1w.path}: slices: {error}") from error
    size = recipe.size or t1w.values.shape[:2]
    start = [(low + high - n) // 2 for (low, high), n in zip(box, size, strict=False)] if recipe.size else [0, 0]
    cropped = [min(low - s, s + n - high) < 0 for (low, high), s, n in zip(box, start, size, strict=False)]
    if any(cropped):
        extent = " x ".join(str(high - low) for low, high in box[:2])
        line = (
            f"{t1w.path}: expected a head of at most {size[0]} x {size[1]} voxels, but it has {extent} and was cut; "
            "give a larger --size or --spacing"
        )
        outcome.warnings.append(("head cropped", line))
    window = ([*start, first], [*size, last - first])
    item: dict[str, Any] = {}
    for key, volume in volumes.items():
        item[key] = f"images/{pair.name}_{NAMES[key]}.nii"
        # One affine for all: they agree to rounding, and what was checked here must pass stricter readers.
        box_of = cut(replace(volume, affine=t1w.affine, code=t1w.code), *window)
        write_volume(out / item[key], box_of)
        if recipe.png:
            _write_slices(out / "png" / pair.subject / pair.session, f"{pair.name}_slice-{{}}_{NAMES[key]}.png", box_of)
    if masked is not None:
        item["mask"] = f"images/{pair.name}_mask.nii"
        write_volume(out / item["mask"], cut(replace(masked, affine=t1w.affine, code=t1w.code), *window), mask=True)
    item["subject"] = pair.subject
    if pair.session:
        item["session"] = pair.session
    return item | {"num_slices": last - first, "intensity": intensity}


def convert_pair(pair: Pair, recipe: Recipe, out: Path) -> Outcome:
    """Prepare one pair and write its volumes below `out`; a pair that cannot be used is dropped, never raised."""
    outcome = Outcome()
    try:
        outcome.item = _prepare(pair, recipe, out, outcome)
    except _DropError as problem:
        outcome.dropped = (str(problem.args[0]), str(problem.args[1]))
    return outcome
