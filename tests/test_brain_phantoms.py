# SPDX-License-Identifier: Apache-2.0
"""Tests of the head phantom: anatomy, lesions, scans and the dataset folder of `tools.phantoms.brain_controlnet`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion

from shared.datalist import SECTIONS, find_leaks, load_datalist, read_datalist
from tests.conftest import digest
from tools.phantoms.__main__ import main
from tools.phantoms.brain_anatomy import Head, coordinates, draw_head, draw_waves
from tools.phantoms.brain_controlnet import _store, make_dataset, make_subject
from tools.phantoms.brain_lesions import add_lesions
from tools.phantoms.brain_signal import TISSUES
from tools.phantoms.brain_tissues import Maps, tissue_maps

NAMES = list(TISSUES)
AXES = [(np.arange(n) - (n - 1) / 2) * 2.0 + middle for n, middle in ((80, 0.0), (112, 0.0), (24, 3.0))]
SMALL = {"size": (40, 56, 6), "spacing": (4.0, 4.0, 6.0)}


@pytest.fixture(scope="module")
def head() -> Head:
    return draw_head(np.random.default_rng(1))


@pytest.fixture(scope="module")
def maps(head: Head) -> Maps:
    return tissue_maps(head, AXES)


def fraction(maps: Maps, name: str) -> np.ndarray:
    return maps.fractions[NAMES.index(name)]


def canonical(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(image).dataobj)


# anatomy


def test_waves_are_smooth_noise_of_unit_variance() -> None:
    waves = draw_waves(np.random.default_rng(0), 200, (20, 40))
    axes = [np.arange(n) * 3.0 for n in (40, 50, 30)]
    field = waves.on(axes)
    assert (field.shape, field.dtype) == ((40, 50, 30), np.float32)
    assert field.std() == pytest.approx(1, abs=0.1)
    point = np.array([axes[0][7], axes[1][11], axes[2][5]])
    direct = np.sqrt(2 / 200) * np.cos(waves.vectors @ point + waves.phases).sum()
    assert field[7, 11, 5] == pytest.approx(direct, abs=1e-4)
    length = 2 * np.pi / np.linalg.norm(waves.vectors, axis=1)
    assert 20 <= length.min() <= length.max() <= 40


def test_fractions_are_shares(maps: Maps) -> None:
    assert maps.fractions.shape == (len(TISSUES), 80, 112, 24)
    assert maps.fractions.min() >= 0
    assert np.allclose(maps.fractions.sum(axis=0), 1, atol=1e-5)
    assert fraction(maps, "lesion").max() == 0
    volume = {name: fraction(maps, name).sum() for name in NAMES}
    brain = volume["grey"] + volume["white"] + volume["deep"]
    # a 48 mm slab through the ventricles: more white than grey matter, a few per cent nuclei
    assert 0.25 < volume["grey"] / brain < 0.6
    assert 0.02 < volume["deep"] / brain < 0.1
    assert 0.03 < volume["csf"] / brain < 0.35
    partial = (maps.fractions > 0.05).sum(axis=0) > 1
    assert partial[maps.brain].mean() > 0.2, "borders are mixed voxels"


def test_layers_from_the_outside_to_the_brain(maps: Maps) -> None:
    """Along a line from the right ear to the middle come air, fat, bone, CSF and grey matter, in this order."""
    line = maps.fractions[::-1, ::-1, 50, 14][::-1]
    first = {name: int(np.argmax(line[NAMES.index(name)] > 0.25)) for name in ("fat", "bone", "csf", "grey", "white")}
    assert line[NAMES.index("air"), 0] == pytest.approx(1, abs=0.6)
    assert first["fat"] < first["bone"] < first["csf"] <= first["grey"] < first["white"], first


def test_brain_mask_lies_inside_the_skull(maps: Maps) -> None:
    inside = maps.brain
    assert 0.25 < inside.mean() < 0.6
    assert not inside[[0, -1]].any()
    assert not inside[:, [0, -1]].any()
    outside = fraction(maps, "air") + fraction(maps, "fat") + fraction(maps, "bone") + fraction(maps, "muscle")
    assert outside[inside].mean() < 0.01
    tissue = fraction(maps, "grey") + fraction(maps, "white") + fraction(maps, "deep")
    assert tissue[inside].sum() > 0.99 * tissue.sum()
    assert not (binary_dilation(inside) & (fraction(maps, "air") > 0.5)).any(), "bone and scalp lie between"


def test_ventricles_are_dark_holes_near_the_middle(head: Head) -> None:
    def ventricles(right: float, left: float) -> tuple[float, float]:
        maps = tissue_maps(dataclasses.replace(head, ventricles=(right, left)), AXES)
        csf = fraction(maps, "csf") * (maps.ventricle_distance < 2)
        return float(csf[40:].sum()), float(csf[:40].sum())

    small, large, one_sided = ventricles(0.8, 0.8), ventricles(1.4, 1.4), ventricles(0.8, 1.4)
    assert min(large) > 1.8 * max(small) * 0.8
    assert sum(large) > 1.8 * sum(small)
    # x grows towards the right: only the left one grew
    assert one_sided[0] == pytest.approx(small[0], rel=0.1)
    assert one_sided[1] == pytest.approx(large[1], rel=0.1)


def test_halves_are_alike_but_not_equal(maps: Maps) -> None:
    white = fraction(maps, "white")
    alike = np.corrcoef(white.ravel(), white[::-1].ravel())[0, 1]
    assert 0.4 < alike < 0.97
    other = fraction(tissue_maps(draw_head(np.random.default_rng(2)), AXES), "white")
    assert np.corrcoef(white.ravel(), other.ravel())[0, 1] < alike, "a person is more like themselves"


def test_left_ventricle_is_larger_on_average() -> None:
    pairs = np.array([draw_head(np.random.default_rng(seed)).ventricles for seed in range(200)])
    assert 1.04 < (pairs[:, 1] / pairs[:, 0]).mean() < 1.12


def test_cortex_is_a_folded_ribbon(maps: Maps) -> None:
    grey, white = fraction(maps, "grey") > 0.5, fraction(maps, "white") > 0.5
    # a smooth shell of this size would have a white matter surface of about a fifth of that
    edge = white & ~binary_erosion(white)
    assert edge.sum() > 0.25 * white.sum()
    core = binary_erosion(maps.brain, iterations=6, border_value=1)
    assert (grey & core).sum() > 0.05 * core.sum(), "sulci reach deep"


def test_midline_bends_as_in_most_people() -> None:
    """The anatomical midline x = 0 lies left of the picture's middle in front and right of it behind."""
    heads = [draw_head(np.random.default_rng(seed)) for seed in range(30)]
    axes = [np.array([-1.0, 0.0, 1.0]), np.array([-60.0, 60.0]), np.array([0.0])]
    straight = {"shift": (0.0, 0.0, 0.0), "tilt": (0.0, 0.0, 0.0), "warp_size": 0.0}
    places = [coordinates(dataclasses.replace(head, **straight), axes)[0][0][1, :, 0] for head in heads]
    behind, front = np.mean(places, axis=0)
    assert behind < -0.5 < 0.5 < front


