# SPDX-License-Identifier: Apache-2.0
"""T1w and FLAIR volumes of the same visits -> dataset folder of brain_controlnet."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tools.prepare.pair_conversion import Outcome, Recipe, convert_pair
from tools.prepare.pair_finder import Pair, check_pattern, find_pairs, parse_extra
from tools.prepare.preparation import Preparation, check_folder, check_workers, split_and_write


def _numbers(value: object, option: str, *, none: bool = False) -> tuple[int, int] | None:
    """Two whole numbers as fire passes them; `none` (or None) where allowed."""
    if value is None or (none and str(value).lower() == "none"):
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        first, second = (int(part) for part in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: expected two whole numbers such as 160,224, but got {value!r}") from error
    return first, second


def _check(recipe: Recipe) -> None:
    """Refuse impossible options before the first file is read."""
    if isinstance(recipe.slices, bool) or not isinstance(recipe.slices, int) or recipe.slices < 0:
        raise ValueError(f"--slices: expected a number of slices or 0 for all, but got {recipe.slices!r}")
    if recipe.slab is not None and not 0 <= recipe.slab[0] < recipe.slab[1]:
        raise ValueError(f"--slab: expected 0 <= START < STOP, but got {recipe.slab}")
    if recipe.size is not None and min(recipe.size) < 1:
        raise ValueError(f"--size: expected at least 1 voxel per axis, but got {recipe.size}")
    number = isinstance(recipe.spacing, int | float) and not isinstance(recipe.spacing, bool)
    if recipe.spacing is not None and not (number and 0 < recipe.spacing < 100):
        raise ValueError(f"--spacing: expected millimetres above 0, but got {recipe.spacing!r}")
    if recipe.interpolation not in ("bilinear", "bspline"):
        raise ValueError(f"--interpolation: expected bilinear or bspline, but got {recipe.interpolation!r}")
    for option in ("apply_mask", "png", "allow_mirrored"):
        if not isinstance(getattr(recipe, option), bool):
            raise ValueError(f"--{option}: expected True or False, but got {getattr(recipe, option)!r}")


def brain_pairs(
    source: str,
    out: str,
    *,
    t1w: str | None = None,
    flair: str | None = None,
    mask: str | None = None,
    table: str | None = None,
    extra: str | Sequence[str] | None = None,
    apply_mask: bool = False,
    spacing: float | None = None,
    interpolation: str = "bilinear",
    slices: int = 5,
    slab: str | Sequence[int] | None = None,
    size: str | Sequence[int] | None = (160, 224),
    png: bool = False,
    allow_mirrored: bool = False,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
) -> None:
    """Prepare registered T1w/FLAIR pairs: find, check, turn to RAS, scale, cut a slab, split by subject.

    Without patterns or a table, BIDS names and the published layout <subject>/<session>/.../*T1w.nii.gz beside
    *FLAIR.nii.gz are understood. A pair that cannot be used is left out and named in preparation.json; T1w and FLAIR
    must lie on one grid already (registration is up to the user's tool).

    Args:
        source: folder with the volumes.
        out: dataset folder to make: images/ (uncompressed NIfTI in [0, 1]), datalist.json, preparation.json.
        t1w: pattern below source with {subject}, optionally {session}, and globs,
            such as '{subject}/T1/T1_brain_to_MNI.nii.gz'; needs flair too.
        flair: pattern of the FLAIR, such as '{subject}/T2_FLAIR/T2_FLAIR_brain_to_MNI.nii.gz'.
        mask: pattern of the brain mask, or nonzero for skull-stripped volumes (non-zero in all contrasts).
        table: CSV file with the columns subject, t1w, flair, and optionally mask, session; paths are relative to source
            or to the table.
        extra: more contrasts on the same grid: t2w=PATTERN,pdw=PATTERN (with a table: t2w,pdw as its columns).
        apply_mask: set everything outside of the brain mask to zero (skull stripping).
        spacing: in-plane voxel size in mm to resample to; by default it is kept. Slices are never resampled.
        interpolation: bilinear or bspline, for spacing.
        slices: so many central slices of the brain (of the mask, else of the upper 150 mm of the head); 0 takes all
            that hold brain or head.
        slab: START,STOP, RAS slice indices (STOP excluded), instead of slices; published: 166,171.
        size: X,Y voxels to pad or crop to around the centre of the head; none keeps the grid.
        png: also write 8-bit PNG slices in the published layout, below png/.
        allow_mirrored: keep pairs whose FLAIR looks mirrored against the T1w, with a warning.
        seed: of the split.
        fractions: share of the subjects for training, validation and test.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    recipe = Recipe(mask, apply_mask, spacing, interpolation, slices, _numbers(slab, "--slab"),
                    _numbers(size, "--size", none=True), png, allow_mirrored)  # fmt: skip
    _check(recipe)
    if apply_mask and mask is None and table is None:
        raise ValueError("--apply_mask: expected --mask PATTERN or --mask nonzero, but there is no mask to apply")
    folder, target = check_folder(source, "--source"), Path(str(out))
    if (target / "images").resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{target}: expected --out elsewhere than --source, but images/ would hold {folder}")
    if table is not None and not Path(str(table)).is_file():
        raise FileNotFoundError(f"{table}: expected a table (--table), but it does not exist; correct the path")
    options = {"t1w": t1w, "flair": flair, "mask": mask, "table": table, "extra": extra, "apply_mask": apply_mask,
               "spacing": spacing, "interpolation": interpolation, "slices": slices, "slab": recipe.slab,
               "size": recipe.size, "png": png, "allow_mirrored": allow_mirrored, "seed": seed,
               "fractions": fractions}  # fmt: skip
    preparation = Preparation("brain_pairs", options)
    pairs = find_pairs(
        folder, preparation, t1w=t1w, flair=flair, out=target / "images",
        mask=check_pattern(mask, "--mask") if mask not in (None, "nonzero") else None,
        table=Path(str(table)) if table is not None else None,
        extra=parse_extra(extra, table=table is not None),
    )  # fmt: skip

    def one(pair: Pair) -> Outcome:
        return convert_pair(pair, recipe, target)

    # Threads suffice: unpacking, sorting and filtering release Python's lock.
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        running = pool.map(one, pairs) if workers else map(one, pairs)
        outcomes = list(tqdm(running, total=len(pairs), desc="brain_pairs", unit="pair", disable=None))
    for outcome in outcomes:
        if outcome.dropped is not None:
            preparation.drop(*outcome.dropped)
        for reason, line in outcome.warnings:
            preparation.warn(reason, line)
    if not pairs and not preparation.dropped:
        raise ValueError(f"{folder}: expected T1w and FLAIR volumes (*_T1w.nii.gz, *_FLAIR.nii.gz), but found none; "
                         "name them with --t1w and --flair (patterns) or --table")  # fmt: skip
    items = [outcome.item for outcome in outcomes if outcome.item is not None]
    split_and_write(
        items, target, preparation, what="pairs", seed=seed, fractions=fractions,
        description="Registered T1w and FLAIR volumes in RAS, values in [0, 1]; split by subject",
    )  # fmt: skip
