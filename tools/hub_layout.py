# SPDX-License-Identifier: Apache-2.0
"""The folder that goes to the Hugging Face hub: an exported bundle with a model card and safetensors copies.

The bundle's files lie at the root, as in MONAI's own repositories on the hub: `monai.bundle.download` takes a snapshot
of the repository as the bundle's folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from shared.files import atomic_path, sha256_of_file, sha256_of_state
from tools.bundle_checks.bundle import Bundle
from tools.bundle_checks.files import large_files, manifest_faults
from tools.export.archive import MANIFEST, write_manifest
from tools.export.large_files import LARGE_FILES
from tools.model_card import model_card

# What the hub stores by content instead of in git. It refuses other files over 10 MB.
LARGE_PATTERNS = ("*.pt", "*.safetensors", "*.ts", "*.gz", "*.png")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Content of `manifest.json` after a check that the folder holds the files it names, unchanged, and no others.

    Others are results of runs, caches, files of an editor: they must not be published by accident.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a file is missing, has other content, or is not in the manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the manifest of an exported bundle, found none; "
            "make one with `python -m tools.export_bundle TASK --out DIST` and name DIST/TASK"
        )
    bundle = Bundle(folder.resolve())
    # Asked first: that these files are absent is the normal state of a bundle which comes from the Model Zoo's git.
    absent = [name for name in large_files(bundle) if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder / absent[0]}: expected this file of {LARGE_FILES}, found none; "
            f"get it with `python -m monai.bundle download_large_files --bundle_path {folder}`"
        )
    if faults := manifest_faults(bundle):
        raise ValueError(f"{folder}: expected a bundle as it was exported, got\n  " + "\n  ".join(faults))
    return json.loads(path.read_text(encoding="utf-8"))


def make_layout(folder: Path, out: Path, *, repo: str, tag: str, license: str, datasets: Sequence[str] = ()) -> Path:
    """Write `out/<name of the bundle>/`, whole or not at all; an earlier layout of the same bundle is replaced.

    Args:
        folder: an exported bundle.
        out: where the layout goes.
        repo: `ORG/NAME` on the hub, for the card.
        tag: of the version on the hub, for the card.
        license: see `tools.model_card.model_card`.
        datasets: the same.

    Returns:
        The layout's folder.

    Raises:
        FileNotFoundError: no manifest.
        ValueError: the folder does not agree with its manifest, a weight file is not a state dict, or `out` holds
            something else under this name.
    """
    manifest = read_manifest(folder)
    target = out / manifest["name"]
    _check_replaceable(target, folder, manifest["name"])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".layout.", dir=out) as temporary:
        layout = Path(temporary) / target.name
        # The hub holds large files itself, as the zoo's release job does: the list would point at another place.
        for name in sorted(manifest["files"].keys() - {LARGE_FILES}):
            (layout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, layout / name)
        for weights in sorted((layout / "models").rglob("*.pt")):
            write_safetensors(weights, about={key: manifest[key] for key in ("name", "version", "commit", "build")})
        card = model_card(folder, manifest=manifest, repo=repo, tag=tag, license=license, datasets=datasets)
        (layout / "README.md").write_text(card, encoding="utf-8")
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_PATTERNS)
        (layout / ".gitattributes").write_text(rules, encoding="utf-8")
        write_manifest(layout, **{key: value for key, value in manifest.items() if key != "files"})
        if target.exists():
            shutil.rmtree(target)
        layout.replace(target)
    return target


def _check_replaceable(target: Path, folder: Path, name: str) -> None:
    if not target.exists():
        return
    earlier = target / MANIFEST
    ours = (target / ".gitattributes").is_file() and earlier.is_file()
    if target.resolve() == folder.resolve() or not ours or json.loads(earlier.read_text())["name"] != name:
        raise ValueError(
            f"{target}: expected no such folder or an earlier layout of {name!r}, got another; name another --out"
        )


def write_safetensors(weights: Path, *, about: Mapping[str, str]) -> Path:
    """Copy a state dict to `<stem>.safetensors` beside it and prove both equal, tensor by tensor.

    The library writes its metadata in another order each time; here it is sorted, so that the same weights give the
    same bytes and a published tag can be compared.

    Args:
        weights: `.pt` file that holds names and tensors, nothing else.
        about: what the copy states of itself; the `.pt` file's SHA-256 is added.

    Raises:
        ValueError: the file holds something else than tensors, or the copy differs.
    """
    state = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        kinds = sorted({type(value).__name__ for value in state.values()}) if isinstance(state, dict) else type(state)
        raise ValueError(
            f"{weights}: expected a state dict of names and tensors, got {kinds}; safetensors holds nothing else. "
            "Store the network's state dict alone"
        )
    # Tensors that share memory are refused there: each gets its own.
    separate = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    content = safetensors.torch.save(separate, metadata={**about, "pt_sha256": sha256_of_file(weights)})
    path = weights.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        temporary.write_bytes(_sort_metadata(content))
    copy = safetensors.torch.load_file(path)
    if sha256_of_state(copy) != sha256_of_state(state):
        path.unlink()
        raise ValueError(f"{path}: expected the tensors of {weights.name}, got others; report this with both files")
    return path


def _sort_metadata(content: bytes) -> bytes:
    """The same safetensors file with the entries of `__metadata__` sorted (8 bytes of length, JSON, tensors)."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
