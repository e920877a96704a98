# SPDX-License-Identifier: Apache-2.0
"""Store released weights in half precision: `python -m tools.shrink_weights SOURCE --out FILE`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shared.files import save_json, sha256_of_file
from shared.weights import read_tensors, save_weights
from tools import command_line


def shrink(source: str, out: str) -> None:
    """Write SOURCE's floating-point tensors as float16, with the description beside it brought up to date.

    Loading into a float32 network widens them again; each weight changes by at most 2**-11 of its size. The demo
    weights are stored so; do not go on training from them expecting equal losses.

    Args:
        source: state dict of plain tensors, e.g. a run's ``models/model.pt``.
        out: file to write.

    Raises:
        ValueError: when a value is too large for float16, or the file is damaged.
    """
    state = read_tensors(source)
    small = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    for name, tensor in small.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            largest = state[name].abs().max().item()
            raise ValueError(
                f"{source}: expected values within float16's 65504, got {largest:.3g} in {name}; keep float32."
            )
    described = Path(source).with_suffix(".json")
    description = json.loads(described.read_text()) if described.exists() else {}
    save_weights(small, out)
    description.update({"sha256": sha256_of_file(out), "precision": "float16"})
    save_json(description, Path(out).with_suffix(".json"))
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB, sha256 {description['sha256']}")


if __name__ == "__main__":
    command_line.run(shrink, name="shrink_weights")
