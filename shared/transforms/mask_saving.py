# SPDX-License-Identifier: Apache-2.0
"""Masks on disk: at the input's own size, with what the model was sure of, a picture and an explanation beside."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from shared.files import save_json, sha256_of_file
from shared.inferers import chosen, number
from shared.nifti_files import write_nifti
from shared.pair_checks import grid_distance
from shared.pictures import INTENDED_USE, made_with, picture_marks, save_grid, save_marked_png, to_grey
from shared.result_files import ResultFiles, path_of, remove_earlier
from shared.segmentation_picture import mosaic, overlay
from shared.segmentation_probability import chosen_probability, mask_of, split_agreement
from shared.transforms.in_plane import UprightVolumed
from shared.transforms.label_answers import is_monai_label_request
from shared.transforms.segmentation_images import SUFFIXES, LoadPictured
from shared.transforms.upright import UprightFile, is_nifti, open_upright

MASK_NOTE = f"Mask drawn by a segmentation model, not by a person. Use: {INTENDED_USE}."
# Formats in which MONAI Label can return a mask of a picture without changing its values.
_LABEL_FORMATS = (".png", ".tif", ".tiff", ".bmp", ".nrrd", ".nii", ".nii.gz")


class SaveSegmentationd(MapTransform):
    """Write ``<input>_mask.png``, of NIfTI files ``<input>_mask.nii.gz``, and beside it what explains it.

    - the mask, uint8: PNG of one channel and the size of the picture as it is seen (EXIF applied), 0 and 255 of one
      foreground, else the class index; NIfTI (also of a NIfTI picture) on the input's grid with the bits of its qform
      and sform, always the class index;
    - ``..._mask_probability``: of the foreground, or of the most probable class; 16-bit PNG or float32 NIfTI;
    - ``..._mask_agreement``: with several samples, the share of them that agree with the majority; same formats;
    - ``..._mask_overlay.png``: the mask over the image in colours; of a volume up to 16 slices that contain mask;
    - ``..._mask.json``: what made them, and the area or volume of each class.

    ``monai.transforms.SaveImaged`` does not fit: it writes in place, its PNG writer swaps rows and columns, it makes
    its own qform and sform of the affine, and overwrites the mask of another input that has the same name.

    The same input overwrites what an earlier run wrote for it. Of another input with the same name the files are kept
    and the new ones are called ``..._mask_1...``. A file that no run wrote, such as a true mask, is never overwritten.

    Afterwards the key holds the class index, uint8, ``(1, H, W)`` or ``(1, X, Y, Z)``. In a MONAI Label request nothing
    is written and the key holds what its writer needs, without channel: ``(W, H)`` (the writer turns it) or
    ``(X, Y, Z)``; ``result`` then holds the JSON part of the answer, and ``result_extension`` becomes ``.png`` where
    the format of the input would change the values of a mask (``.jpg``) or hold none.

    Args:
        keys: probabilities in [0, 1] on the input's grid (after ``Invertd``): ``(N, H, W)`` of a picture, upright, or
            ``(N, X, Y, Z)`` of a volume, in file orientation; with several samples the agreement as one more channel.
        output_dir: folder, made when missing.
        source: folder below which the inputs lie: their subfolders are kept below ``output_dir``; a file or ``None``:
            all results go into ``output_dir`` itself.
        num_classes: N: 1 for one foreground, else the number of classes with the background.
        num_samples: samples per image, as the sampler has it (clients of MONAI Label may send a string or a list).
        class_names: ``{index: name}`` (indices may be strings), or N names (2 where N is 1) with the background first;
            ``None``: "foreground", or "class 1", ...
        threshold: foreground is above it; not used with several classes.
        save_probability: write probability and agreement.
        save_overlay: write the picture in colours.
        weights_path: file whose SHA-256 is stated; ``None`` states null.
        image_key: loaded input, whose metadata tell the input file. The metadata of ``keys`` are asked first.
        window: as ``LoadPictured`` has it: how the picture in colours is scaled.
        software: name of the bundle, stated in the pictures.
        settings: stated in the JSON: seed, num_inference_steps, ...

    Raises:
        ValueError: names that do not fit the classes, another number of channels, a mask on another grid than the
            input or with values that are not finite, or a file in the way that no run wrote.
        FileNotFoundError: no such weights.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | os.PathLike,
        source: str | os.PathLike | None = None,
        num_classes: int = 1,
        num_samples: int | str = 1,
        class_names: Mapping[str | int, str] | Sequence[str] | None = None,
        threshold: float = 0.5,
        save_probability: bool = True,
        save_overlay: bool = True,
        weights_path: str | os.PathLike | None = None,
        image_key: str = "image",
        window: Sequence[float] | None = None,
        software: str = "sdseg",
        **settings: Any,
    ) -> None:
        super().__init__(keys)
        self.results = ResultFiles(output_dir, source)
        self.num_classes, self.threshold = int(num_classes), float(threshold)
        self.num_samples = number("num_samples", num_samples, int, 1, 10000)
        self.class_names = _foreground_names(class_names, self.num_classes)
        self.save_probability, self.save_overlay, self.weights_path = save_probability, save_overlay, weights_path
        self.image_key, self.software = image_key, software
        self.load, self.upright = LoadPictured("image", window=window), UprightVolumed(["image", "mask"])
        self.settings = {name: chosen(value) for name, value in settings.items()}
        self._made_with: dict[str, Any] | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            pred = d[key]
            plain = torch.as_tensor(pred).detach().cpu().as_subclass(torch.Tensor).float()
            probability, agreement = split_agreement(plain, num_classes=self.num_classes, num_samples=self.num_samples)
            mask = mask_of(probability, threshold=self.threshold)
            if is_monai_label_request(d):
                _check_finite(plain, key, str(d["image_path"]))
                self._answer(d, key, mask)
                continue
            path = self._input_path(d, key)
            _check_finite(plain, key, path)
            maps = {"probability": chosen_probability(probability)} if self.save_probability else {}
            if self.save_probability and agreement is not None:
                maps["agreement"] = agreement
            self._save(d, key, path, mask, maps)
            d[key] = convert_to_dst_type(mask[None], pred, dtype=torch.uint8)[0]
        return d

    def _save(
        self, data: Mapping[Hashable, Any], key: Hashable, path: str, mask: torch.Tensor, maps: dict[str, torch.Tensor]
    ) -> None:
        source = open_upright(path) if is_nifti(path) else None
        # A picture's size is known only when it is read; a volume is read for the picture in colours alone.
        image = self._load(data, path) if source is None or self.save_overlay else None
        size = _size_of(source, image)
        if size != tuple(mask.shape):
            raise ValueError(
                f"{key}: expected the size {size} as {path} has it, got {tuple(mask.shape)}; put Invertd before."
            )
        millilitres = None
        if source is not None and source.is_volume:
            _check_affine(data[key], key, source)
            millilitres = abs(float(np.linalg.det(source.file.affine[:3, :3]))) / 1000
        picture = self._picture(image, mask) if image is not None and self.save_overlay else None
        extension = ".png" if source is None else ".nii.gz"
        description, stem, files = self._prepare(path, maps, extension, self._sizes(mask, millilitres))
        marks = picture_marks(description, software=self.software, comment=MASK_NOTE)
        if source is None:
            # One foreground is 0 and 255, which every viewer shows; class indices have to stay what they are.
            levels = mask * 255 if self.num_classes == 1 else mask
            save_marked_png(levels.numpy(), stem.with_name(files["mask"]), marks)
            for name, values in maps.items():
                save_marked_png(to_grey(values[None], 16), stem.with_name(files[name]), marks)
        else:
            write_nifti(_on_grid(mask, source), stem.with_name(files["mask"]), like=path, dtype=np.uint8)
            for name, values in maps.items():
                write_nifti(_on_grid(values, source), stem.with_name(files[name]), like=path)
        if picture is not None:
            save_grid(picture[None], stem.with_name(files["overlay"]), marks=marks)

    def _picture(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mask.ndim == 2:
            return overlay(image, mask)
        turned = self.upright({"image": image, "mask": convert_to_dst_type(mask[None], image, dtype=torch.uint8)[0]})
        spacing = torch.linalg.norm(turned["mask"].affine[:3, :2], dim=0).tolist()
        return mosaic(turned["image"], turned["mask"][0], spacing=spacing)

    def _prepare(
        self, path: str, maps: Mapping[str, Any], extension: str, sizes: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], Path, dict[str, str]]:
        """Claim the names and write the JSON: what to say about the files, their stem, and what each is called."""
        source_sha256 = sha256_of_file(path)
        endings = {"mask": extension, **{name: f"_{name}{extension}" for name in maps}}
        if self.save_overlay:
            endings["overlay"] = "_overlay.png"
        stem = self.results.claim(
            path, f"{_name_of(path)}_mask", source_sha256=source_sha256, endings=list(endings.values())
        )
        files = {what: stem.name + end for what, end in endings.items()}
        # Hashing large weights takes seconds: once, not for each image.
        if self._made_with is None:
            self._made_with = {**made_with(self.weights_path), "nibabel_version": nibabel.__version__}
        description = {**self._stated(sizes), "source_sha256": source_sha256, **self._made_with}
        # The JSON first: it says whose the other files are, should the process end in between.
        sidecar = stem.with_name(f"{stem.name}.json")
        remove_earlier(sidecar, set(files.values()))
        # The name of a file may be that of a patient: in the JSON beside the mask, not inside what is passed on.
        save_json({**description, "source": Path(path).name, "files": files}, sidecar)
        return description, stem, files

    def _stated(self, sizes: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "synthetic": True,
            "intended_use": INTENDED_USE,
            "num_classes": self.num_classes,
            "threshold": self.threshold if self.num_classes == 1 else None,
            "num_samples": self.num_samples,
            **self.settings,
            "classes": sizes,
        }

    def _sizes(self, mask: torch.Tensor, millilitres: float | None = None) -> list[dict[str, Any]]:
        """Each foreground class with its size: of a picture in pixels, of a volume also in ml."""
        counts = torch.bincount(mask.flatten().long(), minlength=max(self.num_classes, 2)).tolist()
        unit = "pixels" if mask.ndim == 2 else "voxels"
        sizes = []
        for index, name in self.class_names.items():
            size = {"index": index, "name": name, unit: counts[index], "fraction": counts[index] / mask.numel()}
            sizes.append(size if millilitres is None else {**size, "ml": counts[index] * millilitres})
        return sizes

    def _load(self, data: Mapping[Hashable, Any], path: str) -> torch.Tensor:
        """The input as it was stored: what the item holds by now has the size that the network wants."""
        item: dict[Hashable, Any] = {"image": path}
        if data.get("window") is not None:
            item["window"] = [float(value) for value in data["window"]]
        return self.load(item)["image"]

    def _input_path(self, data: Mapping[Hashable, Any], key: Hashable) -> str:
        path = path_of(data[key]) or path_of(data.get(self.image_key))
        if path is None:
            raise ValueError(
                f"{key}: expected metadata with the input file (filename_or_obj), got none; load with LoadPictured and "
                "put Invertd before."
            )
        return path

    def _answer(self, data: dict[Hashable, Any], key: Hashable, mask: torch.Tensor) -> None:
        """Put mask and JSON into a MONAI Label request as its writer needs them."""
        if mask.ndim == 3:
            affine = data[key].affine if isinstance(data[key], MetaTensor) else None
            millilitres = None if affine is None else abs(float(torch.linalg.det(affine[:3, :3]))) / 1000
            data[key] = convert_to_dst_type(mask, data[key], dtype=torch.uint8)[0]
            sizes = self._sizes(mask, millilitres)
        else:
            path = path_of(data.get(self.image_key)) or str(data["image_path"])
            on_grid = mask.numpy().T if not is_nifti(path) else _on_grid(mask, open_upright(path))[..., 0]
            data[key] = np.ascontiguousarray(on_grid)
            # With the metadata MONAI Label's last transform would resize (W, H) to the (H, W) of the input.
            if isinstance(data.get(self.image_key), MetaTensor):
                data[self.image_key] = data[self.image_key].as_tensor()
            wanted = str(data.get("result_extension") or _suffix_of(path))
            if not wanted.lower().endswith(_LABEL_FORMATS):
                data["result_extension"] = ".png"
            sizes = self._sizes(mask)
        data["result"] = self._stated(sizes)


