# SPDX-License-Identifier: Apache-2.0
"""Weights that fit, or an error that says why not."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
        ValueError: when the file is damaged, holds pickled objects, or belongs to another configuration; the message
            names the file and the first key that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected trained weights, found no file. {remedy}".rstrip())
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected a state dict of plain tensors, but the file does not load ({reason}); it is damaged or "
            "made by another program: fetch it again or convert it with `python -m tools.convert_checkpoint`."
        ) from error
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
