# SPDX-License-Identifier: Apache-2.0
"""Generated pictures on disk, each marked as synthetic and explained by a file beside it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from shared.files import atomic_path, save_json
from shared.pictures import INTENDED_USE, SYNTHETIC_NOTE, made_with, picture_marks, save_marked_png, to_grey
from shared.transforms.label_answers import is_monai_label_request

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # DICOM PS3.4, Secondary Capture Image Storage


class SaveSampled(MapTransform):
    """Write each generated picture as ``<prompt_index>_<seed>.png`` with ``<prompt_index>_<seed>.json`` beside it.

    ``monai.transforms.SaveImaged`` does not fit: its PNG writer swaps rows and columns, it names files after an input
    file that a prompt does not have, writes in place, and cannot mark a picture as synthetic. File names carry no
    prompt: it may be a report.

    The JSON says what made the picture: prompts, seed, settings, SHA-256 of the weights, versions, and
    ``"synthetic": true``. The PNG carries the same without the prompts as text chunks, so that a copied file still says
    what it is. A picture that other prompts, settings or weights left under the same name is kept and the new one is
    called ``..._1``; the same settings overwrite it, as they give the same picture.

    Does nothing in a MONAI Label request, which gets its picture from ``SampleForLabeld``.

    Args:
        keys: pictures ``(1, H, W)`` in [0, 1], rows first.
        output_dir: folder, made when missing.
        bits: 8 or 16 bits of grey.
        dicom: also write a DICOM Secondary Capture, ``.dcm``; needs pydicom.
        weights_path: file whose SHA-256 is stated; ``None`` states null.
        guidance_scale: stated in the JSON, as are the next two.
        num_inference_steps: see above.
        scheduler: see above.

    Raises:
        ValueError: for other ``bits``, or a picture of another shape.
        FileNotFoundError: when ``weights_path`` does not exist.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | os.PathLike,
        bits: int = 8,
        dicom: bool = False,
        weights_path: str | os.PathLike | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
    ) -> None:
        super().__init__(keys)
        if bits not in (8, 16):
            raise ValueError(f"bits: expected 8 or 16, got {bits!r}.")
        self.output_dir = Path(output_dir)
        self.bits = bits
        self.dicom = dicom
        self.weights_path = None if weights_path is None else Path(weights_path)
        self.settings = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "scheduler": scheduler,
        }
        self._made_with: dict[str, Any] | None = None
        self._study_uid: str | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if is_monai_label_request(d):
            return d
        for key in self.key_iterator(d):
            self._save(to_grey(d[key], self.bits), self._description(d), int(d.get("prompt_index", 0)))
        return d

    def _description(self, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        # Hashing large weights takes seconds: once, not for each picture.
        if self._made_with is None:
            self._made_with = made_with(self.weights_path)
        return {
            "synthetic": True,
            "intended_use": INTENDED_USE,
            "prompt": str(data.get("prompt", "")),
            "negative_prompt": str(data.get("negative_prompt", "")),
            "seed": int(data.get("seed", 0)),
            **self.settings,
            "bits": self.bits,
            **self._made_with,
        }

    def _save(self, grey: np.ndarray, description: dict[str, Any], prompt_index: int) -> None:
        path = self._free_path(f"{prompt_index}_{description['seed']}", description)
        # Not the prompt: a picture is passed on more freely than the JSON beside it.
        stated = {name: value for name, value in description.items() if not name.endswith("prompt")}
        marks = picture_marks(stated, software="cxr_ldm")
        marks["prompt_sha256"] = hashlib.sha256(description["prompt"].encode()).hexdigest()
        save_marked_png(grey, path, marks)
        if self.dicom:
            self._save_dicom(grey, path.with_suffix(".dcm"), description["seed"], made_by=marks)
        save_json(description, path.with_suffix(".json"))

    def _free_path(self, name: str, description: Mapping[str, Any]) -> Path:
        number = 0
        while True:
            path = self.output_dir / f"{name}{f'_{number}' if number else ''}.png"
            sidecar = path.with_suffix(".json")
            if not path.exists() and not sidecar.exists():
                return path
            if sidecar.is_file() and sidecar.read_text(encoding="utf-8") == _as_json(description):
                return path
            number += 1

    def _save_dicom(self, grey: np.ndarray, path: Path, seed: int, *, made_by: Mapping[str, str]) -> None:
        from pydicom.uid import generate_uid

        self._study_uid = self._study_uid or generate_uid()
        with atomic_path(path) as temporary:
            write_secondary_capture(grey, temporary, study_uid=self._study_uid, number=seed, made_by=made_by)


def _as_json(description: Mapping[str, Any]) -> str:
    return json.dumps(description, indent=2, ensure_ascii=False) + "\n"


def write_secondary_capture(
    grey: np.ndarray,
    path: str | os.PathLike,
    *,
    study_uid: str,
    number: int = 1,
    made_by: Mapping[str, str] | None = None,
) -> None:
    """Write ``(H, W)`` uint8 or uint16 as a DICOM Secondary Capture image (PS3.3, A.8.1) that says it is synthetic.

    Patient attributes are constants: name and id ``SYNTHETIC``, birth date and sex empty. Conversion type SYN is the
    standard's word for a synthetic image.

    Args:
        grey: pixels, 0 is black.
        path: file to write.
        study_uid: instance UID of the study, one per run.
        number: instance number in the series.
        made_by: what is stated under Derivation Description, such as seed and SHA-256 of weights and prompt: one
            ``name: value`` a line, together at most 1024 characters.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(SECONDARY_CAPTURE)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    now = datetime.datetime.now(datetime.timezone.utc)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = UID(SECONDARY_CAPTURE)
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = study_uid
    dataset.SeriesInstanceUID = f"{study_uid[:60].rstrip('.')}.1"
    dataset.PatientName = "SYNTHETIC"
    dataset.PatientID = "SYNTHETIC"
    dataset.PatientBirthDate = ""
    dataset.PatientSex = ""
    dataset.StudyID = ""
    dataset.StudyDate = dataset.InstanceCreationDate = now.strftime("%Y%m%d")
    dataset.StudyTime = dataset.InstanceCreationTime = now.strftime("%H%M%S")
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "SYNTHETIC - research only, not for diagnosis"
    dataset.SeriesDescription = "SYNTHETIC chest radiograph"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = number % 2**31  # IS holds 32-bit numbers
    dataset.Modality = "OT"
    dataset.ConversionType = "SYN"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.ImageComments = SYNTHETIC_NOTE
    if made_by:
        dataset.DerivationDescription = "\n".join(f"{name}: {value}" for name, value in made_by.items())
    dataset.BurnedInAnnotation = "NO"
    dataset.PatientOrientation = ""
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = grey.shape
    bits = 8 * grey.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    dataset.add_new("PixelData", "OB" if bits == 8 else "OW", grey.astype(grey.dtype.newbyteorder("<")).tobytes())
    # pydicom 3 renamed the argument; MONAI Label still needs pydicom 2.
    modern = int(pydicom.__version__.split(".")[0]) >= 3
    pydicom.dcmwrite(path, dataset, **({"enforce_file_format": True} if modern else {"write_like_original": False}))


class SampleForLabeld(MapTransform):
    """Hand a generated picture to MONAI Label in the form its writer needs; outside of MONAI Label do nothing.

    Its writer takes ``(W, H)``, turns it and writes the array type as it is; PNG wants ``uint8``. The JSON part of the
    answer says that the picture is synthetic and how it was made, without the prompt: that may come from a file of the
    server, which a client must not read this way.

    Args:
        keys: pictures ``(1, H, W)`` in [0, 1], rows first.
        options: names of the client options to state.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        options: tuple[str, ...] = ("seed", "guidance_scale", "num_inference_steps", "scheduler"),
    ) -> None:
        super().__init__(keys)
        self.options = tuple(options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if not is_monai_label_request(d):
            return d
        for key in self.key_iterator(d):
            d[key] = np.ascontiguousarray(to_grey(d[key], 8).T)
        d["result"] = {"synthetic": True, "intended_use": INTENDED_USE, **{k: d.get(k) for k in self.options}}
        return d
