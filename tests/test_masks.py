# SPDX-License-Identifier: Apache-2.0
"""`shared.transforms.masks` and `.mask_levels`: every way to store a mask gives class indices or a named error."""

from __future__ import annotations

import pickle

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from PIL import Image, ImageDraw

from shared.transforms.in_plane import UprightVolumed
from shared.transforms.masks import CheckMaskGridd, LoadMaskd, MaskToPictured, classes_of_slices
from shared.transforms.pixels import picture_size
from shared.transforms.segmentation_images import LoadPictured
from tests.conftest import HANDBOOK
from tests.test_in_plane import affine_of

REAL = HANDBOOK / "data" / "sdseg"
MASK = np.zeros((6, 9), dtype=np.uint8)
MASK[1:3, 2:7] = 1
CLASSES = MASK.copy()
CLASSES[4, 5:] = 3


def load(path, *, num_classes=1, image_key=None, **item):
    return LoadMaskd("label", num_classes=num_classes, image_key=image_key)({"label": str(path), **item})["label"]


def save(path, values, **kwargs):
    Image.fromarray(values).save(path, **kwargs)
    return path


def write(path, values, affine=None, dtype=np.uint8):
    affine = affine_of("LAS") if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.asarray(values).astype(dtype), affine), path)
    return path


def palette(path, indices, colours):
    picture = Image.fromarray(indices, mode=None)
    picture.putpalette(np.asarray(colours, dtype=np.uint8).ravel().tolist())
    picture.save(path)
    return path


def disc(height=96, width=128):
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).ellipse((30, 20, 90, 70), fill=255)
    return picture


RGB = np.repeat(MASK[..., None] * 255, 3, axis=2)
OPAQUE = np.full((6, 9, 1), 255, dtype=np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: save(p / "a.png", MASK * 255),
        lambda p: save(p / "a.png", MASK),
        lambda p: save(p / "a.png", MASK * 38),
        lambda p: save(p / "a.png", MASK.astype(bool)),
        lambda p: save(p / "a.png", MASK.astype(np.uint16) * 65535),
        lambda p: save(p / "a.png", MASK.astype(np.uint16) * 1000),
        lambda p: save(p / "a.png", RGB),
        lambda p: save(p / "a.png", np.dstack([RGB, OPAQUE])),
        lambda p: save(p / "a.png", np.dstack([MASK * 255, OPAQUE[..., 0]])),
        lambda p: save(p / "a.tif", MASK * 255),
        lambda p: save(p / "a.tif", MASK.astype(np.float32)),
        lambda p: save(p / "a.bmp", MASK * 255),
        lambda p: palette(p / "a.png", MASK * 2, [[0, 0, 0], [9, 9, 9], [255, 0, 0]]),
        lambda p: palette(p / "a.png", MASK, [[90, 0, 0], [0, 0, 9]]),
        # index 0 is white: the order of a program that saves colours, not labels
        lambda p: palette(p / "a.png", 1 - MASK, [[255, 255, 255], [0, 0, 0]]),
        lambda p: write(p / "a.nii", MASK.T, affine_of("LPS")),
        lambda p: write(p / "a.nii.gz", MASK.T, affine_of("LPS"), np.float32),
    ],
    ids=["0-255", "0-1", "0-v", "1-bit", "16-bit", "16-bit-v", "3-channels", "RGBA", "LA", "tif", "float-tif", "bmp",
         "palette", "palette-dark", "palette-white-first", "nifti", "float-nifti"],
)  # fmt: skip
def test_every_coding_of_a_binary_mask(tmp_path, make):
    mask = load(make(tmp_path))
    assert isinstance(mask, MetaTensor)
    assert mask.dtype == torch.float32
    np.testing.assert_array_equal(mask.numpy(), MASK[None])
    assert mask.meta["filename_or_obj"].startswith(str(tmp_path))


