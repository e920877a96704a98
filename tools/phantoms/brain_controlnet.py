# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data of the `brain_controlnet` bundle: pairs of T1w and FLAIR head phantoms in BIDS layout.

    python -m tools.phantoms brain_controlnet --out DIR --n 40 [--size 80,112,24] [--spacing 2] [--seed 0]
        [--lesions 0.5] [--split 0.7,0.15,0.15] [--workers 1]

`--size 160,224,160 --spacing 1` writes whole heads. Shapes are made of formulas; no patient and no scan stands behind
them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shared.datalist import FILE_NAME, split_by_subject, write_datalist
from shared.nifti_files import grid_image, save_image
from tools.phantoms.brain_anatomy import draw_head, draw_waves
from tools.phantoms.brain_lesions import add_lesions
from tools.phantoms.brain_signal import TISSUES, Flair, Mprage, add_rician_noise, mix, vary
from tools.phantoms.brain_tissues import Maps, tissue_maps
from tools.phantoms.dataset_folder import empty_folder, make_all, numbers, shares_of

__all__ = ["make_dataset", "make_subject"]

SEQUENCES: dict[str, Mprage | Flair] = {"T1w": Mprage(), "FLAIR": Flair()}
SLAB_MIDDLE = 3.0  # mm above the middle of the cerebrum: 48 mm around it hold nuclei and ventricles
MAX_OBLIQUE = 5.0  # degrees
_SUBJECT = 3  # last word of the seed sequence


def make_dataset(
    out: str,
    n: int = 40,
    size: Sequence[int] | str = (80, 112, 24),
    spacing: float | Sequence[float] | str = 2.0,
    seed: int = 0,
    lesions: float = 0.5,
    split: Sequence[float] | str = (0.7, 0.15, 0.15),
    noise: float = 0.03,
    bias: float = 0.15,
    workers: int = 1,
    overwrite: bool = False,
) -> str:
    """Write a dataset folder: `sub-001/anat/sub-001_{T1w,FLAIR,desc-brain_mask,lesions}.nii.gz` and `datalist.json`.

    The files of a subject share one grid: int16 in scanner units (uint8 for masks), an oblique affine with an offset,
    stored as RAS for odd and as LPS for even numbers. A lesion mask exists where there are lesions. Subject k is the
    same for every n and number of workers (only its section moves); the same arguments give the same bytes.

    Args:
        out: folder to write; made if absent.
        n: number of subjects.
        size: voxels along left-right, posterior-anterior and inferior-superior.
        spacing: voxel size in mm, one number or three.
        seed: seed of everything, >= 0.
        lesions: share of the subjects with white-matter lesions, 0 to 1.
        split: shares of training, validation and test, summing to 1.
        noise: deviation of the noise in each channel, relative to the signal of white matter.
        bias: deviation of the logarithm of the bias field.
        workers: processes to use.
        overwrite: replace a dataset that this function wrote into `out` before.

    Returns:
        Path of `datalist.json`.

    Raises:
        ValueError: an illegal option, named first in the message.
        FileExistsError: `out` is not empty and `overwrite` is false.
    """
    shape = numbers("size", size, count=3)
    voxel = numbers("spacing", spacing, count=3, repeat=True)
    shares = shares_of(split)
    if any(side != int(side) for side in shape) or min(shape[:2]) < 16 or shape[2] < 1:
        raise ValueError(f"size: expected three whole numbers, the first two at least 16, got {size!r}")
    if min(voxel) <= 0:
        raise ValueError(f"spacing: expected millimetres above 0, got {spacing!r}")
    if n < (wanted := sum(share > 0 for share in shares)):
        raise ValueError(f"n: expected at least {wanted} subjects for {wanted} sections with a share, got {n}; raise n")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if not 0 <= lesions <= 1:
        raise ValueError(f"lesions: expected a share of the subjects between 0 and 1, got {lesions}")
    if noise < 0 or bias < 0:
        raise ValueError(f"{'noise' if noise < 0 else 'bias'}: expected a number >= 0, got {min(noise, bias)}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1 process, got {workers}")
    folder = empty_folder(Path(out), overwrite=overwrite, made=(FILE_NAME, "sub-*/anat/sub-*.nii.gz"))
    write = partial(
        _write_subject,
        folder=folder,
        size=tuple(int(side) for side in shape),
        spacing=tuple(voxel),
        seed=seed,
        lesions=lesions,
        noise=noise,
        bias=bias,
    )
    # written last and renamed into place: a folder with a datalist is complete
    return str(
        write_datalist(
            folder,
            split_by_subject(make_all(write, n, workers=workers), shares, seed=seed),
            name="brain_controlnet phantoms",
            description=f"Synthetic T1w and FLAIR heads: n={n}, size={[int(side) for side in shape]}, spacing={voxel}, "
            f"seed={seed}, lesions={lesions}, split={shares}, noise={noise}, bias={bias}",
        )
    )


