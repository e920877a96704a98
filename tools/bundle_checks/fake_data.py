# SPDX-License-Identifier: Apache-2.0
"""Data for the four bundles of this repository, few and small, and the weights that their trainings start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from shared.files import save_tensors
from tools.phantoms.brain_controlnet import make_dataset as make_heads
from tools.phantoms.cxr_ldm import make_dataset as make_chests
from tools.phantoms.dmri2noddi import make_dataset as make_diffusion
from tools.phantoms.sdseg import make_dataset as make_pictures

_SPLIT = (0.6, 0.2, 0.2)
MAKERS: dict[str, Callable[[str], object]] = {
    "cxr_ldm": lambda folder: make_chests(folder, n=10, size=64, split=_SPLIT),
    "brain_controlnet": lambda folder: make_heads(folder, n=5, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0), split=_SPLIT),
    "sdseg": lambda folder: make_pictures(folder, num_images=18, size=(80, 64), split=(0.4, 0.3, 0.3)),
    "dmri2noddi": lambda folder: make_diffusion(folder, num_subjects=5, shape=(32, 40, 36), split=_SPLIT, lesions=0.0),
}
# Weights of earlier stages, which a release may leave out: they are parts of the model.
STAGES = {
    "cxr_ldm": {"autoencoder": "autoencoder."},
    "sdseg": {"autoencoder": "autoencoder."},
    "dmri2noddi": {"vqgan": "autoencoder.", "encoder": "encoder."},
}


def make_data(task: str, folder: Path) -> None:
    """A dataset folder for one of `MAKERS`."""
    MAKERS[task](str(folder))


def complete_stages(task: str, models: Path) -> None:
    """Write the stages that are missing beside `models/model.pt`, taken out of it."""
    missing = {
        stage: part for stage, part in STAGES.get(task, {}).items() if not (models / f"stages/{stage}.pt").is_file()
    }
    if not missing or not (models / "model.pt").is_file():
        return
    state = torch.load(models / "model.pt", map_location="cpu", weights_only=True)
    for stage, part in missing.items():
        weights = {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}
        save_tensors(weights, models / f"stages/{stage}.pt")
