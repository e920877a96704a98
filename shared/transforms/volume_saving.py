# SPDX-License-Identifier: Apache-2.0
"""Translated volumes on disk: on the input's grid, marked as synthetic, with an explanation and a picture beside."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from PIL import Image

from shared.files import save_json, sha256_of_file
from shared.inferers import chosen, one_of
from shared.intensity import unscale_intensity
from shared.nifti_files import write_nifti
from shared.pair_checks import grid_distance
from shared.pictures import INTENDED_USE, made_with, picture_marks, save_marked_png, to_grey
from shared.result_files import ResultFiles, path_of, remove_earlier
from shared.transforms.label_answers import answer_with_file, is_monai_label_request
from shared.transforms.volumes import PICTURE_SUFFIX, open_volume, scaling_of
from shared.translation_picture import comparison_panels, on_same_grid, save_comparison

logger = logging.getLogger(__name__)

SCALED_UNIT = "[0, 1]"
SCANNER_UNIT = "scanner intensities of the reference"
# What the JSON calls a volume, by the end of its name.
_KIND = {"": "image", "_sd": "standard_deviation"}
_CONDITION_NAME = re.compile(r"(?:^|[_-])flair$", re.IGNORECASE)


class SaveTranslatedVolumed(MapTransform):
    """Write ``<input>_T1w.nii.gz`` with ``<input>_T1w.json`` and the picture ``<input>_T1w.png`` beside it.

    ``<input>`` is the name of the input file without ``_FLAIR``; of several samples the mean is written, and their
    standard deviation as ``<input>_T1w_sd.nii.gz``. The volume is float32 and has the input's shape, and the bits of
    its qform and sform. A 2-D PNG gives a PNG of the same size and depth; its picture is called
    ``<input>_T1w_comparison.png``.

    ``monai.transforms.SaveImaged`` does not fit: it writes in place, makes its own qform and sform of the affine, names
    nothing as synthetic, and overwrites the volume of another input that has the same name.

    The same input overwrites what an earlier run wrote for it. Of another input with the same name the file is kept
    and the new one is called ``..._1``. A file that is not synthetic, such as a true T1w, is never overwritten.

    In a MONAI Label request nothing is written to ``output_dir``: the answer is the file that would have been, byte for
    byte (without picture and JSON), also to a viewer that asks for ``.nrrd`` and ``uint8``. A client chooses it by
    ``volume``: the contrast (``t1w``; without the option) or ``sd``. The JSON part of the answer is that of a run.

    Args:
        keys: ``(1, X, Y, Z)`` in [0, 1] on the input's grid (after ``Invertd``), or ``(2, X, Y, Z)``: mean and standard
            deviation; of a slice without Z.
        output_dir: folder, made when missing.
        suffix: contrast at the end of the names.
        image_key: loaded input, whose metadata tell the input file. The metadata of ``keys`` are asked first.
        source: folder below which the inputs lie: their subfolders are kept below ``output_dir``; a file or ``None``:
            all results go into ``output_dir`` itself.
        weights_path: file whose SHA-256 is stated; ``None`` states null.
        reference: volume, in scanner intensities, into whose robust range the values are mapped; ``None``: see next.
        reference_key: key of such a volume of each item. When that is a prepared one (in [0, 1]), the item's
            ``intensity`` tells its scanner intensities. ``None``: values stay in [0, 1].
        true_key: key of the true image, shown in the picture where an item has it.
        picture: write the picture too.
        software: name of the bundle, stated in the picture.
        num_inference_steps: stated in the JSON, as are the next five.
        guidance_scale: see above.
        conditioning_scale: see above.
        seed: see above.
        num_samples: see above.
        scheduler: see above.

    Raises:
        ValueError: both kinds of reference, a reference without scanner intensities, a volume on another grid than the
            input or with values that are not finite, a file in the way that is not synthetic, or a ``volume`` that is
            none of these, or ``sd`` of a single sample.
        FileNotFoundError: no such weights or reference.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | os.PathLike,
        suffix: str = "T1w",
        image_key: str = "image",
        source: str | os.PathLike | None = None,
        weights_path: str | os.PathLike | None = None,
        reference: str | os.PathLike | None = None,
        reference_key: str | None = None,
        true_key: str = "t1w",
        picture: bool = True,
        software: str = "brain_controlnet",
        num_inference_steps: int | str | None = None,
        guidance_scale: float | str | None = None,
        conditioning_scale: float | str | list[float] | None = None,
        seed: int | str | None = None,
        num_samples: int | str | None = None,
        scheduler: str | list[str] | None = None,
    ) -> None:
        super().__init__(keys)
        if reference and reference_key:
            raise ValueError(f"reference: expected it or reference_key, got both ({reference}, {reference_key}).")
        if reference and not Path(reference).is_file():
            raise FileNotFoundError(f"{reference}: expected the reference volume, found no file; correct reference.")
        self.suffix, self.image_key, self.true_key = suffix, image_key, true_key
        self.results = ResultFiles(output_dir, source)
        self.weights_path = weights_path
        self.reference, self.reference_key = reference or None, reference_key or None
        self.picture, self.software = picture, software
        self.settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "conditioning_scale": conditioning_scale,
            "seed": seed,
            "num_samples": num_samples,
            "scheduler": chosen(scheduler),
        }
        self._made_with: dict[str, Any] | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = self._input_path(d, key)
            mean, deviation = _volumes_of(d[key], path, key=key)
            low, high, intensity = self._intensity(d)
            if _is_picture(path) and intensity["unit"] != SCALED_UNIT:
                raise ValueError(
                    f"{path}: a PNG holds {SCALED_UNIT}, not scanner intensities; leave out the reference."
                )
            volumes = {"": unscale_intensity(mean, low, high)}
            if deviation is not None:
                volumes["_sd"] = deviation * np.float32(high - low)
            if is_monai_label_request(d):
                self._answer(d, key, path, volumes, self._description(path, intensity))
                continue
            panels = None
            if self.picture:
                panels = comparison_panels(path, mean, deviation, true=self._true_on_grid(d, path))
            self._save(path, volumes, self._description(path, intensity), panels)
        return d

    def _save(
        self, path: str, volumes: Mapping[str, np.ndarray], description: dict[str, Any], panels: Any | None
    ) -> None:
        extension, picture = (".png", "_comparison.png") if _is_picture(path) else (".nii.gz", ".png")
        endings = (extension, "_sd" + extension, picture)
        name = f"{_subject_name(path)}{self.suffix}"
        stem = self.results.claim(path, name, source_sha256=description["source_sha256"], endings=endings)
        files = {_KIND[end]: f"{stem.name}{end}{extension}" for end in volumes}
        if panels is not None:
            files["picture"] = stem.name + picture
        # The JSON first: it says whose the other files are, should the process end in between.
        sidecar = stem.with_name(f"{stem.name}.json")
        remove_earlier(sidecar, set(files.values()))
        shown = {} if panels is None else {"panels": list(panels)}
        # The name of a file may be that of a patient: in the JSON beside the volume, not inside what is passed on.
        save_json({**description, "source": Path(path).name, "files": files, **shown}, sidecar)
        for end, values in volumes.items():
            self._write(values, stem.with_name(files[_KIND[end]]), like=path, description=description)
        if panels is not None:
            marks = picture_marks({**description, **shown}, software=self.software)
            save_comparison(panels, stem.with_name(files["picture"]), marks=marks)

    def _answer(
        self,
        data: dict[Hashable, Any],
        key: Hashable,
        path: str,
        volumes: Mapping[str, np.ndarray],
        description: dict[str, Any],
    ) -> None:
        ends = {self.suffix.lower(): "", "sd": "_sd"}
        wanted = one_of("volume", data.get("volume", self.suffix.lower()), list(ends))
        values = volumes.get(ends[wanted])
        if values is None:
            raise ValueError(f"volume: expected {self.suffix.lower()} of one sample, got sd; ask for num_samples of 2.")
        extension = ".png" if _is_picture(path) else ".nii.gz"
        spacing = np.linalg.norm(open_volume(path).affine[:3, :3], axis=0)
        sizes = {"shape": list(values.shape), "voxel_mm": [round(float(size), 6) for size in spacing]}
        answer_with_file(
            data,
            key,
            lambda name: self._write(values, Path(name), like=path, description=description),
            suffix=extension,
            result={**description, "volume": wanted, **sizes},
            image_key=self.image_key,
        )

    def _input_path(self, data: Mapping[Hashable, Any], key: Hashable) -> str:
        path = path_of(data[key]) or path_of(data.get(self.image_key))
        if path is None:
            raise ValueError(
                f"{key}: expected metadata with the input file (filename_or_obj), got none; load with LoadVolumed and "
                "put Invertd before."
            )
        return path

    def _true_on_grid(self, data: Mapping[Hashable, Any], path: str) -> str | None:
        true = path_of(data.get(self.true_key))
        if true is None or on_same_grid(true, path):
            return true
        logger.warning(
            "%s: the true image lies on another grid than the input and is left out of the picture; resample it to see "
            "both.",
            self.true_key,
        )
        return None

    def _description(self, path: str, intensity: dict[str, Any]) -> dict[str, Any]:
        # Hashing large weights takes seconds: once, not for each volume.
        if self._made_with is None:
            self._made_with = {**made_with(self.weights_path), "nibabel_version": nibabel.__version__}
        return {
            "synthetic": True,
            "intended_use": INTENDED_USE,
            "contrast": self.suffix,
            "source_sha256": sha256_of_file(path),
            **self.settings,
            "intensity": intensity,
            **self._made_with,
        }

    def _intensity(self, data: Mapping[Hashable, Any]) -> tuple[float, float, dict[str, Any]]:
        """Values that 0 and 1 become, and what to say about it."""
        if self.reference is None and self.reference_key is None:
            return 0.0, 1.0, {"unit": SCALED_UNIT}
        path = os.fspath(self.reference) if self.reference else path_of(data.get(self.reference_key))
        if path is None:
            raise ValueError(
                f"{self.reference_key}: expected a reference volume in each item, got none; set reference_key to null "
                "to keep values in [0, 1], or give the path of one reference."
            )
        low, high = scaling_of(open_volume(path).read(), name=path)
        if (low, high) == (0.0, 1.0):
            stated = (data.get("intensity") or {}).get(self.reference_key)
            if stated is None:
                raise ValueError(
                    f"{path}: expected scanner intensities of the reference, but its values lie in [0, 1] already; "
                    "give the original volume, or no reference to keep values in [0, 1]."
                )
            low, high = (float(value) for value in stated)
        return low, high, {"unit": SCANNER_UNIT, "low": low, "high": high}

    def _write(self, values: np.ndarray, path: Path, *, like: str, description: Mapping[str, Any]) -> None:
        if not _is_picture(like):
            write_nifti(values, path, like=like)
            return
        with Image.open(like) as opened:
            bits = 16 if opened.mode.startswith("I") else 8
        grey = to_grey(torch.from_numpy(values.reshape(1, *values.shape[:2])), bits)
        save_marked_png(grey, path, picture_marks(description, software=self.software))


