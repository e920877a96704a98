# SPDX-License-Identifier: Apache-2.0
"""The hub's layout: a bundle that still runs, a card, equal safetensors; what a push does, on a hub made of dicts."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow, download, load, push_to_hf_hub
from safetensors import safe_open
from safetensors.torch import load_file

from shared.files import sha256_of_file
from tests.conftest import ROOT, digest
from tools.command_line import run
from tools.export.archive import files_of, write_manifest
from tools.hub_layout import make_layout, read_manifest, write_safetensors
from tools.model_card import CARDS
from tools.push import differences, listing, push, upload

REPO = "some-lab/sdseg"
REAL_HUB = huggingface_hub.HfApi
# MONAI says before it reads any configuration that one should trust it.
TRUSTED = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


def about(build: str = "demo") -> dict[str, str]:
    return {"name": "sdseg", "version": "0.1.0", "commit": "0123abc", "build": build}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of a few bytes: a convolution whose weights are known, in half precision as the demo weights are."""
    folder = tmp_path / "dist" / "sdseg"
    for name in ("configs", "docs", "models/stages"):
        (folder / name).mkdir(parents=True)
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    metadata = {
        "version": "0.1.0",
        "monai_version": "1.6.1",
        "pytorch_version": "2.14.1",
        "numpy_version": "2.2.6",
        "name": "A convolution",
        "data_source": "pictures of a hospital",
    }
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    config = {
        "bundle_root": ".",
        "network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 2, "out_channels": 3, "kernel_size": 1},
        "weights": "$torch.load(@bundle_root + '/models/model.pt', weights_only=True)",
        "imports": ["$import torch"],
        "run": ["$@network_def.load_state_dict(@weights)", "$@network_def(torch.ones(1, 2, 5, 4)).sum().item()"],
    }
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "docs/README.md").write_text("# Model Overview\n\nA convolution.\n")
    (folder / "docs/data_license.txt").write_text("none\n")
    half = torch.arange(6, dtype=torch.float16).reshape(3, 2, 1, 1)
    torch.save({"weight": half, "bias": torch.ones(3, dtype=torch.float16)}, folder / "models/model.pt")
    shared = torch.full((2, 3), torch.nan)
    torch.save({"a": shared, "b": shared.T, "steps": torch.tensor(7)}, folder / "models/stages/autoencoder.pt")
    write_manifest(folder, **about())
    return folder


def layout_of(bundle: Path, out: Path, **changes: Any) -> Path:
    return make_layout(bundle, out, **{"repo": REPO, "tag": "0.1.0", "license": "apache-2.0", **changes})


class Hub:
    """Stands for `huggingface_hub.HfApi`: repositories as dicts of tags to files, and a record of the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.folders: dict[str, dict[str, dict[str, bytes]]] = {}
        self.arguments: dict[str, dict[str, Any]] = {}

    def _record(self, name: str, **arguments: Any) -> None:
        # The real class must take the same arguments.
        inspect.signature(getattr(REAL_HUB, name)).bind_partial(None, **arguments)
        self.calls.append(name)
        self.arguments[name] = arguments

    def repo_exists(self, repo: str) -> bool:
        return repo in self.folders

    def list_repo_refs(self, repo: str) -> Any:
        return SimpleNamespace(tags=[SimpleNamespace(name=name) for name in self.folders[repo] if name != "main"])

    def list_repo_tree(self, repo: str, *, recursive: bool, revision: str) -> list[Any]:
        assert recursive
        return [
            SimpleNamespace(path="models", tree_id="0"),
            *(entry(*item) for item in self.folders[repo][revision].items()),
        ]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._record("create_repo", private=private, exist_ok=exist_ok)
        self.folders.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id: str, folder_path: str, **arguments: Any) -> Any:
        self._record("upload_folder", **arguments)
        folder = Path(folder_path)
        self.folders[repo_id]["main"] = {name: (folder / name).read_bytes() for name in files_of(folder)}
        return SimpleNamespace(oid="f00d")

    def create_tag(self, repo_id: str, *, tag: str, **arguments: Any) -> None:
        self._record("create_tag", tag=tag, **arguments)
        self.folders[repo_id][tag] = dict(self.folders[repo_id]["main"])


def entry(path: str, content: bytes) -> Any:
    """What the hub lists of a file: large ones by SHA-256, others by git's name of the blob."""
    if path.endswith((".pt", ".safetensors")):
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
        return SimpleNamespace(path=path, blob_id="name of the pointer", lfs=lfs)
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return SimpleNamespace(path=path, blob_id=blob, lfs=None)


# --- the layout


