# SPDX-License-Identifier: Apache-2.0
"""The checks of exported bundles: a good one passes, and every planted fault is named by the check that is for it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exports import TASKS, exported, zipped
from tests.toy_bundle import LIB, NAME, edit, list_files, make_bundle, make_data
from tools.bundle_checks import workflows
from tools.bundle_checks.bundle import open_bundle
from tools.bundle_checks.commands import combinations
from tools.bundle_checks.fake_data import MAKERS
from tools.check_bundle import READING, check_bundle, checked

Plant = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy to plant faults in."""
    return Path(shutil.copytree(good, tmp_path / NAME))


def found(folder: Path) -> dict[str, list[str]]:
    """Faults by check, of those that read."""
    with open_bundle(folder) as opened:
        return {name: faults for name, check in READING.items() if (faults := check(opened))}


def test_good_bundle_has_no_faults(good):
    assert found(good) == {}


@pytest.mark.parametrize("task", TASKS)
def test_exported_bundles_have_no_faults(task):
    assert found(exported(task)) == {}
    assert found(zipped(task)) == {}


# Plants


def write(name: str, text: str | bytes) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return plant


def replace(name: str, old: str, new: str) -> Plant:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return plant


def append(name: str, text: str) -> Plant:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def change(name: str, key: str, value: Any) -> Plant:
    """Set a nested entry of a configuration; `None` removes it."""

    def plant(folder: Path) -> None:
        def put(content: Any) -> None:
            *parents, last = key.split("#")
            for part in parents:
                content = content[int(part) if part.isdigit() else part]
            if value is None:
                del content[last]
            else:
                content[last] = value

        edit(folder, name, put)

    return plant


def overlay(name: str, key: str, value: Any) -> Plant:
    """Set an entry of an overlay, whose keys are whole ids."""
    return lambda folder: edit(folder, name, lambda content: content.update({key: value}))


def save(name: str, content: Any) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)

    return plant


def line(text: str) -> Plant:
    return append(f"{LIB}/items.py", f"{text}\n")


