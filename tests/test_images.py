# SPDX-License-Identifier: Apache-2.0
"""`shared.transforms.images`: grey levels, orientation, checks and privacy of loaded radiographs."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pydicom
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from PIL import Image
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from shared.transforms.images import LoadRadiographd, ResizeShorterSided, read_radiograph


def ramp(height=5, width=7, top=255):
    """Brighter to the right, much brighter downwards: every transposition or flip changes it."""
    levels = np.arange(height)[:, None] * width + np.arange(width)[None]
    return levels / levels.max() * top


def write_dicom(path, pixels, *, bits=12, kind="MONOCHROME2", signed=False, **elements):
    dataset = DicomDataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName = "Planted^Name"
    dataset.PatientID = "PLANTED-ID"
    dataset.PatientBirthDate = "19700101"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = kind
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype(np.int16 if signed else np.uint16).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    pydicom.dcmwrite(path, dataset, **NEW_FILE)
    return path


NEW_FILE = {"enforce_file_format": True} if pydicom.__version__ >= "3" else {"write_like_original": False}


def load(path, **kwargs):
    return LoadRadiographd(["image"], **kwargs)({"image": path})["image"]


def test_8_bit_png_keeps_rows_and_columns(tmp_path):
    levels = ramp().astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = load(tmp_path / "a.png")
    assert image.shape == (1, 5, 7)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), levels.astype(np.float32) / 255)


def test_16_bit_png_keeps_its_depth(tmp_path):
    levels = ramp(top=65535).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png")[0].numpy(), levels.astype(np.float32) / 65535)


def test_jpeg(tmp_path):
    Image.fromarray(ramp(64, 96).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    image = load(tmp_path / "a.jpg")
    assert image.shape == (1, 64, 96)
    np.testing.assert_allclose(image[0].numpy(), ramp(64, 96, 1), atol=0.02)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees: rows are columns
    Image.fromarray(ramp(16, 32).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert load(tmp_path / "a.jpg").shape == (1, 32, 16)


def test_palette_is_resolved_not_read_as_indices(tmp_path):
    picture = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (3, 1))).convert("P")
    picture.putpalette([255, 255, 255, 0, 0, 0, 128, 128, 128, 51, 51, 51] + [0] * 756)
    picture.save(tmp_path / "a.png")
    np.testing.assert_allclose(load(tmp_path / "a.png")[0, 0].numpy(), [1, 0, 128 / 255, 0.2], atol=1e-6)


def test_colour_becomes_luma_and_transparency_lies_over_black(tmp_path):
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[:, 0], rgb[:, 1], rgb[:, 2] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    np.testing.assert_allclose(load(tmp_path / "rgb.png")[0, 0].numpy(), [0.299, 0.587, 0.114], atol=0.003)
    rgba = np.full((2, 3, 4), 255, np.uint8)
    rgba[:, 1, 3], rgba[:, 2, 3] = 128, 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(load(tmp_path / "rgba.png")[0, 0].numpy(), [1, 128 / 255, 0], atol=0.004)


def test_dicom_without_window_uses_the_stored_bits(tmp_path):
    levels = ramp(top=2000).astype(np.uint16)
    image = load(write_dicom(tmp_path / "a.dcm", levels))
    assert image.shape == (1, 5, 7)
    np.testing.assert_allclose(image[0].numpy(), levels / 4095, atol=1e-6)


def test_dicom_rescale_and_signed_pixels_stay_in_range(tmp_path):
    levels = ramp(top=4000).astype(np.int16) - 2000
    path = write_dicom(tmp_path / "a.dcm", levels, signed=True, RescaleSlope="2", RescaleIntercept="-100")
    np.testing.assert_allclose(load(path)[0].numpy(), (levels + 2048) / 4095, atol=1e-6)


def test_dicom_window_follows_the_standard(tmp_path):
    # DICOM PS3.3 C.11.2.1.2.1, LINEAR, applied after the rescale
    levels = ramp(top=4095).astype(np.uint16)
    path = write_dicom(
        tmp_path / "a.dcm", levels, RescaleSlope="1", RescaleIntercept="-1000", WindowCenter=["500", "9"],
        WindowWidth=["1000", "9"],
    )  # fmt: skip
    expected = np.clip((levels - 1000.0 - 499.5) / 999 + 0.5, 0, 1)
    np.testing.assert_allclose(load(path)[0].numpy(), expected, atol=1e-6)
    assert expected.min() == 0
    assert expected.max() == 1


def test_dicom_monochrome1_is_inverted(tmp_path):
    levels = ramp(top=4095).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", levels, kind="MONOCHROME1")
    np.testing.assert_allclose(load(path)[0].numpy(), 1 - levels / 4095, atol=1e-6)


def test_dicom_voi_table(tmp_path):
    table = DicomDataset()
    table.LUTDescriptor = [256, 0, 8]
    table["LUTDescriptor"].VR = "US"
    table.LUTData = [255 - i for i in range(256)]
    table["LUTData"].VR = "US"
    levels = ramp(top=255).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", levels, VOILUTSequence=[table])
    np.testing.assert_allclose(load(path)[0].numpy(), 1 - levels / 255, atol=1e-6)


def test_dicom_is_known_by_its_content(tmp_path):
    path = write_dicom(tmp_path / "no_suffix", ramp(top=4095).astype(np.uint16))
    assert load(path).shape == (1, 5, 7)


@pytest.mark.reliability(12)
def test_no_header_value_survives(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", ramp(top=4095).astype(np.uint16))
    image = load(path)
    kept = pickle.dumps((image.meta, image.applied_operations)) + repr(image).encode()
    assert b"Planted" not in kept
    assert b"PLANTED" not in kept
    assert b"1970" not in kept
    assert image.meta["filename_or_obj"] == str(path)


def corrupt_cases(folder):
    good = io.BytesIO()
    Image.fromarray(ramp(64, 64).astype(np.uint8)).save(good, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(ramp(64, 64).astype(np.uint8)).save(jpeg, "JPEG")
    gif = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (0, 200)]
    gif[0].save(folder / "frames.gif", save_all=True, append_images=gif[1:])
    (folder / "truncated.png").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (folder / "truncated.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.dcm").write_text("not a DICOM file")
    Image.fromarray(np.full((8, 9), 7, np.uint8)).save(folder / "constant.png")
    Image.fromarray(ramp().astype(np.float32)).save(folder / "float.tif")
    levels = ramp(top=4095).astype(np.uint16)
    write_dicom(folder / "frames.dcm", np.concatenate([levels, levels]), NumberOfFrames="2", Rows=5)
    write_dicom(folder / "palette.dcm", levels, kind="PALETTE COLOR")
    write_dicom(folder / "window.dcm", levels, WindowCenter="5", WindowWidth="0")
    write_dicom(folder / "flat.dcm", levels, RescaleSlope="0", RescaleIntercept="0")
    whole = write_dicom(folder / "short.dcm", levels).read_bytes()
    (folder / "short.dcm").write_bytes(whole[:-20])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.png", "expected a readable image, but decoding failed.*copy it anew"),
        ("truncated.jpg", "expected a readable image, but decoding failed"),
        ("text.png", "expected a PNG, JPEG or DICOM image"),
        ("empty.png", "expected a PNG, JPEG or DICOM image"),
        ("text.dcm", "expected a readable image, but decoding failed"),
        ("short.dcm", "expected a readable image, but decoding failed"),
        ("constant.png", "all pixels are 0.0274"),
        ("float.tif", "expected 8- or 16-bit grey levels, but got floating-point"),
        ("frames.gif", "expected one 2-D image, but got 2 frames"),
        ("frames.dcm", "expected one 2-D image, but got 2 frames"),
        ("palette.dcm", "MONOCHROME1 or MONOCHROME2, but got 'PALETTE COLOR'"),
        ("window.dcm", "decoding failed"),
        ("flat.dcm", "expected a rescale slope other than 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:The length of the pixel data")
def test_bad_files_are_named(tmp_path, name, message):
    corrupt_cases(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: expected")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected an image file") as error:
            read_radiograph(path)
        assert str(error.value).startswith(str(path))


def test_resize_sets_the_shorter_side_and_keeps_range_aspect_and_name(tmp_path):
    Image.fromarray(ramp(60, 90).astype(np.uint8)).save(tmp_path / "a.png")
    for shape, expected in [((60, 90), (20, 30)), ((90, 60), (30, 20))]:
        image = MetaTensor(torch.rand(1, *shape), meta={"filename_or_obj": "x.png"})
        resized = ResizeShorterSided(["image"], 20)({"image": image})["image"]
        assert resized.shape == (1, *expected)
        assert resized.meta["filename_or_obj"] == "x.png"
        assert 0 <= resized.min() < resized.max() <= 1
    assert ResizeShorterSided(["image"], 120)({"image": load(tmp_path / "a.png")})["image"].shape == (1, 120, 180)


def test_resize_averages_instead_of_dropping_lines():
    stripes = torch.zeros(1, 64, 64)
    stripes[:, ::8] = 1  # one bright row in eight: sampling without a filter at 8-fold reduction sees all or nothing
    small = ResizeShorterSided(["image"], 8)({"image": stripes})["image"]
    assert not isinstance(small, MetaTensor)
    torch.testing.assert_close(small[:, 2:-2], torch.full_like(small[:, 2:-2], 1 / 8), atol=0.02, rtol=0)


def test_resize_errors():
    with pytest.raises(ValueError, match="^size: expected at least 1"):
        ResizeShorterSided(["image"], 0)
    with pytest.raises(ValueError, match=r"expected \(C, H, W\), but got the shape \(4, 5\)"):
        ResizeShorterSided(["image"], 2)({"image": torch.zeros(4, 5)})


def test_batches_carry_the_names(tmp_path):
    items = []
    for index in range(2):
        Image.fromarray(ramp(8, 12).astype(np.uint8)).save(tmp_path / f"{index}.png")
        items.append({"image": str(tmp_path / f"{index}.png")})
    batch = next(iter(DataLoader(Dataset(items, LoadRadiographd(["image"])), batch_size=2)))
    assert batch["image"].shape == (2, 1, 8, 12)
    assert batch["image"].meta["filename_or_obj"] == [item["image"] for item in items]
    assert type(load(items[0]["image"], track_meta=False)) is torch.Tensor
