# SPDX-License-Identifier: Apache-2.0
"""The workflows of ``sdseg``, small: networks of a few channels, pictures of few pixels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bundle_runs import BundleRuns
from tests.bundle_tools import read
from tests.conftest import ROOT

NATIVE = (160, 128)
SIZE = (64, 48)
LATENT_SHAPE = (4, 16, 12)
TINY = read(ROOT / "bundles/sdseg/configs/tiny.json")
AUTOENCODER = {**TINY["autoencoder_def"], "channels": [4, 8, 8], "norm_num_groups": 4}
UNET = {**TINY["unet_def"], "channels": [8, 16, 16], "num_heads": 2, "norm_num_groups": 4}
BASELINE = {**TINY["baseline_def"], "channels": [4, 8], "strides": [2], "num_res_units": 1}
SMALL: dict[str, Any] = {"image_size": list(SIZE), "device": "$torch.device('cpu')"}
MODEL = {**SMALL, "autoencoder_def": AUTOENCODER, "unet_def": UNET}
TRAINING = {"max_epochs": 2, "batch_size": 8, "num_workers": 0, "tracking_uri": ""}
# Few steps that show: large ones, a warm-up that a resumed run must go on with.
FAST = {**TRAINING, "learning_rate": 0.01, "warmup_steps": 6, "preview_interval": 2, "flips": "horizontal"}
STAGES: dict[str, dict[str, Any]] = {
    "train_autoencoder": {
        **{**SMALL, **TRAINING, "autoencoder_def": AUTOENCODER, "preview_interval": 2, "learning_rate": 0.01},
        **{"adversarial_start": 2, "ms_ssim_kernel_size": 3, "flips": "none"},
    },
    "train": {**MODEL, **FAST},
    "train_baseline": {**SMALL, **TRAINING, "baseline_def": BASELINE, "flips": "horizontal"},
    "inference": MODEL,
}
SDSEG = BundleRuns("sdseg", STAGES)

CROSSATTN = {
    "condition_mode": "crossattn",
    "unet_def#in_channels": LATENT_SHAPE[0],
    "unet_def#cross_attention_dim": LATENT_SHAPE[0],
}


def network(stage: str = "inference", **overrides: Any) -> Any:
    """The network of a stage with random weights, also those that start at zero: its masks depend on the image."""
    with torch.random.fork_rng(), SDSEG.small(stage, Path("unused"), overrides) as workflow:
        torch.manual_seed(0)
        result = workflow.parser.get_parsed_content("network_def")
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                if parameter.ndim > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1 * parameter[0].numel() ** -0.5)
                if name == "vision_encoder.head.weight":
                    parameter.mul_(20)
    return result


def save_network(models: Path, **overrides: Any) -> Path:
    """Random weights as a training would leave them: the model and the autoencoder in it."""
    (models / "stages").mkdir(parents=True, exist_ok=True)
    model = network(**overrides)
    torch.save(model.state_dict(), models / "model.pt")
    torch.save(model.autoencoder.state_dict(), models / "stages/autoencoder.pt")
    return models


def weights(root: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(root / f"models/{name}.pt", weights_only=True)


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def changed(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def copy_stage(trained: Path, root: Path, stage: str = "autoencoder") -> Path:
    """The weights of an earlier stage in a folder of models of its own; returns ``root``."""
    (root / "models/stages").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained / f"models/stages/{stage}.pt", root / f"models/stages/{stage}.pt")
    return root


def rewritten(dataset: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a data set with ``change`` made to the content of its data list; files can be replaced."""
    shutil.copytree(dataset, folder)
    content = json.loads((folder / "datalist.json").read_text())
    change(content)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder
