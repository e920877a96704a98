# SPDX-License-Identifier: Apache-2.0
"""Faults of volumes and gradient tables: each function writes one bad file beside a good dataset and returns its path.

A function takes what it needs first and the folder last, so that ``functools.partial`` makes a fault of it.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from shared.datalist import read_datalist, write_datalist
from shared.gradients import read_gradients
from shared.nifti_files import grid_image, save_image
from tests.corpus import edit_list, place
from tools.phantoms import brain_controlnet, dmri2noddi

SECTIONS = ("training", "validation", "test")
Change = Callable[[np.ndarray], np.ndarray]


def good_volumes(bundle: str, folder: Path) -> Path:
    """A small dataset of volumes without any fault, one subject in each section."""
    if bundle == "brain_controlnet":
        brain_controlnet.make_dataset(str(folder), n=3, size=(40, 48, 3), spacing=(4, 4, 6), split=(0.34, 0.33, 0.33))
    elif bundle == "dmri2noddi":
        dmri2noddi.make_dataset(str(folder), num_subjects=3, shape=(32, 36, 34), split=(0.34, 0.33, 0.33))
    else:
        _make_organs(folder)
    return folder


def _make_organs(folder: Path) -> None:
    """Bright ellipsoids in noise, int16, with their masks, uint8."""
    sections = {}
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 3)), indexing="ij")
    affine = np.diag([2.0, 2.5, 4.0, 1.0])
    for number, section in enumerate(SECTIONS):
        label = ((x - 0.1 * number) ** 2 / 0.3 + y**2 / 0.2 + z**2 / 2 < 1).astype(np.uint8)
        noise = np.random.default_rng(number).normal(0, 20, label.shape)
        item = {"image": f"{section}_ct.nii.gz", "label": f"{section}_label.nii.gz", "subject": section}
        save_image(grid_image((200 * label + noise).astype(np.int16), affine), folder / item["image"])
        save_image(grid_image(label, affine), folder / item["label"])
        sections[section] = [item]
    write_datalist(folder, sections, num_classes=1)


def _item(folder: Path) -> dict[str, Any]:
    return read_datalist(folder)["test"][0]


def _volume(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, float32, and affine of the test subject's file."""
    image: Any = nibabel.load(folder / _item(folder)[key])
    return np.asarray(image.dataobj, np.float32), image.affine


def _content(values: np.ndarray, affine: np.ndarray) -> bytearray:
    return bytearray(nibabel.Nifti1Image(values, affine).to_bytes())


def _store(folder: Path, key: str, content: bytes, suffix: str = ".nii.gz", *, level: int = 4) -> Path:
    """Write `bad_<key>.nii[.gz]`, for a series with its gradients beside it."""
    path = folder / f"bad_{key}{suffix}"
    path.write_bytes(gzip.compress(bytes(content), level, mtime=0) if suffix == ".nii.gz" else bytes(content))
    return _with_gradients(folder, path)


def _with_gradients(folder: Path, path: Path) -> Path:
    if path.name.startswith("bad_dwi."):
        for ending in ("bval", "bvec"):
            os.link(folder / _item(folder)[ending], folder / f"bad_dwi.{ending}")
    return path


# Files that are damaged


