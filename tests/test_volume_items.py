# SPDX-License-Identifier: Apache-2.0
"""`shared.volume_items`: which images an inference translates."""

from __future__ import annotations

import pytest

from shared.datalist import write_datalist
from shared.files import save_json
from shared.volume_items import inference_items


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.fixture
def dataset(tmp_path):
    touch(tmp_path, "a_t1.nii", "a_fl.nii", "a_m.nii", "b_fl.nii", "b_dwi.nii")
    rows = [
        {
            "t1w": "a_t1.nii",
            "flair": "a_fl.nii",
            "mask": "a_m.nii",
            "subject": "a",
            "session": "1",
            "num_slices": 9,
            "intensity": {"t1w": [3.5, 700.0]},
        },
        {"flair": ["b_fl.nii", "b_dwi.nii"], "subject": "b"},
    ]
    write_datalist(tmp_path, {"training": rows[:1], "test": rows[1:]})
    return tmp_path


def test_section_of_a_dataset_folder(dataset):
    (item,) = inference_items(dataset, section="training")
    expected = {key: str(dataset / f"a_{name}.nii") for key, name in (("image", "fl"), ("t1w", "t1"), ("mask", "m"))}
    assert item == {**expected, "subject": "a", "session": "1", "intensity": {"t1w": [3.5, 700.0]}}
    (item,) = inference_items(str(dataset))
    assert item == {"image": [str(dataset / "b_fl.nii"), str(dataset / "b_dwi.nii")], "subject": "b"}


def test_several_conditions_become_channels_in_their_order(dataset):
    (item,) = inference_items(dataset, section="training", condition_keys=["mask", "flair"])
    assert item["image"] == [str(dataset / "a_m.nii"), str(dataset / "a_fl.nii")]
    assert inference_items(dataset, section="training", condition_keys="t1w")[0]["image"] == str(dataset / "a_t1.nii")


def test_faults_of_a_dataset_folder_are_named(dataset):
    with pytest.raises(ValueError, match=r"^\S*datalist\.json: expected a section 'validation'"):
        inference_items(dataset, section="validation")
    with pytest.raises(ValueError, match=r"^\S*datalist\.json: test\[0\]: expected 't1w'"):
        inference_items(dataset, condition_keys=("t1w",))
    (dataset / "b_fl.nii").unlink()
    with pytest.raises(FileNotFoundError, match=r"^\S*b_fl\.nii: expected this file \('flair'"):
        inference_items(dataset)


@pytest.mark.parametrize("keys", [(), ("unheard_of",), ("flair", "subject")])
def test_unknown_condition_keys_are_named(dataset, keys):
    with pytest.raises(ValueError, match="^condition_keys: expected one or more of image"):
        inference_items(dataset, condition_keys=keys)


def test_folder_of_flair_volumes_at_any_depth(tmp_path):
    touch(
        tmp_path, "s2/anat/s2_FLAIR.nii.gz", "s2/anat/s2_T1w.nii.gz", "s1_flair.nii", "s1_T1w.nii", "._s1_FLAIR.nii",
        "s1_FLAIR.json", "s3_FLAIR.png",
    )  # fmt: skip
    assert inference_items(tmp_path) == [
        {"image": str(tmp_path / "s1_flair.nii"), "subject": "s1_flair"},
        {"image": str(tmp_path / "s2/anat/s2_FLAIR.nii.gz"), "subject": "s2_anat_s2_FLAIR"},
    ]


def test_folder_without_flair_in_any_name_gives_all(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii", "notes.txt", "c.png")
    assert [item["subject"] for item in inference_items(tmp_path)] == ["a", "b"]


def test_what_an_earlier_run_made_is_not_taken_for_an_input(tmp_path):
    touch(tmp_path, "a.nii.gz", "out/a_T1w.nii.gz", "out/a_T1w_sd.nii.gz", "a.json")
    files = {"image": "a_T1w.nii.gz", "standard_deviation": "a_T1w_sd.nii.gz"}
    save_json({"synthetic": True, "files": files}, tmp_path / "out" / "a_T1w.json")
    assert [item["subject"] for item in inference_items(tmp_path)] == ["a"]
    with pytest.raises(FileNotFoundError, match=r"^\S*out: expected .* but there are none but synthetic ones"):
        inference_items(tmp_path / "out")


def test_folder_of_png_slices(tmp_path):
    touch(tmp_path, "p/1/x_slice-0_FLAIR.png", "p/1/x_slice-0_T1w.png")
    assert [item["image"] for item in inference_items(tmp_path)] == [str(tmp_path / "p/1/x_slice-0_FLAIR.png")]


def test_paths_are_absolute(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii")
    monkeypatch.chdir(tmp_path)
    assert inference_items(".") == inference_items("a.nii") == [{"image": str(tmp_path / "a.nii"), "subject": "a"}]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "a.png"])
def test_one_file(tmp_path, name):
    touch(tmp_path, name)
    (item,) = inference_items(tmp_path / name)
    assert item == {"image": str(tmp_path / name), "subject": name[0]}


def test_faults_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^\S*gone: expected a dataset folder, a folder of FLAIR volumes or"):
        inference_items(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="^" + str(tmp_path) + ": expected datalist.json, or .nii"):
        inference_items(tmp_path)
    touch(tmp_path, "a.dcm", "b_FLAIR.nii")
    with pytest.raises(ValueError, match=r"^\S*a\.dcm: expected a file \.nii, \.nii\.gz or \.png"):
        inference_items(tmp_path / "a.dcm")
    for source in (tmp_path, tmp_path / "b_FLAIR.nii"):
        with pytest.raises(ValueError, match=f"^{source}: expected datalist.json in the folder, as 2 images"):
            inference_items(source, condition_keys=("t1w", "flair"))
