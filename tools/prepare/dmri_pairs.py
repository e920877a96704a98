# SPDX-License-Identifier: Apache-2.0
"""Diffusion data with NODDI maps of the same resolution -> dataset folder of dmri2noddi (input at half of it)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shared.datalist import SECTIONS, write_datalist
from shared.provenance import software_versions
from tools.prepare.dmri_conversion import METHODS, Prepared, Recipe, prepare_subject
from tools.prepare.dmri_subjects import LAYOUTS, UnfitSubjectError, check_patterns, find_subject, subject_names
from tools.prepare.mask_pairs import check_places
from tools.prepare.preparation import Preparation, check_workers, read_table, split_and_write


def dmri_pairs(
    source: str,
    out: str,
    *,
    layout: str = "auto",
    method: str = "kspace",
    low_resolution_dwi: str | None = None,
    dwi: str | None = None,
    bval: str | None = None,
    bvec: str | None = None,
    mask: str | None = None,
    ndi: str | None = None,
    odi: str | None = None,
    fwf: str | None = None,
    subjects: str | Sequence[str] | None = None,
    split: str | None = None,
    fix_axes: bool = False,
    allow_flipped: bool = False,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
) -> None:
    """Prepare diffusion data and NODDI maps: find, check, halve the resolution of the signal, split by subject.

    The source holds one folder per subject, with preprocessed diffusion volumes (4-D NIfTI), FSL b-values and
    directions, a brain mask and NODDI maps as AMICO or the NODDI toolbox write them, all on one grid. A subject that
    cannot be used is left out and named in preparation.json. A run that was stopped goes on where it was; what was
    finished from the same files with the same options is kept.

    The last voxel of an axis of odd length is cut off everywhere, so that the maps have exactly twice the voxels of the
    input; positions do not change. Outside the mask, maps become 0.

    Args:
        source: folder of the subject folders.
        out: dataset folder to make: images/<subject>/{dwi,mask,ndi,odi,fwf}.nii.gz and dwi.bval, dwi.bvec,
            datalist.json, preparation.json.
        layout: hcp (<subject>/T1w/Diffusion/data.nii.gz, bvals, bvecs, nodif_brain_mask.nii.gz; maps there, in
            T1w/Diffusion/AMICO/NODDI or in NODDI), folders (*dwi.nii.gz, *.bval, *.bvec, *mask.nii.gz and maps in the
            subject's folder, its dwi, AMICO/NODDI or NODDI), or auto: by subject, whichever it has.
        method: kspace (half the frequencies per axis, as a shorter scan) or block (mean of 2 x 2 x 2 voxels).
        low_resolution_dwi: pattern of a series that was measured at half the resolution of the maps, such as
            '{subject}/lowres/*_dwi.nii.gz', with bval and bvec beside it; it is checked, and nothing is downsampled.
            The mask may then have either resolution.
        dwi: pattern below source with {subject} and globs, instead of the search.
        bval: the same for the b-values; by default those beside the diffusion volumes.
        bvec: the same for the directions.
        mask: the same for the brain mask.
        ndi: the same for the neurite density (ICVF).
        odi: the same for the orientation dispersion.
        fwf: the same for the free water fraction (ISOVF).
        subjects: names with commas between, or a text file with one per line; by default all folders.
        split: CSV table with the columns subject, section (training, validation, test), to keep a published split, or
            families (HCP has twins) together; without it the split is drawn by subject.
        fix_axes: where fibres are clearly more coherent with an axis flipped or two exchanged, correct the directions
            instead of leaving the subject out.
        allow_flipped: keep such subjects as they are, with a warning.
        seed: of a drawn split.
        fractions: share of the subjects for training, validation and test of a drawn split.
        workers: threads; 0 works in the main thread. Each holds one series at half the resolution in memory (HCP:
            about 1 GB).
    """
    check_workers(workers)
    recipe = _recipe(layout, method, low_resolution_dwi is not None, fix_axes, allow_flipped)
    folder, target = check_places(source, out)
    patterns = check_patterns({"low_resolution_dwi": low_resolution_dwi, "dwi": dwi, "bval": bval, "bvec": bvec,
                               "mask": mask, "ndi": ndi, "odi": odi, "fwf": fwf})  # fmt: skip
    names = subject_names(folder, target, subjects)
    sections = None if split is None else _read_split(Path(str(split)))
    how = "measured" if recipe.low_resolution else method
    preparation = Preparation("dmri_pairs", {"layout": layout, "method": how, "patterns": patterns, "split": split,
                                             "fix_axes": fix_axes, "allow_flipped": allow_flipped, "seed": seed,
                                             "fractions": fractions})  # fmt: skip
    if sections is not None:
        for name in [name for name in names if name not in sections]:
            preparation.drop("not in the table of --split", name)
        names = [name for name in names if name in sections]

    def one(name: str) -> Prepared | UnfitSubjectError:
        try:
            return prepare_subject(find_subject(folder, name, layout=layout, patterns=patterns), recipe, target)
        except UnfitSubjectError as problem:
            return problem

    # Threads suffice: unpacking, multiplying and packing release Python's lock.
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        running = pool.map(one, names) if workers else map(one, names)
        outcomes = list(tqdm(running, total=len(names), desc="dmri_pairs", unit="subject", disable=None))
    items = _collect(outcomes, preparation)
    description = {
        "description": "Diffusion MRI at half the resolution of its NODDI maps; split by subject",
        "method": how,
        "software": _versions(),
    }
    if sections is None:
        split_and_write(items, target, preparation, what="subjects", seed=seed, fractions=fractions, **description)
    else:
        _write_given(items, sections, target, preparation, description)


def _recipe(layout: str, method: str, low_resolution: bool, fix_axes: bool, allow_flipped: bool) -> Recipe:
    for option, value, known in (("layout", layout, LAYOUTS), ("method", method, tuple(METHODS))):
        if value not in known:
            raise ValueError(f"--{option}: expected {' or '.join(known)}, but got {value!r}")
    for option, flag in (("fix_axes", fix_axes), ("allow_flipped", allow_flipped)):
        if not isinstance(flag, bool):
            raise ValueError(f"--{option}: expected True or False, but got {flag!r}")
    if fix_axes and allow_flipped:
        raise ValueError("--allow_flipped: expected it without --fix_axes, but got both; correct the axes or keep them")
    # The method is no part of what is done to measured data: another one must not prepare it anew.
    return Recipe("" if low_resolution else method, low_resolution, fix_axes, allow_flipped)


def _versions() -> dict[str, str]:
    return software_versions() | {name: metadata.version(name) for name in ("nibabel", "scipy", "dipy")}


def _read_split(table: Path) -> dict[str, str]:
    """Subject -> section, each subject once."""
    if not table.is_file():
        raise FileNotFoundError(f"{table}: expected a table (--split), but it does not exist; correct the path")
    sections: dict[str, str] = {}
    for row in read_table(table, ["subject", "section"]):
        subject, section = row["subject"], row["section"]
        if section not in SECTIONS:
            raise ValueError(f"{table}: expected a section of {', '.join(SECTIONS)}, but {subject!r} has {section!r}")
        if subject in sections:
            raise ValueError(f"{table}: expected each subject once, but {subject!r} is listed twice; remove a row")
        sections[subject] = section
    return sections


def _collect(outcomes: Sequence[Prepared | UnfitSubjectError], preparation: Preparation) -> list[dict[str, Any]]:
    """Items of the usable subjects; notes the others, equal data under two names, and tables that differ."""
    first: dict[str, str] = {}
    items = []
    for outcome in outcomes:
        if isinstance(outcome, UnfitSubjectError):
            preparation.drop(outcome.reason, str(outcome))
            continue
        subject = outcome.item["subject"]
        for reason, line in outcome.warnings:
            preparation.warn(reason, line)
        if outcome.digest in first:
            preparation.drop("same data as another subject", f"{outcome.item['dwi']}: expected data of its own, but "
                             f"{first[outcome.digest]} has the same; {subject} is left out")  # fmt: skip
            continue
        first[outcome.digest] = subject
        items.append(outcome.item)
    usual = Counter(_protocol(item) for item in items).most_common(1)
    for item in items:
        if _protocol(item) != usual[0][0]:
            preparation.warn("another gradient table than most subjects",
                             f"{item['bval']}: {_protocol(item)}, most have {usual[0][0]}; rotation-invariant features "
                             "serve both, direction channels do not")  # fmt: skip
    return items


def _protocol(item: dict[str, Any]) -> str:
    return ", ".join(f"{n} at b={b}" for b, n in zip(item["shells"], item["directions"], strict=True))


def _write_given(
    items: Sequence[dict[str, Any]],
    sections: dict[str, str],
    out: Path,
    preparation: Preparation,
    description: dict[str, Any],
) -> None:
    """As `split_and_write`, with the sections of a table."""
    parts = {name: [item for item in items if sections[item["subject"]] == name] for name in SECTIONS}
    preparation.counts |= {"subjects": len(items)} | {name: len(part) for name, part in parts.items()}
    for name in SECTIONS[1:]:
        if not parts[name]:
            preparation.warn("empty section", name)
    out.mkdir(parents=True, exist_ok=True)
    record = preparation.write(out)
    if not parts["training"]:
        raise ValueError(f"{record}: expected subjects for training, but none is left; this file says why each was "
                         "dropped")  # fmt: skip
    write_datalist(out, parts, name=preparation.name, **description)
    print(preparation)