def test_grid_does_not_change_the_person(head: Head) -> None:
    coarse = tissue_maps(head, AXES)
    fine = tissue_maps(head, [np.arange(n) * 1.0 + start for n, start in ((20, 10.0), (24, -10.0), (8, 0.0))])
    x, y, z = (int(np.argmin(np.abs(axis - value))) for axis, value in zip(AXES, (11, -9, 2), strict=True))
    block = fine.fractions.reshape(len(NAMES), 10, 2, 12, 2, 4, 2).mean(axis=(2, 4, 6))
    near = coarse.fractions[:, x : x + 10, y : y + 12, z : z + 4]
    assert np.abs(block - near).mean() < 0.05


def test_single_slice_and_thick_slices(head: Head) -> None:
    maps = tissue_maps(head, [AXES[0], AXES[1], np.array([5.0])])
    assert maps.fractions.shape[1:] == (80, 112, 1)
    assert maps.brain.any()


# lesions


def test_lesions_replace_white_matter_near_the_ventricles(maps: Maps) -> None:
    white = fraction(maps, "white") > 0.5
    distances = []
    for seed in range(6):
        ill, mask = add_lesions(maps, AXES, np.random.default_rng(seed))
        assert (mask.dtype, mask.shape) == (np.uint8, maps.brain.shape)
        assert 3 < mask.sum() < 3000
        assert maps.brain[mask > 0].all()
        lesion = fraction(ill, "lesion")
        assert np.allclose(fraction(ill, "white") + lesion, fraction(maps, "white"), atol=1e-6)
        others = [index for index, name in enumerate(NAMES) if name not in ("white", "lesion")]
        assert np.array_equal(ill.fractions[others], maps.fractions[others])
        distances.append(maps.ventricle_distance[mask > 0].mean())
    assert np.mean(distances) < 0.6 * maps.ventricle_distance[white].mean()
    assert fraction(maps, "lesion").max() == 0, "the healthy maps are left as they were"


