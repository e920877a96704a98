# SPDX-License-Identifier: Apache-2.0
"""`shared.mask_check` and what `shared.data_check` makes of it: masks of a dataset folder are read and counted."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from shared.data_check import check_dataset
from shared.datalist import read_description
from shared.mask_check import stated_classes
from tests.test_images import write_dicom

SIZE = (12, 16)


def make(folder, masks, **description):
    """One pair per mask; sections in turn."""
    sections = {"training": [], "validation": [], "test": []}
    folder.mkdir(exist_ok=True)
    for index, mask in enumerate(masks):
        pixels = np.random.default_rng(index).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        Image.fromarray(mask).save(folder / f"m{index}.png")
        item = {"image": f"{index}.png", "label": f"m{index}.png", "subject": str(index)}
        sections[list(sections)[index % 3]].append(item)
    (folder / "datalist.json").write_text(json.dumps({**description, **sections}))
    return folder


def mask(*values):
    result = np.zeros(SIZE, dtype=np.uint8)
    for index, value in enumerate(values):
        result[2 * index, 3:9] = value
    return result


def test_binary_masks_are_counted(tmp_path):
    result = check_dataset(make(tmp_path, [mask(255), mask(), mask(1)] * 2, num_classes=1))
    assert result.problems == []
    assert result.summary().endswith(
        "12 files; training 2 masks, 0 empty; validation 2 masks, 2 empty; test 2 masks, 0 empty"
    )


def test_classes_are_counted_and_missing_ones_named(tmp_path):
    labels = {"0": "background", "1": "aorta", "2": "liver", "3": "spleen"}
    result = check_dataset(make(tmp_path, [mask(1, 3), mask(2), mask(1), mask(1)], labels=labels))
    assert result.problems == [
        f"{tmp_path}/datalist.json: expected every class in the masks of 'training', but none shows 2; split the data "
        "again or correct num_classes"
    ]
    assert "training 2 masks, 0 empty, with class 1: 2, 2: 0, 3: 1; validation 1 masks" in result.summary()


def test_bad_masks_are_named(tmp_path):
    grey = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint8)
    folder = make(tmp_path, [mask(255), grey, mask(255), np.zeros((16, 12), np.uint8) + 255], num_classes=1)
    first, second = sorted(check_dataset(folder).problems)
    assert first.startswith(f"{tmp_path}/m1.png: expected a binary mask of 0 and one other level, but got 192 levels")
    assert second.startswith(f"{tmp_path}/m3.png: expected the grid of 'image' (12, 16, 1), but got (16, 12, 1)")
    assert check_dataset(folder, images=False).problems == []


def test_masks_without_stated_classes_are_not_judged(tmp_path):
    result = check_dataset(make(tmp_path, [mask(3, 7), mask(1), mask(255)]))
    assert result.problems == []
    assert result.masks is None
    assert "masks" not in result.summary()


def test_volumes_and_photographs_in_dicom(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (*SIZE, 3))
    write_dicom(tmp_path / "a.dcm", rgb, bits=8, kind="RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    Image.fromarray(mask(255)).save(tmp_path / "a.png")
    item = {"image": "a.dcm", "label": "a.png", "subject": "a"}
    (tmp_path / "datalist.json").write_text(json.dumps({"num_classes": 1, "training": [item]}))
    assert check_dataset(tmp_path).problems == []
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [item]}))
    assert "but got 'RGB'" in check_dataset(tmp_path).problems[0]
    values = np.random.default_rng(0).integers(0, 3, (6, 5, 4)).astype(np.int16)
    for name in ("v", "l"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii")
    item = {"image": "v.nii", "label": "l.nii", "subject": "a"}
    (tmp_path / "datalist.json").write_text(json.dumps({"num_classes": 3, "training": [item]}))
    result = check_dataset(tmp_path)
    assert result.problems == []
    assert result.summary().endswith("training 1 masks, 0 empty, with class 1: 1, 2: 1")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"num_classes": 1, "labels": {"0": "background", "1": "polyp"}}, 1),
        ({"num_classes": 9}, 9),
        ({"labels": {"0": "background", "1": "polyp"}}, 1),
        ({"labels": ["background", "a", "b"]}, 3),
        ({"name": "x"}, None),
        ({"num_classes": "9"}, None),
        ({"num_classes": True}, None),
    ],
)
def test_stated_classes(tmp_path, description, expected):
    (tmp_path / "datalist.json").write_text(json.dumps({**description, "training": []}))
    assert read_description(tmp_path) == description
    assert stated_classes(read_description(tmp_path)) == expected


def test_grey_pictures_may_stand_beside_colour_ones(tmp_path):
    folder = make(tmp_path, [mask(255)] * 3, num_classes=1)
    with Image.open(folder / "0.png") as picture:
        picture.convert("L").save(folder / "0.png")
    assert check_dataset(folder).problems == []
