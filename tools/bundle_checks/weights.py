# SPDX-License-Identifier: Apache-2.0
"""Weight files: plain finite tensors, and nothing beside `model.pt` that a consumer could load instead."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

from tools.bundle_checks.bundle import Bundle

SUFFIXES = (".pt", ".pth", ".ts", ".ckpt", ".bin", ".safetensors")


def place_faults(bundle: Bundle) -> list[str]:
    """Weights at the top of `models/`: MONAI Label takes the shortest name there, whatever it holds."""
    top = [name for name in bundle.files if name.startswith("models/") and name.count("/") == 1]
    others = [name for name in top if name.endswith(SUFFIXES) and name != "models/model.pt"]
    return [f"{name}: expected models/model.pt alone at the top; move it to models/stages" for name in others]


def tensor_faults(bundle: Bundle) -> list[str]:
    """Files that `torch.load(weights_only=True)` refuses, or that are no state dict of finite tensors."""
    faults = []
    for name in (name for name in bundle.files if name.startswith("models/") and name.endswith((".pt", ".pth"))):
        try:
            content = torch.load(bundle.folder / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            faults.append(f"{name}: torch.load(weights_only=True) refuses it: {str(error).splitlines()[0][:160]}")
            continue
        faults += [f"{name}: {fault}" for fault in _state_faults(content)]
    return faults


def _state_faults(content: Any) -> list[str]:
    if not isinstance(content, Mapping) or not content:
        return [f"expected a state dict, got {type(content).__name__}"]
    strange = [key for key, value in content.items() if type(value) is not torch.Tensor]
    if strange:
        return [f"{strange[0]}: expected a plain tensor, got {type(content[strange[0]]).__name__}"]
    infinite = [key for key, value in content.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    return [f"{infinite[0]}: expected finite numbers"] if infinite else []
