# SPDX-License-Identifier: Apache-2.0
"""`shared.transforms.segmentation_images` and `.upright`: pictures in colour, volumes, slices, windows."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from PIL import Image

from shared.intensity import robust_range
from shared.transforms import segmentation_images
from shared.transforms.in_plane import UprightVolumed
from shared.transforms.segmentation_images import LoadPictured
from shared.transforms.upright import open_upright
from shared.transforms.volumes import read_voxels
from tests.conftest import HANDBOOK
from tests.test_images import ramp, write_dicom
from tests.test_in_plane import affine_of

REAL = HANDBOOK / "data" / "sdseg"


def load(path, *, window=None, **item):
    return LoadPictured("image", window=window)({"image": str(path), **item})["image"]


def whole(path, **kwargs):
    return UprightVolumed("image")({"image": load(path, **kwargs)})["image"]


def colours(height=5, width=8):
    levels = ramp(height, width).astype(np.uint8)
    return np.stack([levels, 255 - levels, levels // 2], axis=-1)


def write(path, values=None, affine=None, dtype=np.int16):
    values = np.random.default_rng(0).integers(-1000, 2000, (9, 7, 5)) if values is None else values
    image = nibabel.Nifti1Image(np.asarray(values).astype(dtype), affine_of("LAS") if affine is None else affine)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
def test_colour_keeps_channels_rows_and_columns(tmp_path, suffix):
    Image.fromarray(colours()).save(tmp_path / f"a{suffix}")
    image = load(tmp_path / f"a{suffix}")
    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), colours().transpose(2, 0, 1) / 255, atol=1e-7)
    assert image.meta["filename_or_obj"] == str(tmp_path / f"a{suffix}")
    assert image.meta["spatial_shape"].tolist() == [5, 8]
    assert torch.equal(image.affine, torch.eye(4, dtype=torch.float64))


def test_jpeg_in_colour(tmp_path):
    smooth = np.stack([ramp(32, 48), 255 - ramp(32, 48), ramp(32, 48) / 2], axis=-1).round().astype(np.uint8)
    for suffix in ("jpg", "jpeg"):
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", quality=98)
        assert np.abs(load(tmp_path / f"a.{suffix}").numpy() - smooth.transpose(2, 0, 1) / 255).max() < 0.04


def test_grey_is_repeated_and_16_bit_keeps_its_depth(tmp_path):
    levels = ramp(top=65535).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(ramp().astype(np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(ramp() > 99).save(tmp_path / "c.png")
    for name, expected in (("a", levels / 65535), ("b", ramp().astype(np.uint8) / 255), ("c", ramp() > 99)):
        image = load(tmp_path / f"{name}.png").numpy()
        assert image.shape == (3, 5, 7)
        np.testing.assert_allclose(image, np.stack([expected] * 3), atol=1e-6)


def test_palette_is_resolved_and_transparency_lies_over_black(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [1, 2], [2, 0]], dtype=np.uint8), mode=None)
    picture.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    picture.save(tmp_path / "p.png")
    expected = np.array([[200, 10, 20], [30, 210, 40], [50, 60, 220]])[[[0, 1], [1, 2], [2, 0]]]
    np.testing.assert_allclose(load(tmp_path / "p.png").numpy(), expected.transpose(2, 0, 1) / 255, atol=1e-7)
    alpha = np.array([[255, 0, 128]], dtype=np.uint8)
    rgb = np.full((1, 3, 3), 200, dtype=np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "t.png")
    np.testing.assert_allclose(load(tmp_path / "t.png")[1, 0].numpy() * 255, [200, 0, 100], atol=1)


def test_exif_turn_is_applied(tmp_path):
    picture = Image.fromarray(colours())
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(
        load(tmp_path / "a.png").numpy(), np.rot90(colours(), -1).transpose(2, 0, 1) / 255, atol=1e-7
    )


def test_dicom_in_grey_uses_its_window_or_the_given_one(tmp_path):
    levels = ramp(top=4095).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", levels, RescaleSlope="1", RescaleIntercept="-1024")
    np.testing.assert_allclose(load(path).numpy(), np.stack([levels / 4095] * 3), atol=1e-6)
    expected = np.clip((levels - 1024.0 + 175) / 425, 0, 1)
    for image in (load(path, window=[-175, 250]), load(path, **{"window": None}), load(path)):
        assert image.shape == (3, 5, 7)
    np.testing.assert_allclose(load(path, window=[-175, 250])[2].numpy(), expected, atol=1e-6)
    item = LoadPictured("image")({"image": str(path), "window": [-175, 250]})
    np.testing.assert_allclose(item["image"][0].numpy(), expected, atol=1e-6)


def test_a_dicom_slice_of_air_is_black_in_a_window(tmp_path):
    path = write_dicom(tmp_path / "a.dicom", np.zeros((5, 7)), RescaleSlope="1", RescaleIntercept="-1024")
    assert load(path, window=[-175, 250]).max() == 0


def test_dicom_in_colour(tmp_path):
    eight = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "Rows": 5, "Columns": 8}
    rgb = write_dicom(tmp_path / "rgb.dcm", colours().reshape(5, 24).view(np.uint16), bits=8, kind="RGB", **eight)
    np.testing.assert_allclose(load(rgb).numpy(), colours().transpose(2, 0, 1) / 255, atol=1e-7)
    ybr = np.asarray(Image.fromarray(colours()).convert("YCbCr")).reshape(5, 24)
    path = write_dicom(tmp_path / "ybr.dcm", ybr.view(np.uint16), bits=8, kind="YBR_FULL", **eight)
    assert np.abs(load(path).numpy() - colours().transpose(2, 0, 1) / 255).max() < 0.02
    with pytest.raises(ValueError, match=r"^\S*rgb\.dcm: expected a grey image, as a window .* but got RGB"):
        load(rgb, window=[0, 100])


def test_dicom_with_a_palette(tmp_path):
    tables = {}
    for name, table in (("Red", [0, 65535, 0]), ("Green", [65535, 0, 0]), ("Blue", [0, 0, 32768])):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = np.array(table, dtype="<u2").tobytes()
    indices = np.array([[0, 1, 2], [2, 1, 0]])
    path = write_dicom(tmp_path / "a.dcm", indices, bits=16, kind="PALETTE COLOR", **tables)
    expected = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0.5]])[indices].transpose(2, 0, 1)
    np.testing.assert_allclose(load(path).numpy(), expected, atol=1e-4)


@pytest.mark.reliability(12)
def test_no_header_value_survives(tmp_path):
    assert "Planted" not in str(load(write_dicom(tmp_path / "a.dcm", ramp(top=4095))).meta)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_volume_keeps_the_orientation_of_its_file(tmp_path, name):
    path = write(tmp_path / name, affine=affine_of("PIR"))
    image = load(path, window=[-175, 250])
    values = nibabel.load(path).get_fdata()
    np.testing.assert_allclose(image[0].numpy(), np.clip((values + 175) / 425, 0, 1), atol=1e-6)
    np.testing.assert_allclose(image.affine.numpy(), affine_of("PIR"))
    assert image.shape == (1, 9, 7, 5)
    assert image.meta["spatial_shape"].tolist() == [9, 7, 5]


@pytest.mark.parametrize("codes", ["LAS", "PIR", "RSA", "SLP", "PLS"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("window", [None, (-175, 250)])
def test_slice_is_bit_for_bit_that_of_the_whole_volume(tmp_path, codes, name, window):
    path = write(tmp_path / name, affine=affine_of(codes))
    volume = whole(path, window=window)
    for index in range(volume.shape[3]):
        image = load(path, window=window, slice=index)
        assert image.shape == volume.shape[:3]
        assert torch.equal(image.as_tensor(), volume[..., index].as_tensor())
        place = image.affine.double() @ torch.tensor([1.0, 2, 0, 1]).double()
        assert torch.allclose(place, volume.affine.double() @ torch.tensor([1.0, 2, index, 1]).double())
    assert index + 1 == open_upright(path).shape[2]


def test_oblique_volumes_too(tmp_path):
    turn, angle = np.eye(4), np.deg2rad(20)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = write(tmp_path / "a.nii", affine=turn @ affine_of("IRP"))
    volume = whole(path)
    assert torch.equal(load(path, slice=3).as_tensor(), volume[..., 3].as_tensor())
    np.testing.assert_allclose(open_upright(path).affine, volume.affine.numpy(), atol=1e-9)


def test_a_slice_of_an_uncompressed_file_reads_only_that_slice(tmp_path, monkeypatch):
    read = []
    path = write(tmp_path / "a.nii", affine=affine_of("RAS"))
    monkeypatch.setattr(
        "shared.transforms.upright.read_voxels", lambda p, proxy, i: read.append(i) or read_voxels(p, proxy, i)
    )
    load(path, window=[-175, 250], slice=2)
    assert read == [(slice(None), slice(None), 2)]


def test_the_range_of_a_volume_is_read_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    counted = []
    original = segmentation_images.scaling_of
    monkeypatch.setattr(
        segmentation_images, "scaling_of", lambda v, name: counted.append(name) or original(v, name=name)
    )
    path = write(tmp_path / "a.nii")
    for index in (0, 3, 1):
        load(path, slice=index)
    assert counted == [str(path)]
    values = np.random.default_rng(1).integers(0, 77, (9, 7, 5))
    write(path, values)
    os.utime(path, ns=(1, 1))
    low, high = robust_range(values)
    plane = np.flip(values[..., 2], (1,)).T  # LAS: columns grow to the left already
    np.testing.assert_allclose(load(path, slice=2)[0].numpy(), np.clip((plane - low) / (high - low), 0, 1), atol=1e-6)


def test_a_changed_compressed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.arange(24).reshape(2, 3, 4))
    first = load(path, window=[0, 23], slice=1)
    write(path, 23 - np.arange(24).reshape(2, 3, 4))
    os.utime(path, ns=(1, 1))
    assert torch.allclose(load(path, window=[0, 23], slice=1), 1 - first)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_slices_are_a_volume_not_colours(tmp_path, count):
    values = np.random.default_rng(0).integers(0, 99, (6, 8, count))
    path = write(tmp_path / "a.nii", values)
    assert whole(path).shape == (1, 8, 6, count)
    assert load(path, slice=count - 1).shape == (1, 8, 6)


@pytest.mark.parametrize(
    ("codes", "turned"),
    [
        ("RAS", lambda v: v[::-1, ::-1].T),  # axial: anterior up, the patient's right on the left
        ("LPS", lambda v: v.T),
        ("RSA", lambda v: v[::-1, ::-1].T),  # coronal: superior up
        ("AIR", lambda v: v[::-1].T),  # sagittal: anterior on the left
        ("SAL", lambda v: v[::-1, ::-1]),
    ],
)
def test_nifti_of_two_axes_is_an_upright_picture(tmp_path, codes, turned):
    values = ramp(6, 9)
    path = write(tmp_path / "a.nii", values, affine_of(codes), dtype=np.float32)
    assert len(nibabel.load(path).shape) == 2
    image = load(path, window=[0, 255])
    np.testing.assert_allclose(image.numpy(), np.stack([turned(values) / 255] * 3), atol=1e-6)
    assert UprightVolumed("image")({"image": image})["image"] is image
    source = open_upright(path)
    np.testing.assert_allclose(source.turn_back(image[0].numpy())[..., 0], values / 255, atol=1e-6)
    low, high = robust_range(values)
    np.testing.assert_allclose(load(path)[0].numpy(), np.clip((turned(values) - low) / (high - low), 0, 1), atol=1e-5)


@pytest.mark.parametrize("codes", ["LAS", "PIR", "SRP"])
def test_turning_back_undoes_the_turn(tmp_path, codes):
    source = open_upright(write(tmp_path / "a.nii", affine=affine_of(codes)))
    values = np.random.default_rng(0).random((9, 7, 5))
    np.testing.assert_array_equal(source.turn_back(source.turn(values)), values)


def test_a_volume_that_is_scaled_already_stays_as_it_is(tmp_path):
    values = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    path = write(tmp_path / "a.nii", values, dtype=np.float32)
    np.testing.assert_array_equal(load(path)[0].numpy(), values)


def test_header_slope_is_applied_before_the_window(tmp_path):
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), affine_of("PLS"))
    image.header.set_slope_inter(2, -10)
    nibabel.save(image, tmp_path / "a.nii")
    # nibabel stores what the slope brings back to the array
    values = nibabel.load(tmp_path / "a.nii").get_fdata()
    expected = np.clip((values[..., 1] - 5) / 30, 0, 1)
    np.testing.assert_allclose(load(tmp_path / "a.nii", window=[5, 35], slice=1)[0].numpy(), expected, atol=1e-6)


def rgb_volume(path):
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 3), dtype=kind), np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    ("make", "item", "message"),
    [
        (lambda p: rgb_volume(p / "a.nii"), {}, r"^\S*a\.nii: expected grey values, but got voxels of the type"),
        (lambda p: write(p / "a.nii", np.zeros((4, 4, 3, 2))), {}, r"^\S*a\.nii: expected a 3-D volume.*3, 2"),
        (lambda p: write(p / "a.nii", np.ones((4, 4, 3))), {}, r"^\S*a\.nii: expected an image, but all voxels are 1"),
        (lambda p: write(p / "a.nii"), {"slice": 5}, r"^\S*a\.nii: expected a slice of 0\.\.4, but got 5"),
        (lambda p: write(p / "a.nii"), {"slice": -1}, r"^\S*a\.nii: expected a slice of 0\.\.4, but got -1"),
        (lambda p: write(p / "a.nii"), {"slice": "1"}, r"^\S*a\.nii: expected a slice of 0\.\.4, but got '1'"),
        (lambda p: write(p / "a.nii", np.full((4, 4, 3), np.nan), dtype=np.float32), {}, "expected finite voxels"),
        (lambda p: p / "gone.nii", {}, r"^\S*gone\.nii: expected a NIfTI or PNG file, but it does not exist"),
        (lambda p: p / "gone.png", {}, r"^\S*gone\.png: expected an image file, but it does not exist"),
        (lambda p: (p / "a.npy").write_bytes(b"x" * 200) and p / "a.npy", {}, r"^\S*a\.npy: expected a file \.nii"),
        (lambda p: p / "a.npy", {}, r"^\S*a\.npy: expected a file \.nii"),
        (lambda p: png(p / "a.png"), {"slice": 0}, r"^\S*a\.png: expected a volume, as the item names the slice 0"),
        (lambda p: write(p / "a.nii", ramp()), {"slice": 0}, r"^\S*a\.nii: expected a volume, as the item names the"),
        (lambda p: png(p / "a.png"), {"window": [0, 9]}, r"^\S*a\.png: expected a volume or a DICOM file, as a window"),
        (lambda p: write(p / "a.nii"), {"window": [9, 9]}, r"^\S*a\.nii: window: expected \[low, high\] with low < "),
        (lambda p: write(p / "a.nii"), {"window": "5"}, r"^\S*a\.nii: window: expected \[low, high\]"),
        (lambda p: png(p / "a.png", np.full((4, 5), 7)), {}, r"^\S*a\.png: expected an image, but all pixels are"),
        (lambda p: ["a.png", "b.png"], {}, r"^image: expected the path of one file, but got \['a\.png'"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path, make, item, message):
    path = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LoadPictured("image")({"image": path, **item})


def png(path, pixels=None):
    Image.fromarray((colours() if pixels is None else pixels).astype(np.uint8)).save(path)
    return path


def test_truncated_files_are_named(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9999, (40, 40, 9)))
    content = gzip.decompress(Path(path).read_bytes())
    Path(path).write_bytes(Path(path).read_bytes()[: len(content) // 4])
    with pytest.raises(ValueError, match=r"^\S*a\.nii\.gz: expected a readable file"):
        load(path, window=[0, 1], slice=8)
    Path(tmp_path / "b.png").write_bytes(png(tmp_path / "b.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^\S*b\.png: expected a readable image, but decoding failed"):
        load(tmp_path / "b.png")


def test_two_windows_must_agree(tmp_path):
    path = write(tmp_path / "a.nii")
    again = LoadPictured("image", window=[-175, 250])({"image": path, "window": [-175.0, 250]})["image"]
    assert torch.equal(again.as_tensor(), load(path, window=[-175, 250]).as_tensor())
    with pytest.raises(ValueError, match=r"^\S*a\.nii: expected one window, but the item .*\[-125\.0, 275\.0\].*-175"):
        LoadPictured("image", window=[-175, 250])({"image": path, "window": [-125, 275]})
    with pytest.raises(ValueError, match=r"^window: expected \[low, high\]"):
        LoadPictured("image", window=[250, -175])


def test_batches_of_slices_and_workers(tmp_path):
    path = write(tmp_path / "a.nii")
    data = [{"image": str(path), "slice": index, "flip": 0} for index in range(4)]
    transform = pickle.loads(pickle.dumps(LoadPictured("image", window=[-175, 250])))
    (batch,) = DataLoader(Dataset(data, transform), batch_size=4, num_workers=1)
    assert batch["image"].shape == (4, 1, 7, 9)
    assert torch.equal(batch["image"][2].as_tensor(), load(path, window=[-175, 250], slice=2).as_tensor())


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_real_photograph():
    image = load(REAL / "images" / "fuseg_0011.jpg")
    assert image.shape == (3, 512, 512)
    assert 0 <= image.min() < image.max() <= 1