def test_layout_holds_the_bundle_and_what_the_hub_wants(bundle: Path, tmp_path: Path):
    before = digest(bundle)
    layout = layout_of(bundle, tmp_path / "out")
    assert layout == tmp_path / "out" / "sdseg"
    after = digest(layout)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: value for name, value in before.items() if name != "manifest.json"
    }
    added = {"README.md", ".gitattributes", "models/model.safetensors", "models/stages/autoencoder.safetensors"}
    assert after.keys() - before.keys() == added
    assert digest(bundle) == before
    manifest = read_manifest(layout)
    assert {key: manifest[key] for key in about()} == about()
    assert manifest["files"] == {name: value for name, value in after.items() if name != "manifest.json"}


def test_layout_is_the_same_bytes_again_and_replaces_itself(bundle: Path, tmp_path: Path):
    layout = layout_of(bundle, tmp_path / "out")
    first = digest(layout)
    (layout / "stray.txt").write_text("of an earlier version")
    assert digest(layout_of(bundle, tmp_path / "out")) == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sdseg"]


def test_layout_takes_the_place_of_nothing_else(bundle: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"^{bundle}: expected no such folder or an earlier layout of 'sdseg'"):
        layout_of(bundle, bundle.parent)
    other = tmp_path / "out" / "sdseg" / "thesis.tex"
    other.parent.mkdir(parents=True)
    other.write_text("years of work")
    with pytest.raises(ValueError, match="name another --out"):
        layout_of(bundle, tmp_path / "out")
    assert other.read_text() == "years of work"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"/manifest\.json: expected the manifest"),
        (lambda folder: (folder / "LICENSE").write_text("other"), r": expected .*\n  LICENSE: another SHA-256"),
        (lambda folder: (folder / "LICENSE").unlink(), r": expected .*\n  LICENSE: .* missing"),
        (lambda folder: (folder / "patient.png").write_bytes(b"face"), r": expected .*\n  patient\.png: not listed"),
        (lambda folder: write_manifest_with(folder, "../secret"), r": expected .*\n  \.\./secret: .* outside"),
        (lambda folder: write_manifest(folder, **{**about(), "version": "0.2.0"}), r": .*\n.*'0.2.0', but metadata"),
    ],
)
def test_a_changed_bundle_is_refused(bundle: Path, tmp_path: Path, harm: Any, message: str):
    harm(bundle)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{bundle}{message}"):
        layout_of(bundle, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def write_manifest_with(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {**manifest["files"], name: "0"}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


def test_large_files_are_taken_and_their_list_is_not(bundle: Path, tmp_path: Path):
    model = bundle / "models/model.pt"
    entries = [{"path": "models/model.pt", "url": "https://x.org/x", "hash_val": sha256_of_file(model)}]
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": entries}))
    write_manifest(bundle, **about())
    layout = layout_of(bundle, tmp_path / "out")
    assert (layout / "models/model.pt").read_bytes() == model.read_bytes()
    assert not (layout / "large_files.yml").exists()
    assert "large_files.yml" not in read_manifest(layout)["files"]
    model.unlink()
    with pytest.raises(ValueError, match=rf"^{model}: expected .* found none; get it with .*download_large_files"):
        layout_of(bundle, tmp_path / "out")


# --- safetensors


@pytest.mark.parametrize("name", ["models/model", "models/stages/autoencoder"])
def test_safetensors_equal_the_weights(bundle: Path, tmp_path: Path, name: str):
    layout = layout_of(bundle, tmp_path / "out")
    expected = torch.load(bundle / f"{name}.pt", weights_only=True)
    copy = load_file(layout / f"{name}.safetensors")
    assert copy.keys() == expected.keys()
    for key, tensor in expected.items():
        assert copy[key].dtype == tensor.dtype
        assert torch.equal(copy[key].nan_to_num(8), tensor.nan_to_num(8))
    with safe_open(layout / f"{name}.safetensors", framework="pt") as file:
        assert file.metadata() == {**about(), "pt_sha256": sha256_of_file(bundle / f"{name}.pt")}


def test_safetensors_refuse_what_is_no_state_dict(tmp_path: Path):
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.pt: expected a state dict .*\['dict', 'int'\]"):
        write_safetensors(tmp_path / "model.pt", about={})
    assert not (tmp_path / "model.safetensors").exists()


def test_a_wrong_copy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"a": torch.tensor([1.0, 2.0])}, tmp_path / "model.pt")
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: {"a": torch.tensor([1.0, 2.0 + 1e-6])})
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the tensors of model\.pt, got others"):
        write_safetensors(tmp_path / "model.pt", about={})
    assert not (tmp_path / "model.safetensors").exists()


# --- the card


