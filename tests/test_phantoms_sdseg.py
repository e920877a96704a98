# SPDX-License-Identifier: Apache-2.0
"""Tests of the sample data of `sdseg`: polyps, fundi and their dataset folder; abdomens in BTCV's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, label
from skimage.filters import threshold_otsu

from shared.datalist import SECTIONS, find_leaks, load_datalist, read_datalist
from tests.conftest import digest
from tools.phantoms import fundus, polyps, sdseg, sdseg_abdomen
from tools.phantoms.__main__ import main
from tools.phantoms.abdomen import AIR, FAT, LABELLED_Z, ORGAN_HU, ORGANS
from tools.phantoms.picture_scenes import Camera, Outline, draw_outline, draw_ripples, pixels
from tools.prepare.btcv import ORGANS as BTCV_ORGANS
from tools.prepare.btcv import TEST, VALIDATION

SIZE = (80, 64)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1))


# scenes


def test_pixels_and_camera() -> None:
    x, y = pixels((6, 4))
    assert x.ravel() == pytest.approx([-0.75, -0.25, 0.25, 0.75]), "the shorter side runs from -1 to 1"
    assert y.ravel() == pytest.approx([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])
    camera = Camera(centre=(0.25, -0.75), zoom=2.0, turn=0.7)
    scene_x, scene_y = camera.see((6, 4))
    assert (scene_x[1, 2], scene_y[1, 2]) == pytest.approx((0, 0)), "the origin falls on `centre`"
    assert np.hypot(scene_x[1, 3], scene_y[1, 3]) == pytest.approx(0.25), "zoom 2 halves distances"


def test_ripples_have_unit_variance() -> None:
    field = draw_ripples(np.random.default_rng(0), 60, (0.2, 0.4)).at(*pixels((120, 90)))
    assert field.shape == (120, 90)
    assert field.std() == pytest.approx(1, abs=0.15)


def test_outline_of_a_circle_and_of_an_ellipse() -> None:
    circle = Outline((0.5, 0.0), 0.5, aspect=1.0, turn=0.3, weights=(0.0,), phases=(0.0,))
    points = [np.array([value], np.float32) for value in (1.0, 0.0)]
    assert circle.level(*points) == pytest.approx(1)
    ellipse = replace(circle, centre=(0.0, 0.0), aspect=1.25, turn=0.0)
    mask = ellipse.level(*pixels((400, 400))) < 1
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert len(columns) / len(rows) == pytest.approx(1.25**2, rel=0.03)
    assert draw_outline(np.random.default_rng(3), (0.0, 0.0), 0.4).radius == 0.4


# pictures


@pytest.fixture(scope="module")
def polyp_pairs() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    return [sdseg.make_group(number, size=SIZE) for number in range(1, 61)]


@pytest.mark.parametrize("kind", ["polyp", "fundus"])
def test_masks_are_visible_or_empty(kind: str, polyp_pairs: list) -> None:
    groups = polyp_pairs if kind == "polyp" else [sdseg.make_group(n, size=SIZE, kind=kind) for n in range(1, 41)]
    shares = []
    for picture, mask in (pair for group in groups for pair in group):
        assert (picture.shape, picture.dtype) == ((*SIZE, 3), np.uint8)
        assert (mask.shape, mask.dtype) == (SIZE, np.uint8)
        assert set(np.unique(mask)) <= {0, 255}
        shares.append((mask > 0).mean())
    shown = np.array([share for share in shares if share > 0])
    assert 0.02 < shown.min() < 0.09
    assert 0.18 < shown.max() < 0.30
    assert 0.0 < 1 - len(shown) / len(shares) < 0.10, "a few per cent are empty"
    assert {len(group) for group in groups} == set(range(2, sdseg.MAX_PICTURES + 1))


def test_no_threshold_finds_the_polyp(polyp_pairs: list) -> None:
    """Control: Otsu's threshold per picture, and the best of all thresholds for the whole set chosen with the masks."""
    pairs = [(p.astype(float), m > 0) for group in polyp_pairs for p, m in group if m.any()]
    features: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "grey": lambda p: p @ [0.299, 0.587, 0.114],
        "red": lambda p: p[..., 0],
        "green": lambda p: p[..., 1],
        "blue": lambda p: p[..., 2],
        "hue": lambda p: p[..., 0] / (p[..., 1] + 8),
        "saturation": lambda p: 1 - p.min(-1) / (p.max(-1) + 1),
    }
    found = {}
    for name, feature in features.items():
        values = np.stack([feature(picture) for picture, _ in pairs])
        for sign in (1, -1):
            signed = sign * values
            otsu = np.mean([dice(v > threshold_otsu(v), m) for v, (_, m) in zip(signed, pairs, strict=True)])
            fixed = [
                np.mean([dice(v > limit, m) for v, (_, m) in zip(signed, pairs, strict=True)])
                for limit in np.percentile(signed, np.arange(2, 100, 8))
            ]
            found[name, sign] = max(otsu, *fixed)
    assert max(found.values()) < 0.55, found
    assert max(found["grey", 1], found["grey", -1]) < 0.35, found


