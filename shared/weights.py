# SPDX-License-Identifier: Apache-2.0
"""Weights that fit, or an error that says why not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.files import save_tensors, sha256_of_file

Adapt = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def load_weights(network: nn.Module, path: str | Path, remedy: str = "", *, adapt: Adapt | None = None) -> nn.Module:
    """Load a state dict strictly, with plain tensors only, and return the network.

    Args:
        network: network to fill.
        path: file with a state dict, or ``{"model": state dict}``.
        remedy: what the user can do when the file is missing.
        adapt: changes the state dict before the comparison, e.g. widens a convolution; called with names and tensors
            alone, what else a file holds is refused unchanged.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged (see `read_tensors`), holds pickled objects, or belongs to another
            configuration; the message names the file and the first key that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected trained weights, found no file. {remedy}".rstrip())
    content = read_tensors(path)
    state = content["model"] if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else content
    if adapt is not None and _is_state(state):
        state = adapt(state)
    problem = _first_mismatch(network.state_dict(), state)
    if problem:
        raise ValueError(
            f"{path}: expected the weights of this configuration, got others ({problem}); give the configuration they "
            "were made with (shipped demo weights need configs/tiny.json as the last file) or another --ckpt_dir."
        )
    network.load_state_dict(state, strict=True)
    return network


def read_tensors(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, numbers, texts and containers of them, bit for bit.

    ``torch.load`` does not compare the checksums of the file that it reads, so that a flipped bit becomes another
    weight. Here the file is compared with the ``sha256`` that its description states (``model.json`` beside
    ``model.pt``), or where there is none each of its entries with the checksum (CRC-32) that torch has stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: when the file is damaged, not the described one, or holds other objects; the message starts with
            the path of the file, or of a description that cannot be read.
    """
    path = Path(path)
    if not _is_as_described(path):
        _compare_checksums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise _not_loadable(path, error) from error


def save_weights(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write a state dict atomically, and take away a description of the weights that it replaces.

    ``read_tensors`` would refuse the new file for not being the described one.
    """
    described = Path(path).with_suffix(".json")
    if described.is_file() and _stated_hash(described, Path(path).name) is not None:
        described.unlink()
    save_tensors(state, path)


def _is_as_described(path: Path) -> bool:
    """False where nothing is stated about the file."""
    described = path.with_suffix(".json")
    if not described.is_file():
        return False
    expected = _stated_hash(described, path.name)
    if expected is None:
        return False
    if (found := sha256_of_file(path)) != expected:
        raise ValueError(
            f"{path}: expected the file with sha256 {expected} that {described.name} describes, got sha256 {found} "
            f"({path.stat().st_size} bytes); it is damaged or was replaced: fetch both files again, or delete "
            f"{described.name} if the weights were replaced on purpose."
        )
    return True


def _stated_hash(described: Path, name: str) -> str | None:
    try:
        description = json.loads(described.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{described}: expected the description of {name} as JSON, got a file that cannot be read ({error}); "
            "fetch both files again, or delete this one."
        ) from error
    return description.get("sha256") if isinstance(description, Mapping) else None


def _compare_checksums(path: Path) -> None:
    # The form before PyTorch 1.6 is no zip file and has none.
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of the entry {broken}")
    except Exception as error:  # a damaged directory can fail in any way
        raise _not_loadable(path, error) from error


def _not_loadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"{path}: expected a state dict of plain tensors, but the file does not load ({reason}); it is damaged or "
        "made by another program: fetch it again or convert it with `python -m tools.convert_checkpoint`."
    )


def _is_state(state: Any) -> bool:
    if not isinstance(state, Mapping):
        return False
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())


def _first_mismatch(expected: Mapping[str, torch.Tensor], state: Any) -> str | None:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__} instead of a state dict"
    for name, tensor in expected.items():
        if name not in state:
            return f"{name} is missing"
        if not isinstance(state[name], torch.Tensor):
            return f"{name} is a {type(state[name]).__name__} instead of a tensor"
        if state[name].shape != tensor.shape:
            return f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
    unexpected = next((name for name in state if name not in expected), None)
    return f"{unexpected} is not part of the network" if unexpected else None