METADATA, README, INFERENCE = "configs/metadata.json", "docs/README.md", "configs/inference.json"
EXPRESSION = "inference.json: ckpt_dir: "
FAULTS: list[tuple[str, Plant, str]] = [
    # Files
    ("required files", lambda folder: (folder / "configs/evaluate.json").unlink(), "configs/evaluate.json: missing"),
    (
        "required files",
        write("scripts/lib/x.txt", "x\n"),
        "scripts/lib/x.txt: the Model Zoo's .gitignore leaves out lib",
    ),
    ("required files", write("docs/run.log", "x"), r"docs/run.log: .*leaves out \*.log"),
    ("required files", write("docs/.hidden", "x"), "docs/.hidden: expected no hidden file"),
    ("sizes of files", write("docs/big.png", bytes(1_100_000)), "docs/big.png: expected a picture of at most 1 MB"),
    (
        "sizes of files",
        write("docs/big.dat", bytes(25_000_001)),
        "big.dat: 25.0 MB, expected at most 25 MB or an entry in",
    ),
    (
        "sizes of files",
        write("large_files.yml", "large_files:\n- path: a.pt\n  url: http://x/a.pt\n"),
        "a.pt: expected hash_val, hash_type.*|.*expected an https url",
    ),
    ("sizes of files", write("large_files.yml", "files: []\n"), "large_files.yml: expected a list 'large_files'"),
    ("text", append(README, "end "), "expected one newline at the end"),
    ("text", append(README, "end \n"), "README.md: line [0-9]+: expected no spaces at the end"),
    ("text", append(README, "See /home/ada/notes.\n"), "README.md: /home/ada: a path of somebody's machine"),
    ("text", write("docs/notes.txt", b"\xff\xfe\n"), "notes.txt: expected text in UTF-8"),
    ("licence text", write("LICENSE", "Apache License\n"), "LICENSE: expected the whole text of Apache-2.0"),
    # Metadata
    ("metadata: schema", change("metadata", "task", None), "'task' is a required property"),
    (
        "metadata: schema",
        change("metadata", "network_data_format#inputs#image#num_channels", "one"),
        "image#num_channels: 'one' is not of type 'integer'",
    ),
    (
        "metadata: schema",
        change("metadata", "schema", "https://x/meta_schema_20220324.json"),
        "schema: expected the address",
    ),
    (
        "metadata: versions",
        change("metadata", "changelog", {"0.0.1": "x"}),
        "changelog: expected an entry for version 0.1.0",
    ),
    (
        "metadata: versions",
        change("metadata", "monai_version", "1.4.9"),
        "monai_version: expected a version that does not",
    ),
    ("metadata: versions", replace(f"{LIB}/__init__.py", "0.1.0", "0.2.0"), "__version__ = \"0.1.0\", got '0.2.0'"),
    ("metadata: entries", change("metadata", "eval_metrics", None), "eval_metrics: missing"),
    ("metadata: entries", change("metadata", "intended_use", "For everyone."), "intended_use: expected 'research only"),
    ("metadata: entries", change("metadata", "network_data_format#outputs", {"mask": {}}), "expected 'pred' first"),
    # Packages
    (
        "pins",
        change("metadata", "required_packages_version#pytorch-ignite", ">=0.5"),
        "pytorch-ignite: expected an exact",
    ),
    ("pins", change("metadata", "numpy_version", "2.4.6"), "numpy: 2.4.6 needs Python 3.11 or newer"),
    ("packages", line("import nibabel"), f"nibabel: {LIB}/items.py needs it"),
    (
        "packages",
        change("metadata", "required_packages_version", {}),
        "pytorch-ignite: configs/inference.json: evaluator need",
    ),
    (
        "packages",
        change("inference", "inferer", {"_target_": "dipy.core.sphere.Sphere"}),
        "dipy: configs/inference.json: inf",
    ),
    ("packages", line("from monai.networks.nets import AutoencoderKL"), f"einops: {LIB}/items.py needs it"),
    # Configurations
    ("JSON format", append(INFERENCE, "\n"), r"inference.json, line last: expected json.dumps\(indent=4\)"),
    (
        "JSON format",
        replace(INFERENCE, "Doubles pictures.", "Doubles pictures \u2014."),
        "inference.json, line 2: expected json",
    ),
    (
        "JSON format",
        replace("configs/tiny.json", '"max_epochs": 1', '"max_epochs": 1,\n    "max_epochs": 2'),
        "each key once",
    ),
    ("JSON format", write("configs/tiny.json", "{\n"), "configs/tiny.json: Expecting"),
    (
        "logging.conf",
        replace("configs/logging.conf", "class=StreamHandler", "class=os.system"),
        "expected a handler of logg",
    ),
    ("ids", change("inference", "postprocessing", None), "inference.json: postprocessing: missing"),
    (
        "ids",
        change("train", "validate#dataset#transform", []),
        'validate#dataset#transform: expected "@validate#preprocess',
    ),
    (
        "ids",
        change("train", "train#handlers#1#interval", 1),
        r'train#handlers#1#interval: expected "@val_interval", got 1',
    ),
    (
        "ids",
        change("train", "training", ["$@validate#evaluator.run()"]),
        "train.json: training: expected the same as run",
    ),
    (
        "references",
        change("inference", "channels_too", "@chanels"),
        "inference.json: channels_too: chanels is not defined",
    ),
    (
        "references",
        change("train", "channels", "%configs/inference.json::channels"),
        "train.json: channels: .*working dir",
    ),
    (
        "references",
        change("inference", "channels", "@_meta_#version"),
        "inference.json: channels: .*without the metadata",
    ),
    (
        "paths and addresses",
        change("train", "dataset_dir", "/data/ada"),
        "train.json: dataset_dir: /data/ada: expected a p",
    ),
    (
        "paths and addresses",
        change("train", "url", "https://example.org/x.pt"),
        "train.json: url: .*expected no address",
    ),
    (
        "expressions",
        change("inference", "ckpt_dir", "$__import__('os').getcwd()"),
        f"{EXPRESSION}.*__import__ is not allowe",
    ),
    ("expressions", change("inference", "ckpt_dir", "$@bundle_root"), f"{EXPRESSION}.*needs no"),
    (
        "expressions",
        change("inference", "ckpt_dir", "$@bundle_root + '" + "x" * 80 + "'"),
        f"{EXPRESSION}.*longer than 80",
    ),
    ("expressions", change("inference", "amp", "$@device.type == 'cuda'"), "in MONAI Label the device is a string"),
    ("own components", change("inference", "network_def#_requires_", None), 'expected "_requires_": "@bundle_on_path"'),
    (
        "own components",
        change("train", "loss", {"_target_": "shared.losses.X"}),
        "shared.losses.X: expected toy_doubling_lib",
    ),
    ("own components", change("train", "imports", ["$import toy_doubling_lib"]), "expected nothing but import os"),
    # Code
    (
        "code",
        line("from toy_doubling_lib import network"),
        "line [0-9]+: from toy_doubling_lib import: expected a relative",
    ),
    ("code", line("from ..other import x"), r"from ..other import: leads out of toy_doubling_lib"),
    ("code", line("from .others import x"), r"from .others import ...: there is no module others"),
    ("code", line("type Number = int"), "line [0-9]+: no Python 3.10"),
    ("code", line("from datetime import UTC"), "datetime.UTC is not in Python 3.10"),
    (
        "code",
        replace(f"{LIB}/network.py", "# SPDX-License-Identifier: Apache-2.0\n", ""),
        "expected a licence in the first",
    ),
    (
        "code",
        write("scripts/x.py", "# SPDX-License-Identifier: Apache-2.0\n"),
        "scripts/x.py: expected code in toy_doubling_lib",
    ),
    # README
    ("README: sections", replace(README, "## Limitations", "## Limits"), "section '## Limitations' is missing"),
    ("README: sections", replace(README, "Research only.", "For all."), "expected the statement 'Research only"),
    (
        "README: commands",
        replace(README, "configs/inference.json", "configs/infer.json"),
        "configs/infer.json does not exist",
    ),
    (
        "README: commands",
        replace(README, "DIR --channels 1", "DIR --chanels 1"),
        "--chanels is not defined in configs/inference",
    ),
    (
        "README: commands",
        replace(README, "`--channels`", "`--chanels`"),
        "`--chanels`: --chanels is not defined in any",
    ),
    (
        "README: commands",
        replace(README, "run training --config_file configs", "run trainning --config_file configs"),
        "trainn",
    ),
    # Overlays
    (
        "combinations",
        change("evaluate", "run", ["$@validate#evaluater.run()"]),
        r"train \+ evaluate: .*validate#evaluater is n",
    ),
    (
        "combinations",
        overlay("evaluate", "validate#dataset", {"_target_": "Dataset", "transform": []}),
        r"train \+ evaluate: va",
    ),
    # Weights
    (
        "weights: places",
        save("models/unet.pt", {"x": torch.zeros(1)}),
        "models/unet.pt: expected models/model.pt alone",
    ),
    ("weights: tensors", save("models/stages/a.pt", {"x": Path("x")}), "a.pt: torch.load.*refuses it"),
    ("weights: tensors", save("models/stages/a.pt", {"x": 1}), "a.pt: x: expected a plain tensor, got int"),
    (
        "weights: tensors",
        save("models/stages/a.pt", {"x": torch.tensor([1, torch.nan])}),
        "a.pt: x: expected finite numbers",
    ),
]