def cut(key: str, suffix: str, share: float, folder: Path) -> Path:
    """The first part of a file; share 0: an empty one."""
    path = _store(folder, key, _content(*_volume(folder, key)), suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    return path


def header_alone(key: str, suffix: str, folder: Path) -> Path:
    return _store(folder, key, _content(*_volume(folder, key))[:352], suffix)


def flipped_bit(key: str, level: int, folder: Path) -> Path:
    """Level 0 stores the bytes as they are: the stream decodes, and only its checksum is wrong."""
    path = _store(folder, key, _content(*_volume(folder, key)), level=level)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    return path


def words(key: str, suffix: str, folder: Path) -> Path:
    path = folder / f"bad_{key}{suffix}"
    path.write_text("subject,age\n1,60\n" * 40)
    return _with_gradients(folder, path)


def directory(key: str, folder: Path) -> Path:
    path = folder / f"bad_{key}.nii.gz"
    path.mkdir()
    return _with_gradients(folder, path)


def broken_link(key: str, folder: Path) -> Path:
    path = folder / f"bad_{key}.nii.gz"
    path.symlink_to(folder / "gone.nii.gz")
    return _with_gradients(folder, path)


def patched(key: str, offset: int, form: str, numbers: tuple[Any, ...], folder: Path) -> Path:
    """A good file but for a field of its header: offset in bytes, format of `struct`."""
    content = _content(*_volume(folder, key))
    struct.pack_into(form, content, offset, *numbers)
    return _store(folder, key, content)


def no_geometry(key: str, pixdim: tuple[float, float, float], folder: Path) -> Path:
    """Neither sform nor qform, only voxel sizes."""
    content = _content(*_volume(folder, key))
    struct.pack_into("<2h", content, 252, 0, 0)
    struct.pack_into("<3f", content, 80, *pixdim)
    return _store(folder, key, content)


def bomb(key: str, side: int, folder: Path) -> Path:
    """A few bytes that claim to be many: the header of a cube of float64."""
    content = _content(*_volume(folder, key))[:1000]
    struct.pack_into("<4h", content, 40, 3, side, side, side)
    struct.pack_into("<2h", content, 70, 64, 64)
    return _store(folder, key, content)


# Whole files that hold something else


def changed(key: str, change: Change, folder: Path, affine: Change | None = None) -> Path:
    values, known = _volume(folder, key)
    return _store(folder, key, _content(change(values), known if affine is None else affine(known)))


def placed(key: str, affine: Change, folder: Path) -> Path:
    """Good voxels elsewhere; written into the header as it is, whatever that means."""
    values, known = _volume(folder, key)
    content = _content(values, known)
    struct.pack_into("<12f", content, 280, *affine(known)[:3].ravel())
    return _store(folder, key, content)


def two_forms(key: str, agree: bool, folder: Path) -> Path:
    """A sform, and a qform that is elsewhere and mirrored, or the same."""
    values, affine = _volume(folder, key)
    image = grid_image(values, affine)
    image.set_qform(affine if agree else shifted(affine) @ np.diag([-1.0, 1, 1, 1]), 1)
    return _store(folder, key, image.to_bytes())


def scaled(key: str, slope: float, intercept: float, folder: Path) -> Path:
    return patched(key, 112, "<2f", (slope, intercept), folder)


def as_given(values: np.ndarray) -> np.ndarray:
    return values


def one_voxel(value: float, values: np.ndarray) -> np.ndarray:
    """In the middle, which is in the brain."""
    values[tuple(n // 2 for n in values.shape)] = value
    return values


def everywhere(value: float, values: np.ndarray) -> np.ndarray:
    return np.full_like(values, value)


def as_rgb(values: np.ndarray) -> np.ndarray:
    grey = np.clip(255 * values / values.max(), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1).copy().view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]


def shifted(affine: np.ndarray) -> np.ndarray:
    moved = affine.copy()
    moved[0, 3] += 7
    return moved


# Gradient tables


def table(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """b-values (N,) and directions (N, 3) of the test subject."""
    item = _item(folder)
    known = read_gradients(folder / item["bval"], folder / item["bvec"])
    return known.bvals.copy(), known.bvecs.copy()


def bval(change: Change, folder: Path) -> Path:
    return _rows(folder / "bad.bval", change(table(folder)[0])[None])


def bvec(change: Change, folder: Path) -> Path:
    """The change gets and gives 3 rows, as FSL writes them."""
    return _rows(folder / "bad.bvec", change(table(folder)[1].T.copy()))


def _rows(path: Path, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, fmt="%.6f")
    return path


def one_volume_less(folder: Path) -> Path:
    """A series that lost its first volume; what is named is the table that does not fit it."""
    path = changed("dwi", lambda v: v[..., 1:], folder)
    place(folder, path, key="dwi", section="test")
    return folder / _item(folder)["bval"]


def text(name: str, content: str, folder: Path) -> Path:
    (folder / name).write_text(content)
    return folder / name


def put(index: Any, value: Any, values: np.ndarray) -> np.ndarray:
    values[index] = value
    return values


# Masks and data lists


def coarse_mask(move: bool, folder: Path) -> Path:
    """A mask on the grid of the series, or beside it."""
    dwi: Any = nibabel.load(folder / _item(folder)["dwi"])
    values = _volume(folder, "mask")[0][::2, ::2, ::2]
    return _store(folder, "mask", _content(values, shifted(dwi.affine) if move else dwi.affine))


def blocky_mask(folder: Path) -> Path:
    """The coarse mask with each voxel as 2 x 2 x 2."""
    values, affine = _volume(folder, "mask")
    blocks = values[::2, ::2, ::2].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return _store(folder, "mask", _content(blocks, affine))


def without(key: str, folder: Path) -> Path:
    """A data list in which no item has a key."""

    def drop(content: dict[str, Any]) -> None:
        for section in SECTIONS:
            content[section][0].pop(key)

    return edit_list(folder, drop)


def replaced(key: str, change: Callable[[Any], Any], folder: Path) -> Path:
    """A data list in which the value under a key is another one in every item."""

    def edit(content: dict[str, Any]) -> None:
        for section in SECTIONS:
            content[section][0][key] = change(content[section][0][key])

    return edit_list(folder, edit)
