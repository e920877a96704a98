# SPDX-License-Identifier: Apache-2.0
"""`tools.prepare` for segmentation: pictures in the published layouts -> dataset folders of sdseg."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data_check import check_dataset
from shared.datalist import SECTIONS, find_leaks, load_datalist, read_datalist
from shared.segmentation_items import inference_items, training_items
from shared.transforms.masks import LoadMaskd
from shared.transforms.segmentation_images import LoadPictured
from tests.test_images import ramp, write_dicom
from tools.command_line import run
from tools.prepare.__main__ import COMMANDS
from tools.prepare.cvc_clinicdb import FIRST_FRAMES, cvc_clinicdb, sequence_of
from tools.prepare.image_mask_folder import image_mask_folder
from tools.prepare.kvasir_seg import kvasir_seg
from tools.prepare.mask_coding import MaskCoding
from tools.prepare.mask_pairs import Pair, convert_pairs, convert_picture, list_files, stem_of
from tools.prepare.preparation import Preparation
from tools.prepare.refuge2 import cup_and_disc, disc_box, refuge2
from tools.prepare.stored_split import Entry, join_groups, write_sections

REAL = Path("/work/shared/data/sdseg")
HEIGHT, WIDTH = 24, 32


def picture(seed, shape=(HEIGHT, WIDTH, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def blob(value=255, shape=(HEIGHT, WIDTH), dtype=np.uint8):
    mask = np.zeros(shape, dtype)
    mask[4:12, 6:20] = value
    return mask


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def record(folder):
    return json.loads((folder / "preparation.json").read_text())


def sections_of(folder):
    return {Path(item["image"]).name: section for section, part in read_datalist(folder).items() for item in part}


def pixels(path):
    return np.asarray(Image.open(path))


# CVC-ClinicDB


def cvc_tree(root, frames, suffix=".png", parts=("PNG",)):
    for frame in frames:
        save(root.joinpath(*parts, "Original", f"{frame}{suffix}"), picture(frame))
        save(root.joinpath(*parts, "Ground Truth", f"{frame}{suffix}"), blob())
    return root


def test_cvc_sequences_are_those_of_the_stored_table():
    frames = [sequence_of(frame) for frame in range(1, 613)]
    assert frames == sorted(frames)
    assert set(frames) == set(range(1, 30))
    assert [frames.index(sequence) + 1 for sequence in range(1, 30)] == list(FIRST_FRAMES)
    with pytest.raises(ValueError, match=r"frame: expected 1\.\.612, but got 613"):
        sequence_of(613)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_cvc_sequences_agree_with_the_split_file():
    with open(REAL / "cvc_clinicdb_split_no_images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 612
    for row in rows:
        sequence = sequence_of(int(Path(row["image_path_in_repo"]).stem))
        assert sequence == int(row["sequence"])
        assert (row["part"] == "held") == (sequence >= 23)


@pytest.mark.parametrize(("suffix", "parts"), [(".png", ("PNG",)), (".tif", ("CVC-ClinicDB",))])
def test_cvc_has_a_fixed_split_by_sequence(tmp_path, suffix, parts):
    source = cvc_tree(tmp_path / "cvc", [1, 25, 26, 408, 409, 466, 467, 612], suffix, parts)
    cvc_clinicdb(str(source), str(tmp_path / "set"), workers=2)
    assert check_dataset(tmp_path / "set", images=False).problems == []
    assert sections_of(tmp_path / "set") == {
        f"{frame:03d}{suffix}": section
        for frame, section in {1: "training", 25: "training", 26: "training", 408: "training", 409: "validation",
                               466: "validation", 467: "test", 612: "test"}.items()
    }  # fmt: skip
    item = load_datalist(tmp_path / "set", "test", required=["image", "label", "group"])[0]
    assert item["group"] == item["subject"] == "sequence-23"
    assert Path(item["image"]).read_bytes() == source.joinpath(*parts, "Original", f"467{suffix}").read_bytes()
    assert np.array_equal(pixels(item["label"]), blob())


def test_cvc_with_both_formats_takes_one(tmp_path):
    source = cvc_tree(tmp_path, [1, 450, 500])
    cvc_tree(tmp_path, [1, 450, 500], ".tif", ("TIF",))
    cvc_clinicdb(str(source), str(tmp_path / "set"))
    assert set(sections_of(tmp_path / "set")) == {"001.png", "450.png", "500.png"}
    assert record(tmp_path / "set")["dropped"] == {}


def test_cvc_sequences_of_a_mirrors_table_are_kept_together_too(tmp_path):
    """Frame 466 would be validation; the table says that it belongs to the sequence of the test frame 467."""
    source = cvc_tree(tmp_path / "cvc", [1, 430, 466, 467])
    rows = "frame_id,sequence_id\n1,1\n430,20\n466,22\n467,22\n"
    (source / "metadata.csv").write_text(rows)
    cvc_clinicdb(str(source), str(tmp_path / "set"))
    assert sections_of(tmp_path / "set") == {"001.png": "training", "430.png": "validation", "467.png": "test"}
    assert record(tmp_path / "set")["dropped"] == {"same group as an item in test": ["images/466.png"]}


def test_cvc_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folders 'Original' and 'Ground Truth'"):
        cvc_clinicdb(str(save(tmp_path / "cvc" / "x.png", blob()).parent), str(tmp_path / "set"))
    source = cvc_tree(tmp_path / "half", [500])
    with pytest.raises(ValueError, match=r"preparation\.json: expected pictures for training, but none is left"):
        cvc_clinicdb(str(source), str(tmp_path / "set"))


# Kvasir-SEG


def kvasir_tree(root, count=20):
    for index in range(count):
        save(root / "Kvasir-SEG" / "images" / f"c{index:02d}.jpg", picture(index), quality=90)
        grey = np.repeat(blob()[..., None], 3, axis=2)
        save(root / "Kvasir-SEG" / "masks" / f"c{index:02d}.jpg", grey, quality=75)
    (root / "Kvasir-SEG" / "kavsir_bboxes.json").write_text("{}")
    return root


def test_kvasir_masks_lose_their_artefacts_and_pictures_nothing(tmp_path):
    source = kvasir_tree(tmp_path / "kvasir")
    stored = pixels(source / "Kvasir-SEG" / "masks" / "c00.jpg")
    assert len(np.unique(stored)) > 2  # otherwise this shows nothing
    kvasir_seg(str(source), str(tmp_path / "set"))
    sections = read_datalist(tmp_path / "set")
    assert [len(sections[name]) for name in SECTIONS] == [16, 2, 2]
    assert find_leaks(sections) == {}
    for part in sections.values():
        for item in part:
            label = Image.open(tmp_path / "set" / item["label"])
            assert label.mode == "L"
            assert np.array_equal(np.asarray(label), blob())
            original = source / "Kvasir-SEG" / "images" / Path(item["image"]).name
            assert (tmp_path / "set" / item["image"]).read_bytes() == original.read_bytes()
    assert record(tmp_path / "set")["counts"]["warning: grey levels in the mask, cut at half"] == 20


def test_split_depends_on_names_and_not_on_the_order_or_place_of_files(tmp_path, monkeypatch):
    source = kvasir_tree(tmp_path / "kvasir")
    kvasir_seg(str(source), str(tmp_path / "first"))
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(found(self, pattern), reverse=True))
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    kvasir_seg(str(moved), str(tmp_path / "second"))
    first, second = ((tmp_path / name / "datalist.json").read_bytes() for name in ("first", "second"))
    assert first == second
    kvasir_seg(str(moved), str(tmp_path / "third"), seed=1)
    assert (tmp_path / "third" / "datalist.json").read_bytes() != first


def test_equal_pictures_under_two_names_stay_in_one_section(tmp_path):
    source = kvasir_tree(tmp_path / "kvasir")
    images = source / "Kvasir-SEG" / "images"
    for name in ("c03", "c07", "c11"):
        Image.open(images / "c00.jpg").save(images / f"{name}.png")  # another file, the same pixels
        (images / f"{name}.jpg").unlink()
    kvasir_seg(str(source), str(tmp_path / "set"), fractions=(0.4, 0.3, 0.3))
    sections = sections_of(tmp_path / "set")
    assert len({sections[name] for name in ("c00.jpg", "c03.png", "c07.png", "c11.png")}) == 1
    groups = {i["group"] for part in read_datalist(tmp_path / "set").values() for i in part}
    assert len(groups) == 17
    warned = record(tmp_path / "set")["warnings"]["joined with another group (same content or sequence)"]
    assert len(warned) == 3


# REFUGE2


def refuge_mask(shape=(40, 60), centre=(18, 33)):
    """The challenge's coding: cup of radius 4 inside a disc of radius 9."""
    rows, columns = np.indices(shape)
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return np.where(distance <= 4, 0, np.where(distance <= 9, 128, 255)).astype(np.uint8)