def test_mask_is_the_painted_polyp_to_the_pixel() -> None:
    """A polyp without relief that is 1.6 times as bright as the wall: the mask is where the ratio is above 1.3."""
    size, looks = (160, 128), set()
    for seed in range(24):
        drawn = polyps.draw_sequence(np.random.default_rng(seed))
        looks.add(drawn.look)
        plain = replace(drawn, corners=None, elevation=0.0, pattern=0.0, vessel_contrast=0.0, tint=np.full(3, 1.6))
        camera, mask = polyps._find_view(plain, size, np.random.default_rng(seed))
        shown, bare = (polyps._shade(plain, camera, size, on, np.random.default_rng(1)) for on in (True, False))
        painted = (shown / bare)[..., 0] > 1.3
        # reflexes are white and add the same light to both; the wall is red
        wall = (bare[..., 0] > 1.7 * bare[..., 2]) & (bare[..., 2] > 0.01)
        assert wall.mean() > 0.6
        assert ((painted != mask) & wall).sum() < 0.02 * mask.sum(), (seed, drawn.look)
    assert looks == set(polyps.LOOKS)


def test_polyp_is_seen_and_changes_nothing_far_away() -> None:
    size = (160, 128)
    for seed in range(16):
        sequence = replace(polyps.draw_sequence(np.random.default_rng(seed)), corners=None)
        camera, mask = polyps._find_view(sequence, size, np.random.default_rng(seed))
        shown, bare = (polyps._shade(sequence, camera, size, on, np.random.default_rng(1)) for on in (True, False))
        change = np.abs(shown - bare).max(axis=-1)
        x, y = camera.see(size)
        # the shadow of the base lies around the polyp, and a lip's edge is blended over some pixels
        hidden = np.any([lip.beyond(x, y) > 0.08 for lip in sequence.lips] or [np.zeros(size, bool)], axis=0)
        far = (sequence.outline.level(x, y) > 1.25) | hidden
        assert far.mean() > 0.3
        assert (change[far] > 0.02).mean() < 0.002, (seed, sequence.look)
        assert (change > 0.02)[binary_erosion(mask)].mean() > 0.8, (seed, sequence.look)


def test_a_fold_hides_a_part_of_the_polyp() -> None:
    hidden = [s for s in map(polyps.draw_sequence, map(np.random.default_rng, range(60))) if s.look == "hidden"]
    x, y = Camera().see((200, 160))
    shares = [polyps._visible(s, x, y).sum() / (s.outline.level(x, y) < 1).sum() for s in hidden]
    assert len(shares) >= 4
    assert min(shares) > 0.35
    assert max(shares) < 0.99


def test_fundus_mask_is_the_cup_inside_the_disc() -> None:
    for seed in range(20):
        eye = fundus.draw_sequence(np.random.default_rng(seed))
        place = Camera().see((160, 128))
        cup, disc = eye.cup.level(*place) < 1, eye.disc.level(*place) < 1
        assert (cup & ~disc).sum() < 0.02 * cup.sum()
        assert 0.1 < cup.sum() / disc.sum() < 0.75
        picture, mask = fundus.render(eye, (160, 128), np.random.default_rng(seed))
        if mask.any():
            ring = binary_dilation(mask, iterations=6) & ~binary_dilation(mask, iterations=2)
            assert picture[mask].mean() > picture[ring].mean(), "the cup is paler than the rim"