def _check_finite(pred: torch.Tensor, key: Hashable, path: str) -> None:
    if not torch.isfinite(pred).all():
        raise ValueError(f"{key}: expected finite values for {path}, got NaN or infinity; try --amp False.")


def _check_affine(pred: Any, key: Hashable, source: UprightFile) -> None:
    if isinstance(pred, MetaTensor):
        apart = grid_distance(source.file.shape, pred.affine.cpu().numpy(), source.file.affine)
        if apart > 1e-2:
            raise ValueError(
                f"{key}: expected the affine of {source.file.path}, got one that puts voxels up to {apart:.3g} mm "
                "apart; put Invertd before."
            )


def _size_of(source: UprightFile | None, image: torch.Tensor | None) -> tuple[int, ...]:
    """Of a volume as its file has it, of a picture as it is seen."""
    if source is not None:
        return source.file.shape if source.is_volume else source.shape[:2]
    return () if image is None else tuple(image.shape[1:])


def _on_grid(values: torch.Tensor, source: UprightFile) -> np.ndarray:
    """``(X, Y, Z)`` in file orientation: a volume stands so already, a picture is turned back."""
    return values.numpy() if source.is_volume else source.turn_back(values.numpy())


def _suffix_of(path: str) -> str:
    return next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), "")


def _name_of(path: str) -> str:
    """File name without a known suffix; DICOM files may have none, or points in their names."""
    name = Path(path).name
    return name[: len(name) - len(_suffix_of(name))]


def _foreground_names(given: Mapping[str | int, str] | Sequence[str] | None, num_classes: int) -> dict[int, str]:
    """Name of each class but the background."""
    count = max(num_classes, 2)
    if given is None:
        return {1: "foreground"} if num_classes == 1 else {index: f"class {index}" for index in range(1, count)}
    named = given if isinstance(given, Mapping) else dict(enumerate(given))
    names = {int(index): str(name) for index, name in named.items() if str(index).isdigit()}
    if (
        isinstance(given, str)
        or len(names) != len(named)
        or not set(range(1, count)) <= set(names) <= set(range(count))
    ):
        raise ValueError(
            f"class_names: expected a name for each of {count} classes, background first, or {{index: name}}, got "
            f"{given!r}; take them from the labels of the data list."
        )
    return {index: names[index] for index in range(1, count)}
