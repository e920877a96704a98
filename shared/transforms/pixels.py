# SPDX-License-Identifier: Apache-2.0
"""Pixels of picture files (PNG, JPEG, TIFF, BMP) and of DICOM files, grey or in colour, in [0, 1]."""

from __future__ import annotations

import importlib
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

DICOM_SUFFIXES = (".dcm", ".dicom")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

# What is needed to turn stored pixels into grey levels. Everything else in a header (names, dates, numbers of patients)
# is not even read.
_DICOM_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth", "PixelData",
]  # fmt: skip
_COLOUR_TAGS = [
    f"{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for part in ("Descriptor", "Data")
]  # fmt: skip
_GREY_KINDS = ("MONOCHROME1", "MONOCHROME2")
_COLOUR_KINDS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


class UnfitError(Exception):
    """What was expected and what was found; `decoding` adds the file and the remedy."""


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file is DICOM by its name or by its magic bytes."""
    if os.fspath(path).lower().endswith(DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


@contextmanager
def decoding(path: str | os.PathLike) -> Iterator[None]:
    """Around the decoding of a file: whatever a decoder raises becomes an error that names file and remedy.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what the block raised, in words that start with the path.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected an image file, but it does not exist; correct the path")
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: expected a PNG, JPEG or DICOM image, but the content is none of them; "
                         "replace the file or remove it from the data list") from error  # fmt: skip
    except UnfitError as error:
        raise ValueError(f"{file}: expected {error}; replace the file or remove it from the data list") from error
    except PermissionError as error:
        raise ValueError(f"{file}: expected a readable file, but access is denied; change its permissions") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, EOFError, InvalidDicomError, ...
        remedy = "copy it anew or remove it from the data list"
        if isinstance(error, RuntimeError | NotImplementedError | AttributeError) and is_dicom(file):
            remedy += "; a compressed DICOM may need: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        # pydicom lists the plugins that it misses, one a line
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{file}: expected a readable image, but decoding failed ({cause}); {remedy}") from error


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A picture file whose header is read. A header that states more than 89 million pixels, of which Pillow warns,
    is an error: no film has them, and a small file that claims them would fill the memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as picture:
            yield picture


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Decode the only frame of a picture file and turn it as its EXIF tag says; `decoding` names the file.

    The checksums of a PNG file are compared. JPEG, TIFF and BMP have none: a changed byte in their pixels stays unseen.
    """
    with _opened(path) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames != 1:
            raise UnfitError(f"one 2-D image, but got {frames} frames")
        picture.verify()  # leaves nothing to load; loading itself does not look at the checksums of pixels
    with _opened(path) as picture:
        picture.load()
        return ImageOps.exif_transpose(picture)


def _from_picture(picture: Image.Image, *, colour: bool) -> np.ndarray:
    """PIL picture -> float32 in [0, 1] by its bit range: (H, W), by Rec. 601 luma, or (H, W, 3); alpha over black."""
    if picture.mode == "1":
        return _with_channels(np.asarray(picture, dtype=np.float32), colour)
    if picture.mode.startswith("I"):  # "I;16", "I;16B", and "I" of older Pillow: a 16-bit file
        levels = np.asarray(picture).astype(np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise UnfitError(f"grey levels 0..65535 (16 bit), but got {levels.min():g}..{levels.max():g}")
        return _with_channels(levels / 65535.0, colour)
    if picture.mode == "F":
        raise UnfitError("8- or 16-bit grey levels, but got floating-point pixels of unknown range")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    picture = picture.convert("RGB")
    return np.asarray(picture if colour else picture.convert("L"), dtype=np.float32) / 255.0


def _with_channels(grey: np.ndarray, colour: bool) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2) if colour else grey


def _stored_range(dataset: Any) -> tuple[float, float]:
    """Smallest and largest value that the stored bits allow, after the rescale (DICOM PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1.0
    bits = int(dataset.BitsStored)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0.0, 2.0**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept


def _from_dicom(path: str | os.PathLike, *, colour: bool, window: Sequence[float] | None) -> np.ndarray:
    import pydicom

    # pydicom 2.4, which MONAI Label brings, keeps the same functions elsewhere
    version = int(pydicom.__version__.split(".")[0])
    pixels = importlib.import_module("pydicom.pixels" if version >= 3 else "pydicom.pixel_data_handlers.util")
    dataset = pydicom.dcmread(path, specific_tags=_DICOM_TAGS + (_COLOUR_TAGS if colour else []))
    if "PixelData" not in dataset:
        raise UnfitError("a DICOM image, but the file has no pixel data")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UnfitError(f"one 2-D image, but got {dataset.NumberOfFrames} frames")
    kind = str(dataset.get("PhotometricInterpretation", "")).strip()
    if colour and kind in _COLOUR_KINDS:
        if window is not None:
            raise UnfitError(f"a grey image, as a window {list(window)} is given, but got {kind} (set window to null)")
        return _colour_of_dicom(dataset, kind, pixels, decoded_to_rgb=version >= 3)
    if kind not in _GREY_KINDS:
        kinds = ", ".join(_GREY_KINDS + _COLOUR_KINDS) if colour else " or ".join(_GREY_KINDS)
        raise UnfitError(f"PhotometricInterpretation {kinds}, but got {kind or 'none'!r}")
    values = pixels.apply_modality_lut(dataset.pixel_array, dataset)
    if window is not None:
        low, high = window
    else:
        low, high = _stored_range(dataset)
        if dataset.get("VOILUTSequence"):
            low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1.0
            values = values.astype(np.int64)  # a look-up table is addressed by integers
        if high == low:
            raise UnfitError("a rescale slope other than 0, but got 0")
        values = pixels.apply_voi_lut(values, dataset)
    image = np.clip((np.asarray(values, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return _with_channels((1.0 - image if kind == "MONOCHROME1" else image).astype(np.float32), colour)


def _colour_of_dicom(dataset: Any, kind: str, pixels: Any, *, decoded_to_rgb: bool) -> np.ndarray:
    values = dataset.pixel_array
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        return (values / float(np.iinfo(values.dtype).max)).astype(np.float32)
    if kind.startswith("YBR_FULL") and not decoded_to_rgb:
        values = pixels.convert_color_space(values, kind, "RGB")
    return (values / (2.0 ** int(dataset.BitsStored) - 1.0)).astype(np.float32)


def read_pixels(path: str | os.PathLike, *, colour: bool = False, window: Sequence[float] | None = None) -> np.ndarray:
    """Read one picture or DICOM file as rows by columns, never transposed; rules: `shared.transforms.images`.

    Args:
        path: PNG, JPEG (or another format Pillow reads) or DICOM file; DICOM is known by `.dcm` or by its magic bytes.
        colour: keep colours: (H, W, 3), grey repeated; also lets DICOM files in colour pass. False: (H, W), luma.
        window: [low, high] of a grey DICOM's rescaled values that become 0 and 1, instead of the file's own window.

    Returns:
        float32 in [0, 1], finite; constant only where a window is given (a slice of air).

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, unknown pixel kind, empty, non-finite or constant, or a window for a
            picture. The message starts with the path.
    """
    with decoding(path):
        if is_dicom(path):
            image = _from_dicom(path, colour=colour, window=window)
        else:
            if window is not None:
                raise UnfitError(
                    f"a volume or a DICOM file, as a window {list(window)} is given, but got a picture, whose levels "
                    "have no unit (set window to null for pictures)"
                )
            image = _from_picture(open_picture(path), colour=colour)
    if image.ndim != (3 if colour else 2) or 0 in image.shape or (colour and image.shape[2] != 3):
        raise ValueError(f"{path}: expected a 2-D image, but got the shape {image.shape}; export one image per file")
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise ValueError(f"{path}: expected finite pixels, but {count} are NaN or infinite; check rescale and window")
    if window is None and image.min() == image.max():
        raise ValueError(
            f"{path}: expected an image, but all pixels are {image.min():g}; remove the file from the data list"
        )
    return image


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """Rows and columns of a picture or DICOM file as it is seen (EXIF turns applied), without decoding its pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable; the message starts with the path.
    """
    with decoding(path):
        if is_dicom(path):
            import pydicom

            dataset = pydicom.dcmread(path, specific_tags=["Rows", "Columns"], stop_before_pixels=True)
            return int(dataset.Rows), int(dataset.Columns)
        with _opened(path) as picture:
            width, height = picture.size
            # Pillow's own method decodes a PNG file in search of tags behind the pixels.
            whole = picture.format == "PNG" and _ends_with_pixels(path)
            exif = Image.Image.getexif(picture) if whole else picture.getexif()
            turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # TIFF 6.0: rows and columns exchanged
    return (width, height) if turned else (height, width)


def _ends_with_pixels(path: str | os.PathLike) -> bool:
    """Whether nothing follows the pixels of a PNG file (chunks: length, kind, data, checksum; PNG 3, section 5.3)."""
    with open(path, "rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind != b"IDAT":
                return kind == b"IEND"
            pixels = kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False
