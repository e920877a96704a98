# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from shared.files import save_json
from shared.result_files import ResultFiles, path_of, read_sidecar, remove_earlier


def claim(results: ResultFiles, path: str, sha256: str, *endings: str) -> str:
    stem = results.claim(path, "r", source_sha256=sha256, endings=endings or (".png",))
    return stem.relative_to(results.output_dir).as_posix()


def test_names_are_those_of_one_input(tmp_path):
    results = ResultFiles(tmp_path)
    assert claim(results, "a/x.png", "1") == "r"
    assert claim(results, "b/x.png", "1") == "r_1", "a copy is another input"
    assert claim(results, "a/x.png", "1") == "r"
    save_json({"synthetic": True, "source_sha256": "1", "files": {"mask": "r.png"}}, tmp_path / "r.json")
    assert claim(ResultFiles(tmp_path), "c/x.png", "1") == "r", "moved, not changed"
    assert claim(ResultFiles(tmp_path), "a/x.png", "2") == "r_1"


def test_subfolders_of_the_source_are_kept(tmp_path):
    (tmp_path / "in").mkdir()
    assert claim(ResultFiles(tmp_path, tmp_path / "in"), str(tmp_path / "in/a/b/x.png"), "1") == "a/b/r"
    assert claim(ResultFiles(tmp_path, tmp_path / "in"), "/elsewhere/a/x.png", "1") == "r"
    assert claim(ResultFiles(tmp_path, tmp_path / "in/x.png"), str(tmp_path / "in/x.png"), "1") == "r"


@pytest.mark.parametrize("content", ["{", "[1]", '{"synthetic": false}'])
def test_files_of_others_are_in_the_way(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert read_sidecar(tmp_path / "r.json") is None
    with pytest.raises(ValueError, match=f"^{tmp_path}/r.png: expected no file or a synthetic one"):
        claim(ResultFiles(tmp_path), "x.png", "1")
    save_json({"synthetic": True, "source_sha256": "1", "files": {"mask": "r.png"}}, tmp_path / "r.json")
    (tmp_path / "r.png").touch()
    assert claim(ResultFiles(tmp_path), "x.png", "1", ".png", "_sd.png") == "r"
    (tmp_path / "r_sd.png").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}/r_sd.png: expected no file"):
        claim(ResultFiles(tmp_path), "x.png", "1", ".png", "_sd.png")


def test_what_is_not_written_again_is_removed_and_nothing_outside_the_folder(tmp_path):
    for name in ("keep.png", "mine.png", "out/r.png", "out/r_sd.png", "out/mine.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = {"mask": "r.png", "sd": "r_sd.png", "evil": "../keep.png"}
    save_json({"synthetic": True, "files": files}, tmp_path / "out/r.json")
    remove_earlier(tmp_path / "out/r.json", {"r.png"})
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert found == ["keep.png", "mine.png", "out/mine.png", "out/r.png"]


def test_path_of_what_an_item_holds():
    tensor = MetaTensor(torch.zeros(1, 2, 3), meta={"filename_or_obj": ["a.nii"]})
    assert [path_of(value) for value in (tensor, "b.png", ["c.nii", "d.nii"], None, "", torch.zeros(1))] == [
        "a.nii", "b.png", "c.nii", None, None, None,
    ]  # fmt: skip
