# SPDX-License-Identifier: Apache-2.0
"""NIfTI files: written whole, the same input giving the same bytes; generated ones say that they are synthetic."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
from collections.abc import Iterator
from typing import Any

import nibabel
import numpy as np

from shared.files import atomic_path
from shared.pictures import INTENDED_USE

# At most 79 bytes: the header's field `descrip` has 80.
DESCRIPTION = f"synthetic (generative model); {INTENDED_USE}"
_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_DEFLATE_RATIO = 1032  # gzip makes nothing smaller than by this factor
# Files that this process has read to their end: of a volume that is read slice by slice, one slice pays for it.
_known: set[tuple[str, int, int]] = set()
_ALIGNED = 2  # NIfTI code of a world whose origin is anywhere


def space_of(image: Any) -> int:
    """NIfTI code of the world that an image's affine leads to: of its sform, else of its qform; 0: none is known."""
    return int(image.header["sform_code"]) or int(image.header["qform_code"])


def check_length(path: str | os.PathLike, proxy: Any) -> None:
    """Refuse a file that cannot hold the voxels that its header announces, before memory is asked for them.

    Args:
        path: of the file.
        proxy: nibabel's array proxy of it.

    Raises:
        ValueError: negative sizes, or more bytes than the file has or could unpack to. Does not name the file.
    """
    if min(proxy.shape, default=0) < 0:
        raise ValueError(f"the header announces the shape {tuple(proxy.shape)}")
    announced, size = math.prod(map(int, proxy.shape)) * proxy.dtype.itemsize, os.path.getsize(path)
    compressed = os.fspath(path).lower().endswith(".gz")
    if announced > (_DEFLATE_RATIO * size if compressed else max(size - proxy.offset, 0)):
        raise ValueError(f"the header announces {announced} bytes of voxels, but the file has {size} bytes")


@contextlib.contextmanager
def verified(path: str | os.PathLike, proxy: Any) -> Iterator[Any]:
    """What to read the voxels of a file from: a compressed one is once read to its end, where its checksum stands.

    nibabel stops at the last voxel, so that a file with damaged bytes gives other voxels without a word.

    Args:
        path: of the file.
        proxy: nibabel's array proxy of it.

    Raises:
        OSError, EOFError, zlib.error: on leaving, a compressed file is damaged or cut.
    """
    status = os.stat(path)
    state = (os.fspath(path), status.st_size, status.st_mtime_ns)
    if state in _known or not os.fspath(path).lower().endswith(".gz"):
        yield proxy
        return
    with gzip.open(path) as stream:
        yield type(proxy)(stream, (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter))
        while stream.read(1 << 20):
            pass
    _known.add(state)


def grid_image(
    values: np.ndarray, affine: np.ndarray, *, code: int = 1, slope: float = 1.0, description: str = ""
) -> nibabel.Nifti1Image:
    """An image in mm on a grid of its own.

    Args:
        values: ``(X, Y)``, ``(X, Y, Z)`` or ``(X, Y, Z, N)``, stored in their type.
        affine: (4, 4) voxel indices to mm in RAS+, of the sform and, where it is free of shear, of the qform too: a
            qform is a rotation and voxel sizes, and would contradict the sform.
        code: NIfTI code of the world; 0 becomes 2 (aligned), as readers ignore an affine without one.
        slope: what a stored level stands for.
        description: for the header, at most 79 bytes.
    """
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, 0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orthogonal = np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)
    image.set_sform(affine, code or _ALIGNED)
    image.set_qform(affine, (code or _ALIGNED) if orthogonal else 0)
    return image


def save_image(image: Any, path: str | os.PathLike) -> None:
    """Write an image as ``.nii.gz``, atomically."""
    # nibabel picks the format by the name, which is a temporary one. A fixed time keeps the bytes the same; GzipFile,
    # unlike gzip.compress, writes the same header with every Python.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=4, fileobj=file, mtime=0) as zipped,
    ):
        zipped.write(image.to_bytes())


def write_nifti(
    values: np.ndarray,
    path: str | os.PathLike,
    *,
    like: str | os.PathLike,
    affine: np.ndarray | None = None,
    dtype: type[np.generic] = np.float32,
) -> None:
    """Write generated voxels as gzipped NIfTI with the geometry of another file, or on a grid of their own.

    Only the geometry is copied: other fields and extensions of a header may name the patient.

    Args:
        values: ``(X, Y, Z)``, reshaped to the shape of ``like`` unless there is an ``affine``.
        path: file to write, ``.nii.gz``.
        like: NIfTI file whose qform, sform, voxel size and units are taken, bit for bit.
        affine: (4, 4) voxel indices to mm in RAS+, see ``grid_image``; of ``like`` only the kind of space (scanner,
            aligned, template) and the units are taken then. None: as above.
        dtype: type of the voxels on disk, stored without slope and intercept: float32, or uint8 for labels.
    """
    source: Any = nibabel.load(like)
    values = np.asarray(values, dtype=dtype)
    if affine is None:
        image = type(source)(values.reshape(source.shape), None)
        for name in _GEOMETRY:
            image.header[name] = source.header[name]
    else:
        image = grid_image(values, affine, code=space_of(source))
        image.header["xyzt_units"] = source.header["xyzt_units"] & 7  # of space; there is no time
    image.header["descrip"] = DESCRIPTION
    image.header["intent_name"] = "synthetic"
    save_image(image, path)