def test_pictures_of_a_group_share_their_look(polyp_pairs: list) -> None:
    colours = [np.array([picture.mean((0, 1)) for picture, _ in group]) for group in polyp_pairs]
    ratios = [colour / colour.sum(axis=1, keepdims=True) for colour in colours]
    within = np.mean([ratio.std(axis=0).mean() for ratio in ratios])
    between = np.std([ratio.mean(axis=0) for ratio in ratios], axis=0).mean()
    assert within < 0.6 * between
    first, second = polyp_pairs[0][0][1], polyp_pairs[0][1][1]
    assert dice(first > 0, second > 0) < 0.9, "but the camera has moved"


def test_larger_picture_shows_the_same_scene() -> None:
    small, large = (sdseg.make_group(3, size=size)[0] for size in (SIZE, (160, 128)))
    halved = np.asarray(Image.fromarray(large[1]).resize(SIZE[::-1], Image.Resampling.BOX))
    assert dice(small[1] > 0, halved > 127) > 0.93


# dataset folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "polyps"
    assert sdseg.make_dataset(str(folder), num_images=60, size=SIZE) == str(folder / "datalist.json")
    return folder


def test_dataset_folder(dataset: Path) -> None:
    content = json.loads((dataset / "datalist.json").read_text())
    assert content["labels"] == {"0": "background", "1": "polyp"}
    assert content["num_classes"] == 1
    assert "num_images=60, size=[80, 64], seed=0, kind=polyp" in content["description"]
    assert sum(len(content[section]) for section in SECTIONS) == 60
    for section in SECTIONS:
        for item in load_datalist(dataset, section, required=("image", "label", "group")):
            assert set(item) == {"image", "label", "subject", "group", "kind"}
            assert Path(item["image"]).name == Path(item["label"]).name
            assert Path(item["image"]).name.startswith(f"{item['group']}_")
            with Image.open(item["image"]) as picture, Image.open(item["label"]) as mask:
                assert (picture.mode, mask.mode) == ("RGB", "L")
                assert picture.size == mask.size == SIZE[::-1]
    assert len(list(dataset.rglob("*.png"))) == 120


def test_groups_are_not_split(dataset: Path) -> None:
    sections = read_datalist(dataset)
    assert all(sections[section] for section in SECTIONS)
    assert find_leaks(sections, key="group") == {}
    assert max(len(list(dataset.glob(f"images/{g}_*"))) for g in ("g0001", "g0002", "g0003")) > 1


def test_dataset_is_deterministic(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("few", 0), ("seed", 1)):
        sdseg.make_dataset(str(tmp_path / name), num_images=20, size=SIZE, seed=seed)
    every, few, other = digest(dataset), digest(tmp_path / "few"), digest(tmp_path / "seed")
    names = [name for name in few if name.endswith(".png")]
    assert len(names) == 40
    assert [few[name] for name in names] == [every[name] for name in names], "their number does not matter"
    pictures = {few[name] for name in names if name.startswith("images")}
    assert not pictures & set(other.values())


def test_both_kinds(tmp_path: Path) -> None:
    sdseg.make_dataset(str(tmp_path / "x"), num_images=18, size=(40, 32), kind="both", split="0.4,0.3,0.3")
    items = [item for part in read_datalist(tmp_path / "x").values() for item in part]
    kinds = {item["group"]: item["kind"] for item in items}
    assert set(kinds.values()) == {"polyp", "fundus"}
    for item in items:
        number, position = int(item["group"][1:]), int(item["image"][-5])
        expected = sdseg.make_group(number, size=(40, 32), kind=item["kind"])[position - 1][0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x" / item["image"])), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 17}, "num_images: expected at least 18, 6 for each section with a share, got 17"),
        ({"size": 128}, "size: expected 2 numbers such as 1,2,3, got 128"),
        ({"size": (160, 20)}, "size: expected height and width as whole numbers of at least 32"),
        ({"size": (160.5, 128)}, "size: expected height and width as whole numbers"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"kind": "skin"}, "kind: expected one of polyp, fundus, both, got 'skin'"),
        ({"split": (0.5, 0.2, 0.2)}, "split: expected shares >= 0 that sum to 1"),
        ({"split": "0.5,0.5"}, "split: expected 3 numbers, got '0.5,0.5'"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sdseg.make_dataset(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    sdseg.make_dataset(str(folder), num_images=24, size=(40, 32))
    (folder / "images" / "mine.png").write_text("mine")
    before = digest(folder)
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(folder))}: expected an empty or absent folder"):
        sdseg.make_dataset(str(folder), num_images=18, size=(40, 32))
    assert digest(folder) == before
    sdseg.make_dataset(str(folder), num_images=18, size=(40, 32), overwrite=True)
    assert len(list(folder.glob("*/g*.png"))) == 36
    assert (folder / "images" / "mine.png").read_text() == "mine"