def refuge_tree(root):
    places = {
        "g0001": ("Training400/Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Glaucoma"),
        "n0001": ("Training400/Non-Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma"),
        "V0001": ("REFUGE-Validation400", "REFUGE-Validation400-GT/Disc_Cup_Masks"),
        "T0001": ("REFUGE-Test400", "REFUGE-Test-GT/Disc_Cup_Masks"),
    }
    for seed, (name, (images, masks)) in enumerate(places.items()):
        save(root / images / f"{name}.jpg", picture(seed, (40, 60, 3)))
        save(root / masks / f"{name}.bmp", refuge_mask())
    return root


ROLES = {"g0001": "training", "n0001": "training", "V0001": "validation", "T0001": "test"}


@pytest.mark.parametrize(("target", "top"), [("cup", 100), ("disc", 200)])
def test_refuge_original_layout(tmp_path, target, top):
    source = refuge_tree(tmp_path / "refuge")
    refuge2(str(source), str(tmp_path / "set"), target=target)
    assert check_dataset(tmp_path / "set", images=False).problems == []
    assert {stem_of(name): section for name, section in sections_of(tmp_path / "set").items()} == ROLES
    item = load_datalist(tmp_path / "set", "test")[0]
    assert np.array_equal(pixels(item["label"]), np.where(refuge_mask() < top, 255, 0))
    content = json.loads((tmp_path / "set" / "datalist.json").read_text())
    assert content["labels"] == {"0": "background", "1": f"optic {target}"}


