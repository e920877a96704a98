# SPDX-License-Identifier: Apache-2.0
"""`shared.dmri_check` within the data check: planted faults of diffusion data are found, each named by its file."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from shared.data_check import check_dataset
from shared.dmri_check import check_fractions, diffusion_problems, read_mask
from shared.resolution import doubled_affine

LOW, HIGH = (5, 6, 4), (10, 12, 8)
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 1.9, 0.4, -126], [0, -0.4, 1.9, -72], [0, 0, 0, 1.0]])
FINE = doubled_affine(AFFINE)
BVALS = np.array([0, 1000, 1000, 1000, 2000, 2000, 2000.0])
BVECS = np.array([[0, 0, 0], *np.eye(3), *np.eye(3)])


def save(path, values, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, affine).to_filename(path)


def make(folder, number):
    """One subject with everything; values differ between subjects."""
    rng = np.random.default_rng(number)
    save(folder / "dwi.nii.gz", rng.random((*LOW, 7)).astype(np.float32), AFFINE)
    np.savetxt(folder / "dwi.bval", BVALS[None])
    np.savetxt(folder / "dwi.bvec", BVECS.T)
    mask = np.zeros(HIGH, np.uint8)
    mask[2:8, 2:10, 2:6] = 1
    save(folder / "mask.nii.gz", mask, FINE)
    for key in ("ndi", "odi", "fwf"):
        save(folder / f"{key}.nii.gz", rng.random(HIGH).astype(np.float32) * mask, FINE)


@pytest.fixture
def dataset(tmp_path):
    """Three subjects, one per section; returns a function that lists the problems."""
    sections: dict = {}
    for number, section in enumerate(("training", "validation", "test")):
        make(tmp_path / f"s{number}", number)
        names = {key: f"s{number}/{key}.nii.gz" for key in ("dwi", "mask", "ndi", "odi", "fwf")}
        tables = {"bval": f"s{number}/dwi.bval", "bvec": f"s{number}/dwi.bvec"}
        sections[section] = [{**names, **tables, "subject": f"s{number}"}]

    def check(images=True, **changes):
        sections["training"][0].update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del sections["training"][0][key]
        (tmp_path / "datalist.json").write_text(json.dumps(sections))
        return check_dataset(tmp_path, images=images).problems

    return check


def test_a_good_set_has_no_problem(dataset):
    assert dataset() == []
    assert dataset(images=False) == []


def test_a_mask_may_lie_on_the_low_resolution_grid(dataset, tmp_path):
    save(tmp_path / "s0/mask.nii.gz", np.ones(LOW, np.uint8), AFFINE)
    assert dataset() == []


def shifted(affine):
    moved = affine.copy()
    moved[0, 3] += 0.5
    return moved


def map_of(value):
    values = np.full(HIGH, 0.5, np.float32)
    values[2:5, 2:10, 2:6] = value
    values[2, 2, 2] = 0.1
    return values


FAULTS = {
    "shape of a map": ("ndi", np.random.default_rng(0).random(LOW).astype(np.float32), AFFINE,
                       r"ndi.nii.gz: expected the grid of twice the resolution of 'dwi' \(10, 12, 8\), but got \(5"),
    "place of a map": ("fwf", map_of(0.2), shifted(FINE), "expected the origin .* of twice the resolution of 'dwi'"),
    "range of a map": ("odi", map_of(1.5), FINE, r"expected fractions in \[0, 1\] inside .* 95 voxels \(49\.48%\)"),
    "NaN in a map": ("odi", map_of(np.nan), FINE, "expected finite voxels, but 95 are NaN"),
    "4-D map": ("ndi", np.random.default_rng(0).random((*HIGH, 2)).astype(np.float32), FINE, "expected a 3-D volume"),
    "shape of the mask": ("mask", np.ones((5, 6, 8), np.uint8), AFFINE, "mask.nii.gz: expected the grid of twice"),
    "place of a coarse mask": ("mask", np.ones(LOW, np.uint8), FINE, "expected the voxel size .* of 'dwi'"),
    "empty mask": ("mask", np.zeros(HIGH, np.uint8), FINE, "expected a brain mask, but it is empty"),
    "3-D series": ("dwi", np.random.default_rng(0).random(LOW).astype(np.float32), AFFINE, "expected a series of vol"),
    "volume too many": ("dwi", np.random.default_rng(0).random((*LOW, 8)).astype(np.float32), AFFINE,
                        "dwi.bval: expected one b-value for each of the 8 volumes of the series, but got 7"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "values", "affine", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named_once(dataset, tmp_path, key, values, affine, message):
    save(tmp_path / f"s0/{key}.nii.gz", values, affine)
    found = [line for line in dataset() if "like most files" not in line]
    assert len(found) == 1
    assert found[0].startswith(str(tmp_path / "s0"))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[0])


def test_tables_are_checked_without_images_too(dataset, tmp_path):
    np.savetxt(tmp_path / "s0/dwi.bvec", 2 * BVECS.T)
    (line,) = dataset(images=False)
    assert line.startswith(f"{tmp_path / 's0/dwi.bvec'}: expected unit vectors, but 6 of 6 are not")


def test_a_series_needs_its_table(dataset, tmp_path):
    lines = dataset(bval=None)
    assert f"{tmp_path / 's0/dwi.nii.gz'}: expected a gradient table, but its item has no bval; add the files" in lines


def test_missing_and_broken_files_are_left_to_the_data_check(dataset, tmp_path):
    (tmp_path / "s0/ndi.nii.gz").unlink()
    (tmp_path / "s0/mask.nii.gz").write_bytes(b"text")
    lines = dataset()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "s0" / name) for name in
                                                        ("mask.nii.gz", "ndi.nii.gz")]  # fmt: skip
    assert list(diffusion_problems({"dwi": "none.nii.gz"}, tmp_path)) == []


def test_fractions_are_judged_inside_the_brain():
    inside = np.zeros((4, 5, 6), bool)
    inside[1:3, 1:4, 1:5] = True
    values = np.where(inside, np.random.default_rng(0).random(inside.shape), np.nan)
    values[1, 1, 1] = 1.0009
    check_fractions("x", values, inside)
    values[1, 1, 1] = 1.002
    with pytest.raises(ValueError, match=r"^x: expected fractions in \[0, 1\] .* but 1 voxels \(4\.17%\) are outside"):
        check_fractions("x", values, inside)
    values[1, 1, 1] = -np.inf
    with pytest.raises(ValueError, match=r"^x: expected finite fractions .* but 1 voxels \(4\.17%\)"):
        check_fractions("x", values, inside)
    with pytest.raises(ValueError, match=r"^x: expected a map, but all voxels inside the brain mask are 0\.3"):
        check_fractions("x", np.full(inside.shape, 0.3), inside)


def test_masks_of_labels_and_of_probabilities(tmp_path):
    values = np.zeros((3, 4, 5), np.float32)
    values[0, 0, :3] = 0.4, 0.6, 1.0
    save(tmp_path / "p.nii.gz", values, AFFINE)
    assert read_mask(tmp_path / "p.nii.gz").sum() == 2
    save(tmp_path / "l.nii.gz", 10 * values, AFFINE)
    assert read_mask(tmp_path / "l.nii.gz").sum() == 3
    save(tmp_path / "4.nii.gz", np.stack([values, values], -1), AFFINE)
    with pytest.raises(ValueError, match=r"4.nii.gz: expected a 3-D mask, but got the shape \(3, 4, 5, 2\)"):
        read_mask(tmp_path / "4.nii.gz")