def head_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_card_of_demo_weights(bundle: Path, tmp_path: Path):
    card = (layout_of(bundle, tmp_path / "out") / "README.md").read_text()
    head = head_of(card)
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "monai"
    assert head["pipeline_tag"] == "image-segmentation"
    assert {"monai", "medical", "segmentation", "demo"} <= set(head["tags"])
    assert "datasets" not in head
    assert "**Demo weights.**" in card
    assert "pictures of a hospital" not in card
    assert "Not for diagnosis" in card
    assert "# Model Overview\n\nA convolution.\n" in card
    assert f"--source huggingface_hub --repo {REPO} --version 0.1.0" in card


def test_card_of_other_weights(bundle: Path, tmp_path: Path):
    write_manifest(bundle, **about("weights"))
    layout = layout_of(bundle, tmp_path / "out", license="other", datasets=["some-lab/polyps"])
    card = (layout / "README.md").read_text()
    head = head_of(card)
    assert (head["license"], head["license_link"]) == ("other", "docs/data_license.txt")
    assert head["datasets"] == ["some-lab/polyps"]
    assert "demo" not in head["tags"]
    assert "Demo weights" not in card
    assert "| trained on | pictures of a hospital |" in card


def test_every_bundle_has_a_task_that_the_hub_knows():
    names = {path.parent.parent.name for path in (ROOT / "bundles").glob("*/configs/metadata.json")}
    assert CARDS.keys() == names
    assert {card.pipeline_tag for card in CARDS.values()} <= {"image-segmentation", "text-to-image", "image-to-image"}


def test_a_bundle_without_a_card_is_refused(bundle: Path, tmp_path: Path):
    bundle = bundle.rename(bundle.parent / "unheard_of")
    write_manifest(bundle, **{**about(), "name": "unheard_of"})
    with pytest.raises(ValueError, match=r"expected one of the bundles brain_controlnet.* got 'unheard_of'.*CARDS"):
        layout_of(bundle, tmp_path / "out")


# --- MONAI reads it