def test_refuge_cropped_layout_has_each_picture_in_one_role(tmp_path):
    folder = tmp_path / "refuge2" / "Train_crop"
    grey = refuge_mask()
    coloured = np.stack([np.where(grey < 200, 255, 0), np.where(grey < 100, 255, 0), 0 * grey], -1).astype(np.uint8)
    for seed, name in enumerate(ROLES):
        save(folder / "images" / f"{name}.png", picture(seed, (40, 60, 3)))
        save(folder / "masks" / f"{name}.png", coloured)
    refuge2(str(tmp_path / "refuge2"), str(tmp_path / "set"))
    assert {stem_of(name): section for name, section in sections_of(tmp_path / "set").items()} == ROLES
    assert np.array_equal(pixels(tmp_path / "set" / "labels" / "V0001.png"), np.where(grey < 100, 255, 0))


def test_refuge_crop_follows_the_disc(tmp_path):
    source = refuge_tree(tmp_path / "refuge")
    path = source / "REFUGE-Test-GT" / "Disc_Cup_Masks" / "T0001.bmp"
    assert disc_box(path, margin=0) == (slice(9, 28), slice(24, 43))
    assert disc_box(path, margin=0.25) == (slice(4, 32), slice(20, 48))
    assert disc_box(path, margin=9) == (slice(0, 40), slice(0, 60))  # never beyond the picture
    refuge2(str(source), str(tmp_path / "set"), crop_disc=True, margin=0.25)
    item = load_datalist(tmp_path / "set", "test")[0]
    whole = pixels(source / "REFUGE-Test400" / "T0001.jpg")
    assert np.array_equal(pixels(item["image"]), whole[4:32, 20:48])
    assert np.array_equal(pixels(item["label"]), np.where(refuge_mask() < 100, 255, 0)[4:32, 20:48])
    text = json.loads((tmp_path / "set" / "datalist.json").read_text())["description"]
    assert "at test time another program must find the disc" in text


