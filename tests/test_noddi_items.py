# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from shared.noddi_items import inference_items, name_of
from tests.conftest import HANDBOOK

SHAPE = (4, 5, 3)


def volume(path: Path, *, volumes: int | None = 7) -> Path:
    """A NIfTI of so many volumes; None: three axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = SHAPE if volumes is None else (*SHAPE, volumes)
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.float32), np.eye(4)), path)
    return path


def gradients(path: Path, bval: str, bvec: str, *, count: int = 7) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / bval).write_text(" ".join(["1000"] * count) + "\n")
    (path / bvec).write_text("\n".join(" ".join(["0"] * count) for _ in range(3)) + "\n")


def dwi(path: Path, *, volumes: int = 7) -> Path:
    volume(path, volumes=volumes)
    stem = path.name.replace(".nii.gz", "").replace(".nii", "")
    gradients(path.parent, f"{stem}.bval", f"{stem}.bvec", count=volumes)
    return path


def hcp(folder: Path) -> Path:
    """As HCP unpacks: gradient deviations are a second file of four axes, masks and b0 have three."""
    volume(folder / "data.nii.gz", volumes=12)
    volume(folder / "grad_dev.nii.gz", volumes=9)
    volume(folder / "nodif_brain_mask.nii.gz", volumes=None)
    volume(folder / "nodif_brain.nii.gz", volumes=None)
    gradients(folder, "bvals", "bvecs", count=12)
    return folder / "data.nii.gz"


def names(items: list[dict]) -> list[str]:
    return [item["name"] for item in items]


@pytest.mark.parametrize("name", ["sub-01_dwi.nii.gz", "sub-01_dwi.nii", "SUB-01_DWI.NII.GZ"])
def test_one_file_with_gradients_of_its_name(tmp_path, name):
    path = volume(tmp_path / name)
    stem = name.split(".")[0]
    gradients(tmp_path, f"{stem}.bval", f"{stem}.bvec")
    volume(tmp_path / f"{stem}_mask.nii.gz", volumes=None)
    (item,) = inference_items(path)
    assert item == {
        "dwi": str(path),
        "bval": str(tmp_path / f"{stem}.bval"),
        "bvec": str(tmp_path / f"{stem}.bvec"),
        "mask": str(tmp_path / f"{stem}_mask.nii.gz"),
        "name": stem[:6],
    }


def test_hcp_folder_is_found_from_every_level_and_named_after_the_subject(tmp_path):
    path = hcp(tmp_path / "100307" / "T1w" / "Diffusion")
    sources = [path, path.parent, path.parents[1], path.parents[2], tmp_path]
    found = [inference_items(source) for source in sources]
    assert found[0] == [
        {
            "dwi": str(path),
            "bval": str(path.with_name("bvals")),
            "bvec": str(path.with_name("bvecs")),
            "mask": str(path.with_name("nodif_brain_mask.nii.gz")),
            "name": "100307",
        }
    ]
    assert all(items == found[0] for items in found)


def test_bids_folder(tmp_path):
    for session in ("ses-1", "ses-2"):
        dwi(tmp_path / "sub-01" / session / "dwi" / f"sub-01_{session}_dwi.nii.gz")
    volume(tmp_path / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii.gz", volumes=None)
    items = inference_items(tmp_path)
    assert names(items) == ["sub-01_ses-1", "sub-01_ses-2"]
    assert all(set(item) == {"dwi", "bval", "bvec", "name"} for item in items)


def test_subject_folders_of_files_with_the_same_name(tmp_path):
    for subject in ("b", "a"):
        dwi(tmp_path / subject / "dwi.nii.gz")
        volume(tmp_path / subject / "mask.nii.gz", volumes=None)
    items = inference_items(tmp_path)
    assert names(items) == ["a", "b"]
    assert [item["mask"] for item in items] == [str(tmp_path / s / "mask.nii.gz") for s in "ab"]


def test_several_dwi_of_one_folder_each_with_its_gradients(tmp_path):
    for name in ("one", "two"):
        dwi(tmp_path / f"{name}_dwi.nii.gz")
    assert names(inference_items(tmp_path)) == ["one", "two"]


def test_names_grow_by_folders_until_they_are_unique(tmp_path):
    for folder in ("x/scan", "y/scan", "x/other"):
        dwi(tmp_path / folder / "dwi.nii.gz")
    assert names(inference_items(tmp_path)) == ["other", "x_scan", "y_scan"]


def test_a_repeated_item_is_refused(tmp_path):
    dwi(tmp_path / "a.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [{"dwi": "a.nii.gz"}] * 2}))
    with pytest.raises(ValueError, match="expected each diffusion MRI once"):
        inference_items(tmp_path)


def test_data_list_keeps_order_maps_mask_and_subject(tmp_path):
    rows = []
    for subject in ("s2", "s1"):
        dwi(tmp_path / subject / "dwi.nii.gz")
        volume(tmp_path / subject / "ndi.nii.gz", volumes=None)
        rows.append({"dwi": f"{subject}/dwi.nii.gz", "ndi": f"{subject}/ndi.nii.gz", "subject": subject, "age": 3})
    gradients(tmp_path / "s1", "turned.bval", "turned.bvec")
    rows[1] |= {"bval": "s1/turned.bval", "bvec": "s1/turned.bvec"}
    (tmp_path / "datalist.json").write_text(json.dumps({"test": rows[:1], "validation": rows}))
    first, second = inference_items(tmp_path, section="validation")
    assert [first["name"], second["name"]] == ["s2", "s1"]
    assert first["bval"] == str(tmp_path / "s2" / "dwi.bval")  # beside the file, as the list names none
    assert second["bvec"] == str(tmp_path / "s1" / "turned.bvec")
    assert second["ndi"] == str(tmp_path / "s1" / "ndi.nii.gz")
    assert set(second) == {"dwi", "bval", "bvec", "ndi", "subject", "name"}
    assert len(inference_items(tmp_path)) == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"dwi": "a.nii.gz", "bval": "a.bval"}, "expected both 'bval' and 'bvec'.*'bval' alone"),
        ({"dwi": ["a.nii.gz", "a.nii.gz"]}, r"test\[0\]: expected a path under 'dwi', but got \['a"),
        ({"mask": "a.nii.gz"}, "expected 'dwi'"),
    ],
)
def test_faults_of_the_data_list(tmp_path, item, message):
    dwi(tmp_path / "a.nii.gz")
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [item]}))
    with pytest.raises(ValueError, match=message):
        inference_items(tmp_path)


def test_two_files_of_four_axes_for_one_pair_of_gradients(tmp_path):
    for name in ("data.nii.gz", "raw.nii.gz"):
        volume(tmp_path / name)
    gradients(tmp_path, "bvals", "bvecs")
    for source in (tmp_path, tmp_path / "raw.nii.gz"):
        with pytest.raises(ValueError, match=r"expected one diffusion MRI for bvals, but data.nii.gz, raw.nii.gz all"):
            inference_items(source)


def test_compressed_and_uncompressed_file_of_one_name(tmp_path):
    dwi(tmp_path / "a.nii.gz")
    volume(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"there are a.nii and a.nii.gz; remove one"):
        inference_items(tmp_path)


def test_shared_gradients_of_another_length(tmp_path):
    path = volume(tmp_path / "data.nii.gz", volumes=9)
    gradients(tmp_path, "bvals", "bvecs")
    for source in (path, tmp_path):
        with pytest.raises(
            ValueError, match=r"data.nii.gz: expected as many volumes as .*bvals has b-values \(7\), got 9"
        ):
            inference_items(source)


@pytest.mark.parametrize("present", [None, "a.bval", "a.bvec", "bvals"])
def test_missing_gradients_are_named(tmp_path, present):
    path = volume(tmp_path / "a.nii.gz")
    if present:
        (tmp_path / present).write_text("0 1000\n")
    missing = {None: "a.bval and a.bvec", "a.bval": "a.bvec", "a.bvec": "a.bval", "bvals": "bvecs"}[present]
    for source in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match=missing):
            inference_items(source)


def test_two_files_of_one_kind_of_gradients(tmp_path):
    path = dwi(tmp_path / "a.nii.gz")
    (tmp_path / "a.bvals").write_text("0\n")
    with pytest.raises(ValueError, match=r"a.nii.gz: .*a.bval and a.bvals; remove one"):
        inference_items(path)


def test_two_masks(tmp_path):
    path = dwi(tmp_path / "a.nii.gz")
    for name in ("mask", "nodif_brain_mask"):
        volume(tmp_path / f"{name}.nii.gz", volumes=None)
    with pytest.raises(ValueError, match="expected one mask beside it"):
        inference_items(path)
    volume(tmp_path / "a_mask.nii.gz", volumes=None)  # that of the file itself comes first
    assert inference_items(path)[0]["mask"] == str(tmp_path / "a_mask.nii.gz")


def test_functional_mri_is_left_out_with_a_warning_that_names_nobody(tmp_path, caplog):
    dwi(tmp_path / "sub-miller" / "dwi" / "sub-miller_dwi.nii.gz")
    volume(tmp_path / "sub-miller" / "func" / "sub-miller_bold.nii.gz", volumes=20)
    with caplog.at_level(logging.WARNING):
        items = inference_items(tmp_path)
    assert names(items) == ["sub-miller"]
    assert "left out 1 files of four axes without gradients" in caplog.text
    assert "miller" not in caplog.text


def test_results_of_an_earlier_run_and_hidden_files_are_left_out(tmp_path):
    dwi(tmp_path / "a.nii.gz")
    dwi(tmp_path / ".hidden.nii.gz")
    dwi(tmp_path / "made.nii.gz")
    (tmp_path / "made.json").write_text(json.dumps({"synthetic": True, "files": {"x": "made.nii.gz"}}, indent=2))
    assert names(inference_items(tmp_path)) == ["a"]


def test_sources_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a dataset folder"):
        inference_items(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected datalist.json, or diffusion MRI .* but there is none; name"):
        inference_items(tmp_path)
    path = volume(tmp_path / "t1w.nii.gz", volumes=None)
    with pytest.raises(FileNotFoundError, match="but there is none; name another folder"):
        inference_items(tmp_path)
    with pytest.raises(ValueError, match=r"t1w.nii.gz: expected a diffusion MRI of four axes.*\(4, 5, 3\)"):
        inference_items(path)
    (tmp_path / "a.bval").write_text("0\n")
    with pytest.raises(ValueError, match=r"a.bval: expected a diffusion MRI, .nii or .nii.gz"):
        inference_items(tmp_path / "a.bval")


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"a.nii.gz: expected a readable NIfTI"):
        inference_items(tmp_path)


def test_relative_source_gives_absolute_paths(tmp_path, monkeypatch):
    dwi(tmp_path / "in" / "a_dwi.nii.gz")
    monkeypatch.chdir(tmp_path)
    for source in ("in", "in/a_dwi.nii.gz", "."):
        (item,) = inference_items(source)
        assert item["dwi"] == str(tmp_path / "in" / "a_dwi.nii.gz")
        assert item["name"] == "a"


def test_names_of_a_single_path():
    assert name_of("/x/100307/T1w/Diffusion/data.nii.gz") == "100307"
    assert name_of("/x/sub-01_dwi.nii.gz") == "sub-01"
    assert name_of("/data/dwi.nii.gz") == "dwi"


@pytest.mark.parametrize("subject", ["mrtrix_msmt", "small_64D"])
def test_real_crops(subject):
    folder = HANDBOOK / "data" / "dmri2noddi" / subject
    if not folder.is_dir():
        pytest.skip("no real data here")
    (item,) = inference_items(folder)  # maps and mask of three axes lie beside the DWI
    assert item == {
        "dwi": str(folder / "dwi.nii.gz"),
        "bval": str(folder / "dwi.bval"),
        "bvec": str(folder / "dwi.bvec"),
        "mask": str(folder / "mask.nii.gz"),
        "name": subject,
    }
