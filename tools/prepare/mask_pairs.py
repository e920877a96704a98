# SPDX-License-Identifier: Apache-2.0
"""Images with masks: finding what belongs together, and pictures on their way into a dataset folder."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from shared.files import atomic_path
from shared.transforms.pixels import (
    DICOM_SUFFIXES,
    PICTURE_SUFFIXES,
    UnfitError,
    decoding,
    is_dicom,
    open_picture,
    read_pixels,
)
from shared.transforms.upright import is_nifti
from tools.prepare.preparation import Preparation, check_folder, check_workers
from tools.prepare.stored_split import Entry

IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, *DICOM_SUFFIXES)
ReadMask = Callable[[Path], tuple[np.ndarray, str]]
Crop = Callable[[Path], tuple[slice, slice]]


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        image: file.
        mask: file.
        name: of both in the dataset folder, without suffix; may hold `/`.
        subject: what must not be split: patient, sequence, or the picture's own name where neither is known.
        section: given by the publishers; None: to be drawn.
        links: see `tools.prepare.stored_split.Entry`.
    """

    image: Path
    mask: Path
    name: str
    subject: str
    section: str | None = None
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a pair: an entry, or why it was dropped (reason, line); and remarks (reason, line)."""

    entry: Entry | None
    dropped: tuple[str, str] | None = None
    remarks: tuple[tuple[str, str], ...] = ()


def stem_of(path: str | os.PathLike) -> str:
    """Name of a file without folder and without its suffix (`.nii.gz` counts as one)."""
    file = Path(path)
    if is_nifti(file) and file.suffix.lower() == ".gz":
        file = file.with_suffix("")
    return file.stem


def check_places(source: str | os.PathLike, out: str | os.PathLike) -> tuple[Path, Path]:
    """The existing source and another place for the outputs.

    Raises:
        FileNotFoundError: the source is not a folder.
        ValueError: the outputs would overwrite the source.
    """
    folder, target = check_folder(source, "--source"), Path(str(out))
    inside = [(target / part).resolve() for part in ("images", "labels")]
    if target.resolve() == folder.resolve() or set(inside) & {folder.resolve(), *folder.resolve().parents}:
        raise ValueError(f"{target}: expected --out elsewhere than --source, whose files would be overwritten; "
                         "name another folder")  # fmt: skip
    return folder, target


def list_files(folder: Path, suffixes: Sequence[str], *, out: Path | None = None) -> list[Path]:
    """Files below a folder with one of the suffixes (any case), sorted; none that is hidden or lies in `out`."""
    found = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        made = out is not None and out.resolve() in file.resolve().parents
        if file.name.lower().endswith(tuple(suffixes)) and not hidden and not made and file.is_file():
            found.append(file)
    return found


def index_files(
    files: Iterable[Path], key: Callable[[Path], str], preparation: Preparation, *, what: str
) -> dict[str, Path]:
    """Key -> file; of several files with one key the first (sorted) is kept and the others are noted as dropped."""
    found: dict[str, Path] = {}
    for file in sorted(files):
        if (name := key(file)) in found:
            preparation.drop(f"second {what} of the same name", f"{file}: {found[name]} is kept")
        else:
            found[name] = file
    return found


def match_names(images: Mapping[str, Path], masks: Mapping[str, Path], preparation: Preparation) -> list[str]:
    """Names that have both, sorted; what lacks the other is noted as dropped."""
    for name in sorted(set(images) - set(masks)):
        preparation.drop("image without mask", str(images[name]))
    for name in sorted(set(masks) - set(images)):
        preparation.drop("mask without image", str(masks[name]))
    return sorted(set(images) & set(masks))


def read_upright(path: Path) -> np.ndarray:
    """Decode a picture as it is stored, upright: (H, W), or (H, W, channels).

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, several frames, floating-point pixels or constant. The message starts with the path.
    """
    with decoding(path):
        picture = open_picture(path)
        if picture.mode == "F":
            raise UnfitError("a picture with whole grey levels, but got floating-point pixels of unknown range")
        pixels = np.asarray(picture)
    if pixels.min() == pixels.max():
        raise ValueError(f"{path}: expected a picture, but all pixels are {pixels.min():g}; remove it")
    return pixels


def read_dicom(path: Path) -> np.ndarray:
    """A DICOM picture with what its header says applied: (H, W) uint16 where it is grey, else (H, W, 3) uint8.

    Raises what `shared.transforms.pixels.read_pixels` raises.
    """
    values = read_pixels(path, colour=True)
    if (values == values[..., :1]).all():
        return np.rint(values[..., 0].astype(np.float64) * 65535).astype(np.uint16)
    return np.rint(values * 255).astype(np.uint8)


def write_pixels(path: Path, pixels: np.ndarray) -> None:
    """Write pixels as PNG, atomically."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, atomically: a JPEG is never compressed a second time."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def content_mark(pixels: np.ndarray) -> str:
    """Link of pictures and volumes of equal content, whatever their file format."""
    digest = hashlib.sha256(f"{pixels.shape}{pixels.dtype.kind}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return f"content:{digest.hexdigest()}"


def convert_picture(
    pair: Pair, out: Path, read_mask: ReadMask, *, num_classes: int = 1, crop: Crop | None = None
) -> Outcome:
    """Bring one picture and its mask into the dataset folder.

    The bytes of the image are copied. Two kinds become PNG: DICOM, whose header holds names, and what is cropped.
    The mask becomes a one-channel PNG: 0 and 255, or class indices.

    Args:
        pair: what to convert.
        out: dataset folder.
        read_mask: file -> (H, W) uint8 class indices and a remark, such as `MaskCoding.read_picture`.
        num_classes: 1 = binary, else the number of classes with background.
        crop: file of the mask -> rows and columns to keep of both; None keeps all.
    """
    try:
        dicom = is_dicom(pair.image)
        image = read_dicom(pair.image) if dicom else read_upright(pair.image)
        mask, remark = read_mask(pair.mask)
        if mask.shape != image.shape[:2]:
            (rows, columns), (height, width) = mask.shape, image.shape[:2]
            line = (f"{pair.mask}: expected the size of {pair.image.name}, {height} x {width} (rows x columns), but "
                    f"got {rows} x {columns}; export both from the same picture")  # fmt: skip
            return Outcome(None, ("image and mask of different size", line))
        box = None if crop is None else crop(pair.mask)
        if box is not None and image.ndim == 2:  # a palette's colours would be lost with the rest
            image = image if dicom else np.asarray(open_picture(pair.image).convert("RGB"))
    except (ValueError, OSError) as error:
        return Outcome(None, ("unusable image or mask", str(error)))
    suffix = ".png" if dicom or box is not None else pair.image.suffix.lower()
    picture, label = f"images/{pair.name}{suffix}", f"labels/{pair.name}.png"
    if dicom or box is not None:
        write_pixels(out / picture, np.ascontiguousarray(image if box is None else image[box]))
    else:
        copy_file(pair.image, out / picture)
    mask = mask if box is None else np.ascontiguousarray(mask[box])
    write_pixels(out / label, mask * 255 if num_classes == 1 else mask)
    remarks = [(remark, str(pair.mask))] if remark else []
    if not mask.any():
        remarks.append(("empty mask", str(pair.mask)))
    item: dict[str, Any] = {"image": picture, "label": label, "subject": pair.subject}
    if num_classes > 1:
        item["classes"] = [int(c) for c in np.unique(mask) if c > 0]
    return Outcome(Entry(item, pair.section, (*pair.links, content_mark(image))), remarks=tuple(remarks))


def convert_pairs(
    pairs: Sequence[Pair], convert: Callable[[Pair], Outcome], preparation: Preparation, *, workers: int
) -> list[Entry]:
    """Convert all pairs, in `workers` threads (0: in the main thread); notes what was dropped or is doubtful.

    Threads suffice: decoding, encoding and copying release Python's lock.
    """
    check_workers(workers)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        running = pool.map(convert, pairs) if workers else map(convert, pairs)
        outcomes = list(tqdm(running, total=len(pairs), desc=preparation.name, unit="pair", disable=None))
    for outcome in outcomes:
        if outcome.dropped is not None:
            preparation.drop(*outcome.dropped)
        for reason, line in outcome.remarks:
            preparation.warn(reason, line)
    return [outcome.entry for outcome in outcomes if outcome.entry is not None]