def test_refuge_masks_that_mean_something_else_are_named(tmp_path):
    inverted = save(tmp_path / "a.bmp", 255 - refuge_mask())
    with pytest.raises(ValueError, match=r"a\.bmp: expected 0 for the cup.* with 0% background at the edge"):
        cup_and_disc(inverted)
    other = save(tmp_path / "b.bmp", np.where(refuge_mask() == 128, 60, refuge_mask()).astype(np.uint8))
    with pytest.raises(ValueError, match=r"b\.bmp: expected 0 for the cup, 128 for the disc"):
        cup_and_disc(other)
    outside = np.zeros((8, 10, 3), np.uint8)
    outside[2:4, 2:4, 1] = 255
    with pytest.raises(ValueError, match=r"c\.png: expected red 255 .* a cup outside of the disc"):
        cup_and_disc(save(tmp_path / "c.png", outside))
    with pytest.raises(ValueError, match="--target: expected cup or disc, but got 'rim'"):
        refuge2(str(tmp_path), str(tmp_path / "set"), target="rim")


# anyone's folders


def folder_tree(root, count=12, mask=None, suffix=".png", ending=""):
    for index in range(count):
        save(root / "images" / f"p{index // 2}_{index % 2}.jpg", picture(index))
        save(root / "masks" / f"p{index // 2}_{index % 2}{ending}{suffix}", blob() if mask is None else mask)
    return root


def test_groups_by_pattern(tmp_path):
    source = folder_tree(tmp_path / "mine", ending="_mask")
    image_mask_folder(str(source), str(tmp_path / "set"), mask_suffix="_mask", group_pattern=r"^(p\d+)_")
    assert check_dataset(tmp_path / "set", images=False).problems == []
    sections = read_datalist(tmp_path / "set")
    groups = {name: {item["group"] for item in part} for name, part in sections.items()}
    assert sorted(len(part) for part in sections.values()) == [2, 2, 8]
    assert len(set.union(*groups.values())) == sum(len(g) for g in groups.values()) == 6
    loaded = inference_items(tmp_path / "set")
    assert {item["group"] for item in loaded} == groups["test"]
    items = training_items(load_datalist(tmp_path / "set"), flips="none")
    pair = LoadMaskd("label", image_key="image")(LoadPictured("image")(items[0]))
    assert pair["image"].shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(pair["label"][0], blob(1))


def test_groups_by_table(tmp_path):
    source = folder_tree(tmp_path / "mine", 8)
    table = tmp_path / "groups.csv"
    rows = ["image,group", *(f"p{i // 2}_{i % 2}{'.jpg' if i % 3 else ''},{'AB'[i > 3]}" for i in range(7))]
    table.write_text("\n".join(rows))
    image_mask_folder(str(source), str(tmp_path / "set"), groups=str(table), fractions="0.5,0,0.5")
    parts = read_datalist(tmp_path / "set")
    assert {frozenset(item["group"] for item in part) for part in parts.values() if part} == {
        frozenset("A"),
        frozenset("B"),
    }
    dropped = record(tmp_path / "set")["dropped"]
    assert dropped == {"no group in --group_pattern or --groups": [str(source / "images" / "p3_1.jpg")]}
    with pytest.raises(ValueError, match="--groups: expected either --groups or --group_pattern"):
        image_mask_folder(str(source), str(tmp_path / "set"), groups=str(table), group_pattern="(x)")


