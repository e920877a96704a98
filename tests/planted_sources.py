# SPDX-License-Identifier: Apache-2.0
"""Sources of data as a hospital might hand them over, small, with the identifiers of ``tests.planted`` everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests import test_prepare_dmri
from tests.planted import PLANTED
from tests.test_images import NEW_FILE, ramp, write_dicom
from tools.phantoms.brain_controlnet import make_subject

HEADER = PLANTED["header"]
EVERYTHING = "\n".join(f"{name}: {value}" for name, value in HEADER.items())
WHO = PLANTED["name"]["subject and file"]
REPORT = f"FINDINGS: Heart is normal in Mrs {PLANTED['text']['report']}.\n\nIMPRESSION: No {{}} effusion.\n"


def dicom(path: Path, pixels: np.ndarray) -> None:
    """A DICOM file with the identifiers in public elements and in a private one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in HEADER.items() if name != "private"}
    write_dicom(path, pixels.astype(np.uint16), SpecificCharacterSet="ISO_IR 192", **known)
    dataset = pydicom.dcmread(path)
    dataset.private_block(0x0011, EVERYTHING.splitlines()[0], create=True).add_new(1, "LO", HEADER["private"])
    dataset.ImageComments = EVERYTHING
    pydicom.dcmwrite(path, dataset, **NEW_FILE)


def picture(path: Path, pixels: np.ndarray) -> None:
    """PNG with plain and compressed text, JPEG and TIFF with EXIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if path.suffix == ".png":
        chunks = PngInfo()
        chunks.add_text("Comment", HEADER["PatientID"])
        chunks.add_itxt("Patient", EVERYTHING, zip=True)
        options["pnginfo"] = chunks
    else:
        exif = image.getexif()
        exif[0x010E] = EVERYTHING.encode("ascii", "replace").decode()  # ImageDescription
        options["exif"] = exif
    image.save(path, **options)


def nifti(path: Path, image: nibabel.Nifti1Image) -> None:
    """A volume whose header names the patient in all its texts, with a sidecar as converters of DICOM write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = image.header
    header["descrip"] = f"{HEADER['PatientName']} {HEADER['PatientID']}"
    header["intent_name"] = HEADER["PatientID"]
    header["aux_file"] = HEADER["AccessionNumber"]
    header["db_name"] = HEADER["PatientBirthDate"]
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", EVERYTHING.encode()))
    nibabel.save(image, path)
    path.with_name(path.name.removesuffix(".nii.gz") + ".json").write_text(json.dumps(HEADER))


def films(folder: Path) -> None:
    """A folder of each patient: a film and its report; one film is cut off."""
    for number in range(8):
        place = folder / f"{WHO}-{number}"
        levels = ramp(64, 72, 250) * (0.5 + number / 16)
        if number % 2:
            picture(place / "film.png", levels.astype(np.uint8))
        else:
            dicom(place / "film.dcm", levels * 12)
        (place / "film.txt").write_text(REPORT.format(("left", "right")[number % 2]))
    damaged = folder / f"{WHO}-9/film.dcm"
    dicom(damaged, ramp(64, 72))
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    damaged.with_suffix(".txt").write_text(REPORT.format("left"))


def heads(folder: Path) -> None:
    """BIDS: T1w and FLAIR of each subject; one subject has a FLAIR of another grid."""
    for number in range(4):
        stem = f"sub-{WHO}{number}"
        volumes = make_subject(number + 1, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0))
        for suffix in ("T1w", "FLAIR"):
            nifti(folder / stem / "anat" / f"{stem}_{suffix}.nii.gz", volumes[suffix])
    stem = folder / f"sub-{WHO}9/anat/sub-{WHO}9"
    for suffix, size in (("T1w", (48, 64, 4)), ("FLAIR", (44, 64, 4))):
        volume = make_subject(9, size=size, spacing=(3.4, 3.5, 6.0))[suffix]
        nifti(Path(f"{stem}_{suffix}.nii.gz"), volume)


def polyps(folder: Path) -> None:
    """Images of every kind with masks; one has none."""
    endings = (".dcm", ".png", ".jpg", ".tif")
    for number in range(8):
        name, ending = f"{WHO}{number}_1", endings[number % 4]
        levels = np.stack([ramp(64, 56, 200), ramp(64, 56, 120), np.roll(ramp(64, 56, 250), 5 * number, axis=0)], -1)
        (dicom if ending == ".dcm" else picture)(
            folder / f"images/{name}{ending}", (levels[..., 2] * 12) if ending == ".dcm" else levels.astype(np.uint8)
        )
        mask = np.zeros((64, 56), np.uint8)
        mask[10 : 30 + number, 12:40] = 255
        picture(folder / f"masks/{name}.png", mask)
    dicom(folder / f"images/{WHO}9_1.dcm", ramp(64, 56))


def series(folder: Path) -> None:
    """Diffusion MRI of each subject as AMICO leaves it, one without a brain mask; one more in an inbox."""
    for number in range(4):
        place = folder / f"{WHO}{number}"
        test_prepare_dmri.subject(place, seed=number, shape=(24, 28, 26), counts=((0, 2), (1000, 30), (2000, 30)))
        for path in place.rglob("*.nii.gz"):
            nifti(path, nibabel.Nifti1Image.from_bytes(nibabel.load(path).to_bytes()))
    shutil.copytree(folder / f"{WHO}0", folder.with_name("INBOX") / f"{WHO}0")
    (folder / f"{WHO}3/brain_mask.nii.gz").unlink()