def _is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURE_SUFFIX)


def _volumes_of(pred: Any, path: str, *, key: Hashable) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and standard deviation ``(X, Y, Z)`` float32, checked against the grid of the input."""
    plain = pred.as_tensor() if isinstance(pred, MetaTensor) else torch.as_tensor(pred)
    values = plain.detach().cpu().float().numpy()
    values = values[..., None] if values.ndim == 3 else values
    file = open_volume(path)
    if values.ndim != 4 or values.shape[0] not in (1, 2) or values.shape[1:] != file.shape:
        raise ValueError(
            f"{key}: expected (1 or 2, {', '.join(map(str, file.shape))}) as {path} has it, got {values.shape}; put "
            "Invertd before."
        )
    if isinstance(pred, MetaTensor):
        apart = grid_distance(file.shape, pred.affine.cpu().numpy(), file.affine)
        if apart > 1e-2:
            raise ValueError(
                f"{key}: expected the affine of {path}, got one that puts voxels up to {apart:.3g} mm apart; put "
                "Invertd before."
            )
    if not np.isfinite(values).all():
        raise ValueError(f"{key}: expected finite values for {path}, got NaN or infinity; try --amp False.")
    return values[0], values[1] if len(values) == 2 else None


def _subject_name(path: str) -> str:
    """``.../sub-01_FLAIR.nii.gz`` -> ``sub-01_``; empty for ``flair.nii``."""
    name = re.sub(r"\.(nii\.gz|nii|png)$", "", Path(path).name, flags=re.IGNORECASE)
    name = _CONDITION_NAME.sub("", name)
    return f"{name}_" if name else ""
