# SPDX-License-Identifier: Apache-2.0
"""The folder, its configurations, its card, its zip."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from tests import commands
from tests.bundle_tools import read, strings, undefined_references
from tests.conftest import ROOT, digest
from tests.exports import TASKS, exported, zipped
from tools.export import archive, bundle, card, configs

tasks = pytest.mark.parametrize("task", TASKS)


def names(folder: Path, pattern: str) -> set[str]:
    return {path.stem for path in (folder / "configs").glob(pattern)}


@tasks
def test_manifest_states_every_file(task):
    folder = exported(task)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {k: v for k, v in digest(folder).items() if k != "manifest.json"}
    assert manifest["name"] == task
    assert manifest["build"] == "demo"
    assert manifest["version"] == read(folder / "configs/metadata.json")["version"]
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", manifest["commit"])
    stamp = (folder / f"{task}_lib/__init__.py").read_text()
    assert f'__version__ = "{manifest["version"]}"' in stamp
    assert f'__commit__ = "{manifest["commit"]}"' in stamp


@tasks
def test_nothing_refers_to_the_repository(task):
    folder = exported(task)
    for path in folder.rglob("*.json"):
        assert "shared." not in path.read_text(), path
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            name = getattr(node, "module", None) or ""
            assert not isinstance(node, ast.ImportFrom) or not name.startswith(("shared", "tools")) or node.level, path
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.suffix == ".pyc"]


@tasks
def test_code_is_formatted_as_the_zoo_asks(task):
    ruff = [str(Path(sys.executable).with_name("ruff"))]
    style = ["--config", "line-length=120", "--config", "format.skip-magic-trailing-comma=true"]
    done = subprocess.run([*ruff, "format", "--isolated", "--no-cache", "--check", *style, str(exported(task))])
    assert done.returncode == 0
    for path in exported(task).rglob("*.py"):
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
    for path in (exported(task) / "configs").glob("*.json"):
        assert path.read_text() == json.dumps(read(path), indent=4, ensure_ascii=True) + "\n"


@tasks
def test_configurations_find_their_parts_wherever_the_bundle_lies(task):
    folder = exported(task)
    for path in (folder / "configs").glob("*.json"):
        config = read(path)
        if path.stem == "metadata":
            continue
        own = [c for c in _components(config) if str(c["_target_"]).startswith(f"{task}_lib.")]
        assert all("@bundle_on_path" in _listed(component["_requires_"]) for component in own), path
        if "bundle_root" in config:
            assert own
            assert list(config)[:4] == ["_desc_", "imports", "bundle_root", "bundle_on_path"]
            assert undefined_references(config) == []
        else:
            assert "imports" not in config


@tasks
def test_demo_sizes_are_baked_in_and_full_sizes_kept(task):
    """Baked is what laying tiny.json over the source's file gives, less what nothing refers to."""
    folder, source = exported(task), ROOT / "bundles" / task / "configs"
    standalone = {path.stem for path in source.glob("*.json") if "bundle_root" in read(path)}
    assert names(folder, "published_*.json") == {f"published_{name}" for name in standalone}
    for name in standalone:
        expected = ConfigParser.load_config_files([str(source / f"{name}.json"), str(source / "tiny.json")])
        found = read(folder / f"configs/{name}.json")
        kept = {key: value for key, value in configs.self_contained(expected, f"{task}_lib").items() if key in found}
        assert {**kept, "ckpt_dir": "$@bundle_root + '/models'"} == {**found, "_desc_": expected["_desc_"]}
        assert set(read(source / f"{name}.json")) <= set(found)
        full = read(folder / f"configs/published_{name}.json")
        assert full["ckpt_dir"] == "$@bundle_root + '/models/published'"
        original = configs.self_contained(read(source / f"{name}.json"), f"{task}_lib")
        assert full == {**original, "ckpt_dir": full["ckpt_dir"]}
    # Laid over once more it changes nothing.
    again = ConfigParser.load_config_files([str(folder / f"configs/{x}.json") for x in ("inference", "tiny")])
    inference = read(folder / "configs/inference.json")
    assert {key: again[key] for key in inference if key != "_desc_"} == {
        key: value for key, value in inference.items() if key != "_desc_"
    }


@tasks
def test_only_the_weights_of_network_def_lie_at_the_top(task):
    """MONAI Label takes the shortest name of `models/*.pt`."""
    folder = exported(task)
    assert [path.name for path in (folder / "models").glob("*.pt")] == ["model.pt"]
    assert not (folder / "models/tiny").exists()
    source = ROOT / "bundles" / task / "models/tiny"
    assert {k: v for k, v in digest(folder / "models").items() if not k.startswith("tokenizer/")} == digest(source)
    state = torch.load(folder / "models/model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize(
    ("task", "shapes"),
    [
        ("sdseg", {"image": [96, 96], "pred": [96, 96]}),
        ("brain_controlnet", {"image": [80, 112], "pred": [80, 112]}),
        ("dmri2noddi", {"image": [16, 16, 16], "pred": [32, 32, 32]}),
        ("cxr_ldm", {"image": [77], "pred": [128, 128]}),
    ],
)
def test_metadata_has_the_shapes_of_the_weights(task, shapes):
    data_format = read(exported(task) / "configs/metadata.json")["network_data_format"]
    tensors = {**data_format["inputs"], **data_format["outputs"]}
    assert {name: tensor["spatial_shape"] for name, tensor in tensors.items()} == shapes
    # All else is the source's.
    source = read(ROOT / "bundles" / task / "configs/metadata.json")
    assert {**source, "network_data_format": data_format} == read(exported(task) / "configs/metadata.json")


