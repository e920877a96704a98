# SPDX-License-Identifier: Apache-2.0
"""Bad pictures: films of ``cxr_ldm``, pictures and masks of ``sdseg``, as PNG, JPEG, TIFF, GIF and DICOM.

Every one is made here from numbers. What the product reads although it is unusual stands here too, with the reason;
`FILM` and `PICTURE` are then what it has to read.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from tests.corpus import COMMANDS, BadInput

# Brighter to the right and downwards, fine texture over it, so that nothing compresses to a few bytes.
_ROWS, _COLUMNS = np.mgrid[:64, :48]
FILM = (2 * _ROWS + _COLUMNS + np.random.default_rng(0).integers(0, 80, (64, 48))).astype(np.uint8)
PICTURE = np.stack([FILM, FILM[::-1], 255 - FILM], axis=2)
MASK = np.where((_ROWS - 30) ** 2 + (_COLUMNS - 20) ** 2 < 200, 255, 0).astype(np.uint8)
MIXED = "it is converted as documented; check_data tells that it is of another kind than the rest"
READERS = ("training", "evaluation", "inference")

# Bytes of files


def encoded(values: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture file."""
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    with io.BytesIO() as file:
        picture.save(file, form, **options)
        return file.getvalue()


def flipped(content: bytes, share: float) -> bytes:
    """One byte changed, at a share of the length."""
    position = int(len(content) * share)
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that declares this size and has the pixels of a few rows, with correct checksums."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(4 * (width + 1)))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def animated(form: str) -> bytes:
    frames = [Image.fromarray(FILM), Image.fromarray(FILM[::-1].copy())]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF file of any number of channels and kind of numbers, which Pillow cannot write (TIFF 6.0)."""
    rows, columns, channels = np.atleast_3d(values).shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    pixels = np.ascontiguousarray(values).tobytes()
    tags = [
        (256, columns), (257, rows), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, channels),
        (278, rows), (279, len(pixels)), (339, kind),
    ]  # fmt: skip
    # A tag with one value for each channel holds a single one here: all channels are equal, and readers repeat it.
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head, directory = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)), struct.pack("<H", len(tags)) + directory
    return head + pixels + directory + struct.pack("<I", 0)


def dicom(pixels: np.ndarray = FILM, *, drop: Sequence[str] = (), compressed: bool = False, **elements: Any) -> bytes:
    """A DICOM file with 12 of 16 bits; ``elements`` are set last, those of ``drop`` are left out."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    stored = (16 * pixels.astype(np.uint16)).tobytes()
    dataset.PixelData = encapsulate([stored]) if compressed else stored
    dataset["PixelData"].VR = "OB" if compressed else "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    for name in drop:
        delattr(dataset, name)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless if compressed else ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    new_file = {"enforce_file_format": True} if pydicom.__version__ >= "3" else {"write_like_original": False}
    with io.BytesIO() as file:
        pydicom.dcmwrite(file, dataset, **new_file)
        return file.getvalue()