def test_lesions_are_bright_on_flair_and_dark_on_t1w() -> None:
    for number in (1, 2):
        clean = {"noise": 0.0, "bias": 0.0}
        ill = {name: canonical(v) for name, v in make_subject(number, lesions=1.0, **clean).items()}
        healthy = {name: canonical(v) for name, v in make_subject(number, lesions=0.0, **clean).items()}
        assert set(ill) == {"T1w", "FLAIR", "desc-brain_mask", "lesions"}
        assert set(healthy) == {"T1w", "FLAIR", "desc-brain_mask"}
        where = ill["lesions"] > 0
        assert ill["FLAIR"][where].mean() > 1.3 * healthy["FLAIR"][where].mean()
        assert ill["T1w"][where].mean() < 0.85 * healthy["T1w"][where].mean()
        far = ~binary_dilation(where, iterations=6)
        for name in ("T1w", "FLAIR"):
            assert (ill[name] != healthy[name])[far].mean() < 0.01, "elsewhere it is the same person"


# scans


def test_contrasts_of_the_scans() -> None:
    scans = {name: canonical(v).astype(float) for name, v in make_subject(1, lesions=0.0).items()}
    brain = scans["desc-brain_mask"] > 0
    t1w, flair = scans["T1w"], scans["FLAIR"]
    # CSF is dark in both contrasts; deep in the brain that is mostly the ventricles
    core = binary_erosion(brain, iterations=12, border_value=1)
    dark_t1w, dark_flair = (core & (scan < 0.3 * np.median(scan[brain])) for scan in (t1w, flair))
    for dark in (dark_t1w, dark_flair):
        assert 0.01 < dark.sum() / core.sum() < 0.25
    assert (dark_t1w & dark_flair).sum() > 0.6 * dark_t1w.sum()
    together = np.corrcoef(t1w[brain], flair[brain])[0, 1]
    assert 0.05 < together < 0.8, "same anatomy, but neither contrast is a copy of the other"
    rim = binary_dilation(brain, iterations=8) & ~binary_dilation(brain, iterations=3)
    assert np.percentile(t1w[rim], 90) > 1.2 * np.median(t1w[brain]), "fat is the brightest on T1w"
    background = np.concatenate([t1w[:3, :3].ravel(), t1w[-3:, :3].ravel()])
    assert 0 < background.mean() < 0.15 * np.median(t1w[brain])


def test_gain_differs_between_scans() -> None:
    levels = np.array(
        [
            [
                np.median(images[name].get_fdata()[images["desc-brain_mask"].get_fdata() > 0])
                for name in ("T1w", "FLAIR")
            ]
            for images in (make_subject(number, lesions=0.0, **SMALL) for number in range(1, 9))
        ]
    )
    assert (levels.max(axis=0) > 2 * levels.min(axis=0)).all()
    assert np.ptp(np.log(levels[:, 0] / levels[:, 1])) > 0.5, "one gain per contrast"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_geometry(number: int) -> None:
    size, spacing = (40, 56, 6), (4.0, 3.5, 6.0)
    images = make_subject(number, size=size, spacing=spacing, lesions=1.0)
    affine = images["T1w"].affine
    for name, image in images.items():
        assert image.shape == size
        assert image.get_data_dtype() == (np.int16 if name in ("T1w", "FLAIR") else np.uint8)
        assert np.array_equal(image.affine, affine), "one grid"
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.header.get_zooms() == pytest.approx(spacing)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
        assert image.get_qform() == pytest.approx(affine, abs=1e-3)
    assert "".join(nib.aff2axcodes(affine)) == ("RAS" if number % 2 else "LPS")
    turn = nib.as_closest_canonical(images["T1w"]).affine[:3, :3] / spacing
    assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-6)
    angle = np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    assert 0.4 < angle < 5.01
    assert np.abs(affine[:3, 3]).min() > 1, "the origin is not in the corner"


def test_stored_orders_show_the_same_head() -> None:
    """A voxel keeps its place in the world whatever the order in the file."""
    volume = np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3)
    affine = np.array([[2.0, 0.1, 0, -7], [-0.1, 3, 0, 5], [0, 0, 4, 9], [0, 0, 0, 1]])
    plain, flipped = (_store(volume, affine, flipped=value) for value in (False, True))
    assert np.array_equal(plain.dataobj, volume)
    assert np.array_equal(np.asarray(flipped.dataobj)[3, 0, 1], volume[0, 4, 1])
    assert "".join(nib.aff2axcodes(flipped.affine)) == "LPS"
    back = nib.as_closest_canonical(flipped)
    assert np.array_equal(np.asarray(back.dataobj), volume)
    assert back.affine == pytest.approx(plain.affine, abs=1e-5)


# dataset folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "brain"
    assert make_dataset(str(folder), n=12, size="40,56,6", spacing="4,4,6") == str(folder / "datalist.json")
    return folder


