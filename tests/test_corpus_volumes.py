# SPDX-License-Identifier: Apache-2.0
"""Commands, each in a process of its own, with the inputs of `tests.corpus_volumes`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from shared.datalist import PATH_KEYS
from tests import commands
from tests.conftest import ROOT
from tests.corpus import COMMANDS, DATALIST, BadInput, complaint, copied, edit_list, place
from tests.corpus_volumes import TWINS, VOLUMES
from tests.volume_faults import good_volumes

BUNDLES = ("brain_controlnet", "dmri2noddi", "sdseg")
CONFIGS = {"training": ["train"], "evaluation": ["train", "evaluate"], "inference": ["inference"]}
# Few steps; none of it meets a bad file.
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("brain_controlnet", "evaluation"): {"num_inference_steps": 1},
    ("brain_controlnet", "inference"): {"num_inference_steps": 1},
    ("dmri2noddi", "evaluation"): {"num_inference_steps": 1, "num_samples": 2},
    ("dmri2noddi", "inference"): {"deterministic": True},
    ("sdseg", "training"): {"flips": "none"},
    ("sdseg", "evaluation"): {"num_samples": 2},
}
REFUSED = [bad for bad in VOLUMES if bad.accepted is None]
READ = [bad for bad in VOLUMES if bad.accepted is not None]
# What `check_data` can be shown together: faults of files, not of the list.
OF_FILES = [bad for bad in VOLUMES if bad.key is not None and "check_data" in bad.commands]


def _matrix() -> Iterator[Any]:
    """Every bad input with each of its commands. The inference of all runs always, as do faults of the data list in
    `check_data`; of each kind one training, and one evaluation of damaged files and of what inference does not read."""
    shown: set[tuple[str, str, str]] = set()
    for bad in REFUSED:
        for command in COMMANDS:
            if command not in bad.commands:
                continue
            kind = (bad.bundle, bad.kind, command)
            quick = {
                "check_data": bad.key is None,
                "training": kind not in shown,
                "evaluation": kind not in shown and (bad.kind == "damaged" or "inference" not in bad.commands),
                "inference": True,
            }[command]
            shown.add(kind)
            yield pytest.param(bad, command, id=f"{bad}-{command}", marks=() if quick else pytest.mark.soak)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    for bundle in BUNDLES:
        (root / bundle).mkdir()
        good_volumes(bundle, root / bundle)
    # The server behind `commands` imports torch when it starts; no time of a command.
    commands.run("tools.check_data", root / "sdseg", limit=200)
    return {bundle: root / bundle for bundle in BUNDLES}


def words(bundle: str, command: str, source: Path, root: Path) -> list[str]:
    """The documented command line, for small networks, with everything it writes below a folder."""
    if command == "check_data":
        return ["tools.check_data", str(source)]
    files = [f"configs/{name}.json" for name in (*CONFIGS[command], "tiny")]
    options = {"dataset_dir": source, "output_dir": root / "out", **SMALL.get((bundle, command), {})}
    if command == "training":
        options["ckpt_dir"] = with_demo_weights(bundle, root / "models")
    if command != "inference":
        options |= {"tracking_uri": "", "latent_cache_dir": root / "latents", "max_epochs": 1}
        if bundle == "dmri2noddi":
            options["volume_cache_dir"] = root / "volumes"
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    run_id = ["training"] if command == "training" else []
    return ["monai.bundle", "run", *run_id, "--config_file", str(files), *given]


def with_demo_weights(bundle: str, folder: Path) -> Path:
    """A folder of models of its own: a training that goes on must not replace the shipped ones."""
    (folder / "stages").mkdir(parents=True)
    for file in (ROOT / f"bundles/{bundle}/models/tiny/stages").iterdir():
        (folder / "stages" / file.name).symlink_to(file)
    return folder


def run(bundle: str, command: str, source: Path, root: Path) -> commands.Finished:
    root.mkdir(exist_ok=True)
    cwd = ROOT if command == "check_data" else ROOT / "bundles" / bundle
    return commands.run(*words(bundle, command, source, root), cwd=cwd, limit=30)


def prepared(bad: BadInput, command: str, good: Path, folder: Path, make: Any = None) -> Path:
    """Write the bad file into a copy of the good dataset, and into the list of the section that the command reads."""
    file: Path = (make or bad.make)(copied(good, folder))
    if bad.key is not None:
        place(folder, file, key=bad.key, section="test")
    if command == "training":
        edit_list(folder, lambda content: content.update(training=content["test"], test=content["training"]))
    return file


def source_of(bad: BadInput, command: str, folder: Path, file: Path) -> Path:
    """What a command is given: images that need nothing beside them go to the inference as a file."""
    return file if command == "inference" and bad.key in ("flair", "image") else folder


@pytest.mark.reliability(3)
@pytest.mark.parametrize(("bad", "command"), list(_matrix()))
def test_refused_in_one_line_that_begins_with_the_file(bad, command, good, tmp_path):
    folder = tmp_path / "data"
    file = prepared(bad, command, good[bad.bundle], folder)
    done = run(bad.bundle, command, source_of(bad, command, folder, file), tmp_path / "run")
    if command == "check_data":
        lines = done.out.splitlines()
        assert (done.code, done.timed_out, "Traceback" in done.err) == (1, False, False), done.err
        assert [line for line in lines if line.startswith(f"{file}: ") and bad.words in line], lines
        assert " problem" in lines[-1]
    else:
        assert complaint(done, file, bad.words) is None, done.err[-2000:]
        assert not list((tmp_path / "run").rglob("*.nii.gz"))


# The data check of many bad files at once


@pytest.fixture(scope="module")
def checked(good, tmp_path_factory) -> dict[str, tuple[commands.Finished, dict[str, Path]]]:
    """Of each bundle the check of one dataset with all bad files, each of a subject of its own, and their paths."""
    return {bundle: _check_all(bundle, good[bundle], tmp_path_factory.mktemp(bundle)) for bundle in BUNDLES}


def _check_all(bundle: str, good: Path, root: Path) -> tuple[commands.Finished, dict[str, Path]]:
    folder = copied(good, root / "data")
    content = json.loads((folder / DATALIST).read_text())
    content["test"], files = [], {}
    for bad in OF_FILES:
        if bad.bundle != bundle:
            continue
        files[bad.name] = prepared(bad, "check_data", good, folder / bad.name)
        item = json.loads((folder / bad.name / DATALIST).read_text())["test"][0]
        content["test"].append({key: f"{bad}/{value}" if key in PATH_KEYS else value for key, value in item.items()})
    (folder / DATALIST).write_text(json.dumps(content))
    return run(bundle, "check_data", folder, root), files


@pytest.mark.reliability(3)
@pytest.mark.parametrize("bad", OF_FILES, ids=str)
def test_check_data_names_every_bad_file_and_no_other(bad, checked):
    done, files = checked[bad.bundle]
    assert (done.code, done.timed_out, "Traceback" in done.err) == (1, False, False), done.err[-2000:]
    *lines, summary = done.out.splitlines()
    own = [line for line in lines if line.startswith(f"{files[bad.name]}: ")]
    if bad.accepted is None:
        assert any(bad.words in line for line in own), own
    else:
        assert own == []
    begins = tuple(f"{file}: " for file in files.values())
    assert [line for line in lines if not line.startswith(begins)] == []
    assert summary.startswith(f"{len(lines)} problems in {len(files) + 2} items")


# What is read


def results(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Voxels and affine of every volume that a command made."""
    images: dict[str, Any] = {path.name: nibabel.load(path) for path in sorted(folder.rglob("*.nii.gz"))}
    return {name: (np.asarray(image.dataobj).squeeze(), image.affine) for name, image in images.items()}


