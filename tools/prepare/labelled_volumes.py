# SPDX-License-Identifier: Apache-2.0
"""Volumes with label maps on their way into a dataset folder: checked, upright, readable slice by slice."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from shared.files import atomic_path
from shared.transforms.mask_levels import whole_numbers
from shared.transforms.upright import UprightFile, open_upright
from tools.prepare.mask_pairs import Outcome, Pair, content_mark
from tools.prepare.stored_split import Entry

_LEAST_OF_WINDOW = 0.05  # share of the window that a volume's values must span, or they have other units
Encode = Callable[[np.ndarray, Path], tuple[np.ndarray, str]]  # levels, file -> uint8 indices, remark
Clean = Callable[[np.ndarray, np.ndarray], np.ndarray]  # label, image -> label


def parse_window(value: object, *, option: str = "--window") -> tuple[float, float] | None:
    """`-175,250` as fire passes it -> two numbers; None stays None.

    Raises:
        ValueError: not two numbers, or not ascending. The message starts with the option.
    """
    if value is None:
        return None
    parts: Any = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: expected two numbers such as -175,250, but got {value!r}") from error
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"{option}: expected LOW,HIGH with LOW < HIGH, but got {low:g},{high:g}")
    return low, high


def remove_small_parts(label: np.ndarray, *, voxels: int) -> np.ndarray:
    """Set connected parts (26 neighbours) of fewer voxels to background, each class by itself.

    MONAI's `RemoveSmallObjects` needs scikit-image, whose argument for this has just changed its name and meaning.

    Args:
        label: (X, Y, Z) class indices.
        voxels: the smallest size that is kept.
    """
    result = label.copy()
    for index in np.unique(label[label > 0]):
        parts, _ = ndimage.label(label == index, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())
        sizes[0] = voxels
        result[(sizes < voxels)[parts]] = 0
    return result


def read_labelled(image: Path, label: Path) -> tuple[UprightFile, np.ndarray, np.ndarray]:
    """Read a volume and its label map, which must lie on one grid.

    Returns:
        The volume's header, its values (X, Y, Z) float32 in the units of the file, and labels (X, Y, Z) int64 >= 0;
        both in file orientation, Z = 1 for a picture of two axes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: damaged, NaN, constant image, more than three axes, other grids, labels that are no whole numbers.
            The message starts with the path.
    """
    source, target = open_upright(image), open_upright(label)
    target.file.check_same_grid_as(source.file)
    levels = whole_numbers(target.file.read(mask=True), name=str(label))
    if levels.min() < 0:
        raise ValueError(f"{label}: expected labels of at least 0, but got {levels.min()}; correct the labels")
    return source, source.file.read(), levels


def _check_units(values: np.ndarray, window: tuple[float, float], path: Path) -> None:
    low, high = (float(np.clip(v, *window)) for v in (values.min(), values.max()))
    if high - low < _LEAST_OF_WINDOW * (window[1] - window[0]):
        raise ValueError(
            f"{path}: expected values that the window {window[0]:g}..{window[1]:g} shows (Hounsfield units in CT), but "
            f"got {values.min():g}..{values.max():g}; take the original volume or give another window"
        )


def _storable(values: np.ndarray) -> np.ndarray:
    """int16 where that loses nothing, else float32."""
    limits = np.iinfo(np.int16)
    if values.min() >= limits.min and values.max() <= limits.max:
        whole = values.astype(np.int16)
        if np.array_equal(whole, values):
            return whole
    return values.astype(np.float32)


def _write(path: Path, values: np.ndarray, affine: np.ndarray, code: int) -> None:
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(1, 0)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    stream = io.BytesIO()
    image.to_stream(stream)
    with atomic_path(path) as temporary:
        temporary.write_bytes(stream.getvalue())


def present_classes(label: np.ndarray) -> list[list[int]]:
    """Class indices above 0 of each slice (last axis)."""
    return [[int(c) for c in np.unique(label[..., k]) if c > 0] for k in range(label.shape[2])]


def convert_volume(
    pair: Pair,
    out: Path,
    encode: Encode,
    *,
    window: Sequence[float] | None = None,
    clean: Clean | None = None,
) -> Outcome:
    """Bring one volume and its labels into the dataset folder: uncompressed NIfTI, upright (axes PLS).

    Voxels are moved, never interpolated or scaled: the image stays in the units of its file (int16 where that loses
    nothing, else float32), labels are uint8. A slice (third axis) then lies in one piece on the
    disk. A picture of two axes stays as it is turned, since not every one is axial.

    Args:
        pair: what to convert.
        out: dataset folder.
        encode: integer labels and their file -> uint8 indices and a remark, such as `MaskCoding.encode`.
        window: LOW, HIGH in the units of the file that become 0 and 1; it is stored with the item, so that training
            and test use the same one. None: the loader's robust range of each volume.
        clean: (label, image) in file orientation -> label; None: labels stay as they are.
    """
    try:
        source, values, levels = read_labelled(pair.image, pair.mask)
        label, remark = encode(levels, pair.mask)
        if window is not None:
            _check_units(values, (window[0], window[1]), pair.image)
    except (ValueError, FileNotFoundError) as error:
        return Outcome(None, ("unusable image or label", str(error)))
    if clean is not None:
        label = clean(label, values)
    header = nibabel.Nifti1Header.from_header(nibabel.load(pair.image).header)
    code = int(header["sform_code"]) or int(header["qform_code"]) or 2
    affine, stored = source.file.affine, _storable(values)
    item: dict[str, Any] = {"image": f"images/{pair.name}.nii", "label": f"labels/{pair.name}.nii",
                            "subject": pair.subject}  # fmt: skip
    if source.is_volume:
        affine, stored, label = source.affine, source.turn(stored), source.turn(label)
        item |= {"num_slices": int(label.shape[2]), "slice_classes": present_classes(label)}
    else:
        stored, label = stored[..., 0], label[..., 0]
        item["classes"] = [int(c) for c in np.unique(label) if c > 0]
    if window is not None:
        item["window"] = [float(v) for v in window]
    _write(out / item["image"], stored, affine, code)
    _write(out / item["label"], label.astype(np.uint8), affine, code)
    remarks = [(remark, str(pair.mask))] if remark else []
    if not label.any():
        remarks.append(("empty label", str(pair.mask)))
    return Outcome(Entry(item, pair.section, (*pair.links, content_mark(stored))), remarks=tuple(remarks))
