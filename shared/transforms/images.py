# SPDX-License-Identifier: Apache-2.0
"""Radiographs from PNG, JPEG and DICOM files to tensors in [0, 1], checked; and their resizing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys
from PIL import Image, ImageOps, UnidentifiedImageError

# What is needed to turn stored pixels into grey levels. Everything else in a header (names, dates, numbers of patients)
# is not even read.
_DICOM_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth", "PixelData",
]  # fmt: skip


class _UnfitError(Exception):
    """What was expected and what was found; `read_radiograph` adds the file and the remedy."""


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _grey_from_picture(picture: Image.Image) -> np.ndarray:
    """PIL picture -> (H, W) float32 in [0, 1] by its bit range; colour by Rec. 601 luma, transparency over black."""
    if picture.mode == "1":
        return np.asarray(picture, dtype=np.float32)
    if picture.mode.startswith("I"):  # "I;16", "I;16B", and "I" of older Pillow: a 16-bit file
        levels = np.asarray(picture).astype(np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise _UnfitError(f"grey levels 0..65535 (16 bit), but got {levels.min():g}..{levels.max():g}")
        return levels / 65535.0
    if picture.mode == "F":
        raise _UnfitError("8- or 16-bit grey levels, but got floating-point pixels of unknown range")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32) / 255.0


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames != 1:
            raise _UnfitError(f"one 2-D image, but got {frames} frames")
        picture.load()
        return _grey_from_picture(ImageOps.exif_transpose(picture))


def _stored_range(dataset: Any) -> tuple[float, float]:
    """Smallest and largest value that the stored bits allow, after the rescale (DICOM PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1.0
    bits = int(dataset.BitsStored)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0.0, 2.0**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def _read_dicom(path: Path) -> np.ndarray:
    import pydicom

    # pydicom 2.4, which MONAI Label brings, keeps the same functions elsewhere
    version = int(pydicom.__version__.split(".")[0])
    pixels = importlib.import_module("pydicom.pixels" if version >= 3 else "pydicom.pixel_data_handlers.util")
    dataset = pydicom.dcmread(path, specific_tags=_DICOM_TAGS)
    if "PixelData" not in dataset:
        raise _UnfitError("a DICOM image, but the file has no pixel data")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise _UnfitError(f"one 2-D image, but got {dataset.NumberOfFrames} frames")
    kind = str(dataset.get("PhotometricInterpretation", "")).strip()
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise _UnfitError(f"PhotometricInterpretation MONOCHROME1 or MONOCHROME2, but got {kind or 'none'!r}")
    values = pixels.apply_modality_lut(dataset.pixel_array, dataset)
    low, high = _stored_range(dataset)
    if dataset.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1.0
        values = values.astype(np.int64)  # a look-up table is addressed by integers
    if high == low:
        raise _UnfitError("a rescale slope other than 0, but got 0")
    values = np.asarray(pixels.apply_voi_lut(values, dataset), dtype=np.float64)
    image = np.clip((values - low) / (high - low), 0.0, 1.0)
    return (1.0 - image if kind == "MONOCHROME1" else image).astype(np.float32)


def read_radiograph(path: str | os.PathLike) -> np.ndarray:
    """Read one radiograph as rows by columns, never transposed.

    Rules: 8-bit levels are divided by 255, 16-bit levels by 65535 (also where only 12 bits are used). Colour becomes
    Rec. 601 luma; palettes are resolved first; transparent pixels lie over black; the EXIF orientation is applied.
    DICOM: rescale slope and intercept (or modality LUT), then VOI LUT or the first window, then scaled so that the
    window's (without a window: the stored bits') range becomes [0, 1]; MONOCHROME1 is inverted, so that
    bone is bright everywhere. Of a DICOM header only the elements that describe pixels are read.

    MONAI's readers do not fit: `PILReader` swaps the axes and keeps palette indices, `PydicomReader` ignores window and
    MONOCHROME1 and keeps the whole header, and their errors do not name the file.

    Args:
        path: PNG, JPEG (or another format Pillow reads) or DICOM file; DICOM is known by `.dcm` or by its magic bytes.

    Returns:
        float32 (H, W) in [0, 1], finite, not constant.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, unknown pixel kind, empty, non-finite or constant. The message starts
            with the path.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected an image file, but it does not exist; correct the path")
    try:
        image = _read_dicom(file) if _is_dicom(file) else _read_picture(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: expected a PNG, JPEG or DICOM image, but the content is none of them; "
                         "replace the file or remove it from the data list") from error  # fmt: skip
    except _UnfitError as error:
        raise ValueError(f"{file}: expected {error}; replace the file or remove it from the data list") from error
    except PermissionError as error:
        raise ValueError(f"{file}: expected a readable file, but access is denied; change its permissions") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, InvalidDicomError, ...
        remedy = "copy it anew or remove it from the data list"
        if isinstance(error, RuntimeError | NotImplementedError | AttributeError) and _is_dicom(file):
            remedy += "; a compressed DICOM may need: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise ValueError(
            f"{file}: expected a readable image, but decoding failed ({type(error).__name__}: {error}); {remedy}"
        ) from error
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"{file}: expected a 2-D image, but got the shape {image.shape}; export one image per file")
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise ValueError(f"{file}: expected finite pixels, but {count} are NaN or infinite; check rescale and window")
    if image.min() == image.max():
        raise ValueError(
            f"{file}: expected an image, but all pixels are {image.min():g}; remove the file from the data list"
        )
    return image


class LoadRadiograph(Transform):
    """Path of a PNG, JPEG or DICOM radiograph -> float32 (1, H, W) in [0, 1]; rules and errors: `read_radiograph`.

    Args:
        track_meta: True: a `MetaTensor` whose metadata hold the file name (`filename_or_obj`, which MONAI's savers use
            to name outputs) and the shape, and nothing of a DICOM header. False: a plain tensor.
    """

    def __init__(self, *, track_meta: bool = True) -> None:
        self.track_meta = track_meta

    def __call__(self, path: str | os.PathLike) -> torch.Tensor:
        image = torch.from_numpy(read_radiograph(path)).unsqueeze(0)
        if not self.track_meta:
            return image
        meta = {
            "filename_or_obj": os.fspath(path),
            MetaKeys.SPATIAL_SHAPE: np.asarray(image.shape[1:]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        }
        return MetaTensor(image, meta=meta)


class LoadRadiographd(MapTransform):
    """Dictionary form of `LoadRadiograph`: the path under each key becomes the image.

    There is no "skip" policy here: a data set cannot lose an item while an epoch runs, and a blank in its place would
    be learnt. `python -m tools.check_data` names every bad file beforehand.

    Args:
        keys: keys that hold paths.
        track_meta: see `LoadRadiograph`.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(self, keys: KeysCollection, *, track_meta: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadRadiograph(track_meta=track_meta)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.load(result[key])
        return result


class ResizeShorterSide(Transform):
    """Resize (C, H, W) so that the shorter side has `size` pixels; the aspect ratio is kept.

    Bilinear with anti-aliasing (`torch.nn.functional.interpolate(antialias=True)`), so the value range is kept and
    lines thinner than a new pixel are averaged instead of dropped. MONAI's `Resize` does not fit: its `size_mode`
    knows "all" and "longest" only, so the target would have to be known per image.

    Args:
        size: pixels of the shorter side; smaller images are enlarged. The longer side is rounded to the nearest pixel.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, but got {size}")
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if image.ndim != 3:
            raise ValueError(f"image: expected (C, H, W), but got the shape {tuple(image.shape)}; add a channel")
        height, width = image.shape[1:]
        shorter = min(height, width)
        if shorter == self.size:
            return image
        target = (
            max(self.size, round(height * self.size / shorter)),
            max(self.size, round(width * self.size / shorter)),
        )
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        resized = torch.nn.functional.interpolate(plain[None], size=target, mode="bilinear", antialias=True)[0]
        return MetaTensor(resized, meta=image.meta) if isinstance(image, MetaTensor) else resized


class ResizeShorterSided(MapTransform):
    """Dictionary form of `ResizeShorterSide`.

    Args:
        keys: keys that hold (C, H, W) images.
        size: pixels of the shorter side.
        allow_missing_keys: do not complain about absent keys.
    """

    def __init__(self, keys: KeysCollection, size: int, *, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.resize = ResizeShorterSide(size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.resize(result[key])
        return result
