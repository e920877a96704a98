# SPDX-License-Identifier: Apache-2.0
"""`shared.segmentation_items`: slices, classes and flips to train on, pictures to code, images to segment."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL
from monai.transforms import Compose
from PIL import Image

from shared.datalist import load_datalist, write_datalist
from shared.files import save_json
from shared.latent_cache import LatentDataset
from shared.segmentation_items import autoencoder_items, class_names, inference_items, training_items
from shared.transforms.in_plane import FlipByItemd, ResizeInPlaned
from shared.transforms.masks import LoadMaskd, MaskToPictured
from shared.transforms.segmentation_images import LoadPictured
from tests.test_in_plane import affine_of

# axes of the file: rows down, inferior to superior, columns left; 3 slices along its second axis
LABELS = np.zeros((8, 3, 6), dtype=np.uint8)
LABELS[1:4, 1, 1:3], LABELS[5:7, 1, 3:5], LABELS[2:4, 2, 2:4] = 1, 3, 2


def write(path, values, codes="PSL"):
    nibabel.save(nibabel.Nifti1Image(values, affine_of(codes)), path)
    return str(path)


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return str(path)


@pytest.fixture
def volume(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, LABELS.shape).astype(np.int16)
    return {"image": write(tmp_path / "ct.nii", values), "label": write(tmp_path / "seg.nii", LABELS), "group": "p1"}


def of(items, *keys):
    return [tuple(item[key] for key in keys) for item in items]


UNREAD = {"image": "a.png", "label": "m.png", "group": "g", "classes": [2]}


@pytest.mark.parametrize(("flips", "expected"), [("both", [0, 1, 2, 3]), ("horizontal", [0, 1]), ("none", [0])])
def test_pictures_times_flips_without_a_look_at_the_files(flips, expected):
    items = training_items([UNREAD, {**UNREAD, "image": "b.jpg"}], flips=flips)
    assert of(items, "image", "flip") == [(name, flip) for name in ("a.png", "b.jpg") for flip in expected]
    assert all(set(item) == {"image", "label", "group", "flip"} for item in items)


def test_binary_volumes_times_slices(volume):
    items = training_items([volume], flips="none")
    assert items == [{**volume, "slice": index, "flip": 0} for index in range(3)]  # along the upright axis
    known = {
        "image": "gone.nii.gz",
        "label": "gone.nii",
        "num_slices": 2,
        "window": [-175, 250],
        "slice_classes": [[], [1]],
    }
    items = training_items([known], flips="horizontal")
    assert of(items, "slice", "flip") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert items[0] == {"image": "gone.nii.gz", "label": "gone.nii", "window": [-175, 250], "slice": 0, "flip": 0}


def test_classes_of_a_volume_are_those_of_each_slice(volume):
    expected = [(0, 0), (1, 0), (1, 1), (1, 3), (2, 0), (2, 2)]
    items = training_items([volume], num_classes=4, flips="none")
    assert of(items, "slice", "class_id") == expected
    known = {**volume, "label": "unread.nii", "num_slices": 3, "slice_classes": [[], [3, 1], [2]]}
    assert of(training_items([known], num_classes=4, flips="none"), "slice", "class_id") == expected
    load = LoadMaskd("label", num_classes=4)
    assert [load(item)["label"].sum().item() for item in items] == [0, 10, 6, 4, 4, 4]


def test_classes_of_a_picture(tmp_path):
    label = png(tmp_path / "m.png", LABELS[:, 1])
    items = training_items([{"image": "a.png", "label": label}], num_classes=4, flips="horizontal")
    assert of(items, "class_id", "flip") == [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1)]
    assert of(training_items([UNREAD], num_classes=4, flips="none"), "class_id") == [(0,), (2,)]
    assert "classes" not in training_items([UNREAD], num_classes=4)[0]


def test_a_nifti_of_two_axes_is_a_picture(tmp_path):
    image = write(tmp_path / "a.nii", LABELS[:, 1].astype(np.int16), "RAS")
    (item,) = training_items([{"image": image, "label": image}], flips="none")
    assert item == {"image": image, "label": image, "flip": 0}


def test_training_items_load(volume):
    steps = Compose([LoadPictured("image"), LoadMaskd("label", image_key="image"), FlipByItemd(["image", "label"])])
    for item in training_items([volume], flips="both"):
        loaded = steps(item)
        assert loaded["image"].shape == loaded["label"].shape == (1, 8, 6)
        expected = LABELS[:, item["slice"]] > 0
        expected = expected[::-1] if item["flip"] & 2 else expected
        expected = expected[:, ::-1] if item["flip"] & 1 else expected
        np.testing.assert_array_equal(loaded["label"][0].numpy(), expected)


def test_latents_of_masks_are_kept_per_slice_flip_and_class(volume, tmp_path):
    size = (16, 32)
    steps = [
        LoadMaskd("label", num_classes=4), ResizeInPlaned("label", size, "nearest"), FlipByItemd("label"),
        MaskToPictured("label", name="image"),
    ]  # fmt: skip
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        spatial_dims=2, in_channels=3, out_channels=3, num_res_blocks=(1, 1), channels=(4, 4), latent_channels=2,
        attention_levels=(False, False), norm_num_groups=2, with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()  # fmt: skip

    def dataset(items):
        return LatentDataset(
            items, Compose([LoadPictured("image"), ResizeInPlaned("image", size)]), image_transform=Compose(steps),
            autoencoder=autoencoder, cache_dir=tmp_path / "cache", image_keys=["label", "slice", "flip", "class_id"],
        )  # fmt: skip

    items = training_items([volume], num_classes=4, flips="horizontal")
    first = dataset(items)
    for index in (2, 7, 11):
        target = Compose(steps)(items[index])["image"][None]
        mean = autoencoder.encode(torch.as_tensor(target).as_subclass(torch.Tensor))[0][0]
        assert torch.allclose(first.posterior(index)[0], mean, atol=1e-5)
    assert dataset(items).cache_path == first.cache_path  # nothing of an item depends on the run
    assert dataset(items[:-1]).cache_path != first.cache_path
    assert first[3]["image"].shape == (1, *size)


def test_images_and_masks_to_reconstruct(volume, tmp_path):
    items = autoencoder_items([UNREAD, {"image": "b.png"}])
    assert items == [
        {"image": "a.png", "kind": "image", "flip": 0},
        {"image": "m.png", "kind": "mask", "flip": 0},
        {"image": "b.png", "kind": "image", "flip": 0},
    ]
    items = autoencoder_items([{**volume, "window": [-175, 250]}], flips="horizontal")
    assert len(items) == 3 * 2 * 2
    assert items[5] == {"image": volume["image"], "kind": "image", "slice": 1, "window": [-175, 250], "flip": 1}
    assert items[7] == {"image": volume["label"], "kind": "mask", "slice": 1, "flip": 1}
    masks = [item for item in autoencoder_items([volume], num_classes=4) if item["kind"] == "mask"]
    assert of(masks, "slice", "class_id") == [(0, 0), (1, 0), (1, 1), (1, 3), (2, 0), (2, 2)]


@pytest.mark.parametrize(
    ("item", "kwargs", "message"),
    [
        ({"image": "a.png"}, {}, r"^label: expected a file in every item, but item 0 has the keys \['image'\]"),
        ({"label": "a.png"}, {}, "^image: expected a file in every item"),
        ({"image": ["a.png"], "label": "m.png"}, {}, r"^image: expected the path of one file, but got \['a\.png'\]"),
        (UNREAD, {"flips": "vertical"}, "^flips: expected one of none, horizontal, both, but got 'vertical'"),
        ({**UNREAD, "classes": [4]}, {"num_classes": 4}, r"^m\.png: expected class ids 1\.\.3 .* but .* has \[4\]"),
        ({**UNREAD, "classes": [0]}, {"num_classes": 4}, r"^m\.png: expected class ids 1\.\.3"),
        ({**UNREAD, "image": "a.nii", "num_slices": 0}, {}, r"^a\.nii: expected `num_slices` to be an integer above 0"),
        (
            {**UNREAD, "image": "a.nii", "num_slices": 2, "slice_classes": [[1]]}, {"num_classes": 4},
            r"^m\.png: expected the classes of 2 slices, but got those of 1",
        ),
    ],
)  # fmt: skip
def test_faults_of_training_items_are_named(item, kwargs, message):
    with pytest.raises(ValueError, match=message):
        training_items([item], **kwargs)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_section_of_a_dataset_folder(tmp_path):
    touch(tmp_path, "images/1.png", "labels/1.png", "images/ct.nii.gz", "labels/ct.nii.gz")
    first = {"image": "images/1.png", "label": "labels/1.png", "group": "g1", "subject": "s1", "text": "unused"}
    second = {"image": "images/ct.nii.gz", "label": "labels/ct.nii.gz", "window": [-175, 250], "num_slices": 3}
    write_datalist(tmp_path, {"training": [first], "test": [{**second, "subject": "s2"}]})
    (item,) = inference_items(tmp_path, section="training")
    assert item == {
        "image": str(tmp_path / "images/1.png"), "label": str(tmp_path / "labels/1.png"), "group": "g1",
        "subject": "s1", "name": "1",
    }  # fmt: skip
    (item,) = inference_items(tmp_path)
    assert (item["name"], item["group"], item["window"]) == ("ct", "ct", [-175, 250])
    assert "num_slices" not in item
    assert training_items(load_datalist(tmp_path, "test"), flips="none")[2]["slice"] == 2
    with pytest.raises(ValueError, match=r"^\S*datalist\.json: expected a section 'validation'"):
        inference_items(tmp_path, section="validation")


def test_every_format_at_any_depth(tmp_path):
    names = ["a.png", "b.JPG", "c/d.jpeg", "e.tif", "f.tiff", "g.bmp", "h.dcm", "i.dicom", "j.nii", "k/l.nii.gz"]
    touch(tmp_path, *names, "notes.txt", "m.npy", ".hidden.png", "._a.png")
    items = inference_items(tmp_path)
    assert [item["image"] for item in items] == [str(tmp_path / name) for name in names]
    assert [item["name"] for item in items] == ["a", "b", "d", "e", "f", "g", "h", "i", "j", "l"]
    assert all(item["group"] == item["name"] for item in items)


def test_names_are_unique(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "b/1.jpg", "2.nii.gz")
    assert [item["name"] for item in inference_items(tmp_path)] == ["2", "a_1", "b_1_jpg", "b_1_png"]
    touch(tmp_path / "x", "a/b.png", "a_b.png", "c/b.png")
    assert len({item["name"] for item in inference_items(tmp_path / "x")}) == 3
    write_datalist(tmp_path, {"test": [{"image": "2.nii.gz"}] * 2})
    with pytest.raises(ValueError, match=f"^{tmp_path}/datalist.json: expected each image once, but '2_nii_gz'"):
        inference_items(tmp_path)


def test_what_an_earlier_run_made_is_not_taken_for_an_input(tmp_path):
    touch(tmp_path, "a.png", "out/a_mask.png", "out/a_mask_overlay.png")
    files = {"mask": "a_mask.png", "overlay": "a_mask_overlay.png"}
    save_json({"synthetic": True, "files": files}, tmp_path / "out" / "a_mask.json")
    assert [item["name"] for item in inference_items(tmp_path)] == ["a"]
    with pytest.raises(FileNotFoundError, match=r"^\S*out: expected .* but there are none but synthetic ones"):
        inference_items(tmp_path / "out")


def test_one_file_and_relative_paths(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii.gz", "b.txt")
    monkeypatch.chdir(tmp_path)
    assert inference_items("a.nii.gz") == [{"image": str(tmp_path / "a.nii.gz"), "name": "a", "group": "a"}]
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    assert inference_items("IM0001") == [{"image": str(tmp_path / "IM0001"), "name": "IM0001", "group": "IM0001"}]
    with pytest.raises(ValueError, match=r"^b\.txt: expected a file \.nii, \.nii\.gz, \.png"):
        inference_items("b.txt")
    with pytest.raises(FileNotFoundError, match="^gone: expected a dataset folder, a folder of images or a file"):
        inference_items("gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^empty: expected datalist\.json, or files \.nii"):
        inference_items("empty")


def test_items_are_plain(volume):
    json.dumps(training_items([volume], num_classes=4))
    json.dumps(autoencoder_items([volume], num_classes=4))


def test_class_names_come_from_the_data_list(tmp_path):
    names = {"0": "background", "1": "spleen", "2": "liver"}
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": names, "test": []}))
    assert class_names(tmp_path, 3) == names
    assert class_names(tmp_path) is None  # a binary model on a set of several classes
    assert class_names(tmp_path / "datalist.json", 3) is None  # one file, as inference takes it
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": {"0": "background", "1": "polyp"}, "test": []}))
    assert class_names(tmp_path) == {"0": "background", "1": "polyp"}
    (tmp_path / "datalist.json").write_text(json.dumps({"test": []}))
    assert class_names(tmp_path, 3) is None
