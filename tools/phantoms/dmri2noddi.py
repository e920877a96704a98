# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data of the `dmri2noddi` bundle: low-resolution diffusion MRI with true NODDI maps at twice the
resolution, as a ready dataset folder.

    python -m tools.phantoms dmri2noddi --out DIR --num_subjects 40 [--shape 64,72,56] [--seed 0] [--snr 40]
        [--gradient_table STEM] [--noise none] [--directions] [--lesions 0.3] [--split 0.7,0.15,0.15] [--workers 1]

Brains are made of formulas, signals of the NODDI model (`noddi_signal`); no patient and no scan stands behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.datalist import FILE_NAME, split_by_subject, write_datalist
from shared.files import atomic_path
from shared.gradients import GradientTable
from shared.nifti_files import grid_image, save_image
from shared.resolution import halved_affine
from tools.phantoms.brain_controlnet import oblique_affine
from tools.phantoms.dataset_folder import empty_folder, make_all, numbers, shares_of
from tools.phantoms.noddi_acquisition import acquire, default_table, read_table
from tools.phantoms.noddi_anatomy import NoddiMaps, draw_maps

__all__ = ["make_dataset", "make_subject"]

VOXEL = 1.25  # mm, high resolution
MAX_OBLIQUE = 8.0  # degrees
MIN_SIDE = 32
_SUBJECT = 6  # last word of the seed sequence


def make_dataset(
    out: str,
    num_subjects: int = 40,
    shape: Sequence[int] | str = (64, 72, 56),
    seed: int = 0,
    snr: float = 40.0,
    noise: str = "rician",
    gradient_table: str = "",
    directions: bool = False,
    lesions: float = 0.3,
    split: Sequence[float] | str = (0.7, 0.15, 0.15),
    workers: int = 1,
    overwrite: bool = False,
) -> str:
    """Write a dataset folder: `subjects/sub-001/{dwi,mask,ndi,odi,fwf}.nii.gz`, `dwi.bval`, `dwi.bvec`, a datalist.

    `dwi` is int16 on the low-resolution grid; the mask (uint8) and the maps (float32, in [0, 1]) are on the grid of
    twice the resolution over the same field of view, 1.25 mm, stored in RAS order with a rotation of up to 8 degrees.
    Subject k is the same for every number of subjects and of workers (only its section moves); the same arguments give
    the same bytes. What the maps are in water and in crossings: `noddi_anatomy.NoddiMaps`.

    Args:
        out: folder to write; made if absent.
        num_subjects: number of subjects.
        shape: voxels of the maps along right, front and up: even, at least `MIN_SIDE`. The brain fills the grid.
        seed: seed of everything, >= 0.
        snr: signal of white matter at b = 0 over the deviation of the noise, at low resolution.
        noise: `rician`, or `none` for the signal itself.
        gradient_table: stem of `<stem>.bval` and `<stem>.bvec`; empty for 4 x b 0, 20 x b 1000, 40 x b 2000.
        directions: also write `direction.nii.gz`, the strongest bundle's unit vector along the voxel axes (X, Y, Z, 3).
        lesions: share of the subjects with white-matter lesions, 0 to 1.
        split: shares of the subjects for training, validation and test, summing to 1.
        workers: processes to use.
        overwrite: replace a dataset that this function wrote into `out` before.

    Returns:
        Path of `datalist.json`. Its items hold `dwi`, `bval`, `bvec`, `mask`, `ndi`, `odi`, `fwf` and `subject`.

    Raises:
        ValueError: an illegal option, named first in the message.
        FileExistsError: `out` is not empty and `overwrite` is false.
    """
    sides = numbers("shape", shape, count=3)
    shares = shares_of(split)
    if any(side % 2 for side in sides) or min(sides) < MIN_SIDE:
        raise ValueError(f"shape: expected three even numbers of at least {MIN_SIDE}, got {shape!r}")
    if num_subjects < (wanted := sum(share > 0 for share in shares)):
        raise ValueError(f"num_subjects: expected at least {wanted}, one for each section, got {num_subjects}")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if snr <= 0:
        raise ValueError(f"snr: expected a number above 0, got {snr}; --noise none leaves the noise out")
    # fire reads a bare `none` as the word, but `None` as Python's
    if str(noise).lower() not in ("rician", "none"):
        raise ValueError(f"noise: expected rician or none, got {noise!r}")
    if not 0 <= lesions <= 1:
        raise ValueError(f"lesions: expected a share of the subjects between 0 and 1, got {lesions}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1 process, got {workers}")
    table = read_table(gradient_table) if gradient_table else default_table()
    folder = empty_folder(
        Path(out), overwrite=overwrite, made=(FILE_NAME, "subjects/sub-*/*.nii.gz", "subjects/sub-*/dwi.bv*")
    )
    write = partial(
        _write_subject,
        folder=folder,
        directions=directions,
        table=table,
        shape=tuple(int(side) for side in sides),
        seed=seed,
        snr=float(snr) if str(noise).lower() == "rician" else None,
        lesions=lesions,
    )
    # written last and renamed into place: a folder with a datalist is complete
    return str(
        write_datalist(
            folder,
            split_by_subject(make_all(write, num_subjects, workers=workers), shares, seed=seed),
            name="dmri2noddi phantoms",
            description=f"Synthetic diffusion MRI with true NODDI maps: num_subjects={num_subjects}, "
            f"shape={[int(side) for side in sides]}, seed={seed}, noise={noise}, snr={snr}, lesions={lesions}, "
            f"split={shares}, gradient_table={Path(gradient_table).name or 'default'}",
        )
    )


