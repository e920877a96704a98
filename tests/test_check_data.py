# SPDX-License-Identifier: Apache-2.0
"""`shared.data_check` and `tools.check_data`: planted faults are found, each named by its file."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from shared.data_check import check_dataset, check_volume
from tools.check_data import check_data


def picture(path, seed=0, shape=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)).save(path)


def good_set(folder, per_section=3):
    """Nine images, three per section, each with text and a subject of its own."""
    sections = {}
    for number, section in enumerate(("training", "validation", "test")):
        sections[section] = []
        for index in range(per_section):
            name = f"images/{section}_{index}.png"
            picture(folder / name, 10 * number + index)
            sections[section].append({"image": name, "text": "Clear lungs.", "subject": f"{section}{index}"})
    return sections


def write(folder, sections):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "datalist.json").write_text(json.dumps(sections))


def problems(folder, sections, **kwargs):
    write(folder, sections)
    return check_dataset(folder, **kwargs).problems


def test_a_good_set_has_no_problem(tmp_path, capsys):
    write(tmp_path, good_set(tmp_path))
    check_data(str(tmp_path))
    assert capsys.readouterr().out == "no problems in 9 items (3 training, 3 validation, 3 test), 9 files\n"


def corrupt(path):
    path.write_bytes(path.read_bytes()[:60])


def constant(path):
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.unlink(), "expected this file ('image' of"),
        (lambda path: path.write_bytes(b""), "expected content, but the file is empty"),
        (lambda path: path.write_text("words"), "expected a PNG, JPEG or DICOM image"),
        (corrupt, "expected a readable image"),
        (constant, "all pixels are 0"),
    ],
)
def test_one_bad_file_gives_one_line_that_starts_with_it(tmp_path, fault, message):
    sections = good_set(tmp_path)
    bad = tmp_path / "images" / "validation_1.png"
    fault(bad)
    (problem,) = problems(tmp_path, sections)
    assert problem.startswith(f"{bad}: ")
    assert message in problem
    assert "\n" not in problem


def test_texts_and_keys(tmp_path):
    sections = good_set(tmp_path)
    sections["training"][0]["text"] = "  "
    del sections["training"][1]["text"]
    del sections["test"][2]["subject"]
    found = problems(tmp_path, sections)
    name = tmp_path / "datalist.json"
    assert any(p.startswith(f"{name}: training[0]: the text under 'text' is empty") for p in found)
    assert any(p.startswith(f"{name}: training[1]: expected the keys text") for p in found)
    assert any(p.startswith(f"{name}: test[2]: expected the keys subject") for p in found)
    assert len(found) == 3


def test_reports(tmp_path):
    sections = good_set(tmp_path)
    for item, content in zip(sections["training"], (b"Clear.", b" \n", b"\xe9"), strict=True):
        del item["text"]
        item["report"] = item["image"].replace("images/", "").replace(".png", ".txt")
        (tmp_path / item["report"]).write_bytes(content)
    found = problems(tmp_path, sections)
    assert len(found) == 2
    assert found[0].startswith(f"{tmp_path / 'training_1.txt'}: the report is empty")
    assert found[1].startswith(f"{tmp_path / 'training_2.txt'}: expected UTF-8 text, got the byte 0xe9 at offset 0")


def test_leaks_of_subjects_and_of_images(tmp_path):
    sections = good_set(tmp_path)
    sections["test"][0]["subject"] = "training0"
    shutil.copy(tmp_path / "images/training_1.png", tmp_path / "images/test_1.png")
    sections["validation"][2]["image"] = sections["training"][2]["image"]
    found = problems(tmp_path, sections)
    assert len(found) == 3
    assert any(
        "test_1.png: expected an image of its own in test" in p and "training_1.png in training" in p for p in found
    )
    assert any("training_2.png: expected an image of its own in validation" in p for p in found)
    assert any("'training0' is in training, test" in p for p in found)
    # the same image twice within one section is no leak (two reports of one film)
    sections = good_set(tmp_path)
    sections["training"][1]["image"] = sections["training"][0]["image"]
    assert problems(tmp_path, sections) == []


def test_without_images_nothing_is_decoded(tmp_path):
    sections = good_set(tmp_path)
    corrupt(tmp_path / "images" / "test_0.png")
    (tmp_path / "images" / "test_1.png").unlink()
    found = problems(tmp_path, sections, images=False)
    assert [p.split(":")[0] for p in found] == [str(tmp_path / "images" / "test_1.png")]


def volume(path, values, affine=None):
    nibabel.Nifti1Image(np.asarray(values, np.float32), np.eye(4) if affine is None else affine).to_filename(path)


def test_volumes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"t1w": (4, 5, 6), "flair": (4, 5, 6)}
    items = []
    for index in range(5):
        item = {"subject": str(index)}
        for key, shape in shapes.items():
            item[key] = f"{index}_{key}.nii.gz"
            volume(tmp_path / item[key], rng.random(shape))
        items.append(item)
    values = rng.random((4, 5, 6))
    values[0, 0, 0] = np.nan
    volume(tmp_path / "0_t1w.nii.gz", values)
    volume(tmp_path / "1_t1w.nii.gz", rng.random((4, 5, 6, 2)))
    volume(tmp_path / "2_flair.nii.gz", rng.random((4, 5, 7)))
    whole = (tmp_path / "3_flair.nii.gz").read_bytes()
    (tmp_path / "3_flair.nii.gz").write_bytes(whole[: len(whole) // 2])
    found = sorted(problems(tmp_path, {"training": items}))
    assert len(found) == 4
    for problem, (name, message) in zip(
        found,
        [("0_t1w", "1 are NaN"), ("1_t1w", "expected a 3-D volume like most files of 't1w', but got a 4-D volume"),
         ("2_flair", "expected the grid of 't1w'"), ("3_flair", "expected a readable NIfTI file")],
        strict=True,
    ):  # fmt: skip
        assert problem.startswith(str(tmp_path / f"{name}.nii.gz"))
        assert message in problem


def test_pairs_on_other_grids(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    flipped, moved = affine.copy(), affine.copy()
    flipped[0] *= -1
    moved[1, 3] = 4
    items = []
    for index in range(6):
        item = {"subject": str(index), "flair": [f"{index}_flair.nii", f"{index}_t2w.nii"]}
        item |= {"t1w": f"{index}_t1w.nii", "mask": f"{index}_mask.nii"}
        for name in (item["t1w"], *item["flair"], item["mask"]):
            volume(tmp_path / name, rng.random((4, 5, 6)), affine)
        items.append(item)
    volume(tmp_path / "1_flair.nii", rng.random((4, 5, 6)), flipped)
    volume(tmp_path / "2_mask.nii", rng.random((4, 5, 6)), moved)
    volume(tmp_path / "3_t2w.nii", rng.random((4, 5, 7)), affine)
    found = problems(tmp_path, {"training": items})
    assert len(found) == 3
    assert found[0].startswith(
        f"{tmp_path / '1_flair.nii'}: expected the orientation RAS of 't1w', but got LAS; reorient"
    )
    assert found[1].startswith(f"{tmp_path / '2_mask.nii'}: expected the origin (0, 0, 0) of 't1w', but got (0, 4, 0)")
    assert found[2].startswith(f"{tmp_path / '3_t2w.nii'}: expected the grid of 't1w' (4, 5, 6), but got (4, 5, 7)")
    assert "register it" in found[1]


def test_pictures_of_a_pair_have_one_size(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2, (16, 12))
    (problem,) = problems(tmp_path, {"training": [{"t1w": "a.png", "flair": "b.png", "subject": "1"}]})
    assert problem.startswith(f"{tmp_path / 'b.png'}: expected the grid of 't1w' (12, 16, 1), but got (16, 12, 1)")


def test_voxels_must_be_numbers(tmp_path):
    colours = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(colours, np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: expected one real number per voxel, but got"):
        check_volume(tmp_path / "a.nii")


def test_an_affine_that_cannot_be_inverted(tmp_path):
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((3, 3, 3)).astype(np.float32), np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 2, 0
    image.header["srow_x"] = 0
    nibabel.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[280:296] = bytes(16)  # srow_x of the NIfTI-1 header
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.nii: expected a finite, invertible affine"):
        check_volume(tmp_path / "a.nii")


def test_label_images_may_be_constant_and_shared(tmp_path):
    sections = good_set(tmp_path)
    constant(tmp_path / "empty.png")
    for part in sections.values():
        for item in part:
            item["label"] = "empty.png"
    assert problems(tmp_path, sections) == []


def test_exit_code_and_output(tmp_path, capsys):
    sections = good_set(tmp_path)
    (tmp_path / "images" / "test_0.png").unlink()
    write(tmp_path, sections)
    with pytest.raises(SystemExit) as stop:
        check_data(str(tmp_path))
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(str(tmp_path / "images" / "test_0.png"))
    assert lines[1] == "1 problem in 9 items (3 training, 3 validation, 3 test), 9 files"
    with pytest.raises(FileNotFoundError, match="expected a dataset folder"):
        check_data(str(tmp_path / "nowhere"))


def test_mixed_channels(tmp_path):
    sections = good_set(tmp_path)
    colours = np.random.default_rng(5).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "images" / "training_1.png")
    Image.fromarray(colours[..., 0]).convert("P").save(tmp_path / "images" / "test_2.png")
    found = sorted(problems(tmp_path, sections))
    assert len(found) == 2
    assert "test_2.png: expected a picture of 1 channel like most files of 'image', but got a palette" in found[0]
    assert "training_1.png: expected a picture of 1 channel like most" in found[1]
    assert "got a picture of 3 channels" in found[1]
