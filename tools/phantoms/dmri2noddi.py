# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data of the `dmri2noddi` bundle: low-resolution diffusion MRI with true NODDI maps at twice the
resolution, as a ready dataset folder.

    python -m tools.phantoms dmri2noddi --out DIR --num_subjects 40 [--shape 64,72,56] [--seed 0] [--snr 40]
        [--gradient_table STEM] [--noise none] [--directions] [--lesions 0.3] [--split 0.7,0.15,0.15] [--workers 1]

Brains are made of formulas, signals of the NODDI model (`noddi_signal`); no patient and no scan stands behind them.
"""

from __future__ import annotations

import gzip
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shared.datalist import FILE_NAME, SECTIONS, split_by_subject, write_datalist
from shared.files import atomic_path
from shared.gradients import GradientTable
from shared.resolution import halved_affine
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
    sides = _numbers("shape", shape)
    shares = _numbers("split", split)
    if any(side % 2 for side in sides) or min(sides) < MIN_SIDE:
        raise ValueError(f"shape: expected three even numbers of at least {MIN_SIDE}, got {shape!r}")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"split: expected shares >= 0 that sum to 1 ({', '.join(SECTIONS)}), got {split!r}")
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
    folder = _prepare(Path(out), overwrite)
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
    if workers == 1:
        items = [write(number) for number in range(1, num_subjects + 1)]
    else:
        # a fresh interpreter per process: forking a process that has loaded torch can hang
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            items = list(pool.map(write, range(1, num_subjects + 1)))
    # written last and renamed into place: a folder with a datalist is complete
    return str(
        write_datalist(
            folder,
            split_by_subject(items, shares, seed=seed),
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
    affine = _affine(shape, place)
    gain = np.exp(place.uniform(np.log(1000.0), np.log(4000.0)))
    volumes = acquire(maps, default_table() if table is None else table, affine, scanner, snr=snr)
    return maps, volumes * np.float32(gain), affine


def _affine(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """RAS affine in mm: a rotation of at most `MAX_OBLIQUE` degrees about a random axis, and the table's offset."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.radians(rng.uniform(0.5, MAX_OBLIQUE))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross) * VOXEL
    affine[:3, 3] = rng.uniform(-20, 20, size=3) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


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
        _save(folder / "subjects" / subject / f"{name}.nii.gz", values, place)
    rows = {"bval": table.bvals[None], "bvec": table.bvecs.T}
    for name, lines in rows.items():
        with atomic_path(folder / "subjects" / subject / f"dwi.{name}") as temporary:
            temporary.write_text("".join(" ".join(f"{v:.6g}" for v in line) + "\n" for line in lines), encoding="utf-8")
    item: dict[str, Any] = {name: f"subjects/{subject}/{name}.nii.gz" for name in ("dwi", "mask", "ndi", "odi", "fwf")}
    return item | {name: f"subjects/{subject}/dwi.{name}" for name in rows} | {"subject": subject}


def _save(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(np.ascontiguousarray(values), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"synthetic brain phantom"
    # no time stamp and no name in the gzip header, or equal runs would give different bytes
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _numbers(name: str, value: Any) -> list[float]:
    """Three finite numbers of an option given as "a,b,c" or as a sequence."""
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    try:
        found = [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected 3 numbers such as 1,2,3, got {value!r}") from error
    if len(found) != 3 or not np.isfinite(found).all():
        raise ValueError(f"{name}: expected 3 numbers, got {value!r}")
    return found


def _prepare(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{folder}: expected an empty or absent folder; choose another one or use --overwrite"
            )
        (folder / FILE_NAME).unlink(missing_ok=True)
        for path in (folder / "subjects").glob("sub-*"):
            shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