def test_dataset_folder(dataset: Path) -> None:
    sections = read_datalist(dataset)
    items = [item for section in SECTIONS for item in sections[section]]
    assert sorted(item["subject"] for item in items) == [f"sub-{number:03d}" for number in range(1, 13)]
    for item in items:
        assert set(item) == {"t1w", "flair", "mask", "subject", "num_slices"}
        name = item["subject"]
        assert item["t1w"] == f"{name}/anat/{name}_T1w.nii.gz"
        assert item["flair"] == f"{name}/anat/{name}_FLAIR.nii.gz"
        assert item["mask"] == f"{name}/anat/{name}_desc-brain_mask.nii.gz"
        shapes = {nib.load(dataset / item[key]).shape for key in ("t1w", "flair", "mask")}
        assert shapes == {(40, 56, item["num_slices"])}
    with_lesions = len(list(dataset.glob("sub-*/anat/sub-*_lesions.nii.gz")))
    assert 1 <= with_lesions <= 11
    for section in SECTIONS:
        for loaded in load_datalist(dataset, section, required=("t1w", "flair", "mask", "subject")):
            assert Path(loaded["mask"]).is_file()


def test_split_is_by_subject(dataset: Path, tmp_path: Path) -> None:
    sections = read_datalist(dataset)
    assert find_leaks(sections) == {}
    assert [len(sections[section]) for section in SECTIONS] == [8, 2, 2]
    make_dataset(str(tmp_path / "x"), n=3, split=(0.5, 0, 0.5), **SMALL)
    assert [len(read_datalist(tmp_path / "x")[section]) for section in SECTIONS] == [2, 0, 1]


def test_dataset_is_deterministic(dataset: Path, tmp_path: Path) -> None:
    for name, options in (("few", {"n": 3, "workers": 2}), ("seed", {"n": 3, "seed": 1})):
        make_dataset(str(tmp_path / name), **options, **SMALL)
    every, few, seed = digest(dataset), digest(tmp_path / "few"), digest(tmp_path / "seed")
    images = [name for name in few if name.endswith(".nii.gz")]
    assert len(images) >= 9
    assert [few[name] for name in images] == [every[name] for name in images], "neither n nor workers matter"
    assert not set(few.values()) & set(seed.values())


def test_share_of_subjects_with_lesions(tmp_path: Path) -> None:
    for share, expected in ((0, 0), (1, 3)):
        folder = tmp_path / str(share)
        make_dataset(str(folder), n=3, lesions=share, **SMALL)
        assert len(list(folder.glob("sub-*/anat/*_lesions.nii.gz"))) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n: expected at least 3 subjects for 3 sections with a share, got 2; raise n"),
        ({"size": (80, 112)}, r"size: expected 3 numbers, got \(80, 112\)"),
        ({"size": "80,112,few"}, "size: expected 3 numbers such as 1,2,3, got '80,112,few'"),
        ({"size": (80, 8, 24)}, "size: expected three whole numbers, the first two at least 16"),
        ({"size": (80, 112.5, 24)}, "size: expected three whole numbers"),
        ({"spacing": 0}, "spacing: expected millimetres above 0, got 0"),
        ({"spacing": "2,2"}, "spacing: expected 3 numbers or one, got '2,2'"),
        ({"spacing": "nan"}, "spacing: expected 3 numbers or one"),
        ({"split": (0.5, 0.2, 0.2)}, "split: expected shares >= 0 that sum to 1"),
        ({"split": (1.2, -0.1, -0.1)}, "split: expected shares >= 0 that sum to 1"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"lesions": 1.5}, "lesions: expected a share of the subjects between 0 and 1, got 1.5"),
        ({"noise": -0.1}, "noise: expected a number >= 0, got -0.1"),
        ({"bias": -0.2}, "bias: expected a number >= 0, got -0.2"),
        ({"workers": 0}, "workers: expected at least 1 process, got 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "brain"
    make_dataset(str(folder), n=4, **SMALL)
    (folder / "sub-004" / "notes.txt").write_text("mine")
    before = digest(folder)
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(folder))}: expected an empty or absent folder"):
        make_dataset(str(folder), n=3, **SMALL)
    assert digest(folder) == before
    make_dataset(str(folder), n=3, overwrite=True, **SMALL)
    assert sorted(path.name for path in folder.glob("sub-*")) == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert list((folder / "sub-004").rglob("*.nii.gz")) == []
    assert (folder / "sub-004" / "notes.txt").read_text() == "mine"


def test_command_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "brain"
    options = ["--n", "3", "--size", "40,56,6", "--spacing", "4,4,6", "--lesions", "0.5", "--split", "0.4,0.3,0.3"]
    main(["brain_controlnet", "--out", str(folder), *options])
    assert capsys.readouterr().out.strip() == str(folder / "datalist.json")
    assert json.loads((folder / "datalist.json").read_text())["name"] == "brain_controlnet phantoms"
    name = "sub-002/anat/sub-002_T1w.nii.gz"
    assert (folder / name).read_bytes() == (dataset / name).read_bytes()