@TRUSTED
def test_monai_loads_and_runs_the_layout(bundle: Path, tmp_path: Path):
    layout = layout_of(bundle, tmp_path / "out")
    network = load("sdseg", bundle_dir=tmp_path / "out", workflow_type="inference", device="cpu")
    assert torch.equal(network.weight.flatten(), torch.arange(6.0))
    workflow = ConfigWorkflow(
        config_file=str(layout / "configs/inference.json"),
        meta_file=str(layout / "configs/metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(layout),
    )
    # (0 + ... + 5) + 3 biases of 1, at 20 pixels
    assert workflow.run()[-1] == (15 + 3) * 20


def test_monai_downloads_and_pushes_the_layout(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout = layout_of(bundle, tmp_path / "out")
    asked = {}

    def snapshot(*, repo_id: str, revision: str, local_dir: str) -> None:
        asked.update(repo_id=repo_id, revision=revision)
        shutil.copytree(layout, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    download("sdseg", source="huggingface_hub", repo=REPO, version="0.1.0", bundle_dir=tmp_path / "got")
    assert asked == {"repo_id": REPO, "revision": "0.1.0"}
    assert digest(tmp_path / "got" / "sdseg") == digest(layout)
    read_manifest(tmp_path / "got" / "sdseg")

    hub = Hub()
    hub.create_tag = lambda repo_id, *, tag, exist_ok: hub.calls.append(tag)  # type: ignore[method-assign]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: hub)
    push_to_hf_hub(REPO, "sdseg", str(tmp_path / "got"), version="0.1.0")
    assert hub.calls == ["create_repo", "upload_folder", "0.1.0"]
    # It puts a card of its own in the place of ours, and leaves all else.
    assert {name for name, content in hub.folders[REPO]["main"].items() if content != (layout / name).read_bytes()} == {
        "README.md"
    }


# --- the push


def test_push_creates_uploads_and_tags(bundle: Path, tmp_path: Path):
    layout, hub = layout_of(bundle, tmp_path / "out"), Hub()
    assert (
        upload(layout, repo=REPO, tag="0.1.0", private=True, api=hub) == f"{REPO}: uploaded as commit f00d, tag 0.1.0"
    )
    assert hub.calls == ["create_repo", "upload_folder", "create_tag"]
    assert hub.arguments["create_repo"] == {"private": True, "exist_ok": True}
    assert hub.arguments["upload_folder"] == {"commit_message": "sdseg 0.1.0", "delete_patterns": "*"}
    assert hub.arguments["create_tag"] == {"tag": "0.1.0", "revision": "f00d"}
    assert hub.folders[REPO]["0.1.0"].keys() == set(files_of(layout))


def test_same_content_under_the_same_tag_does_nothing(bundle: Path, tmp_path: Path):
    layout, hub = layout_of(bundle, tmp_path / "out"), Hub()
    upload(layout, repo=REPO, tag="0.1.0", private=True, api=hub)
    hub.calls.clear()
    assert "is there with the same content; nothing was uploaded" in upload(
        layout, repo=REPO, tag="0.1.0", private=True, api=hub
    )
    assert hub.calls == []


@pytest.mark.parametrize("name", ["models/model.pt", "configs/inference.json", "new file"])
def test_other_content_under_the_same_tag_is_refused(bundle: Path, tmp_path: Path, name: str):
    layout, hub = layout_of(bundle, tmp_path / "out"), Hub()
    upload(layout, repo=REPO, tag="0.1.0", private=True, api=hub)
    published = json.dumps({path: entry.hex() for path, entry in hub.folders[REPO]["0.1.0"].items()})
    hub.calls.clear()
    (layout / name).write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"^--tag: .*'0.1.0' is there with other content \({name}\); nothing was upl"):
        upload(layout, repo=REPO, tag="0.1.0", private=True, api=hub)
    assert hub.calls == []
    assert json.dumps({path: entry.hex() for path, entry in hub.folders[REPO]["0.1.0"].items()}) == published
    assert "tag 0.1.1" in upload(layout, repo=REPO, tag="0.1.1", private=True, api=hub)


def test_a_file_that_is_gone_is_a_difference(bundle: Path, tmp_path: Path):
    layout = layout_of(bundle, tmp_path / "out")
    tree = [entry(name, (layout / name).read_bytes()) for name in files_of(layout)]
    assert differences(layout, tree) == []
    (layout / "LICENSE").unlink()
    assert differences(layout, tree) == ["LICENSE"]


def test_command_pushes_to_the_hub(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "from the environment")
    push(str(bundle), repo=REPO, private=False)
    assert hub.arguments["create_repo"]["private"] is False
    assert hub.arguments["create_tag"]["tag"] == "0.1.0"
    assert hub.folders[REPO]["0.1.0"]["models/model.pt"] == (bundle / "models/model.pt").read_bytes()
    assert "uploaded as commit f00d" in capsys.readouterr().out


def test_dry_run_writes_and_lists_and_asks_nobody(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("HfApi", "get_token"):
        monkeypatch.setattr(huggingface_hub, name, lambda: pytest.fail("a dry run asked the hub"))
    push(str(bundle), repo=REPO, dry_run=True, out=str(tmp_path / "out"), tag="0.1.0-rc1")
    layout, out = tmp_path / "out" / "sdseg", capsys.readouterr().out
    assert listing(layout) in out
    weights = layout / "models/model.safetensors"
    assert f"{weights.stat().st_size:>12}  {sha256_of_file(weights)}  models/model.safetensors\n" in out
    assert "tag 0.1.0-rc1; nothing was uploaded" in out
    assert "--version 0.1.0-rc1" in (layout / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "sdseg"}, r"^--repo: expected ORG/NAME, got 'sdseg'"),
        ({"repo": REPO, "dry_run": True}, r"^--out: expected a folder"),
        ({"repo": REPO}, r"^HF_TOKEN: expected a token .* `hf auth login`"),
    ],
)
def test_command_says_what_is_missing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        push(str(bundle), **options)


@pytest.mark.parametrize("commit", ["0123abc+changes", "unknown"])
def test_only_the_export_of_a_commit_is_published(bundle: Path, tmp_path: Path, commit: str):
    write_manifest(bundle, **{**about(), "commit": commit})
    push(str(bundle), repo=REPO, dry_run=True, out=str(tmp_path / "out"))
    with pytest.raises(
        ValueError, match=rf"^{bundle}/manifest.json: expected the export of a commit, got '{commit[:7]}"
    ):
        push(str(bundle), repo=REPO)


def test_licence_of_trained_weights_must_be_said(bundle: Path, tmp_path: Path):
    write_manifest(bundle, **about("weights"))
    with pytest.raises(ValueError, match=r"^--license: expected the licence .* got none.*terms of training data"):
        push(str(bundle), repo=REPO, dry_run=True, out=str(tmp_path / "out"))
    push(str(bundle), repo=REPO, dry_run=True, out=str(tmp_path / "out"), license="cc-by-nc-4.0")
    assert head_of((tmp_path / "out/sdseg/README.md").read_text())["license"] == "cc-by-nc-4.0"


def test_a_token_is_no_option(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["push", str(bundle), "--repo", REPO, "--token", "hf_secret"])
    with pytest.raises(SystemExit, match="--token: expected an option of this command") as error:
        run(push, name="tools.push")
    assert "hf_secret" not in str(error.value)