def test_everything_that_does_not_fit_is_named(tmp_path):
    source = folder_tree(tmp_path / "mine", 8)
    images, masks = source / "images", source / "masks"
    save(images / "alone.png", picture(100))
    save(masks / "orphan.png", blob())
    save(masks / "p0_0.png", blob(shape=(HEIGHT, WIDTH + 1)))
    save(masks / "p0_1.png", np.tile(np.arange(WIDTH, dtype=np.uint8) * 8, (HEIGHT, 1)))
    save(masks / "p1_0.png", blob(0))
    save(images / "p1_1.jpg", np.full((HEIGHT, WIDTH, 3), 7, np.uint8))
    (masks / "p2_0.png").write_bytes(b"no picture")
    save(images / "p2_1.png", picture(200))
    image_mask_folder(str(source), str(tmp_path / "set"), fractions=(1, 0, 0))
    report = record(tmp_path / "set")
    assert report["dropped"]["image without mask"] == [str(images / "alone.png")]
    assert report["dropped"]["mask without image"] == [str(masks / "orphan.png")]
    assert report["dropped"]["second image of the same name"] == [
        f"{images / 'p2_1.png'}: {images / 'p2_1.jpg'} is kept"
    ]
    (line,) = report["dropped"]["image and mask of different size"]
    assert line.startswith(
        f"{masks / 'p0_0.png'}: expected the size of p0_0.jpg, 24 x 32 (rows x columns), but got 24 x 33"
    )
    unusable = report["dropped"]["unusable image or mask"]
    assert [line.split(": ")[0] for line in unusable] == [
        str(masks / "p0_1.png"), str(images / "p1_1.jpg"), str(masks / "p2_0.png")
    ]  # fmt: skip
    assert "--foreground" in unusable[0]
    assert report["warnings"]["empty mask"] == [str(masks / "p1_0.png")]
    assert "no groups given: each image is a group of its own" in report["warnings"]
    assert sorted(sections_of(tmp_path / "set")) == ["p1_0.jpg", "p2_1.jpg", "p3_0.jpg", "p3_1.jpg"]


def test_odd_masks_with_a_word_about_them(tmp_path):
    levels = blob(3)
    levels[0, :5] = 9
    one = {"fractions": (1, 0, 0)}
    source = folder_tree(tmp_path / "levels", 2, levels)
    image_mask_folder(str(source), str(tmp_path / "a"), foreground="9", **one)
    assert np.array_equal(pixels(tmp_path / "a" / "labels" / "p0_0.png"), np.where(levels == 9, 255, 0))
    image_mask_folder(str(source), str(tmp_path / "b"), foreground=(9, 3), num_classes=3, labels="rim,core", **one)
    assert np.array_equal(
        pixels(tmp_path / "b" / "labels" / "p0_0.png"), np.where(levels == 9, 1, np.where(levels == 3, 2, 0))
    )
    assert read_datalist(tmp_path / "b")["training"][0]["classes"] == [1, 2]
    content = json.loads((tmp_path / "b" / "datalist.json").read_text())
    assert (content["labels"], content["num_classes"]) == ({"0": "background", "1": "rim", "2": "core"}, 3)
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[blob() > 0] = (255, 0, 0)
    red[20:, :4] = (0, 0, 255)
    for name, suffix in (("c", ".png"), ("d", ".jpg")):
        source = folder_tree(tmp_path / f"colour{name}", 2, red, suffix)
        image_mask_folder(str(source), str(tmp_path / name), mask_colour="#FF0000", **one)
        agreement = (pixels(tmp_path / name / "labels" / "p0_0.png") == blob()).mean()
        assert agreement == 1 if suffix == ".png" else agreement > 0.9
    with pytest.raises(ValueError, match=r"none is left"):
        image_mask_folder(str(tmp_path / "colourc"), str(tmp_path / "e"))
    assert "--mask_colour" in record(tmp_path / "e")["dropped"]["unusable image or mask"][0]


