# SPDX-License-Identifier: Apache-2.0
"""`tools.prepare` for segmentation: labelled volumes in the published layouts -> dataset folders of sdseg."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import torch

from shared.data_check import check_dataset
from shared.datalist import load_datalist, read_datalist
from shared.segmentation_items import training_items
from shared.transforms.in_plane import UprightVolumed
from shared.transforms.masks import LoadMaskd, classes_of_slices
from shared.transforms.segmentation_images import LoadPictured
from tools.prepare.btcv import EIGHT, ORGANS, TEST, VALIDATION, btcv, class_table
from tools.prepare.image_mask_folder import image_mask_folder
from tools.prepare.labelled_volumes import remove_small_parts
from tools.prepare.sts3d import sts3d

SHAPE = (16, 20, 6)
LPS = np.diag([-2.0, -3.0, 4.0, 1.0])
LPS[:3, 3] = 100, -50, 7
# slices along the first file axis, downwards; rows along the third
TURNED = np.array([[0, 2.0, 0, 5], [0, 0, 3.0, -8], [-4.0, 0, 0, 9], [0, 0, 0, 1]])


def hounsfield(seed, shape=SHAPE):
    values = np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)
    values[0, 0, 0], values[0, 0, 1] = -1000, 1500
    return values


def save(path, values, affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return path


def record(folder):
    return json.loads((folder / "preparation.json").read_text())


def numbers_of(folder):
    return {section: [item["group"] for item in part] for section, part in read_datalist(folder).items()}


def position_of(path, value):
    """World position of the only voxel with a value."""
    image = nibabel.load(path)
    (index,) = np.argwhere(np.asarray(image.dataobj) == value)
    return nibabel.affines.apply_affine(image.affine, index)


# BTCV


def btcv_tree(root, numbers, shape=SHAPE, affine=LPS):
    training = root / "Abdomen" / "RawData" / "Training"
    for number in numbers:
        values = hounsfield(number, shape)
        label = np.zeros(shape, np.uint8)
        label.ravel()[:14] = np.arange(14)
        save(training / "img" / f"img{number:04d}.nii.gz", values, affine)
        save(training / "label" / f"label{number:04d}.nii.gz", label, affine)
    return root


ALL = (*range(1, 11), *range(21, 41))


def test_btcv_has_the_published_test_volumes_and_a_validation_part(tmp_path):
    source = btcv_tree(tmp_path / "raw", ALL, (4, 5, 3))
    save(source / "Abdomen/RawData/Testing/img/img0061.nii.gz", hounsfield(61))
    btcv(str(source), str(tmp_path / "set"), workers=2)
    assert check_dataset(tmp_path / "set").problems == []
    numbers = numbers_of(tmp_path / "set")
    assert [len(numbers[section]) for section in ("training", "validation", "test")] == [15, 3, 12]
    assert numbers["test"] == [f"{n:04d}" for n in TEST]
    assert numbers["validation"] == [f"{n:04d}" for n in VALIDATION]
    assert record(tmp_path / "set")["dropped"] == {}
    windows = {tuple(item["window"]) for part in read_datalist(tmp_path / "set").values() for item in part}
    assert windows == {(-175.0, 250.0)}


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ("8", [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0]),
        (8, [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0]),
        ("13", list(range(14))),
        ("binary", [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]),
    ],
)
def test_btcv_classes(tmp_path, classes, expected):
    source = btcv_tree(tmp_path / "raw", [1, 5, 40])
    btcv(str(source), str(tmp_path / "set"), classes=classes)
    original = np.asarray(nibabel.load(source / "Abdomen/RawData/Training/label/label0005.nii.gz").dataobj)
    (item,) = load_datalist(tmp_path / "set")
    label = nibabel.load(item["label"])
    assert label.get_data_dtype() == np.uint8
    assert nibabel.aff2axcodes(label.affine) == ("P", "L", "S")
    back = nibabel.as_closest_canonical(label)  # both in RAS
    wanted = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(expected, np.uint8)[original], LPS))
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(wanted.dataobj))
    assert np.allclose(back.affine, wanted.affine)
    content = json.loads((tmp_path / "set" / "datalist.json").read_text())
    assert content["num_classes"] == (1 if classes == "binary" else max(expected) + 1)
    assert len(content["labels"]) == max(expected) + 1
    assert item["slice_classes"] == classes_of_slices(item["label"], num_classes=14)


def test_btcv_names_go_with_the_published_labels():
    table, names, num_classes = class_table("8")
    assert num_classes == 9
    assert [names[str(table[label])] for label in EIGHT] == [ORGANS[label - 1] for label in EIGHT]
    assert list(names.values()) == ["background", "spleen", "right kidney", "left kidney", "gallbladder", "liver",
                                    "stomach", "aorta", "pancreas"]  # fmt: skip
    with pytest.raises(ValueError, match="--classes: expected 8, 13 or binary, but got '9'"):
        class_table("9")


@pytest.mark.parametrize("affine", [LPS, TURNED], ids=["LPS", "slices first"])
def test_slices_are_read_upright_and_keep_their_place(tmp_path, affine):
    values = np.zeros(SHAPE, np.int16)
    values[3, 14, 1], values[0, 0, 0] = 1000, -1000
    label = (values == 1000).astype(np.uint8)
    training = tmp_path / "raw" / "Training"
    save(training / "img" / "img0005.nii.gz", values, affine)
    save(training / "label" / "label0005.nii.gz", label, affine)
    btcv(str(tmp_path / "raw"), str(tmp_path / "set"))
    (item,) = load_datalist(tmp_path / "set")
    for key, value in (("image", 1000), ("label", 1)):
        source = training / key.replace("image", "img") / f"{key.replace('image', 'img')}0005.nii.gz"
        assert np.allclose(position_of(item[key], value), position_of(source, value))
    image = nibabel.load(item["image"])
    assert image.get_data_dtype() == np.int16
    upright = UprightVolumed("image")(LoadPictured("image")({"image": item["image"], "window": item["window"]}))[
        "image"
    ]
    assert upright.shape[1:] == image.shape  # turned already
    assert item["num_slices"] == image.shape[2] == len(item["slice_classes"])
    for one in training_items([item], num_classes=9, flips="none"):
        loaded = LoadMaskd("label", num_classes=9, image_key="image")(LoadPictured("image")(one))
        assert torch.equal(loaded["image"].as_tensor(), upright[..., one["slice"]].as_tensor())
        present = item["slice_classes"][one["slice"]]
        assert loaded["label"].sum() == (1 if one["class_id"] in present or (one["class_id"] == 0 and present) else 0)


def test_volumes_that_cannot_be_used_are_named(tmp_path):
    source = btcv_tree(tmp_path / "raw", range(1, 11))
    training = source / "Abdomen/RawData/Training"

    def image(number):
        return training / "img" / f"img{number:04d}.nii.gz"

    def label(number):
        return training / "label" / f"label{number:04d}.nii.gz"

    holes = hounsfield(1).astype(np.float32)
    holes[2, 2, 2] = np.nan
    save(image(1), holes)
    moved = LPS.copy()
    moved[0, 3] += 5
    save(label(2), np.zeros(SHAPE, np.uint8), moved)
    save(label(3), np.zeros((16, 20, 7), np.uint8))
    save(label(4), np.full(SHAPE, 14, np.uint8))
    save(label(5), np.full(SHAPE, 0.5, np.float32))
    save(image(6), np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
    save(image(7), hounsfield(7, (*SHAPE, 2)))
    label(8).unlink()
    save(image(9).with_name("other.nii.gz"), hounsfield(9))
    save(label(9), np.zeros(SHAPE, np.uint8))
    btcv(str(source), str(tmp_path / "set"))
    report = record(tmp_path / "set")
    assert report["dropped"]["image without mask"] == [str(image(8)), str(image(9).with_name("other.nii.gz"))]
    unusable = report["dropped"]["unusable image or label"]
    expected = [
        (image(1), "expected finite voxels, but 1 are NaN"), (label(2), "expected the origin"),
        (label(3), "expected the grid of"), (label(4), "expected the labels 0..13 of BTCV, but got 14"),
        (label(5), "expected whole numbers as labels"), (image(6), "expected values that the window -175..250 shows"),
        (image(7), "expected"),
    ]  # fmt: skip
    assert len(unusable) == len(expected)
    for line, (path, words) in zip(unusable, expected, strict=True):
        assert line.startswith(f"{path}: {words}")
    assert report["warnings"]["empty label"] == [str(label(9))]
    assert numbers_of(tmp_path / "set") == {"training": ["0009", "0010"], "validation": [], "test": []}
    assert report["warnings"]["empty section"] == ["validation", "test"]
    with pytest.raises(FileNotFoundError, match="expected 'RawData/Training/img'"):
        btcv(str(tmp_path / "set" / "labels"), str(tmp_path / "other"))


def test_a_volume_given_twice_is_not_in_two_sections(tmp_path):
    source = btcv_tree(tmp_path / "raw", [1, 5, 6])
    training = source / "Abdomen/RawData/Training"
    for part in ("img", "label"):
        (training / part / f"{part}0006.nii.gz").write_bytes((training / part / f"{part}0001.nii.gz").read_bytes())
    btcv(str(source), str(tmp_path / "set"))
    assert numbers_of(tmp_path / "set") == {"training": ["0005"], "validation": [], "test": ["0001"]}
    assert record(tmp_path / "set")["dropped"] == {"same group as an item in test": ["images/img0006.nii"]}


# STS-3D


def sts_tree(root, names, ending="_0000"):
    for seed, name in enumerate(names):
        values = hounsfield(seed, (20, 24, 8))
        values[2:8] = 800
        label = np.zeros(values.shape, np.uint8)
        label[2:8, 3:9, 1:5] = 1
        label[12:14, 12:14, 2:6] = 1  # 16 voxels: too small
        label[2, 9, 5] = 1  # touches the large part at a corner only
        values[3, 4, 2] = -900  # black inside the large part
        save(root / "labelled" / "image" / f"{name}{ending}.nii.gz", values)
        save(root / "labelled" / "label" / f"{name}.nii.gz", label)
    return root


def test_sts_cleans_labels_for_training_only_and_validates_elsewhere_than_it_tests(tmp_path):
    source = sts_tree(tmp_path / "sts", [f"Teeth_{n:04d}" for n in range(1, 13)])
    sts3d(str(source), str(tmp_path / "set"))
    assert numbers_of(tmp_path / "set") == {
        "training": [f"Teeth_{n:04d}" for n in (1, 2, 3, 4, 5, 6, 9)],
        "validation": ["Teeth_0007", "Teeth_0008"],
        "test": ["Teeth_0010", "Teeth_0011", "Teeth_0012"],
    }
    sections = read_datalist(tmp_path / "set")
    assert {tuple(item["window"]) for part in sections.values() for item in part} == {(-100.0, 1100.0)}
    whole = 6 * 6 * 4 + 1 + 16
    for section, wanted in (("training", whole - 16 - 1), ("validation", whole), ("test", whole)):
        label = np.asarray(nibabel.load(tmp_path / "set" / sections[section][0]["label"]).dataobj)
        assert label.sum() == wanted
        assert set(np.unique(label)) == {0, 1}
    sts3d(str(source), str(tmp_path / "raw"), min_component=0)
    label = np.asarray(nibabel.load(tmp_path / "raw" / read_datalist(tmp_path / "raw")["training"][0]["label"]).dataobj)
    assert label.sum() == whole


def test_sts_with_other_names_draws_the_split(tmp_path):
    source = sts_tree(tmp_path / "sts", [f"patient{n}" for n in range(6)], ending="")
    sts3d(str(source), str(tmp_path / "set"))
    first = numbers_of(tmp_path / "set")
    assert sorted(len(part) for part in first.values()) == [1, 1, 4]
    assert "names are not Teeth_0001..0012: sections drawn" in record(tmp_path / "set")["warnings"]
    sts3d(str(source), str(tmp_path / "thirds"), fractions="1,1,1", seed=3)
    assert [len(part) for part in numbers_of(tmp_path / "thirds").values()] == [2, 2, 2]
    with pytest.raises(FileNotFoundError, match="expected 'labelled/image' and 'labelled/label'"):
        sts3d(str(source / "labelled" / "image"), str(tmp_path / "x"))
    with pytest.raises(ValueError, match="--min_component: expected a number of voxels"):
        sts3d(str(source), str(tmp_path / "x"), min_component=-1)


def test_small_parts_touch_at_corners_and_count_by_class():
    label = np.zeros((5, 6, 7), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = label[2, 2, 2] = 1  # one part of 3 by its corners
    label[3, 3, 3] = 2  # touches it, but is another class
    assert remove_small_parts(label, voxels=3).sum() == 3
    assert remove_small_parts(label, voxels=4).sum() == 0
    assert np.array_equal(remove_small_parts(label, voxels=1), label)


# anyone's volumes


def test_folder_of_volumes(tmp_path):
    for index in range(4):
        values = hounsfield(index).astype(np.float32) + 0.25
        save(tmp_path / "mine" / "images" / f"p{index}.nii.gz", values)
        label = np.zeros(SHAPE, np.uint8)
        label[2:5, 3:6, 2], label[6:8, 7:9, 4] = 1, 5
        save(tmp_path / "mine" / "masks" / f"p{index}_seg.nii", label)
    options = {"mask_suffix": "_seg", "fractions": (0.5, 0.25, 0.25)}
    image_mask_folder(
        str(tmp_path / "mine"), str(tmp_path / "set"), num_classes=3, foreground=(1, 5), window="-100,300", **options
    )
    assert check_dataset(tmp_path / "set").problems == []
    item = load_datalist(tmp_path / "set")[0]
    assert item["slice_classes"] == [[], [], [1], [], [2], []]
    assert item["window"] == [-100.0, 300.0]
    assert nibabel.load(item["image"]).get_data_dtype() == np.float32
    image_mask_folder(str(tmp_path / "mine"), str(tmp_path / "binary"), **options)
    item = load_datalist(tmp_path / "binary")[0]
    assert item["slice_classes"] == [[], [], [1], [], [1], []]
    assert "window" not in item
    assert "several labels joined to one foreground" in record(tmp_path / "binary")["warnings"]


def test_a_flat_nifti_is_a_picture_and_two_slices_are_a_volume(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("flat", (10, 12)), ("two", (10, 12, 2))):
        save(tmp_path / "mine" / "images" / f"{name}.nii.gz", rng.normal(size=shape).astype(np.float32))
        save(tmp_path / "mine" / "masks" / f"{name}.nii.gz", np.ones(shape, np.uint8))
    save(tmp_path / "mine" / "masks" / "kind.nii.gz", np.ones((10, 12, 2), np.uint8))
    (tmp_path / "mine" / "images" / "kind.png").write_bytes(b"")
    image_mask_folder(str(tmp_path / "mine"), str(tmp_path / "set"), fractions=(1, 0, 0))
    items = {item["group"]: item for item in load_datalist(tmp_path / "set")}
    assert "num_slices" not in items["flat"]
    assert items["two"]["num_slices"] == 2
    shapes = {name: LoadPictured("image")({"image": item["image"]})["image"].shape for name, item in items.items()}
    assert shapes == {"flat": (3, 12, 10), "two": (1, 12, 10, 2)}
    assert list(record(tmp_path / "set")["dropped"]) == ["picture with volume"]