@pytest.mark.parametrize("value", [0, 255, 1])
def test_empty_and_full_masks_stay_so(tmp_path, value):
    for num_classes in (1, 2) if value < 2 else (1,):
        mask = load(save(tmp_path / "a.png", np.full((4, 5), value, dtype=np.uint8)), num_classes=num_classes)
        np.testing.assert_array_equal(mask.numpy(), np.full((1, 4, 5), min(value, 1)))


def test_compression_of_jpeg_is_cut_away(tmp_path):
    original = np.asarray(disc()) > 127
    disc().save(tmp_path / "a.jpg", quality=90)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.jpg")))) > 8
    mask = load(tmp_path / "a.jpg")
    assert sorted(mask.unique().tolist()) == [0, 1]
    assert (mask[0].numpy() != original).mean() < 1e-3
    # the same in colour: the channels of a grey JPEG are equal
    disc().convert("RGB").save(tmp_path / "b.jpg", quality=90)
    assert (load(tmp_path / "b.jpg")[0].numpy() != original).mean() < 1e-3


def test_blurred_levels_are_cut_at_half(tmp_path):
    values = np.zeros((40, 44), dtype=np.uint8)
    values[:, 22:] = 255
    values[0, :4] = 80, 127, 128, 250
    assert load(save(tmp_path / "a.png", values))[0, 0, :4].tolist() == [0, 0, 1, 1]


def grey_steps(*levels, shape=(10, 20)):
    """Mostly black, two rows per level."""
    values = np.zeros(shape, dtype=np.uint8)
    for index, level in enumerate(levels):
        values[2 * index : 2 * index + 2] = level
    return values


CUP = np.full((100, 100), 255, dtype=np.uint8)
CUP[50:60, 50:60], CUP[52:56, 52:56] = 128, 0
VOID = np.zeros((100, 100), dtype=np.uint8)
VOID[10:40, 10:40], VOID[10:40, 40] = 15, 255


@pytest.mark.parametrize(
    "values",
    [
        grey_steps(60, 128, 200),  # a soft mask
        grey_steps(1, 2),  # class indices
        CUP,  # REFUGE: cup 0, disc 128, rest 255; 1 % is grey
        VOID,  # VOC: classes below 21, void 255: all near the ends, but nothing is blurred
        grey_steps(1, 2).astype(np.uint16) * 300,
    ],
    ids=["soft", "classes", "cup", "void", "16-bit-classes"],
)
def test_grey_levels_that_do_not_tell_the_foreground_are_refused(tmp_path, values):
    with pytest.raises(
        ValueError, match=r"^\S*a\.png: expected a binary mask of 0 and one other level, but got [34] lev"
    ):
        load(save(tmp_path / "a.png", values))


def test_grey_levels_are_listed_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"got 4 levels \(0, 60, 128, 200\).*--foreground.*num_classes"):
        load(save(tmp_path / "a.png", grey_steps(60, 128, 200)))
    with pytest.raises(ValueError, match=r"12 levels \(0, 10, 20, 30, 40, 50, 60, 70 \.\.\.\)"):
        load(save(tmp_path / "a.png", grey_steps(*range(10, 120, 10), shape=(30, 9))))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: save(p / "a.png", CLASSES),
        lambda p: save(p / "a.png", CLASSES.astype(np.uint16)),
        lambda p: save(p / "a.png", np.repeat(CLASSES[..., None], 3, axis=2)),
        lambda p: palette(p / "a.png", CLASSES, [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        lambda p: write(p / "a.nii", CLASSES.T, affine_of("LPS"), np.float32),
    ],
    ids=["png", "16-bit", "3-channels", "palette", "float-nifti"],
)
def test_class_indices(tmp_path, make):
    path = make(tmp_path)
    np.testing.assert_array_equal(load(path, num_classes=4).numpy(), CLASSES[None])
    np.testing.assert_array_equal(load(path, num_classes=4, class_id=0).numpy(), CLASSES[None] > 0)
    np.testing.assert_array_equal(load(path, num_classes=4, class_id=3).numpy(), CLASSES[None] == 3)
    absent = load(path, num_classes=4, class_id=2)
    assert absent.dtype == torch.float32
    assert absent.max() == 0
    assert absent.meta["filename_or_obj"] == str(path)
    with pytest.raises(ValueError, match=r"expected class indices 0\.\.2 \(num_classes 3\), but got 0, 1, 3; correct"):
        load(path, num_classes=3)
    assert classes_of_slices(path, num_classes=4) == [[1, 3]]