def _made(bad: BadInput, make: Any, good: Path, root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    root.mkdir()
    file = prepared(bad, "inference", good, root / "data", make)
    done = run(bad.bundle, "inference", source_of(bad, "inference", root / "data", file), root / "run")
    assert (done.code, done.timed_out) == (0, False), done.err
    return results(root / "run/out")


@pytest.fixture(scope="module")
def made_of_twins() -> dict[int, Any]:
    """Some inputs have the same twin."""
    return {}


@pytest.mark.reliability(3)
@pytest.mark.parametrize("bad", READ, ids=str)
def test_read_as_documented(bad, good, made_of_twins, tmp_path):
    twin = TWINS[bad.name]
    if id(twin) not in made_of_twins:
        made_of_twins[id(twin)] = _made(bad, twin, good[bad.bundle], tmp_path / "twin")
    expected, found = made_of_twins[id(twin)], _made(bad, bad.make, good[bad.bundle], tmp_path / "bad")
    assert found.keys() == expected.keys() != set()
    for name, (values, affine) in expected.items():
        np.testing.assert_array_equal(found[name][0], values)
        np.testing.assert_array_equal(found[name][1], affine)
        assert np.ptp(values) > 0


def test_the_corpus_is_large_and_has_every_name_once():
    assert len(REFUSED) >= 34
    assert len({bad.name for bad in VOLUMES}) == len(VOLUMES)
    assert {bad.bundle for bad in VOLUMES} == set(BUNDLES)