def test_palette_classes_are_indices(tmp_path):
    source = folder_tree(tmp_path / "mine", 1)
    indices = blob(2)
    mask = Image.fromarray(indices)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(source / "masks" / "p0_0.png")
    assert mask.mode == "P"
    image_mask_folder(str(source), str(tmp_path / "set"), num_classes=3, fractions=(1, 0, 0))
    assert np.array_equal(pixels(tmp_path / "set" / "labels" / "p0_0.png"), indices)


@pytest.mark.reliability(12)
def test_dicom_pictures_lose_their_header(tmp_path):
    source = tmp_path / "mine"
    (source / "images").mkdir(parents=True)
    write_dicom(
        source / "images" / "a.dcm",
        ramp(HEIGHT, WIDTH, 4000).astype(np.uint16),
    )
    save(source / "masks" / "a.png", blob())
    image_mask_folder(str(source), str(tmp_path / "set"), fractions=(1, 0, 0))
    (item,) = load_datalist(tmp_path / "set")
    assert item["image"].endswith("a.png")
    assert b"Planted" not in Path(item["image"]).read_bytes()
    first, second = (
        LoadPictured("image")({"image": path})["image"] for path in (item["image"], source / "images" / "a.dcm")
    )
    assert first.shape == second.shape == (3, HEIGHT, WIDTH)
    assert float((first - second).abs().max()) < 1e-4


def test_one_folder_for_both(tmp_path):
    for index in range(3):
        save(tmp_path / "mine" / f"{index}.png", picture(index))
        save(tmp_path / "mine" / f"{index}_seg.png", blob())
    options = {"images": ".", "masks": ".", "fractions": (1, 1, 1)}
    image_mask_folder(str(tmp_path / "mine"), str(tmp_path / "set"), mask_suffix="_seg", **options)
    assert sorted(sections_of(tmp_path / "set")) == ["0.png", "1.png", "2.png"]
    assert record(tmp_path / "set")["dropped"] == {}
    with pytest.raises(ValueError, match="expected --mask_suffix, as images and masks lie in one folder"):
        image_mask_folder(str(tmp_path / "mine"), str(tmp_path / "set"), **options)


def test_the_source_is_never_overwritten(tmp_path):
    source = folder_tree(tmp_path / "mine", 4)
    before = {file: file.read_bytes() for file in source.rglob("*.*")}
    for out in (source, source / "images"):
        with pytest.raises(ValueError, match="expected --out elsewhere"):
            image_mask_folder(str(source), str(out))
    inside = source / "images" / "set"
    for _ in range(2):  # what the first run wrote is not read by the second
        image_mask_folder(str(source), str(inside), fractions=(1, 0, 0))
        assert len(sections_of(inside)) == 4
        assert record(inside)["dropped"] == {}
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "--num_classes: expected 1"),
        ({"num_classes": 3, "foreground": (1,)}, "--foreground: expected 2 levels for --num_classes 3"),
        ({"foreground": "a"}, "--foreground: expected levels such as 255"),
        ({"foreground": (1, 1)}, "--foreground: expected different levels"),
        ({"mask_colour": "red"}, "--mask_colour: expected a colour like '#FF0000'"),
        ({"mask_colour": "#FF0000", "foreground": 1}, "--mask_colour: expected binary masks and no --foreground"),
        ({"group_pattern": "p"}, "--group_pattern: expected a group in parentheses"),
        ({"group_pattern": "("}, "--group_pattern: expected a regular expression"),
        ({"labels": "a,b"}, "--labels: expected 1 names"),
        ({"window": (1, 0)}, "--window: expected LOW,HIGH with LOW < HIGH"),
        ({"mask_suffix": "_none"}, "none match; name the masks' ending"),
        ({"masks": "no"}, r"no: expected a folder \(--masks\)"),
        ({"fractions": (1, 1)}, "fractions: expected 3 numbers"),
        ({"workers": -1}, "--workers: expected 0 or a number"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    source = folder_tree(tmp_path / "mine", 4)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        image_mask_folder(str(source), str(tmp_path / "set"), **options)


def test_an_empty_set_says_why(tmp_path):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "masks").mkdir()
    with pytest.raises(ValueError, match=r"of 0 images \(none\) and 0 masks \(none\) none match"):
        image_mask_folder(str(tmp_path / "mine"), str(tmp_path / "set"))
    with pytest.raises(FileNotFoundError, match=r"expected the folders 'images' and 'masks'"):
        kvasir_seg(str(tmp_path / "mine"), str(tmp_path / "set"))


