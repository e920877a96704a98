# SPDX-License-Identifier: Apache-2.0
"""Read the weights of other programs' files, without running the code such files can hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_NETWORK_ENTRIES = ("state_dict", "diffusion", "controlnet", "model")
_WRAPPERS = ("module.", "model.")


class _Placeholder(list):
    """Stands for an object whose class is not to be imported: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key of a dictionary


def read_published(path: str | Path, *, entry: str | None = None, placeholders: bool = False) -> dict[str, Tensor]:
    """Read the network weights from any of the forms in which they are published.

    A plain state dict (`autoencoder.pth`, `diffusion_model.pth` of the monai-generative model zoo), a training
    checkpoint that holds one under `state_dict` (autoencoder; everything of PyTorch Lightning), `diffusion`,
    `controlnet` or `model`, or a `.safetensors` file. The prefixes that `DataParallel` and small wrappers leave on all
    keys (`module.`, `model.`) are removed.

    Args:
        path: the file.
        entry: which entry of a training checkpoint, e.g. "discriminator"; None takes the first of the four above.
        placeholders: read a checkpoint that holds other objects besides tensors (callbacks, hyper-parameters) with
            inert placeholders in their place. Their code is never imported, let alone run, so the file need not be
            trusted. If false such a file is refused.

    Returns:
        state dict on the CPU; the values stay in the file until they are used, where the format allows it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no torch file, holds pickled objects besides tensors, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, entry, placeholders)
    for wrapper in _WRAPPERS:
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as a safetensors file, truncated or damaged ({error})") from error


def _read_torch(path: Path, entry: str | None, placeholders: bool) -> dict[str, Tensor]:
    try:
        # Only the zip format (since PyTorch 1.6) can list what it would import, and be mapped instead of read.
        is_zip = zipfile.is_zipfile(path)
        names = get_unsafe_globals_in_checkpoint(path) if placeholders and is_zip else []
        # A dictionary of any class is filled item by item, which torch allows for its own dictionaries alone.
        stand_ins = [(OrderedDict if name.lower().endswith("dict") else _Placeholder, name) for name in names]
        with safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can fail in any way
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            reason = f"{type(error).__name__} {error}".split("\n")[0][:120]
            raise ValueError(f"{path}: not readable as a torch file, truncated or damaged ({reason})") from error
        raise ValueError(
            f"{path}: expected tensors only, got a file whose loading would run code ({refused[1]}). Remedy: where the "
            "file is trusted and its packages are installed, save the plain weights once: "
            'torch.save(torch.load(F, weights_only=False).state_dict(), G), or ["state_dict"] for a checkpoint'
        ) from error
    return _state_dict(content, path, entry)


def _state_dict(content: Any, path: Path, entry: str | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected a state dict or a training checkpoint, got {type(content).__name__}")
    if entry is None and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    if entry is None:
        entry = next((name for name in _NETWORK_ENTRIES if name in content), "")
    weights = content.get(entry)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        expected = f"entry {entry!r}" if entry else f"one of the entries {', '.join(_NETWORK_ENTRIES)}"
        names = list(map(str, content))
        raise ValueError(
            f"{path}: expected {expected} with tensors, got the entries {', '.join(names[:8])}"
            + (", ..." if len(names) > 8 else "")
        )
    return dict(weights)