@tasks
def test_card_is_true_for_the_copy(task):
    text = (exported(task) / "docs/README.md").read_text()
    assert card.INSTALL not in text
    assert f"`{task}_lib`" in text
    assert "demo weights, trained on synthetic phantoms only" in text
    assert "models/tiny" not in text
    named = set(re.findall(r"configs/(\w+\.\w+)", text))
    assert named <= {path.name for path in (exported(task) / "configs").iterdir()}, named
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if "monai.bundle run" in line]
    assert commands
    for command in commands:
        base = re.findall(r"configs/(\w+)\.json", command)[0]
        assert base.startswith("published_") != ("tiny.json" in command), command


@tasks
def test_same_files_give_the_same_zip(task, tmp_path):
    first = zipped(task)
    archive.write_zip(exported(task), tmp_path / "again.zip")
    assert first.read_bytes() == (tmp_path / "again.zip").read_bytes()
    with zipfile.ZipFile(first) as content:
        assert {name.split("/")[0] for name in content.namelist()} == {task}
        assert {name.split("/", 1)[1] for name in content.namelist()} == set(digest(exported(task)))
        assert content.testzip() is None


def test_other_weights_keep_the_full_size(tmp_path):
    weights = tmp_path / "trained"
    (weights / "stages").mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, weights / "model.pt")
    torch.save({"b": torch.ones(2)}, weights / "stages/autoencoder.pt")
    torch.save({"secret": torch.ones(2)}, weights / "checkpoint.pt")
    folder = bundle.export("sdseg", tmp_path / "out", weights=weights)
    assert json.loads((folder / "manifest.json").read_text())["build"] == "weights"
    source = read(ROOT / "bundles/sdseg/configs/inference.json")
    assert read(folder / "configs/inference.json") == configs.self_contained(source, "sdseg_lib")
    assert not names(folder, "published_*")
    found = set(digest(folder / "models"))
    assert {"model.pt", "stages/autoencoder.pt", "tiny/model.pt"} <= found
    assert not [name for name in found if "checkpoint" in name]
    assert "models/tiny" in (folder / "docs/README.md").read_text()


def test_overlay_of_the_users_own_training(tmp_path):
    weights = tmp_path / "trained"
    weights.mkdir()
    torch.save({"a": torch.ones(2)}, weights / "model.pt")
    overlay = tmp_path / "organs.json"
    overlay.write_text(json.dumps({"num_classes": 3, "image_size": [128, 192], "nobody_reads": 1}))
    folder = bundle.export("sdseg", tmp_path / "out", weights=weights, overlay=overlay)
    config = read(folder / "configs/inference.json")
    assert config["num_classes"] == 3
    assert "nobody_reads" not in config
    assert read(folder / "configs/published_inference.json")["num_classes"] == 1
    shape = read(folder / "configs/metadata.json")["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert shape == [128, 192]


def test_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    folder = tmp_path / "sdseg"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"sdseg: expected nothing or an earlier export"):
        bundle.export("sdseg", tmp_path)
    assert (folder / "mine.txt").read_text() == "x"
    shutil.rmtree(folder)
    shutil.copytree(exported("sdseg"), folder)
    (folder / "configs/stale.json").write_text("{}")
    before = digest(exported("sdseg"))
    assert digest(bundle.export("sdseg", tmp_path)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sdseg"]


def test_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    shutil.copytree(exported("sdseg"), tmp_path / "sdseg")
    monkeypatch.setattr(archive, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        bundle.export("sdseg", tmp_path)
    assert digest(tmp_path / "sdseg") == digest(exported("sdseg"))
    assert [path.name for path in tmp_path.iterdir()] == ["sdseg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unet"], r"^unet: expected one of brain_controlnet, cxr_ldm, dmri2noddi, sdseg"),
        (["all", "--weights", "x"], r"^--weights: expected the name of one bundle"),
        (["sdseg", "--overlay", "x"], r"^--overlay: expected --weights beside it"),
        (["sdseg", "--weights", "/nowhere"], r"^/nowhere/model.pt: expected weights"),
    ],
)
def test_wrong_commands(tmp_path, words, message):
    done = commands.run("tools.export_bundle", *words, "--out", tmp_path / "out")
    assert done.code == 1
    assert re.match(message, done.err), done.err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_card_without_the_sentence_to_replace_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Model Overview\n\n## Data\n")
    with pytest.raises(ValueError, match=r"README.md: expected 'The package of the repository must be installed"):
        card.card(path, package="x_lib", version="0", commit="c", build="demo", published=[])


def _components(config):
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from _components(value)
    elif isinstance(config, list):
        for value in config:
            yield from _components(value)


def _listed(value):
    return value if isinstance(value, list) else [value]


def test_no_personal_paths():
    for task in TASKS:
        for path in (exported(task) / "configs").glob("*.json"):
            found = [
                text for _, text in strings(read(path)) if "/home/" in text or "/root/" in text or "/work/" in text
            ]
            assert [text for text in found if not text.startswith("/workspace/")] == []