# What one fault brings with it.
CONSEQUENCES = {
    "required files": {"README: commands", "combinations", "code"},
    "references": {"paths and addresses", "combinations", "ids"},
    "metadata: entries": {"metadata: schema"},
    "packages": {"expressions"},
    "JSON format": {"text"},
    "ids": {"references", "combinations"},
    "text": {"README: sections"},
    "own components": {"packages", "expressions"},
    "README: commands": {"combinations"},
    "code": {"packages"},
    "expressions": set(),
}


@pytest.mark.parametrize(("check", "plant", "message"), FAULTS, ids=[f"{fault[0]}-{fault[2][:30]}" for fault in FAULTS])
def test_planted_fault_is_named_by_its_check(bundle, check, plant, message):
    plant(bundle)
    list_files(bundle)
    faults = found(bundle)
    assert check in faults, faults
    assert any(re.search(message, fault) for fault in faults[check]), faults[check]
    assert not set(faults) - {check} - CONSEQUENCES.get(check, set()), faults


def test_manifest_must_say_what_is_there(bundle):
    replace(README, "It only doubles.", "It doubles.")(bundle)
    write("docs/more.txt", "x\n")(bundle)
    (bundle / "docs/data_license.txt").unlink()
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"]["../models/other.pt"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps({**content, "name": "other", "version": "0.2.0"}, indent=4) + "\n")
    faults = "\n".join(found(bundle)["manifest"])
    for message in (
        "docs/README.md: another SHA-256 than manifest.json says",
        "docs/more.txt: not listed in manifest.json",
        "docs/data_license.txt: listed in manifest.json, but missing",
        "../models/other.pt: manifest.json lists a path outside of the bundle",
        "expected the name of the folder, 'toy_doubling', got 'other'",
        "version '0.2.0', but metadata.json has '0.1.0'",
    ):
        assert message in faults
    (bundle / "manifest.json").unlink()
    assert found(bundle)["manifest"] == ["manifest.json: missing"]


def test_links_are_found(bundle):
    (bundle / "models/unet.txt").symlink_to(bundle / "LICENSE")
    assert found(bundle)["no links, safe zip"] == ["models/unet.txt: expected a file, got a symbolic link"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brain_vessels", "expected no '_v' in a name"),
        ("Toy-Doubling", "expected small letters, digits and underscores"),
        ("toy_doubling_twice", "part of another bundle's name or the other way round: toy_doubling"),
    ],
)
def test_names_that_scripts_cut_wrongly(bundle, name, message):
    other = Path(shutil.copytree(bundle, bundle.with_name(name)))
    assert any(message in fault for fault in found(other)["name"])