def make_subject(
    number: int,
    *,
    shape: tuple[int, int, int] = (64, 72, 56),
    seed: int = 0,
    snr: float | None = 40.0,
    lesions: float = 0.3,
    table: GradientTable | None = None,
) -> tuple[NoddiMaps, np.ndarray, np.ndarray]:
    """Subject `number` (from 1).

    Args:
        number: of the subject. shape, seed, lesions: as in `make_dataset`.
        snr: as in `make_dataset`; None adds no noise.
        table: gradients; None takes the default ones.

    Returns:
        The truth, the volumes (X, Y, Z, N) float32 in scanner units on the low-resolution grid, and the affine (4, 4)
        of the truth.
    """
    body, place, scanner = np.random.default_rng([seed, number, _SUBJECT]).spawn(3)
    maps = draw_maps(shape, body, lesions=bool(place.random() < lesions))
    affine = oblique_affine(shape, [VOXEL] * 3, place, degrees=MAX_OBLIQUE)
    gain = np.exp(place.uniform(np.log(1000.0), np.log(4000.0)))
    volumes = acquire(maps, default_table() if table is None else table, affine, scanner, snr=snr)
    return maps, volumes * np.float32(gain), affine


def _write_subject(
    number: int, *, folder: Path, directions: bool, table: GradientTable, **options: Any
) -> dict[str, Any]:
    subject = f"sub-{number:03d}"
    maps, volumes, affine = make_subject(number, table=table, **options)
    dwi = np.rint(np.minimum(volumes, np.iinfo(np.int16).max)).astype(np.int16)
    files = {
        "dwi": (dwi, halved_affine(affine)),
        "mask": (maps.mask.astype(np.uint8), affine),
        "ndi": (maps.ndi, affine),
        "odi": (maps.odi, affine),
        "fwf": (maps.fwf, affine),
    }
    if directions:
        files["direction"] = (np.moveaxis(maps.first, 0, -1), affine)
    for name, (values, place) in files.items():
        image = grid_image(values, place, description="synthetic brain phantom")
        save_image(image, folder / "subjects" / subject / f"{name}.nii.gz")
    rows = {"bval": table.bvals[None], "bvec": table.bvecs.T}
    for name, lines in rows.items():
        with atomic_path(folder / "subjects" / subject / f"dwi.{name}") as temporary:
            temporary.write_text("".join(" ".join(f"{v:.6g}" for v in line) + "\n" for line in lines), encoding="utf-8")
    item: dict[str, Any] = {name: f"subjects/{subject}/{name}.nii.gz" for name in ("dwi", "mask", "ndi", "odi", "fwf")}
    return item | {name: f"subjects/{subject}/dwi.{name}" for name in rows} | {"subject": subject}