def test_command_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    main(["sdseg", "--out", str(folder), "--num_images", "20", "--size", "[80,64]", "--split", "0.6,0.2,0.2"])
    assert capsys.readouterr().out.strip() == str(folder / "datalist.json")
    assert (folder / "images/g0002_1.png").read_bytes() == (dataset / "images/g0002_1.png").read_bytes()
    main(["sdseg_abdomen", "--out", str(tmp_path / "y"), "--num_volumes", "1", "--size", "24,26,8"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "y" / "RawData")


# abdomen


def canonical(number: int, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, labels and affine in RAS order."""
    image, labels = map(nib.as_closest_canonical, sdseg_abdomen.make_patient(number, **options))
    return np.asarray(image.dataobj), np.asarray(labels.dataobj), image.affine


@pytest.fixture(scope="module")
def fine() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return canonical(5, size=(120, 104, 60))


def middle(labels: np.ndarray, affine: np.ndarray, name: str) -> np.ndarray:
    """World coordinates in mm (right, front, up) of an organ's centre of mass, relative to the aorta's."""
    centres = [np.argwhere(labels == ORGANS.index(n) + 1).mean(0) @ affine[:3, :3].T for n in (name, "aorta")]
    return centres[0] - centres[1]


def test_labels_are_those_of_btcv() -> None:
    assert ORGANS == BTCV_ORGANS
    assert tuple(ORGAN_HU) == ORGANS
    assert sorted(sdseg_abdomen.NUMBERS) == [*range(1, 11), *range(21, 41)]
    sections = ["test" if n in TEST else "validation" if n in VALIDATION else "training" for n in sdseg_abdomen.NUMBERS]
    assert set(sections[:3]) == {"training", "validation", "test"}, "three volumes already fill all sections"


def test_organs_are_in_their_places(fine: tuple) -> None:
    _, labels, affine = fine
    place = {name: middle(labels, affine, name) for name in ORGANS}
    for name in ("right kidney", "right adrenal gland", "liver", "gallbladder", "inferior vena cava"):
        assert place[name][0] > 12, f"{name} is on the right"
    for name in ("left kidney", "left adrenal gland", "spleen", "stomach"):
        assert place[name][0] < -12, f"{name} is on the left"
    assert place["stomach"][1] > place["spleen"][1] + 30, "the stomach is in front of the spleen"
    assert place["gallbladder"][1] > place["right kidney"][1] + 60
    for side in ("right", "left"):
        assert place[f"{side} adrenal gland"][2] > place[f"{side} kidney"][2] + 30
    assert place["oesophagus"][2] > place["pancreas"][2] + 60
    assert place["liver"][2] > place["right kidney"][2] + 40


def test_organs_are_smooth_bodies_of_plausible_size(fine: tuple) -> None:
    _, labels, affine = fine
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000  # ml
    volume = {name: (labels == number).sum() * voxel for number, name in enumerate(ORGANS, start=1)}
    assert 900 < volume["liver"] < 2600
    assert 60 < volume["spleen"] < 450
    assert 80 < volume["right kidney"] < 300
    assert 80 < volume["left kidney"] < 300
    assert 1 < volume["left adrenal gland"] < 15
    for number, name in enumerate(ORGANS, start=1):
        parts, _ = label(labels == number, structure=np.ones((3, 3, 3)))
        assert np.bincount(parts.ravel())[1:].max() > 0.9 * (labels == number).sum(), f"{name} is one body"


def test_hounsfield_units(fine: tuple) -> None:
    values, labels, _ = fine
    assert values.dtype == np.int16
    assert values.min() >= -1024
    assert values[:3, :3].mean() == pytest.approx(AIR, abs=20)
    for number, name in enumerate(ORGANS, start=1):
        inside = values[labels == number]
        assert inside.mean() == pytest.approx(ORGAN_HU[name], abs=25)
        assert 5 < inside.std() < 30, "noise and texture"
    fat = values[(labels == 0) & (np.abs(values - FAT) < 45)]
    assert len(fat) > 0.15 * values.size
    assert (values > 300).mean() > 0.003, "bones"
    assert (values < -700).mean() > 0.2, "air and lungs"


@pytest.mark.parametrize("size", [(64, 56, 20), (24, 26, 8), (40, 32, 12)])
def test_all_organs_whatever_the_grid(size: tuple[int, int, int]) -> None:
    for number in (1, 2, 37):
        values, labels, affine = canonical(number, size=size)
        assert values.shape == labels.shape == size
        assert set(np.unique(labels)) == set(range(14))
        filled = labels.any(axis=(0, 1))
        assert not filled[0]
        assert not filled[-1]
        assert filled[1:-1].sum() >= 0.6 * size[2]
        assert affine[2, 2] * filled.sum() < np.ptp(LABELLED_Z) + 2 * affine[2, 2]


def test_geometry_of_the_files() -> None:
    size = (48, 40, 12)
    for number, order in ((1, "LPS"), (2, "LAS"), (37, "LPS")):
        image, labels = sdseg_abdomen.make_patient(number, size=size)
        assert (image.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)
        assert image.shape == labels.shape == size
        assert np.array_equal(image.affine, labels.affine)
        assert "".join(nib.aff2axcodes(image.affine)) == order
        assert image.get_qform() == pytest.approx(image.affine, abs=1e-3)
        assert image.header.get_zooms() == pytest.approx(np.abs(np.diag(image.affine)[:3]), rel=1e-4)
        assert np.asarray(image.header.get_zooms()) * size == pytest.approx((358, 313, 300), rel=0.06)
        # the spine, whose bone is dense, lies at the patient's back and in the middle
        bone = np.argwhere(np.asarray(image.dataobj)[:, :, 0] > 300).mean(0)
        assert abs(bone[0] / size[0] - 0.5) < 0.1
        assert (bone[1] / size[1] > 0.6) == (order == "LPS")


def test_abdomen_folder(tmp_path: Path) -> None:
    options = {"size": "24,26,8"}
    for name, count, seed in (("few", 3, 0), ("more", 4, 0), ("seed", 3, 1)):
        sdseg_abdomen.make_dataset(str(tmp_path / name), num_volumes=count, seed=seed, **options)
    few, more, other = (digest(tmp_path / name) for name in ("few", "more", "seed"))
    numbers = ("0001", "0005", "0037")
    training = "RawData/Training"
    assert sorted(few) == [f"{training}/{n}/{n}{k}.nii.gz" for n in ("img", "label") for k in numbers]
    assert all(more[name] == value for name, value in few.items())
    assert not set(few.values()) & set(other.values())
    with pytest.raises(FileExistsError, match="few: expected an empty or absent folder"):
        sdseg_abdomen.make_dataset(str(tmp_path / "few"), num_volumes=1, **options)
    sdseg_abdomen.make_dataset(str(tmp_path / "few"), num_volumes=1, overwrite=True, **options)
    assert len(digest(tmp_path / "few")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_volumes": 31}, "num_volumes: expected 1 to 30, the cases of BTCV, got 31"),
        ({"num_volumes": 0}, "num_volumes: expected 1 to 30"),
        ({"size": (64, 56)}, r"size: expected 3 numbers, got \(64, 56\)"),
        ({"size": (64, 56, 4)}, r"size: expected three whole numbers of at least \(24, 24, 8\)"),
        ({"seed": -2}, "seed: expected an integer >= 0, got -2"),
    ],
)
def test_bad_arguments_of_the_abdomen(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sdseg_abdomen.make_dataset(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()
