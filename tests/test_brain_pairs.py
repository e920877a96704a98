# SPDX-License-Identifier: Apache-2.0
"""`tools.prepare brain_pairs`: trees of small volumes -> dataset folders; faults are named, world positions stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from shared.data_check import check_dataset
from shared.datalist import load_datalist, read_datalist
from shared.intensity import robust_range, scale_intensity, unscale_intensity
from tests.test_pair_checks import heads
from tools.command_line import run
from tools.prepare.__main__ import COMMANDS
from tools.prepare.brain_pairs import brain_pairs
from tools.prepare.brain_volumes import Volume, bounding_box, cut, find_head, resample
from tools.prepare.pair_finder import find_by_layout, find_by_patterns
from tools.prepare.preparation import Preparation

SHAPE = (44, 56, 30)
AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])
AFFINE[:3, 3] = -80, -110, -60
SMALL = {"size": (40, 48), "fractions": (1, 0, 0)}


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, affine).to_filename(path)
    return path


def visit(seed=0):
    """T1w and FLAIR of one head, as int16 in two scanner ranges; air is noise."""
    return tuple(
        (100 * scale * volume + 40).astype(np.int16) for scale, volume in zip((1, 3), heads(seed), strict=True)
    )


def bids(root, *names, seed=0):
    """T1w and FLAIR below root; each name is one pair without its suffix."""
    for index, name in enumerate(names):
        for suffix, values in zip(("T1w", "FLAIR"), visit(seed + index), strict=True):
            save(root / f"{name}_{suffix}.nii.gz", values)
    return root


def record(folder):
    return json.loads((folder / "preparation.json").read_text())


def items_of(folder):
    return [item for part in read_datalist(folder).values() for item in part]


def load(path):
    return nibabel.load(path)


def test_bids_sessions_become_a_dataset_folder(tmp_path, capsys):
    names = [f"sub-{s:02d}/ses-{v}/anat/sub-{s:02d}_ses-{v}" for s in range(1, 5) for v in "ab"]
    bids(tmp_path / "bids", *names)
    out = tmp_path / "set"
    brain_pairs(str(tmp_path / "bids"), str(out), size=(40, 52), fractions="0.5,0.25,0.25", workers=2)
    assert check_dataset(out).problems == []
    sections = read_datalist(out)
    assert [len(sections[name]) for name in ("training", "validation", "test")] == [4, 2, 2]
    item = load_datalist(out, "training", required=("t1w", "flair"))[0]
    stem = f"{item['subject']}_{item['session']}"
    assert item["t1w"] == str(out / "images" / f"{stem}_T1w.nii")
    assert item["flair"] == str(out / "images" / f"{stem}_FLAIR.nii")
    assert item["num_slices"] == 5
    assert "mask" not in item
    for key in ("t1w", "flair"):
        image = load(item[key])
        assert image.shape == (40, 52, 5)
        assert image.get_data_dtype() == np.uint16
        assert image.dataobj.slope == pytest.approx(1 / 65535)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 2
        np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)
        values = np.asarray(image.dataobj)
        assert 0 == values.min() < values.max() <= 1 + 1e-6
    assert record(out)["counts"] == {"pairs": 8, "subjects": 4, "training": 4, "validation": 2, "test": 2}
    assert "8 pairs, 4 subjects" in capsys.readouterr().out


@pytest.mark.parametrize("turn", [None, "LPS", "SAL"])
def test_every_voxel_keeps_its_world_position(tmp_path, turn):
    """Slab, crop (X), pad (Y) and reorientation: each output voxel holds what the source has at that place."""
    angle = 0.1
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    sources = {}
    for key, values in zip(("T1w", "FLAIR"), visit(), strict=True):
        image = nibabel.Nifti1Image(values, tilt @ AFFINE)
        if turn:
            order = nibabel.orientations.axcodes2ornt(tuple(turn))
            image = image.as_reoriented(nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], order))
            assert "".join(nibabel.aff2axcodes(image.affine)) == turn
        sources[key] = save(tmp_path / "in" / f"a_{key}.nii.gz", np.asarray(image.dataobj), image.affine)
    out = tmp_path / "out"
    brain_pairs(str(tmp_path / "in"), str(out), slab=(11, 18), size="20,70", fractions=(1, 0, 0))
    (item,) = items_of(out)
    assert record(out)["counts"]["warning: head cropped"] == 1
    for key, source in (("t1w", sources["T1w"]), ("flair", sources["FLAIR"])):
        made, given = load(out / item[key]), load(source)
        assert made.shape == (20, 70, 7)
        assert nibabel.aff2axcodes(made.affine) == ("R", "A", "S")
        values = np.asarray(given.dataobj)
        low, high = item["intensity"][key]
        assert (low, high) == robust_range(values)
        voxels = np.stack(np.meshgrid(*map(np.arange, made.shape), indexing="ij"), -1).reshape(-1, 3)
        place = nibabel.affines.apply_affine(np.linalg.inv(given.affine) @ made.affine, voxels)
        index = np.rint(place).astype(int)
        np.testing.assert_allclose(place, index, atol=1e-3)
        inside = ((index >= 0) & (index < given.shape)).all(1)
        assert 0.7 < inside.mean() < 0.9
        expected = np.zeros(len(voxels))
        expected[inside] = scale_intensity(values[tuple(index[inside].T)], low, high)
        np.testing.assert_allclose(np.asarray(made.dataobj).reshape(-1), expected, atol=1e-5)
    # what was not clipped is undone to within the 16 bits
    made, (low, high) = np.asarray(load(out / item["t1w"]).dataobj), item["intensity"]["t1w"]
    restored = unscale_intensity(made, low, high)
    original = np.unique(load(sources["T1w"]).get_fdata())
    part = restored[(made > 0) & (made < 1)]
    assert np.abs(original[:, None] - part[None, ::20]).min(0).max() < (high - low) / 65535


def test_intensities_come_from_the_whole_volume(tmp_path):
    bids(tmp_path / "in", "a")
    ranges = []
    for slab in ((2, 4), (14, 16)):
        brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), slab=slab, **SMALL)
        ranges.append(items_of(tmp_path / "out")[0]["intensity"])
    assert ranges[0] == ranges[1]


def test_volumes_in_0_to_1_are_taken_as_scaled(tmp_path):
    scaled = [scale_intensity(v, *robust_range(v)) * np.float32(0.8) for v in visit()]
    for suffix, values in zip(("T1w", "FLAIR"), scaled, strict=True):
        save(tmp_path / "in" / f"a_{suffix}.nii", values)
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), size="none", slices=0, fractions=(1, 0, 0))
    (item,) = items_of(tmp_path / "out")
    assert item["intensity"] == {"t1w": [0, 1], "flair": [0, 1]}
    assert np.asarray(load(tmp_path / "out" / item["t1w"]).dataobj).max() == pytest.approx(0.8, abs=1e-4)


def test_central_and_all_slices(tmp_path):
    t1w, flair = (v.copy() for v in visit())
    for values in (t1w, flair):
        values[..., :4], values[..., 24:] = 0, 0
    for suffix, values in (("T1w", t1w), ("FLAIR", flair)):
        save(tmp_path / "in" / f"a_{suffix}.nii", values, np.diag([4, 4, 5, 1.0]))
    for slices, first, count in ((0, 4, 20), (5, 11, 5), (6, 11, 6), (30, 0, 30)):
        brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), slices=slices, **SMALL)
        (item,) = items_of(tmp_path / "out")
        assert load(tmp_path / "out" / item["t1w"]).affine[2, 3] == 5 * first, slices
        assert item["num_slices"] == count
    # without a mask a long neck does not pull the centre down: the upper 150 mm (15 slices of 10 mm) count
    for suffix, values in (("T1w", t1w), ("FLAIR", flair)):
        save(tmp_path / "in" / f"a_{suffix}.nii", values, np.diag([4, 4, 10, 1.0]))
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), slices=5, **SMALL)
    (item,) = items_of(tmp_path / "out")
    assert load(tmp_path / "out" / item["t1w"]).affine[2, 3] == 10 * ((9 + 24 - 5) // 2)
    with pytest.raises(ValueError, match="expected pairs to keep, but none is left"):
        brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), slab=(28, 31), **SMALL)
    (line,) = record(tmp_path / "out")["dropped"]["slab not in the volume"]
    assert line.startswith(
        f"{tmp_path / 'in' / 'a_T1w.nii'}: slices: expected at least 31 slices for --slab, but got 30"
    )


def faulty(root):
    """Eight visits, seven with one fault each; returns the start of the line and words that must name each fault."""
    bids(root, *(f"sub-{n}/anat/sub-{n}" for n in range(9)))

    def path(n, suffix):
        return root / f"sub-{n}" / "anat" / f"sub-{n}_{suffix}.nii.gz"

    path(1, "FLAIR").unlink()
    nan = visit(2)[1].astype(np.float32)
    nan[3, 4, 5] = np.nan
    save(path(2, "FLAIR"), nan)
    save(path(3, "FLAIR"), visit(3)[1][:, :, 1:])
    save(path(4, "T1w"), np.full(SHAPE, 7, np.int16))
    affine = AFFINE.copy()
    affine[0, 3] += 3
    save(path(5, "FLAIR"), visit(5)[1], affine)
    save(path(6, "FLAIR"), visit(6)[1][:, ::-1])
    save(path(7, "T1w"), np.stack([visit(7)[0]] * 2, -1))
    whole = path(8, "FLAIR").read_bytes()
    path(8, "FLAIR").write_bytes(whole[: len(whole) // 2])
    return {
        "FLAIR missing": [(path(1, "T1w"), "expected a FLAIR of the same visit")],
        "unusable volume": [
            (path(2, "FLAIR"), "expected finite voxels, but 1 are NaN"),
            (path(4, "T1w"), "expected an image, but all voxels are 7"),
            (path(7, "T1w"), "expected a 3-D volume, but got the shape (44, 56, 30, 2)"),
            (path(8, "FLAIR"), "expected a readable NIfTI file"),
        ],
        "grids differ": [
            (
                path(3, "FLAIR"),
                f"expected the grid of {path(3, 'T1w')} (44, 56, 30), but got (44, 56, 29); resample it",
            ),
            (path(5, "FLAIR"), "expected the origin (-80, -110, -60)"),
        ],
        "mirrored": [(path(6, "FLAIR"), "better mirrored front-back")],
    }


def test_each_fault_is_one_line_and_the_others_go_on(tmp_path):
    expected = faulty(tmp_path / "in")
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), **SMALL)
    assert [item["subject"] for item in items_of(tmp_path / "out")] == ["sub-0"]
    written = record(tmp_path / "out")
    assert written["dropped"].keys() == expected.keys()
    for reason, faults in expected.items():
        assert written["counts"][f"dropped: {reason}"] == len(faults)
        for line, (path, words) in zip(written["dropped"][reason], faults, strict=True):
            assert line.startswith(f"{path}: ")
            assert words in line
            assert "\n" not in line
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), allow_mirrored=True, **SMALL)
    assert [item["subject"] for item in items_of(tmp_path / "out")] == ["sub-0", "sub-6"]
    assert "better mirrored" in record(tmp_path / "out")["warnings"]["mirrored"][0]


def test_a_header_without_orientation_is_a_warning(tmp_path):
    for suffix, values in zip(("T1w", "FLAIR"), visit(), strict=True):
        image = nibabel.Nifti1Image(values, None)
        image.header["sform_code"] = image.header["qform_code"] = 0
        (tmp_path / "in").mkdir(exist_ok=True)
        image.to_filename(tmp_path / "in" / f"a_{suffix}.nii")
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), **SMALL)
    (line,) = record(tmp_path / "out")["warnings"]["no orientation in the header"]
    assert line.startswith(f"{tmp_path / 'in' / 'a_T1w.nii'}: expected an orientation in the header")


def test_bids_entities_decide_and_the_rest_is_ambiguous(tmp_path):
    def touch(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def tree(n, *names):
        touch(*(f"sub-{n}/anat/sub-{n}{name}.nii.gz" for name in names))

    tree(1, "_acq-mprage_T1w", "_acq-3D_FLAIR")  # one each: entities may differ
    tree(2, "_T1w", "_space-MNI_T1w", "_space-MNI_FLAIR", "_desc-x_FLAIR")  # equal entities win
    tree(3, "_T1w", "_run-1_FLAIR", "_run-2_FLAIR")
    tree(4, "_run-1_T1w", "_run-1_FLAIR", "_run-2_T1w", "_run-2_FLAIR")
    tree(5, "_FLAIR")
    touch("derivatives/x/sub-1/anat/sub-1_T1w.nii.gz", "derivatives/x/sub-1/anat/sub-1_FLAIR.nii.gz")
    preparation = Preparation("x", {})
    pairs = find_by_layout(tmp_path, preparation)
    assert [(p.name, p.files["t1w"].name, p.files["flair"].name) for p in pairs] == [
        ("sub-1", "sub-1_acq-mprage_T1w.nii.gz", "sub-1_acq-3D_FLAIR.nii.gz"),
        ("sub-2", "sub-2_space-MNI_T1w.nii.gz", "sub-2_space-MNI_FLAIR.nii.gz"),
    ]
    three, four = preparation.dropped["ambiguous"]
    assert three.startswith(f"{tmp_path / 'sub-3/anat/sub-3_T1w.nii.gz'}: expected one T1w and one FLAIR, but got")
    assert "sub-3_run-1_FLAIR.nii.gz, sub-3_run-2_FLAIR.nii.gz; choose with --t1w and --flair" in three
    assert "sub-4_run-2_T1w" in four
    assert preparation.dropped["T1w missing"][0].startswith(f"{tmp_path / 'sub-5/anat/sub-5_FLAIR.nii.gz'}: ")


def test_published_layout(tmp_path):
    for name in ("7/i2/anat/x_T1w", "7/i2/anat/x_FLAIR", "7/i3/unusable/x_T1w", "7/i3/unusable/x_FLAIR", "8/i2/x_T1w"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    preparation = Preparation("x", {})
    (pair,) = find_by_layout(tmp_path, preparation)
    assert (pair.subject, pair.session, pair.name) == ("7", "i2", "7_i2")
    assert pair.files["flair"] == tmp_path / "7/i2/anat/x_FLAIR.nii.gz"
    assert {reason: len(lines) for reason, lines in preparation.dropped.items()} == {
        "marked unusable": 2,
        "FLAIR missing": 1,
    }


def test_patterns(tmp_path):
    for name in (
        "11_i2_0/T1/T1_brain_to_MNI", "11_i2_0/T2_FLAIR/T2_FLAIR_brain_to_MNI", "12_i2_0/T1/T1_brain_to_MNI",
        "11_i2_0/T1/T1", "13_i3_0/T1/T1_brain_to_MNI", "13_i3_0/T2_FLAIR/T2_FLAIR_brain_to_MNI",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    preparation = Preparation("x", {})
    pairs = find_by_patterns(
        tmp_path,
        "{subject}_{session}_0/T1/T1_brain_to_MNI.nii.gz",
        "{subject}_{session}_?/**/*to_MNI.nii.gz",
        preparation,
    )
    assert pairs == []  # the glob meets T1 and FLAIR
    assert len(preparation.dropped["ambiguous"]) == 2
    (line,) = preparation.dropped["FLAIR missing"]
    assert "12_i2_0/T1/T1_brain_to_MNI.nii.gz: expected a FLAIR, but its pattern finds the T1w" in line
    preparation.dropped.clear()
    pairs = find_by_patterns(
        tmp_path, "{subject}_{session}_0/T1/T1_brain_to_MNI.nii.gz", "{subject}_*/T2*/*_to_MNI.nii.gz", preparation
    )
    assert [(p.subject, p.session) for p in pairs] == [("11", "i2"), ("13", "i3")]
    for kind in ("T1w", "FLAIR"):
        (tmp_path / f"ms_01_study2_{kind}.nii").touch()
    (pair,) = find_by_patterns(
        tmp_path, "{subject}_{session}_T1w.nii", "{subject}_{session}_FLAIR.nii", Preparation("x", {})
    )
    assert (pair.subject, pair.session) == ("ms_01", "study2")
    (line,) = preparation.dropped["FLAIR missing"]
    assert line.startswith(f"{tmp_path / '12_i2_0/T1/T1_brain_to_MNI.nii.gz'}: expected a FLAIR at {tmp_path / '12_*'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t1w": "{subject}_T1w.nii"}, "--flair: expected both patterns or none"),
        ({"t1w": "T1w.nii", "flair": "{subject}_F.nii"}, "--t1w: expected {subject} in the pattern"),
        ({"t1w": "{patient}/a", "flair": "{subject}/b"}, "--t1w: expected the placeholders .* but got {patient}"),
        ({"t1w": "/a/{subject}", "flair": "{subject}/b"}, "--t1w: expected a pattern relative to --source"),
        ({"t1w": "{subject}/a", "flair": "{subject}/{session}/b"}, "--flair: expected {session} in both"),
        ({"extra": "t1c=x"}, "--extra: expected t2w=PATTERN"),
        ({"apply_mask": True}, "--apply_mask: expected --mask PATTERN"),
        ({"slab": (9, 4)}, "--slab: expected 0 <= START < STOP"),
        ({"size": 160}, "--size: expected two whole numbers such as 160,224"),
        ({"slices": -1}, "--slices: expected a number of slices"),
        ({"spacing": 0}, "--spacing: expected millimetres above 0"),
        ({"interpolation": "cubic"}, "--interpolation: expected bilinear or bspline"),
        ({"table": "nowhere.csv"}, r"^nowhere\.csv: expected a table"),
        ({"workers": -1}, "--workers: expected 0 or a number"),
        ({"png": "yes"}, "--png: expected True or False"),
        ({}, "expected T1w and FLAIR volumes .* but found none"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    (tmp_path / "in").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out" / "datalist.json").exists()


def ball(radius=0.8):
    grid = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in SHAPE), indexing="ij")
    return sum(g**2 for g in grid) < radius**2


def test_table_with_masks_and_more_contrasts(tmp_path):
    root = bids(tmp_path / "in", "a", "b", "c", "d")
    inside = ball()
    save(root / "a_mask.nii", inside.astype(np.uint8))
    save(root / "d_mask.nii", np.zeros(SHAPE, np.uint8))
    save(root / "a_t2.nii", visit()[1])
    negative = visit()[0] - 300  # then zero is not the lowest value, but still what lies outside of the mask
    save(root / "a_T1w.nii.gz", negative)
    table = root / "pairs.csv"
    table.write_text(
        "subject,session,t1w,flair,mask,t2w\n"
        "A,1,a_T1w.nii.gz,a_FLAIR.nii.gz,a_mask.nii,a_t2.nii\n"
        "B,,b_T1w.nii.gz,b_FLAIR.nii.gz,,\n"
        "C,,c_T1w.nii.gz,,,a_t2.nii\n"
        "D,,d_T1w.nii.gz,d_FLAIR.nii.gz,d_mask.nii,a_t2.nii\n"
    )
    out = tmp_path / "out"
    brain_pairs(str(root), str(out), table=str(table), extra="t2w", **SMALL)
    (item,) = items_of(out)
    assert list(item) == ["t1w", "flair", "t2w", "mask", "subject", "session", "num_slices", "intensity"]
    assert item["t2w"] == "images/A_1_T2w.nii"
    assert set(item["intensity"]) == {"t1w", "flair", "t2w"}
    dropped = record(out)["dropped"]
    assert dropped["T2w missing"] == [f"{table}: expected a path under 't2w' of B, but it is empty; fill it in"]
    assert "expected a path under 'flair' of C" in dropped["FLAIR missing"][0]
    assert dropped["unusable volume"][0].startswith(f"{root / 'd_mask.nii'}: expected a brain mask, but it is empty")
    # without the extra contrast B is complete; with apply_mask it needs a mask
    brain_pairs(str(root), str(out), table=str(table), apply_mask=True, **SMALL)
    (item,) = items_of(out)
    mask, t1w = load(out / item["mask"]), load(out / item["t1w"])
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, t1w.affine)
    outside = np.asarray(mask.dataobj) == 0
    assert 0.2 < outside.mean() < 0.8
    assert np.asarray(t1w.dataobj)[outside].max() == 0
    assert np.asarray(t1w.dataobj)[~outside].mean() > 0.2
    assert item["intensity"]["t1w"] == list(robust_range(negative * inside))
    assert item["intensity"]["t1w"][0] < 0
    assert record(out)["dropped"]["mask missing"][0].startswith(f"{root / 'b_T1w.nii.gz'}: expected a brain mask")


def test_mask_pattern_and_nonzero(tmp_path):
    root = tmp_path / "in"
    inside = ball(1.0)
    stripped = [np.where(inside, np.maximum(v, 1), 0).astype(np.int16) for v in visit()]
    stripped[1][20:24, 26:30, 14:16] = 0  # dark CSF inside the brain is no background
    for suffix, values in zip(("T1w", "FLAIR"), stripped, strict=True):
        save(root / "s1" / f"s1_{suffix}.nii.gz", values)
    bids(root, "s2/s2")
    brain_pairs(str(root), str(tmp_path / "out"), mask="nonzero", slices=0, size=None, fractions=(1, 0, 0))
    (item,) = items_of(tmp_path / "out")
    made = np.asarray(load(tmp_path / "out" / item["mask"]).dataobj)
    low, high = bounding_box(inside)[2]
    np.testing.assert_array_equal(made, inside[:, :, low:high])
    (line,) = record(tmp_path / "out")["dropped"]["not skull-stripped"]
    assert line.startswith(f"{root / 's2' / 's2_T1w.nii.gz'}: expected a skull-stripped volume for --mask nonzero")
    # probabilities are cut at one half; the folder of s2 has no mask
    save(root / "s1" / "brain.nii", np.where(inside, 0.6, 0.4).astype(np.float32))
    brain_pairs(str(root), str(tmp_path / "out"), mask="{subject}/brain.nii", slices=0, size=None, fractions=(1, 0, 0))
    (item,) = items_of(tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "out" / item["mask"]).dataobj), made)
    assert "expected a mask at" in record(tmp_path / "out")["dropped"]["mask missing"][0]


@pytest.mark.parametrize("mode", ["bilinear", "bspline"])
def test_resampling_keeps_world_positions_and_slices(mode):
    """A ramp in world coordinates is reproduced by linear and cubic interpolation away from the border."""
    affine = np.diag([1.0, 1.5, 3.0, 1.0])
    affine[:3, 3] = -20, 11, 5
    voxels = np.stack(np.meshgrid(*map(np.arange, (31, 26, 7)), indexing="ij"), -1)

    def ramp(affine, voxels):
        return nibabel.affines.apply_affine(affine, voxels) @ [1.0, 0.5, 2.0]

    volume = Volume(Path("a.nii"), ramp(affine, voxels).astype(np.float32), affine, 1)
    made = resample(volume, 2.0, mode=mode)
    np.testing.assert_allclose(made.spacing, [2, 2, 3])
    assert made.values.shape[2] == 7
    places = np.stack(np.meshgrid(*map(np.arange, made.values.shape), indexing="ij"), -1)
    inner = (slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(made.values[inner], ramp(made.affine, places)[inner], atol=0.02)


def test_spacing_option(tmp_path):
    bids(tmp_path / "in", "a")
    save(tmp_path / "in" / "a_mask.nii", ball().astype(np.uint8))
    brain_pairs(
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        spacing=5,
        mask="{subject}_mask.nii",
        size=(32, 40),
        fractions=(1, 0, 0),
    )
    (item,) = items_of(tmp_path / "out")
    t1w, mask = load(tmp_path / "out" / item["t1w"]), load(tmp_path / "out" / item["mask"])
    np.testing.assert_allclose(t1w.header.get_zooms(), (5, 5, 5), rtol=1e-5)
    assert t1w.shape == mask.shape == (32, 40, 5)
    # volume of the brain in the central slices is that of the source
    low = round((t1w.affine[2, 3] - AFFINE[2, 3]) / 5)
    expected = ball()[:, :, low : low + 5].sum() * 16
    assert np.asarray(mask.dataobj).sum() * 25 == pytest.approx(expected, rel=0.02)


def test_png_layout(tmp_path):
    bids(tmp_path / "in", "sub-1/ses-2/anat/sub-1_ses-2")
    brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), png=True, **SMALL)
    folder = tmp_path / "out" / "png" / "sub-1" / "ses-2"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(f"sub-1_ses-2_slice-{k}_{kind}.png" for k in range(5) for kind in ("T1w", "FLAIR"))
    picture = np.asarray(Image.open(folder / "sub-1_ses-2_slice-3_FLAIR.png"))
    assert picture.dtype == np.uint8
    volume = np.asarray(load(tmp_path / "out" / "images" / "sub-1_ses-2_FLAIR.nii").dataobj)
    np.testing.assert_array_equal(picture, np.rint(volume[:, :, 3] * 255))


def test_cut_and_head():
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    volume = Volume(Path("a"), values, AFFINE, 1)
    apart = cut(volume, (5, 0, 0), (2, 3, 4))
    assert not apart.values.any()
    noise = np.random.default_rng(0).random((20, 24, 8)) < 0.02
    head = np.zeros((20, 24, 8), bool)
    head[5:15, 6:20, 2:7] = True
    assert bounding_box(find_head((head | noise).astype(np.float32))) == [(5, 15), (6, 20), (2, 7)]


def test_two_visits_may_not_share_a_name(tmp_path):
    bids(tmp_path / "in", "a_b/x", "a/b/x")
    with pytest.raises(ValueError, match=r"x_T1w\.nii\.gz: expected a name of its own"):
        brain_pairs(str(tmp_path / "in"), str(tmp_path / "out"), **SMALL)


def test_command_line(tmp_path, monkeypatch, capsys):
    """Braces, commas and words of the options survive fire."""
    for n in range(3):
        t1w, flair = visit(n)
        save(tmp_path / "in" / str(n) / "T1" / "T1_to_MNI.nii.gz", t1w)
        save(tmp_path / "in" / str(n) / "F" / "F_to_MNI.nii.gz", flair)
        save(tmp_path / "in" / str(n) / "F" / "P.nii.gz", t1w - flair // 5)
        save(tmp_path / "in" / str(n) / "F" / "T2.nii.gz", flair - 1)
    command = [
        "tools.prepare", "brain_pairs", "--source", str(tmp_path / "in"), "--out",
        str(tmp_path / "out"), "--t1w", "{subject}/T1/T1_to_MNI.nii.gz", "--flair", "{subject}/F/F_to_MNI.nii.gz",
        "--extra", "t2w={subject}/F/T2.nii.gz,pdw={subject}/F/P.nii.gz", "--slab", "11,16",
        "--size", "none",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    run(COMMANDS, name="tools.prepare")
    assert "3 pairs, 3 subjects, 1 training, 1 validation, 1 test" in capsys.readouterr().out
    item = items_of(tmp_path / "out")[0]
    assert load(tmp_path / "out" / item["pdw"]).shape == (44, 56, 5)
    assert check_dataset(tmp_path / "out").problems == []
