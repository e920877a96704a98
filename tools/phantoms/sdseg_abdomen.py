# SPDX-License-Identifier: Apache-2.0
"""Raw sample data for the multi-class mode of `sdseg`: abdominal CT phantoms in the layout of BTCV's download.

    python -m tools.phantoms sdseg_abdomen --out DIR --num_volumes 30 [--size 64,56,20] [--seed 0]
    python -m tools.prepare btcv DIR --out DATASET

Shapes are made of formulas; no patient and no scan stands behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from shared.nifti_files import grid_image, save_image
from tools.phantoms.abdomen import FIELD_OF_VIEW, MIDDLE, draw_abdomen, render
from tools.phantoms.dataset_folder import empty_folder, numbers

__all__ = ["NUMBERS", "make_dataset", "make_patient"]

# The numbers of BTCV's training cases. The order is such that a few volumes already hold cases of all parts of the
# usual split (test 0001 ... 0038; of the other 18, `tools.prepare btcv` validates on 0037, 0039 and 0040).
NUMBERS = (5, 1, 37, 6, 2, 7, 3, 9, 4, 10, 8, 21, 22, 23, 25, 39, 24, 29, 26, 32,
           27, 35, 28, 36, 30, 38, 31, 33, 40, 34)  # fmt: skip
FEWEST = (24, 24, 8)
_PATIENT = 6  # last word of the seed sequence


def make_dataset(
    out: str,
    num_volumes: int = 30,
    size: Sequence[int] | str = (64, 56, 20),
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Write `RawData/Training/img/img0001.nii.gz` (int16, HU) and `RawData/Training/label/label0001.nii.gz` (uint8).

    Volumes cover about 36 x 31 x 30 cm whatever their size. They are stored in LPS order for odd and LAS order for
    even numbers, as scanners and converters do, never in RAS. The case of a number is the same for every number of
    volumes; the same arguments give the same bytes.

    Args:
        out: folder to write; made if absent.
        num_volumes: number of cases, at most 30; the order of their numbers is `NUMBERS`.
        size: voxels along left-right, posterior-anterior and inferior-superior.
        seed: seed of everything, >= 0.
        overwrite: replace volumes that this function wrote into `out` before.

    Returns:
        Path of `RawData`.

    Raises:
        ValueError: an illegal option, named first in the message.
        FileExistsError: `out` is not empty and `overwrite` is false.
    """
    sides = numbers("size", size, count=3)
    if any(side != int(side) or side < fewest for side, fewest in zip(sides, FEWEST, strict=True)):
        raise ValueError(f"size: expected three whole numbers of at least {FEWEST}, got {size!r}")
    if not 1 <= num_volumes <= len(NUMBERS):
        raise ValueError(f"num_volumes: expected 1 to {len(NUMBERS)}, the cases of BTCV, got {num_volumes}")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    training = "RawData/Training"
    made = (f"{training}/img/img????.nii.gz", f"{training}/label/label????.nii.gz")
    folder = empty_folder(Path(out), overwrite=overwrite, made=made) / training
    for number in sorted(NUMBERS[:num_volumes]):
        images = make_patient(number, size=(int(sides[0]), int(sides[1]), int(sides[2])), seed=seed)
        for name, image in zip(("img", "label"), images, strict=True):
            save_image(image, folder / name / f"{name}{number:04d}.nii.gz")
    return str(folder.parent)


def make_patient(
    number: int, *, size: tuple[int, int, int] = (64, 56, 20), seed: int = 0
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """CT and labels of case `number`, on one grid. Options as in `make_dataset`."""
    body, place, noise = np.random.default_rng([seed, number, _PATIENT]).spawn(3)
    # the field of view is set in the plane for each patient, as at the scanner
    zoom = np.repeat(place.uniform(0.97, 1.05, size=2), [2, 1])
    spacing = zoom * FIELD_OF_VIEW / size
    axes = [
        (np.arange(count) - (count - 1) / 2) * step + middle
        for count, step, middle in zip(size, spacing, MIDDLE, strict=True)
    ]
    values, label = render(draw_abdomen(body), axes, noise)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes] + place.uniform(-30, 30, size=3)
    signs = np.array([-1, -1 if number % 2 else 1, 1])
    turn = np.diag([*signs, 1.0])
    turn[:3, 3] = np.where(signs < 0, np.array(size) - 1, 0)
    images = []
    for array in (values, label):
        turned = array[:: signs[0], :: signs[1]]
        images.append(grid_image(turned, affine @ turn, description="synthetic abdomen phantom"))
    return images[0], images[1]