def test_label_maps_are_foreground_wherever_they_are_not_0(tmp_path):
    volume = np.stack([CLASSES, MASK, MASK * 0], axis=-1)
    np.testing.assert_array_equal(load(write(tmp_path / "a.nii", volume)).numpy(), volume[None] > 0)
    coloured = palette(tmp_path / "a.png", CLASSES, [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(load(coloured).numpy(), CLASSES[None] > 0)


@pytest.mark.parametrize("codes", ["LAS", "PIR", "RSA"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slices_of_a_volume(tmp_path, codes, name):
    values = np.random.default_rng(0).integers(0, 9, (5, 6, 7))
    path = write(tmp_path / name, values, affine_of(codes))
    volume = load(path, num_classes=9)
    np.testing.assert_array_equal(volume.numpy(), values[None])
    upright = UprightVolumed("label")({"label": volume})["label"]
    for index in range(upright.shape[3]):
        mask = load(path, num_classes=9, slice=index)
        assert torch.equal(mask.as_tensor(), upright[..., index].as_tensor())
        one = load(path, num_classes=9, slice=index, class_id=8)
        assert torch.equal(one.as_tensor(), (upright[..., index] == 8).float().as_tensor())
    expected = [sorted(set(upright[0, ..., k].unique().int().tolist()) - {0}) for k in range(upright.shape[3])]
    assert classes_of_slices(path, num_classes=9) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_slices_are_a_volume(tmp_path, count):
    path = write(tmp_path / "a.nii", np.repeat(MASK[..., None], count, axis=2))
    assert load(path).shape == (1, 6, 9, count)


def nan():
    values = MASK.astype(np.float32)
    values[0, 0] = np.nan
    return values


BAD_ALPHA = np.dstack([RGB, OPAQUE])
BAD_ALPHA[0, 0, 3] = 0
COLOURS = RGB.copy()
COLOURS[2, 2] = (255, 0, 128)


@pytest.mark.parametrize(
    ("make", "item", "message"),
    [
        (lambda p: save(p / "a.png", COLOURS), {}, r"equal ones, but got colours \(#000000, #FFFFFF, #FF0080\).*--ma"),
        (lambda p: save(p / "a.png", BAD_ALPHA), {}, r"expected an opaque mask, but 1\.9% of its"),
        (lambda p: save(p / "a.tif", nan()), {}, "expected finite levels, but 1 are NaN"),
        (lambda p: save(p / "a.tif", MASK * np.float32(0.5)), {}, r"as labels, but got fractions \(0, 0\.5"),
        (lambda p: write(p / "a.nii", nan(), dtype=np.float32), {}, "expected finite voxels, but 1 are NaN"),
        (lambda p: write(p / "a.nii", MASK * 0.7, dtype=np.float32), {}, r"whole numbers as labels, but got fractions"),
        (lambda p: write(p / "a.nii", MASK * -1.0, dtype=np.int16), {}, "expected labels of at least 0, but got -1, 0"),
        (lambda p: write(p / "a.nii", np.zeros((4, 4, 3, 2))), {}, r"expected a 3-D volume"),
        (lambda p: write(p / "a.nii", np.zeros((4, 4, 3))), {"slice": 3}, r"expected a slice of 0\.\.2, but got 3"),
        (lambda p: save(p / "a.png", MASK), {"slice": 0}, "expected a volume, as the item names the slice 0"),
        (lambda p: save(p / "a.png", MASK), {"class_id": 1}, "expected a class_id of none, as num_classes is 1"),
        (lambda p: p / "gone.png", {}, "expected an image file, but it does not exist"),
        (lambda p: p / "gone.nii", {}, "but it does not exist"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path, make, item, message):
    path = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{path}: .*{message}"):
        load(path, **item)


def test_more_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"0, 255 \(0 and 255 are a binary mask: num_classes 1\)"):
        load(save(tmp_path / "a.png", MASK * 255), num_classes=4)
    with pytest.raises(ValueError, match=r"^\S*a\.png: expected a class_id of 0\.\.3, but got 4"):
        load(save(tmp_path / "a.png", MASK), num_classes=4, class_id=4)
    (tmp_path / "a.dcm").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^\S*a\.dcm: expected a mask as PNG, TIFF, BMP or NIfTI, but got DICOM"):
        load(tmp_path / "a.dcm")
    with pytest.raises(ValueError, match="^num_classes: expected 1"):
        LoadMaskd("label", num_classes=0)
    with pytest.raises(ValueError, match="^label: expected the path of one file"):
        LoadMaskd("label")({"label": None})


def pair(image, label, *, loaded=False):
    item = {"image": str(image), "label": str(label)}
    if loaded:
        item = LoadPictured("image")(item)
    return LoadMaskd("label", image_key="image")(item)["label"]


@pytest.mark.parametrize("loaded", [False, True])
def test_size_of_a_picture_and_its_mask(tmp_path, loaded):
    photograph = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    image = save(tmp_path / "a.png", photograph)
    assert pair(image, save(tmp_path / "m.png", MASK), loaded=loaded).shape == (1, 6, 9)
    turned = save(tmp_path / "t.png", np.ascontiguousarray(MASK.T))
    with pytest.raises(ValueError, match=r"^\S*t\.png: expected the size of its image \S*a\.png, 6 x 9 .* got 9 x 6"):
        pair(image, turned, loaded=loaded)
    # a photograph that a tag turns has the size that is seen
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph).save(tmp_path / "e.jpg", exif=exif)
    assert pair(tmp_path / "e.jpg", turned, loaded=loaded).shape == (1, 9, 6)
    with pytest.raises(ValueError, match=r"^\S*v\.nii: expected a picture like its image \S*a\.png, but got a volume"):
        pair(image, write(tmp_path / "v.nii", np.zeros((6, 9, 3))), loaded=loaded)
    with pytest.raises(FileNotFoundError, match=r"^\S*gone\.png: expected this file"):
        pair(image, tmp_path / "gone.png")


@pytest.mark.parametrize("loaded", [False, True])
def test_grid_of_a_volume_and_its_mask(tmp_path, loaded):
    values = np.random.default_rng(0).integers(0, 999, (5, 6, 7))
    image = write(tmp_path / "a.nii", values, dtype=np.int16)
    assert pair(image, write(tmp_path / "m.nii", values > 500), loaded=loaded).shape == (1, 5, 6, 7)
    with pytest.raises(ValueError, match=r"^\S*o\.nii: expected the orientation LAS of \S*a\.nii, but got PIR"):
        pair(image, write(tmp_path / "o.nii", values > 500, affine_of("PIR")), loaded=loaded)
    with pytest.raises(
        ValueError, match=r"^\S*s\.nii: expected the grid of \S*a\.nii \(5, 6, 7\), but got \(5, 6, 6\)"
    ):
        pair(image, write(tmp_path / "s.nii", values[..., 1:] > 500), loaded=loaded)
    with pytest.raises(ValueError, match=r"^\S*m\.png: expected a volume like its image \S*a\.nii, but got a picture"):
        pair(image, save(tmp_path / "m.png", MASK), loaded=loaded)


def test_the_image_may_have_been_resized_before(tmp_path):
    image = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8))
    item = LoadPictured("image")({"image": str(image), "label": str(save(tmp_path / "m.png", MASK))})
    item["image"] = MetaTensor(torch.zeros(3, 4, 4), meta=item["image"].meta)
    assert LoadMaskd("label", image_key="image")(item)["label"].shape == (1, 6, 9)


@pytest.mark.parametrize("late", [False, True])
def test_size_of_a_png_file_that_a_tag_turns(tmp_path, late):
    exif = Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / "a.png"
    Image.fromarray(MASK).save(path, exif=exif)
    written = path.read_bytes()
    start, pixels = written.index(b"eXIf") - 4, written.index(b"IDAT") - 4
    assert start < pixels
    if late:
        tag = written[start:pixels]
        path.write_bytes(written[:start] + written[pixels:-12] + tag + written[-12:])
    assert picture_size(path) == (9, 6) == load(path).shape[1:]


def test_grid_is_compared_without_decoding(tmp_path):
    """The headers alone: the pixels may be spoiled."""
    photograph = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    mask = save(tmp_path / "m.png", MASK)
    written = mask.read_bytes()
    start = written.index(b"IDAT") + 4
    mask.write_bytes(written[:start] + bytes(6) + written[start + 6 :])
    with pytest.raises(ValueError, match=r"m\.png: expected a readable image"):
        load(mask)
    item = {"image": str(save(tmp_path / "a.png", photograph)), "label": str(mask), "slice": 2}
    check = pickle.loads(pickle.dumps(CheckMaskGridd("label")))
    assert check(item) == item
    # without a cache of latents the mask is loaded, and resized, already
    loaded = MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": str(save(tmp_path / "t.png", MASK.T.copy()))})
    for label in (loaded, str(tmp_path / "t.png")):
        with pytest.raises(ValueError, match=r"^\S*t\.png: expected the size of its image \S*a\.png, 6 x 9 .* 9 x 6;"):
            check({**item, "label": label})
    other = write(tmp_path / "v.nii", np.zeros((5, 6, 7)))
    with pytest.raises(ValueError, match=r"^\S*s\.nii: expected the grid of \S*v\.nii"):
        check({"image": str(other), "label": str(write(tmp_path / "s.nii", np.zeros((5, 6, 6))))})
    with pytest.raises(KeyError, match="label"):
        check({"image": str(other)})
    assert CheckMaskGridd("label", allow_missing_keys=True)({"image": str(other)}) == {"image": str(other)}


def test_mask_as_a_picture(tmp_path):
    mask = load(save(tmp_path / "a.png", MASK * 255))
    item = MaskToPictured("label")({"label": mask})
    assert item["target"].dtype == torch.float32
    np.testing.assert_array_equal(item["target"].numpy(), np.stack([MASK] * 3))
    assert item["label"] is mask
    assert "m" in MaskToPictured("label", name="m")({"label": torch.zeros(1, 3, 4, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"^\S*a\.png: expected a binary mask of 0 and 1, but got values up to 3"):
        MaskToPictured("label")({"label": load(save(tmp_path / "a.png", CLASSES), num_classes=4)})
    with pytest.raises(ValueError, match=r"^label: expected a mask \(1, H, W\), but got the shape \(3, 4, 5\)"):
        MaskToPictured("label")({"label": torch.zeros(3, 4, 5)})
    with pytest.raises(ValueError, match="^keys: expected one key"):
        MaskToPictured(["label", "mask"])


def test_batches_and_workers(tmp_path):
    path = write(tmp_path / "a.nii", np.random.default_rng(0).integers(0, 3, (5, 6, 4)))
    data = [{"label": str(path), "slice": index, "class_id": index % 3} for index in range(4)]
    transform = pickle.loads(pickle.dumps(LoadMaskd("label", num_classes=3)))
    (batch,) = DataLoader(Dataset(data, transform), batch_size=4, num_workers=1)
    assert batch["label"].shape == (4, 1, 6, 5)
    assert torch.equal(batch["label"][2].as_tensor(), load(path, num_classes=3, slice=2, class_id=2).as_tensor())


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_real_pairs():
    for name in ("fuseg_0011", "fuseg_0191"):
        mask = pair(REAL / "images" / f"{name}.jpg", REAL / "masks" / f"{name}.png")
        assert 0.006 <= mask.mean() < 0.5
