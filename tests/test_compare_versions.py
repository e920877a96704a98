# SPDX-License-Identifier: Apache-2.0
"""`tools.compare_versions` with interpreters that only pretend to run a bundle."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tools import compare_versions as module
from tools.compare_results import Comparison, compare_folders, largest
from tools.compare_versions import compare_versions, infer, markdown, versions_of

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
# Answers `-c` with versions, and a run with what it was told, where, and one value.
INTERPRETER = """#!{python}
import json, os, sys, time
if sys.argv[1] == "-c":
    print(json.dumps({{"python": "3.10.1", "monai": "{monai}"}}))
    sys.exit()
words = dict(word[2:].split("=", 1) for word in sys.argv[4:])
os.makedirs(words["output_dir"])
seen = {{"words": words, "pythonpath": os.environ.get("PYTHONPATH"), "here": os.listdir(".")}}
with open(words["output_dir"] + "/../seen.json", "w") as file:
    json.dump(seen, file)
with open(words["output_dir"] + "/answer.json", "w") as file:
    json.dump({{"value": {value}, "monai_version": "{monai}"}}, file)
{end}
"""


@pytest.fixture
def phantoms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setitem(module.PHANTOMS, "sdseg", lambda out, **options: made.append((out, options)))
    return made


def interpreter(path: Path, *, monai: str = "1.6.1", value: float = 1.0, end: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.format(python=sys.executable, monai=monai, value=value, end=end))
    path.chmod(0o755)
    return path


def bundle(root: Path, name: str = "sdseg", *, exported: bool = True) -> Path:
    folder = root / name
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/inference.json").write_text("{}")
    if exported:
        (folder / "manifest.json").write_text("{}")
    return folder


def write(folder: Path, *, change: float = 0.0, affine: np.ndarray = AFFINE, monai: str = "1.6.1") -> Path:
    (folder / "a").mkdir(parents=True)
    values = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    values[1, 2, 3] += change
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "a/v.nii.gz")
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    pixels[0, 0] += round(change)
    text = PngImagePlugin.PngInfo()
    text.add_text("monai_version", monai)
    Image.fromarray(pixels).save(folder / "p.png", pnginfo=text)
    (folder / "s.json").write_text(json.dumps({"seed": 3, "software": {"monai": monai, "numpy": "2"}}))
    return folder


def compared(one: Path, two: Path) -> dict[str, Comparison]:
    return {c.file: c for c in compare_folders(one, two, "sdseg", "B")}


def test_results_that_differ_in_versions_alone_are_equal(tmp_path: Path) -> None:
    found = compared(write(tmp_path / "1"), write(tmp_path / "2", monai="1.5.2"))
    assert list(found) == ["a/v.nii.gz", "p.png", "s.json"]
    assert found["p.png"].elsewhere == ["monai_version"]
    assert found["s.json"].elsewhere == ["software.monai"]
    assert (found["p.png"].max_difference, found["p.png"].equal_bytes) == (0.0, False)
    assert (found["a/v.nii.gz"].max_difference, found["a/v.nii.gz"].affine_difference) == (0.0, 0.0)
    assert all(c.acceptable() for c in found.values())


def test_a_changed_voxel_pixel_or_affine_is_seen(tmp_path: Path) -> None:
    one = write(tmp_path / "1")
    changed = compared(one, write(tmp_path / "2", change=2.0))
    assert changed["a/v.nii.gz"].max_difference == pytest.approx(2.0)
    assert changed["p.png"].max_difference == 2.0
    assert not changed["p.png"].acceptable(1.9)
    assert changed["p.png"].acceptable(2.0)
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    shifted = compared(one, write(tmp_path / "3", affine=moved))["a/v.nii.gz"]
    assert (shifted.max_difference, shifted.affine_difference, shifted.elsewhere) == (0.0, 0.5, ["header"])
    assert not shifted.acceptable(1.0)  # the header is no matter of rounding


def test_another_seed_and_an_absent_file_are_seen(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1"), write(tmp_path / "2")
    (two / "s.json").write_text(json.dumps({"seed": 4, "software": {}}))
    (two / "p.png").unlink()
    (two / "more.csv").write_text("1")
    found = compared(one, two)
    assert "seed" in found["s.json"].elsewhere
    assert [name for name, c in found.items() if not c.acceptable(math.inf)] == ["more.csv", "p.png", "s.json"]
    assert found["p.png"].elsewhere == found["more.csv"].elsewhere == ["absent"]


def test_other_bytes_of_equal_content_are_named(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1"), write(tmp_path / "2")
    (two / "s.json").write_text(json.dumps(json.loads((one / "s.json").read_text()), indent=3))
    found = compared(one, two)["s.json"]
    assert (found.equal_bytes, found.elsewhere, found.acceptable()) == (False, ["encoding"], True)


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([0, 255], [255, 0], 255.0),  # no wrap around of unsigned levels
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.5], 0.5),
        ([1.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_largest_difference(one: list[float], two: list[float], expected: float) -> None:
    kind = np.uint8 if one == [0, 255] else np.float64
    assert largest(np.array(one, kind), np.array(two, kind)) == expected
    assert largest(np.zeros(2, np.uint8), np.zeros(2, np.uint16)) == math.inf


def test_table_of_two_interpreters(tmp_path: Path, phantoms: list, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = interpreter(tmp_path / "a/python"), interpreter(tmp_path / "b/python", monai="1.5.2")
    folder = bundle(tmp_path)
    compare_versions(str(folder), f"{a},{b}", str(tmp_path / "out"))
    assert phantoms == [(str(tmp_path / "out/data/sdseg"), {"overwrite": True, "num_images": 20, "seed": 1})]
    text = (tmp_path / "out/versions.md").read_text()
    assert text in capsys.readouterr().out
    assert "| B | python 3.10.1, monai 1.5.2 |" in text
    assert "| sdseg | B | answer.json |  |  | no | monai_version |" in text
    record = json.loads((tmp_path / "out/versions.json").read_text())
    assert (record["failures"], record["versions"]["A"]["monai"]) == ([], "1.6.1")
    assert record["files"][0]["elsewhere"] == ["monai_version"]


def test_another_value_ends_in_exit_code_1(tmp_path: Path, phantoms: list) -> None:
    a, b = interpreter(tmp_path / "a/python"), interpreter(tmp_path / "b/python", value=2.0)
    with pytest.raises(SystemExit, match="0 runs failed and 1 files differ"):
        compare_versions((str(bundle(tmp_path)),), (str(a), str(b)), str(tmp_path / "out"))
    assert "| sdseg | B | answer.json |  |  | no | value |" in (tmp_path / "out/versions.md").read_text()


def test_a_failed_run_is_told_with_its_last_line(tmp_path: Path, phantoms: list) -> None:
    a = interpreter(tmp_path / "a/python")
    b = interpreter(tmp_path / "b/python", end="sys.exit('x.pt: expected weights, found none')")
    with pytest.raises(SystemExit, match="1 runs failed and 0 files differ"):
        compare_versions(str(bundle(tmp_path)), [str(a), str(b)], str(tmp_path / "out"))
    assert "FAILED: sdseg with B: x.pt: expected weights, found none" in (tmp_path / "out/versions.md").read_text()


def test_an_exported_bundle_runs_from_an_empty_folder_with_nothing_of_ours_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    python, folder = interpreter(tmp_path / "a/python"), bundle(tmp_path)
    assert infer(folder, python, tmp_path / "out/sdseg", tmp_path / "data") is None
    seen = json.loads((tmp_path / "out/seen.json").read_text())
    assert (seen["pythonpath"], seen["here"]) == (None, [])
    assert seen["words"]["config_file"] == f"['{folder}/configs/inference.json']"
    assert (seen["words"]["bundle_root"], seen["words"]["dataset_dir"]) == (str(folder), str(tmp_path / "data"))


def test_a_source_folder_runs_small_with_the_repository_on_the_path(tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path / "a/python"), bundle(tmp_path, "cxr_ldm", exported=False)
    assert infer(folder, python, tmp_path / "out/cxr_ldm", None) is None
    seen = json.loads((tmp_path / "out/seen.json").read_text())
    assert seen["pythonpath"] == str(module.REPOSITORY)
    assert seen["words"]["config_file"].endswith("inference.json'," + f"'{folder}/configs/tiny.json']")
    assert "dataset_dir" not in seen["words"]


def test_a_run_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "a/python", end="time.sleep(60)")
    fault = infer(bundle(tmp_path), python, tmp_path / "out/sdseg", None, timeout=1.0)
    assert fault is not None
    assert fault.startswith("not finished after 1 s; raise --timeout")


def test_wrong_arguments(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python")
    with pytest.raises(ValueError, match=r"nothing: expected the folder of a bundle .*called sdseg, brain_controlnet"):
        compare_versions(str(tmp_path / "nothing"), f"{python},{python}", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="^--pythons: expected two interpreters or more"):
        compare_versions(str(bundle(tmp_path)), str(python), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"^/bin/false: expected a Python interpreter .*; correct --pythons"):
        versions_of(Path("/bin/false"))


def test_the_versions_of_this_interpreter() -> None:
    found = versions_of(Path(sys.executable))
    assert found["python"] == ".".join(str(number) for number in sys.version_info[:3])
    assert found["numpy"] == np.__version__


def test_numbers_of_the_table() -> None:
    rows = [
        Comparison("sdseg", "C", "v.nii.gz", False, 7.7e-7, 0.0, []),
        Comparison("sdseg", "C", "w.nii.gz", True, 0.0, 0.0, []),
        Comparison("sdseg", "C", "s.json", True, None, None, []),
    ]
    text = markdown({}, rows, [])
    assert "| sdseg | C | v.nii.gz | 7.7e-07 | 0 | no |  |" in text
    assert "| sdseg | C | 3 | 2 | 2 | 7.7e-07 |" in text