def make_subject(
    number: int,
    *,
    size: tuple[int, int, int] = (80, 112, 24),
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    seed: int = 0,
    lesions: float = 0.5,
    noise: float = 0.03,
    bias: float = 0.15,
) -> dict[str, nib.Nifti1Image]:
    """The volumes of subject `number` (from 1) by BIDS suffix: `T1w`, `FLAIR`, `desc-brain_mask` and, if the subject
    has lesions, `lesions`. Options as in `make_dataset`."""
    rng = np.random.default_rng([seed, number, _SUBJECT])
    body, spots, place, *scans = rng.spawn(3 + len(SEQUENCES))
    axes = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(size, spacing, strict=True)]
    axes[2] = axes[2] + SLAB_MIDDLE
    maps = tissue_maps(draw_head(body), axes)
    tissues = vary(TISSUES, body)
    volumes: dict[str, np.ndarray] = {}
    if spots.random() < lesions:
        maps, volumes["lesions"] = add_lesions(maps, axes, spots)
    for (name, sequence), scan in zip(SEQUENCES.items(), scans, strict=True):
        volumes[name] = _acquire(maps, sequence, tissues, axes, scan, noise=noise, bias=bias)
    volumes["desc-brain_mask"] = maps.brain.astype(np.uint8)
    affine = oblique_affine(size, spacing, place, degrees=MAX_OBLIQUE, middle=(0, 0, SLAB_MIDDLE))
    return {name: _store(volume, affine, flipped=number % 2 == 0) for name, volume in volumes.items()}


def _acquire(
    maps: Maps,
    sequence: Mprage | Flair,
    tissues: dict,
    axes: Sequence[np.ndarray],
    rng: np.random.Generator,
    **level: float,
) -> np.ndarray:
    """One scan as int16: tissue signals with a texture of their own, bias field, noise, and an unknown gain."""
    values = list(tissues.values())
    white = sequence.signal(TISSUES["white"])
    signal = np.abs(mix(maps.fractions, sequence, values)) / np.float32(white)
    signal *= 1 + np.float32(0.025) * draw_waves(rng, 24, (12, 60)).on(axes)
    signal *= np.exp(np.float32(level["bias"]) * np.clip(draw_waves(rng, 6, (180, 400)).on(axes), -2, 2))
    gain = np.exp(rng.uniform(np.log(200.0), np.log(2000.0)))
    measured = gain * add_rician_noise(signal, level["noise"] * rng.uniform(0.7, 1.3), rng)
    return np.rint(np.minimum(measured, np.iinfo(np.int16).max)).astype(np.int16)


def oblique_affine(
    size: Sequence[int],
    spacing: Sequence[float],
    rng: np.random.Generator,
    *,
    degrees: float,
    middle: Sequence[float] = (0, 0, 0),
) -> np.ndarray:
    """RAS affine in mm: a rotation of at most so many degrees about a random axis, and the table's random offset of the
    grid's `middle`."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.radians(rng.uniform(0.5, degrees))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.asarray(spacing)
    affine[:3, 3] = rng.uniform(-20, 20, size=3) + middle - affine[:3, :3] @ ((np.asarray(size) - 1) / 2)
    return affine


def _store(volume: np.ndarray, affine: np.ndarray, *, flipped: bool) -> nib.Nifti1Image:
    """The volume as NIfTI in mm, in RAS order or, `flipped`, in LPS order, at the same place in the world."""
    if flipped:
        turn = np.diag([-1.0, -1.0, 1.0, 1.0])
        turn[:2, 3] = np.array(volume.shape[:2]) - 1
        volume, affine = volume[::-1, ::-1], affine @ turn
    return grid_image(volume, affine, description="synthetic head phantom")


def _write_subject(number: int, *, folder: Path, **options: Any) -> dict[str, Any]:
    subject = f"sub-{number:03d}"
    images = make_subject(number, **options)
    paths = {}
    for name, image in images.items():
        paths[name] = folder / subject / "anat" / f"{subject}_{name}.nii.gz"
        save_image(image, paths[name])
    return {
        "t1w": os.path.relpath(paths["T1w"], folder),
        "flair": os.path.relpath(paths["FLAIR"], folder),
        "mask": os.path.relpath(paths["desc-brain_mask"], folder),
        "subject": subject,
        "num_slices": images["T1w"].shape[2],
    }
