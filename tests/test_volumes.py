# SPDX-License-Identifier: Apache-2.0
"""`shared.transforms.volumes`: loading, checks, scaling and display of brain volumes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, NibabelReader
from monai.transforms import (
    Compose,
    DivisiblePadd,
    Invertd,
    Orientationd,
    SaveImaged,
    Spacingd,
    SpatialPadd,
)
from PIL import Image

from shared.intensity import robust_range, scale_intensity
from shared.transforms.volumes import LoadVolumed, RobustScaled, for_display, open_volume
from tests.conftest import HANDBOOK

REAL = HANDBOOK / "data" / "brain_controlnet"
LPS = np.array([[-1.0, 0, 0, 30], [0, -1.5, 0, 20], [0, 0, 2, -10], [0, 0, 0, 1]])


def oblique():
    turn = np.eye(4)
    angle = np.deg2rad(12)
    turn[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    # axes of the file: superior, left, anterior
    axes = np.array([[0, -0.9, 0, 5], [0, 0, 1.1, -7], [3, 0, 0, 2], [0, 0, 0, 1.0]])
    return turn @ axes


def voxels(shape=(7, 9, 5), *, top=900, seed=0):
    values = np.random.default_rng(seed).integers(0, top, size=shape)
    values[0] = 0
    return values


def write(path, values=None, affine=None, *, dtype=np.int16):
    values = voxels() if values is None else values
    nibabel.save(nibabel.Nifti1Image(np.asarray(values).astype(dtype), LPS if affine is None else affine), path)
    return str(path)


def load(path):
    return LoadVolumed("image")({"image": path})["image"]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("affine", [LPS, oblique()], ids=["LPS", "oblique"])
def test_nifti_keeps_axes_values_and_affine(tmp_path, name, affine):
    path = write(tmp_path / name, affine=affine)
    image = load(path)
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), voxels()[None])
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-6)
    assert image.meta["filename_or_obj"] == path
    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(path))
    np.testing.assert_array_equal(image[0].numpy(), array)
    for key in ("affine", "original_affine", "spatial_shape", "space", "original_channel_dim"):
        np.testing.assert_array_equal(np.asarray(image.meta[key]), np.asarray(meta[key]), err_msg=key)


@pytest.mark.reliability(12)
def test_metadata_hold_nothing_of_the_header_that_could_name_the_patient(tmp_path):
    image = nibabel.Nifti1Image(voxels().astype(np.int16), LPS)
    image.header["descrip"] = b"Planted Name"
    image.header["db_name"] = b"Planted"
    nibabel.save(image, tmp_path / "a.nii")
    assert "Planted" not in str(load(tmp_path / "a.nii").meta)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nibabel.Nifti1Image(voxels(top=50).astype(np.uint16), LPS)
    image.header.set_slope_inter(0.25, -3)
    nibabel.save(image, tmp_path / "a.nii")
    written = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_allclose(load(tmp_path / "a.nii")[0].numpy(), written.get_fdata(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 1, 1)])
def test_2d_nifti_gets_one_slice(tmp_path, shape):
    image = load(write(tmp_path / "a.nii.gz", voxels((6, 8)).reshape(shape)))
    assert image.shape == (1, 6, 8, 1)
    np.testing.assert_array_equal(image[0, ..., 0].numpy(), voxels((6, 8)))


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
    assert load(write(tmp_path / "a.nii", voxels((4, 5, 6, 1)))).shape == (1, 4, 5, 6)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_png_rows_are_x_and_columns_are_y(tmp_path, dtype, top):
    levels = np.random.default_rng(0).integers(0, top, size=(16, 22)).astype(dtype)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = load(tmp_path / "a.png")
    assert image.shape == (1, 16, 22, 1)
    np.testing.assert_allclose(image[0, ..., 0].numpy(), levels / top, rtol=1e-6)
    np.testing.assert_array_equal(image.affine.numpy(), np.eye(4))
    reoriented = Orientationd("image", axcodes="RAS", labels=None)({"image": image})["image"]
    np.testing.assert_array_equal(reoriented.numpy(), image.numpy())


def test_list_of_paths_becomes_channels(tmp_path):
    paths = [write(tmp_path / "a.nii"), write(tmp_path / "b.nii.gz", voxels(seed=1))]
    image = load(paths)
    assert image.shape == (2, 7, 9, 5)
    np.testing.assert_array_equal(image[1].numpy(), voxels(seed=1))
    assert image.meta["filename_or_obj"] == paths[0]


def test_channels_on_different_grids_are_refused(tmp_path):
    first = write(tmp_path / "a.nii")
    with pytest.raises(
        ValueError, match=r"^\S*b\.nii: expected the grid of \S*a\.nii \(7, 9, 5\), but got \(7, 9, 4\)"
    ):
        load([first, write(tmp_path / "b.nii", voxels((7, 9, 4)))])
    moved = LPS.copy()
    moved[0, 3] += 2
    with pytest.raises(ValueError, match=r"^\S*c\.nii: expected the origin"):
        load([first, write(tmp_path / "c.nii", affine=moved)])


def broken(kind, folder):
    path = folder / "bad.nii"
    values = voxels().astype(np.float32)
    if kind == "nan":
        values[1, 2, 3] = np.nan
    elif kind == "inf":
        values[1, 2, 3:5] = np.inf
    elif kind == "too large":
        values = values.astype(np.float64)
        values[1, 2, 3] = 1e60
    elif kind == "constant":
        values[:] = 4
    elif kind == "4-D":
        values = np.stack([values, values], -1)
    elif kind == "complex":
        values = values.astype(np.complex64)
    write(path, values, dtype=values.dtype)
    if kind == "text":
        path.write_text("not an image " * 100)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:800])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "singular":
        content = bytearray(path.read_bytes())
        content[280:328] = np.zeros(12, "<f4").tobytes()  # srow_x, srow_y, srow_z; sform_code is set
        path.write_bytes(bytes(content))
    elif kind == "truncated gzip":
        packed = write(folder / "whole.nii.gz", values)
        path = folder / "bad.nii.gz"
        path.write_bytes(Path(packed).read_bytes()[:-120])
    elif kind == "missing":
        path.unlink()
    elif kind == "other kind":
        path = path.rename(folder / "bad.mgz")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "expected a NIfTI or PNG file, but it does not exist"),
        ("text", r"expected a readable file, but got \(ImageFileError"),
        ("empty", "expected a readable file"),
        ("truncated", "expected a readable file"),
        ("truncated gzip", "expected a readable file"),
        ("other kind", r"expected a file \.nii, \.nii\.gz or \.png"),
        ("nan", "expected finite voxels, but 1 are NaN or infinite"),
        ("inf", "expected finite voxels, but 2 are NaN or infinite"),
        ("too large", "expected finite voxels, but 1 are NaN or infinite"),
        ("constant", "expected an image, but all voxels are 4"),
        ("4-D", r"expected a 3-D volume, but got the shape \(7, 9, 5, 2\)"),
        ("complex", "expected grey values, but got voxels of the type complex64"),
        ("singular", r"affine: expected a finite, invertible \(4, 4\) matrix"),
    ],
)
def test_each_fault_is_named(tmp_path, kind, message):
    error = FileNotFoundError if kind == "missing" else ValueError
    path = broken(kind, tmp_path)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_damaged_png_is_named(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"^\S*a\.png: expected a readable file"):
        load(path)


@pytest.mark.parametrize("value", [None, "", [], 7, ["a.nii", 3]])
def test_an_item_without_a_path_is_named(value):
    with pytest.raises(ValueError, match="^image: expected the path of a file or a list of paths"):
        load(value)


def test_missing_key_may_be_allowed():
    assert LoadVolumed("image", allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="image"):
        LoadVolumed("image")({"x": 1})


def test_header_alone_is_read_on_opening(tmp_path):
    path = tmp_path / "a.nii.gz"
    write(path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352]))
    file = open_volume(path)
    assert file.shape == (7, 9, 5)
    np.testing.assert_allclose(file.affine, LPS)


@pytest.mark.parametrize("affine", [LPS, oblique()], ids=["LPS", "oblique"])
def test_monai_transforms_their_inverse_and_the_writer_work(tmp_path, affine):
    path = write(tmp_path / "in.nii.gz", affine=affine)
    preprocessing = Compose(
        [
            LoadVolumed("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            RobustScaled("image"),
            SpatialPadd("image", [12, 12, -1]),
            DivisiblePadd("image", [8, 8, 1]),
        ]
    )
    item = preprocessing({"image": path})
    assert item["image"].shape[1] == 16
    item["pred"] = item["image"].clone()
    inverse = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True)
    save = SaveImaged("pred", output_dir=tmp_path / "out", output_postfix="t1w", separate_folder=False, print_log=False)
    result = save(inverse(item))["pred"]
    scaled = scale_intensity(voxels(), *robust_range(voxels()))
    np.testing.assert_allclose(result[0].numpy(), scaled, atol=1e-6)
    written = nibabel.load(tmp_path / "out" / "in_t1w.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    np.testing.assert_allclose(written.get_fdata(), scaled, atol=1e-6)


def test_resampling_uses_the_affine(tmp_path):
    item = LoadVolumed("image")({"image": write(tmp_path / "a.nii")})
    resampled = Spacingd("image", pixdim=(2.0, 1.5, 1.0))(item)["image"]
    assert resampled.shape == (1, 4, 9, 9)


def test_loader_collates(tmp_path):
    items = [{"image": write(tmp_path / f"{n}.nii", voxels(seed=n))} for n in range(2)]
    batch = next(iter(DataLoader(Dataset(items, LoadVolumed("image")), batch_size=2)))["image"]
    assert batch.shape == (2, 1, 7, 9, 5)
    np.testing.assert_allclose(batch.affine[1].numpy(), LPS)


def test_scaling_is_the_one_rule_per_channel_and_tells_its_ranges(tmp_path):
    prepared = voxels(seed=3) / 1000
    paths = [write(tmp_path / "a.nii"), write(tmp_path / "b.nii", prepared, dtype=np.float32)]
    item = RobustScaled("image")(LoadVolumed("image")({"image": paths}))
    (low, high), second = item["image_range"]
    assert (low, high) == robust_range(voxels().astype(np.float32))
    assert second == [0.0, 1.0]
    assert json.loads(json.dumps(item["image_range"])) == item["image_range"]
    np.testing.assert_array_equal(item["image"][0].numpy(), scale_intensity(voxels(), low, high))
    np.testing.assert_array_equal(item["image"][1].numpy(), prepared.astype(np.float32))
    assert item["image"].meta["filename_or_obj"] == paths[0]
    np.testing.assert_allclose(item["image"].affine.numpy(), LPS)


def test_scaling_works_on_plain_tensors_and_names_the_key():
    values = torch.from_numpy(voxels()[None].astype(np.float32))
    item = RobustScaled("image")({"image": values})
    assert not isinstance(item["image"], MetaTensor)
    assert item["image"].max() == 1
    assert values.max() > 1, "the input is not changed in place"
    with pytest.raises(ValueError, match="^image: expected an image, but all voxels are 5"):
        RobustScaled("image")({"image": torch.full((1, 3, 4, 5), 5.0)})


def test_display_has_anterior_up_and_the_right_of_the_patient_on_the_left():
    image = torch.zeros(2, 1, 5, 7)
    image[..., 4, 1] = 1  # most right, posterior
    image[..., 0, 6] = 2  # most left, most anterior
    shown = for_display(image)
    assert shown.shape == (2, 1, 7, 5)
    assert shown[0, 0, 5, 0] == 1, "near the bottom, left edge"
    assert shown[0, 0, 0, 4] == 2, "top, right edge"
    assert shown.sum() == 6
    tracked = for_display(MetaTensor(image))
    assert not isinstance(tracked, MetaTensor)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real brain volumes on this machine")
@pytest.mark.parametrize("kind", ["ms_mni", "ms_native", "lgg_slices"])
def test_real_pairs_load_and_scale(kind):
    row = next(row for row in json.loads((REAL / "datalist.json").read_text()) if row["kind"] == kind)
    item = {"image": [str(REAL / row["flair"]), str(REAL / row["t1w"])]}
    item = Compose([LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None), RobustScaled("image")])(
        item
    )
    assert item["image"].shape == (2, *row["shape"])
    for channel, (low, high) in zip(item["image"], item["image_range"], strict=True):
        assert 0 <= low < 40 < high < 600
        head = channel[channel > 0.05]
        assert channel.min() == 0
        assert channel.max() == 1
        assert 0.2 < head.mean() < 0.8