def test_groups_join_through_chains_whatever_the_order():
    entries = [
        Entry({"subject": "d"}, links=("2",)), Entry({"subject": "b"}, links=("1", "2")), Entry({"subject": "c"}),
        Entry({"subject": "a"}, links=("1",)), Entry({"subject": "c"}, links=("3",)), Entry({"subject": "1"}),
    ]  # fmt: skip
    assert join_groups(entries) == ["a", "a", "c", "a", "c", "1"]
    assert join_groups(entries[::-1]) == ["1", "c", "a", "c", "a", "a"]


def test_a_published_test_set_stays_and_its_doubles_leave(tmp_path):
    entries = [Entry({"image": name, "subject": name}, section, links)
               for name, section, links in (("a", "training", ("x",)), ("b", "test", ("x",)), ("c", "training", ()),
                                            ("d", "validation", ("y",)), ("e", "training", ("y",)))]  # fmt: skip
    preparation = Preparation("x", {})
    write_sections(entries, tmp_path, preparation, what="pictures", seed=0, fractions=())
    assert {name: [item["image"] for item in part] for name, part in read_datalist(tmp_path).items()} == {
        "training": ["c"], "validation": ["d"], "test": ["b"]
    }  # fmt: skip
    assert preparation.dropped == {"same group as an item in test": ["a"], "same group as an item in validation": ["e"]}


def test_command_line(tmp_path, monkeypatch, capsys):
    source = folder_tree(tmp_path / "mine")
    words = [
        "--source",
        str(source),
        "--out",
        str(tmp_path / "set"),
        "--group_pattern",
        r"^(p\d+)_",
        "--fractions",
        "0.6,0.2,0.2",
    ]
    monkeypatch.setattr(sys, "argv", ["tools.prepare", "image_mask_folder", *words])
    run(COMMANDS, name="tools.prepare")
    assert "12 items, 6 subjects" in capsys.readouterr().out
    assert set(COMMANDS) >= {"cvc_clinicdb", "kvasir_seg", "refuge2", "sts3d", "btcv", "image_mask_folder"}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_pairs(tmp_path):
    """Every 12th real pair: none is dropped, masks keep their area, groups stay whole."""
    rows = json.loads((REAL / "datalist.json").read_text())[::12]
    pairs = [Pair(REAL / row["image"], REAL / row["mask"], stem_of(row["image"]), row["group"]) for row in rows]
    preparation, coding = Preparation("real", {}), MaskCoding()
    entries = convert_pairs(
        pairs, lambda pair: convert_picture(pair, tmp_path, coding.read_picture), preparation, workers=2
    )
    write_sections(entries, tmp_path, preparation, what="pictures", seed=42, fractions=(0.7, 0.1, 0.2))
    assert preparation.dropped == {}
    assert preparation.counts["pictures"] == len(rows)
    assert len(list_files(tmp_path / "labels", (".png",))) == len(rows)
    for row in rows:
        label = pixels(tmp_path / "labels" / f"{stem_of(row['image'])}.png")
        assert label.shape == (row["height"], row["width"])
        assert abs((label == 255).mean() - row["fg_fraction"]) < 1e-4
        assert set(np.unique(label)) <= {0, 255}
