# SPDX-License-Identifier: Apache-2.0
"""Generated volumes as NIfTI files that keep the geometry of their input and say that they are synthetic."""

from __future__ import annotations

import gzip
import os
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


def write_nifti(
    values: np.ndarray, path: str | os.PathLike, *, like: str | os.PathLike, dtype: type[np.generic] = np.float32
) -> None:
    """Write voxels as gzipped NIfTI with the geometry of another file; the same input gives the same bytes.

    Only the geometry is copied: other fields and extensions of a header may name the patient.

    Args:
        values: ``(X, Y, Z)``, reshaped to the shape of ``like``.
        path: file to write, ``.nii.gz``.
        like: NIfTI file whose qform, sform, voxel size and units are taken, bit for bit.
        dtype: type of the voxels on disk, stored without slope and intercept: float32, or uint8 for labels.
    """
    source: Any = nibabel.load(like)
    image = type(source)(np.asarray(values, dtype=dtype).reshape(source.shape), None)
    for name in _GEOMETRY:
        image.header[name] = source.header[name]
    image.header["descrip"] = DESCRIPTION
    image.header["intent_name"] = "synthetic"
    with atomic_path(path) as temporary:
        # nibabel picks the format by the name, which is a temporary one; a fixed time keeps the bytes the same.
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))