def _palette() -> bytes:
    picture = Image.fromarray(FILM // 4)
    picture = Image.fromarray(np.asarray(picture), "L")
    indexed = Image.frombytes("P", picture.size, np.asarray(picture).tobytes())
    indexed.putpalette([level for index in range(64) for level in [4 * index] * 3])
    return encoded(indexed)


def _clear() -> bytes:
    """A picture whose pixels are all transparent."""
    return encoded(np.dstack([PICTURE, np.zeros_like(FILM)]))


def _numpy(values: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, values)
        return file.getvalue()


# What stands in a folder


def _no_rights(path: Path) -> None:
    path.write_bytes(encoded(FILM))
    path.chmod(0)


def _in_file(content: Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content())


def _bad(
    name: str,
    put: Callable[[Path], Any],
    words: str,
    *,
    bundle: str = "cxr_ldm",
    kind: str = "picture",
    suffix: str = ".png",
    **options: Any,
) -> BadInput:
    def make(folder: Path) -> Path:
        path = folder / "images" / f"bad_{name}{suffix}"
        put(path)
        return path

    # Images are drawn from text alone: no file of a data set is read.
    options.setdefault("commands", COMMANDS[:3] if bundle == "cxr_ldm" else COMMANDS)
    return BadInput(f"{bundle}-{name}", bundle, kind, make, words=words, **options)


def _film(name: str, content: Callable[[], bytes], words: str = "", **options: Any) -> BadInput:
    return _bad(name, _in_file(content), words, **options)


def _dicom(name: str, words: str = "", *, cut: float = 1.0, **options: Any) -> BadInput:
    def content() -> bytes:
        whole = dicom(**options)
        return whole[: int(len(whole) * cut)]

    return _bad(f"dicom-{name}", _in_file(content), words, kind="DICOM", suffix=".dcm")


def _picture(name: str, content: Callable[[], bytes], words: str = "", **options: Any) -> BadInput:
    return _bad(name, _in_file(content), words, bundle="sdseg", **options)


def _mask(name: str, content: Callable[[], bytes], words: str = "", **options: Any) -> BadInput:
    # The mask of an item is there to train and to measure.
    options = {"kind": "mask", "key": "label", "commands": COMMANDS[:3], **options}
    return _bad(f"mask-{name}", _in_file(content), words, bundle="sdseg", **options)


_PNG = encoded(FILM)
_UNUSUAL: dict[str, Any] = {"accepted": MIXED, "accepted_by": READERS}
_NOT_AN_IMAGE = "expected a PNG, JPEG or DICOM image, but the content is none of them"

FILMS = (
    _film("empty", bytes, "empty"),
    _film("zeros", lambda: bytes(1000), _NOT_AN_IMAGE),
    _film("words", lambda: b"not a film", _NOT_AN_IMAGE),
    _film("numpy", lambda: _numpy(FILM), _NOT_AN_IMAGE, suffix=".npy"),
    _film("cut", lambda: _PNG[: len(_PNG) // 2], "decoding failed"),
    _film("cut-at-end", lambda: _PNG[:-30], "decoding failed"),
    _film("cut-in-header", lambda: _PNG[:20], ""),
    _film("flipped-early", lambda: flipped(_PNG, 0.1), "decoding failed"),
    _film("flipped-half", lambda: flipped(_PNG, 0.5), "decoding failed"),
    _film("flipped-late", lambda: flipped(_PNG, 0.97), "decoding failed"),
    _film("bomb", lambda: png_of_size(60000, 60000), "decoding failed"),
    _film("huge", lambda: png_of_size(11000, 11000), "decoding failed"),
    _film("constant", lambda: encoded(np.full((64, 48), 128, np.uint8)), "all pixels are 0.50"),
    _film("transparent", _clear, "all pixels are 0"),
    _film("gif", lambda: animated("GIF"), "expected one 2-D image, but got 2 frames"),
    _film("animated", lambda: animated("PNG"), "expected one 2-D image, but got 2 frames"),
    _film("jpeg-cut", lambda: encoded(FILM, "JPEG")[:900], "decoding failed", suffix=".jpg"),
    _film("tiff-nan", lambda: tiff(np.where(FILM > 99, np.nan, FILM).astype("<f4")), "floating-point", suffix=".tif"),
    _film("tiff-inf", lambda: tiff(np.where(FILM > 99, np.inf, FILM).astype("<f4")), "floating-point", suffix=".tif"),
    _film("tiff-5-channels", lambda: tiff(np.dstack([FILM] * 5)), "image", suffix=".tif"),
    _film("tiff-32-bit", lambda: tiff(FILM.astype("<i4") * 1000), "grey levels 0..65535", suffix=".tif"),
    _bad("folder", Path.mkdir, "does not exist"),
    _bad("broken-link", lambda path: path.symlink_to("nowhere.png"), "does not exist"),
    _bad("link-to-itself", lambda path: path.symlink_to(path), "does not exist"),
    _bad("pipe", os.mkfifo, "does not exist"),
    _bad("missing", lambda path: None, "does not exist"),
    _bad("no-rights", _no_rights, "access is denied"),
    _film("palette", _palette, **_UNUSUAL),
    _film("rgba", lambda: encoded(Image.fromarray(FILM).convert("RGBA")), **_UNUSUAL),
    _film("cmyk-jpeg-cut", lambda: encoded(Image.fromarray(FILM).convert("CMYK"), "JPEG")[:900], suffix=".jpg"),
    _film("cmyk", lambda: encoded(Image.fromarray(FILM).convert("CMYK"), "TIFF"), suffix=".tif", **_UNUSUAL),
    _film("16-bit", lambda: encoded(FILM.astype(np.uint16) * 257), accepted="16-bit levels are divided by 65535"),
    _film("1-bit", lambda: encoded(Image.fromarray(MASK > 0)), accepted="a picture of two levels"),
    _film("png-named-jpg", lambda: _PNG, suffix=".jpg", accepted="known by its content"),
    _film("dicom-named-png", dicom, kind="DICOM", accepted="DICOM is known by its magic bytes"),
)

DICOMS = (
    _dicom("no-pixels", "the file has no pixel data", drop=["PixelData"]),
    _dicom("no-kind", "PhotometricInterpretation", drop=["PhotometricInterpretation"]),
    _dicom("no-bits-stored", "Bits", drop=["BitsStored"]),
    _dicom("no-bits-allocated", "", drop=["BitsAllocated"]),
    _dicom("no-rows", "Rows", drop=["Rows"]),
    _dicom("no-rows-at-all", "", Rows=0),
    _dicom("cut", "", cut=0.5),
    _dicom("cut-in-header", "", cut=0.03),
    _dicom("too-few-pixels", "", Rows=128),
    _dicom("compressed", "", compressed=True),
    _dicom("frames", "expected one 2-D image, but got 2 frames", pixels=np.stack([FILM, FILM]), NumberOfFrames=2),
    _dicom("colour", "MONOCHROME", pixels=FILM[:, :16], SamplesPerPixel=3, PhotometricInterpretation="RGB"),
    _dicom("slope-zero", "rescale slope", RescaleSlope=0, RescaleIntercept=0),
    _dicom("window-of-no-width", "", WindowCenter=100, WindowWidth=0),
    _dicom("constant", "all pixels are", pixels=np.full((64, 48), 99)),
    _bad("dicom-words", _in_file(lambda: b"not DICOM"), "", kind="DICOM", suffix=".dcm"),
)

PICTURES_AND_MASKS = (
    _picture("cut", lambda: encoded(PICTURE)[:2000], "decoding failed"),
    _picture("flipped", lambda: flipped(encoded(PICTURE), 0.6), "decoding failed"),
    _picture("words", lambda: b"not a picture", _NOT_AN_IMAGE),
    _picture("constant", lambda: encoded(np.full((64, 48, 3), 7, np.uint8)), "all pixels are"),
    _picture("jpeg-cut", lambda: encoded(PICTURE, "JPEG")[:900], "decoding failed", suffix=".jpg"),
    _picture("webp", lambda: encoded(PICTURE, "WEBP"), "expected a file .nii", suffix=".webp"),
    _picture("dicom-no-pixels", lambda: dicom(drop=["PixelData"]), "no pixel data", suffix=".dcm", kind="DICOM"),
    _picture("grey", lambda: encoded(FILM), accepted="grey is repeated to three channels"),
    _mask("other-size", lambda: encoded(MASK[:-1]), "expected the size of its image"),
    _mask("turned", lambda: encoded(MASK.T.copy()), "expected the size of its image"),
    _mask("grey", lambda: encoded(FILM), "expected a binary mask of 0 and one other level"),
    _mask("three-levels", lambda: encoded(np.where(_ROWS > 40, 128, MASK).astype(np.uint8)), "but got 3 levels"),
    _mask("colours", lambda: encoded(PICTURE), "but got colours"),
    _mask("transparent", _clear, "transparent"),
    _mask("cut", lambda: encoded(FILM)[:700], "decoding failed"),
    _mask("flipped", lambda: flipped(encoded(MASK), 0.5), "decoding failed"),
    _mask("frames", lambda: animated("GIF"), "2 frames"),
    _mask("dicom", lambda: dicom(MASK), "but got DICOM", suffix=".dcm"),
    _mask("probabilities", lambda: tiff((MASK / 300).astype("<f4")), "fractions", suffix=".tif"),
    _mask("nan", lambda: tiff(np.where(MASK, np.nan, 0).astype("<f4")), "NaN", suffix=".tif"),
    _mask("negative", lambda: tiff(np.where(MASK, -1, 0).astype("<i4")), "at least 0", suffix=".tif"),
    _mask("words", lambda: b"not a mask", "none of them"),
    _mask("empty", bytes, ""),
    _mask("nothing-in-it", lambda: encoded(np.zeros_like(MASK)), accepted="no polyp in the picture"),
)

PICTURES = FILMS + DICOMS + PICTURES_AND_MASKS