def test_zip_is_read_and_unsafe_entries_are_named(good, tmp_path):
    path = tmp_path / "toy.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(good.rglob("*")):
            archive.write(file, f"{NAME}/{file.relative_to(good)}")
    assert found(path) == {}
    link = zipfile.ZipInfo(f"{NAME}/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../outside.txt", "x")
        archive.writestr("beside.txt", "x")
    assert found(path)["no links, safe zip"] == [
        f"{NAME}/link: expected a file, got a symbolic link",
        "../outside.txt: expected a path inside the zip's folder",
        "beside.txt: expected everything in one folder, found it beside",
    ]
    assert not (tmp_path / "outside.txt").exists()


def test_what_is_no_bundle_is_refused(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"none: expected the folder or zip of a bundle"),
        open_bundle(tmp_path / "none"),
    ):
        pass
    (tmp_path / "x.zip").write_text("x")
    with pytest.raises(ValueError, match=r"x\.zip: .*got another kind of file"), open_bundle(tmp_path / "x.zip"):
        pass
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.writestr("LICENSE", "x")
    with (
        pytest.raises(ValueError, match=r"flat\.zip: expected one folder at the root"),
        open_bundle(tmp_path / "flat.zip"),
    ):
        pass


def test_combinations_are_those_of_commands_and_overlays(good):
    with open_bundle(good) as opened:
        assert set(combinations(opened)) == {
            *(("inference",), ("train",), ("inference", "tiny"), ("train", "tiny")),
            *(("train", "multi_gpu_train"), ("train", "evaluate"), ("train", "evaluate", "tiny")),
        }


def test_command_prints_a_line_per_check_and_fails(bundle, capsys):
    (bundle / INFERENCE).unlink()
    with pytest.raises(SystemExit) as caught:
        check_bundle(str(bundle))
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "pass  licence text" in lines
    assert f"FAIL  manifest: {INFERENCE}: listed in manifest.json, but missing" in lines
    assert re.fullmatch(rf"{NAME}: \d+ of {len(READING)} checks passed in \d+ s", lines[-1])


# With the bundle's code, in processes of their own


@pytest.fixture
def data_for_toys(monkeypatch) -> None:
    monkeypatch.setitem(MAKERS, NAME, make_data)


def test_good_bundle_passes_everything_and_stays_as_it_is(good, data_for_toys):
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*")}
    with open_bundle(good) as opened:
        results = list(checked(opened))
    assert {result.name: result.faults for result in results if result.faults} == {}
    assert [result.note for result in results if result.name == "workflows and their properties"] == ["7 built"]
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*")} == before


def test_faults_of_code_are_found_without_the_repository(bundle):
    line("import shared.files")(bundle)
    write(f"{LIB}/layers.py", "import importlib\n\nimportlib.import_module('tools.phantoms')\n")(bundle)
    change("inference", "inferer", {"_target_": "SimpleInferer", "spied": 1})(bundle)
    overlay("evaluate", "validate#inferer", {"_target_": "monai.inferers.SimpleInfererer"})(bundle)
    save("models/model.pt", {"layer.weight": torch.zeros(1, 1, 1, 1), "extra": torch.zeros(1)})(bundle)
    with open_bundle(bundle) as opened:
        answer = workflows.look(opened)
    imports = "\n".join(answer["imports"])
    assert f"{LIB}.items: ModuleNotFoundError: shared" in imports
    assert f"{LIB}.layers: ModuleNotFoundError: tools.phantoms belongs to the repository" in imports
    signatures = "\n".join(answer["signatures"])
    assert "inference: inferer: SimpleInferer: got an unexpected keyword argument 'spied'" in signatures
    assert "train + evaluate: validate#inferer: monai.inferers.SimpleInfererer does not exist" in signatures
    assert re.search("models/model.pt: does not fit network_def.*Missing key.*layer.bias", answer["strict"][0])


def test_faults_of_workflows_are_found(bundle, data_for_toys):
    change("train", "train#dataset#data#folder", "@ckpt_dir")(bundle)
    with open_bundle(bundle) as opened:
        faults, note = workflows.build(opened)
    assert note == "2 built"
    assert len(faults) == 5
    assert re.match("train: FileNotFoundError: .*models/values.txt", faults[0])


def test_output_of_another_shape_is_found(bundle):
    change("metadata", "network_data_format#outputs#pred#num_channels", 2)(bundle)
    with open_bundle(bundle) as opened:
        (fault,), _ = workflows.monai_faults(opened, "verify_net_in_out")
    assert "monai.bundle verify_net_in_out: ValueError: output channel number `1` doesn't match: `2`" in fault
