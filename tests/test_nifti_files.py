# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from shared.nifti_files import grid_image, save_image, space_of, verified, write_nifti

AFFINE = np.array([[0, -2.0, 0, 31], [1.5, 0, 0, -17], [0, 0, 3, 40], [0, 0, 0, 1]])
SHEAR = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_voxels_type_and_grid_come_back(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for name in ("a", "b"):
        save_image(grid_image(values, AFFINE, description="drawn"), tmp_path / name / "c.nii.gz")
    image = nibabel.load(tmp_path / "a" / "c.nii.gz")
    assert image.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(image.dataobj), values)
    for stored in (image.affine, image.header.get_qform(), image.header.get_sform()):
        np.testing.assert_allclose(stored, AFFINE, atol=1e-6)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == space_of(image) == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["descrip"].item() == b"drawn"
    assert (tmp_path / "a" / "c.nii.gz").read_bytes() == (tmp_path / "b" / "c.nii.gz").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c.nii.gz"]


def test_a_level_stands_for_its_slope(tmp_path: Path) -> None:
    levels = np.array([[[0, 1, 65535]]], np.uint16)
    save_image(grid_image(levels, AFFINE, slope=0.25), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(nibabel.load(tmp_path / "a.nii.gz").get_fdata(), levels * 0.25)


def test_shear_is_in_the_sform_alone_and_a_world_is_always_stated() -> None:
    header = grid_image(np.zeros((4, 5, 3), np.uint8), AFFINE @ SHEAR, code=0).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 0)
    np.testing.assert_allclose(header.get_best_affine(), AFFINE @ SHEAR, atol=1e-6)
    assert space_of(grid_image(np.zeros((4, 5, 3), np.uint8), AFFINE, code=0)) == 2


def test_a_grid_of_its_own_takes_space_and_units_of_the_input_and_nothing_else(tmp_path: Path) -> None:
    source = nibabel.Nifti1Image(np.ones((4, 5, 3, 2), np.int16), None)
    source.set_qform(AFFINE, code=3)
    source.header.set_xyzt_units("micron", "sec")
    source.header["descrip"] = "MILLER^JOHN"
    nibabel.save(source, tmp_path / "in.nii")
    write_nifti(np.ones((8, 10, 6)), tmp_path / "a.nii.gz", like=tmp_path / "in.nii", affine=AFFINE @ SHEAR)
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, AFFINE @ SHEAR, atol=1e-6)
    assert (image.shape, image.get_data_dtype(), space_of(image)) == ((8, 10, 6), np.float32, 3)
    assert image.header.get_xyzt_units() == ("micron", "unknown")
    assert image.header["intent_name"].item() == b"synthetic"
    assert b"synthetic" in image.header["descrip"].item()


def test_a_compressed_file_is_checked_once_and_again_when_it_has_changed(tmp_path):
    path = tmp_path / "head.nii.gz"
    values = np.random.default_rng(0).integers(0, 255, (5, 7, 60), dtype=np.uint8)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
    proxy = nibabel.load(path).dataobj
    with verified(path, proxy) as first:
        assert first is not proxy
        assert np.array_equal(first[..., 3], values[..., 3])
    with verified(path, proxy) as second:
        assert second is proxy
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum, behind all voxels
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="CRC"), verified(path, nibabel.load(path).dataobj) as damaged:
        assert np.array_equal(damaged[..., 3], values[..., 3])
