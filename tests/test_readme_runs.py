# SPDX-License-Identifier: Apache-2.0
"""The README's short blocks, run as they are written: in an empty HOME, without network, and twice with one result."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from shared.files import sha256_of_file
from tests.commands import Finished
from tests.conftest import ROOT, digest
from tests.readme_blocks import Block, blocks, execute

BUNDLES = ("cxr_ldm", "brain_controlnet", "sdseg", "dmri2noddi")
# The tests themselves forbid it to libraries, which then would not even try.
ONLINE = {"HF_HUB_OFFLINE": "0"}


def about(heading: str) -> dict[str, Block]:
    """The blocks below a heading, by the bundle whose folder they name."""
    found = {}
    for block in blocks():
        if block.heading == heading:
            (bundle,) = (bundle for bundle in BUNDLES if f"bundles/{bundle}" in block.text)
            assert bundle not in found, f"{block}: a second block about {bundle}"
            found[bundle] = block
    return found


WHOLE_WAY = about("The whole way, small")
INFERENCE = about("Inference")
# The others draw volumes, for minutes.
AS_WRITTEN = {bundle: INFERENCE[bundle] for bundle in ("cxr_ldm", "sdseg")}


def test_every_bundle_has_its_blocks():
    assert tuple(WHOLE_WAY) == tuple(INFERENCE) == BUNDLES
    for block in WHOLE_WAY.values():
        words = [" ".join(command.words) for command in block.commands]
        kinds = [kind for line in words for kind in (" training", "/evaluate", "/inference", ".report") if kind in line]
        assert kinds.count(" training") >= 2
        assert kinds[-3:] == ["/evaluate", "/inference", ".report"]


def assert_well(finished: list[Finished], block: Block) -> None:
    """Every command was run, and ended well without looking for the network."""
    for done in finished:
        assert (done.code, done.timed_out) == (0, False), f"{block}: {done.last_line}"
        assert done.network_attempts == ()
    assert len(finished) == sum(bool(command.module) for command in block.commands)


def facts(path: Path) -> bytes:
    """What a file says but for dates, times and the folder: weights, pixels, voxels and their grid, rows, measures."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        return b"".join(f"{name} {tensor.dtype}".encode() + tensor.numpy().tobytes() for name, tensor in state.items())
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return f"{picture.mode} {picture.size}".encode() + np.asarray(picture).tobytes()
    if path.name.endswith(".nii.gz"):
        image = nibabel.load(path)
        return image.affine.tobytes() + np.asarray(image.dataobj).tobytes()
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [
                [value for key, value in row.items() if key not in ("time", "seconds")] for row in csv.DictReader(file)
            ]
        return json.dumps(rows).encode()
    rows = [{key: value for key, value in row.items() if key != "note"} for row in json.loads(path.read_text())]
    return json.dumps([row for row in rows if row.get("group") != "Time and memory"]).encode()


def results(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(facts(path)).hexdigest() for path in paths}


RELEASED = ("models/**/*.pt",)
CURVES = ("runs/*/metrics.csv", "runs/*/previews/*.png")
MEASURED = ("runs/evaluation/evaluation/*.csv", "runs/evaluation/evaluation/*.png", "runs/evaluation/*/summary.json")
OUTPUTS = ("eval/**/*.png", "eval/**/*.nii.gz")
# What the inference leaves for each item, and for how many.
LEFT = {
    "cxr_ldm": (1, ("*.png",)),
    "brain_controlnet": (1, ("*_T1w.nii.gz", "*_T1w_sd.nii.gz", "*_T1w.png")),
    "sdseg": (2, ("*_mask.png", "*_mask_probability.png", "*_mask_agreement.png", "*_mask_overlay.png")),
    "dmri2noddi": (1, tuple(f"*_{name}{end}.nii.gz" for name in ("ndi", "odi", "fwf") for end in ("", "_sd"))),
}


@pytest.mark.reliability(5)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_whole_way_twice(bundle, tmp_path, record_property):
    block, shipped = WHOLE_WAY[bundle], digest(ROOT / "bundles" / bundle / "models")
    ways, commands = [], 0
    for name in ("one", "two"):
        finished = execute(block, tmp_path / name, environment=ONLINE)
        assert_well(finished, block)
        commands += len(finished)
        ways.append(tmp_path / name / "try" / bundle)
    record_property("cases", commands)
    record_property("figure", f"{bundle}: 0 network attempts in {commands} commands, both runs bit-equal")
    one, two = ways
    for patterns in (RELEASED, CURVES, MEASURED, OUTPUTS):
        found = results(one, patterns)
        assert found
        assert found == results(two, patterns)
    assert digest(ROOT / "bundles" / bundle / "models") == shipped

    count, kinds = LEFT[bundle]
    assert [len(list((one / "eval").rglob(kind))) for kind in kinds] == [count] * len(kinds)
    trained = one / "models/tiny/model.pt"
    assert sha256_of_file(trained) not in shipped.values()
    said = [json.loads(path.read_text()) for path in (one / "eval").rglob("*.json")]
    assert {item["weights_sha256"] for item in said if "weights_sha256" in item} == {sha256_of_file(trained)}
    report = (one / "report.html").read_text()
    assert "No evaluation was run" not in report
    # Maps have no pictures of their own.
    assert ("No generated images to show" in report) == (bundle == "dmri2noddi")


def repository(folder: Path, bundle: str) -> Path:
    """A folder that holds of the repository what an inference with the demo weights reads."""
    for part in ("configs", "models"):
        shutil.copytree(ROOT / "bundles" / bundle / part, folder / "bundles" / bundle / part)
    return folder


@pytest.mark.reliability(5)
@pytest.mark.parametrize("bundle", AS_WRITTEN)
def test_demo_weights_are_asked_as_the_readme_says(bundle, tmp_path, record_property):
    block, root = AS_WRITTEN[bundle], repository(tmp_path / "repository", bundle)
    finished = execute(block, tmp_path / "tmp", root=root, environment=ONLINE)
    assert_well(finished, block)
    record_property("cases", len(finished))
    found = root / "bundles" / bundle / "eval"
    if bundle == "cxr_ldm":  # "each with a JSON beside it that says what made it"
        pictures = sorted(found.glob("*.png"))
        assert len(pictures) == 4
        said = [json.loads(picture.with_suffix(".json").read_text()) for picture in pictures]
        assert {item["prompt"] for item in said} == {"There is a large left pleural effusion."}
    else:  # "for each picture `..._mask.png` at its own size, the probability, the agreement, the mask over ..."
        for picture in (tmp_path / "tmp/polyps/images").glob("*.png"):
            (mask,) = found.rglob(f"{picture.stem}_mask.png")
            for end in ("", "_probability", "_agreement", "_overlay"):
                assert size_of(mask.with_name(f"{mask.stem}{end}.png")) == size_of(picture)
            assert json.loads(mask.with_suffix(".json").read_text())["num_samples"] == 4


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
