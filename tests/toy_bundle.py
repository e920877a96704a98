# SPDX-License-Identifier: Apache-2.0
"""The smallest bundle that passes every check: it doubles pictures with a convolution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT
from tools.export.archive import write_manifest
from tools.export.configs import IMPORTS, ON_PATH_EXPRESSION, write_config

NAME = "toy_doubling"
LIB = f"{NAME}_lib"
VERSION = "0.1.0"
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"

INIT = f'{SPDX}"""Doubles pictures."""\n\n__version__ = "{VERSION}"\n'
NETWORK = f'''{SPDX}"""A convolution."""

from __future__ import annotations

import torch


class Doubling(torch.nn.Module):
    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)
'''
ITEMS = f'''{SPDX}"""Pictures made of a number."""

from __future__ import annotations

from pathlib import Path

import torch

from .network import Doubling


def items(folder: str) -> list[dict]:
    assert Doubling
    values = [float(word) for word in (Path(folder) / "values.txt").read_text().split()]
    return [{{"image": torch.full((1, 6, 8), value), "label": torch.full((1, 6, 8), 2 * value)}} for value in values]
'''
README = """# Model Overview

Doubles pictures. **Research only. Not for diagnosis or any clinical use.**

## Data

None.

## Training configuration

### Input

A picture.

### Output

A picture twice as bright.

## Performance

Not measured.

## MONAI Bundle Commands

```bash
python -m monai.bundle run training --config_file configs/train.json --dataset_dir DIR
torchrun --standalone --nproc_per_node=2 -m monai.bundle run training \\
    --config_file "['configs/train.json','configs/multi_gpu_train.json']" --dataset_dir DIR
python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir DIR
python -m monai.bundle run --config_file configs/inference.json --dataset_dir DIR --channels 1
```

Options: `--channels`, `--max_epochs 3`.

## Limitations

It only doubles.

# References

None.

# License

Apache-2.0.
"""
TENSOR = {
    **{"type": "image", "format": "magnitude", "num_channels": 1, "spatial_shape": [6, 8], "dtype": "float32"},
    **{"value_range": [0, 1], "is_patch_data": False, "channel_def": {"0": "brightness"}},
}


def _standalone(description: str, content: dict[str, Any]) -> dict[str, Any]:
    network = {"_target_": f"{LIB}.network.Doubling", "_requires_": "@bundle_on_path", "channels": "@channels"}
    return {
        "_desc_": f"{description} Run: python -m monai.bundle run --config_file configs/inference.json",
        "imports": list(IMPORTS),
        "bundle_root": ".",
        "bundle_on_path": ON_PATH_EXPRESSION,
        "dataset_dir": "/workspace/data/toys",
        "ckpt_dir": "$@bundle_root + '/models'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "channels": 1,
        "network_def": network,
        "network": "$@network_def.to(@device)",
        **content,
    }


def _items() -> dict[str, Any]:
    return {"_target_": f"{LIB}.items.items", "_requires_": "@bundle_on_path", "folder": "@dataset_dir"}


def _data(prefix: str) -> dict[str, Any]:
    return {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "EnsureTyped", "keys": ["image", "label"]}],
        },
        "dataset": {"_target_": "Dataset", "data": _items(), "transform": f"@{prefix}preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": f"@{prefix}dataset", "batch_size": 2},
        "inferer": {"_target_": "SimpleInferer"},
        "handlers": [
            {"_target_": "StatsHandler", "output_transform": "$monai.handlers.from_engine(['pred', 'label'])"}
        ],
    }


def _evaluator(prefix: str) -> dict[str, Any]:
    return {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": f"@{prefix}dataloader",
        "network": "@network",
        "inferer": f"@{prefix}inferer",
        "val_handlers": f"@{prefix}handlers",
    }


def configs() -> dict[str, dict[str, Any]]:
    """Content of all configurations by name."""
    inference = _standalone(
        "Doubles pictures.",
        {
            **_data(""),
            "postprocessing": {"_target_": "Compose", "transforms": [{"_target_": "EnsureTyped", "keys": "pred"}]},
            "evaluator": {**_evaluator(""), "postprocessing": "@postprocessing"},
            "initialize": [{"_target_": "monai.utils.set_determinism", "seed": 0}],
            "run": ["$@evaluator.run()"],
        },
    )
    trainer = {
        "_target_": "SupervisedTrainer",
        "max_epochs": "@max_epochs",
        "device": "@device",
        "train_data_loader": "@train#dataloader",
        "network": "@network",
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.01},
        "loss_function": {"_target_": "torch.nn.L1Loss"},
        "inferer": "@train#inferer",
        "train_handlers": "@train#handlers",
    }
    validation = {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "interval": "@val_interval"}
    train_data = _data("train#")
    train_data["handlers"].append(validation)
    train = _standalone(
        "Learns to double.",
        {
            "max_epochs": 1,
            "val_interval": 1,
            "train": {**train_data, "trainer": trainer},
            "validate": {**_data("validate#"), "evaluator": _evaluator("validate#")},
            "initialize": [{"_target_": "monai.utils.set_determinism", "seed": 0}],
            "run": ["$@train#trainer.run()"],
            "training": ["$@train#trainer.run()"],
        },
    )
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": VERSION,
        "changelog": {VERSION: "first version"},
        **{"monai_version": "1.6.1", "pytorch_version": "2.14.1", "numpy_version": "2.2.6"},
        "required_packages_version": {"pytorch-ignite": "0.5.5"},
        "supported_apps": {},
        **dict.fromkeys(("name", "task", "description", "authors", "copyright", "data_source", "data_type"), "toy"),
        **dict.fromkeys(("image_classes", "label_classes", "pred_classes"), "brightness"),
        "eval_metrics": {},
        "intended_use": "Research only, not for diagnosis or any clinical use.",
        "references": [],
        "network_data_format": {"inputs": {"image": TENSOR}, "outputs": {"pred": TENSOR}},
    }
    return {
        "metadata": metadata,
        "inference": inference,
        "train": train,
        "evaluate": {"_desc_": "Overlay on train.json: measures.", "run": ["$@validate#evaluator.run()"]},
        "multi_gpu_train": {
            "_desc_": "Overlay on train.json: several processes.",
            "discriminator": "$@discriminator_def.to(@device)",
            "train#dataloader#shuffle": False,
        },
        "tiny": {"_desc_": "Overlay: small.", "max_epochs": 1},
    }


def make_bundle(parent: Path) -> Path:
    """Write the bundle as an export would; returns its folder."""
    folder = parent / NAME
    for name, content in configs().items():
        write_config(content, folder / f"configs/{name}.json")
    shutil.copy(ROOT / "bundles/sdseg/configs/logging.conf", folder / "configs")
    shutil.copy(ROOT / "LICENSE", folder)
    texts = {"docs/README.md": README, "docs/data_license.txt": "No data.\n"}
    texts |= {f"{LIB}/__init__.py": INIT, f"{LIB}/network.py": NETWORK, f"{LIB}/items.py": ITEMS}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "models").mkdir()
    torch.save(torch.nn.ModuleDict({"layer": torch.nn.Conv2d(1, 1, 1)}).state_dict(), folder / "models/model.pt")
    list_files(folder)
    return folder


def list_files(folder: Path) -> None:
    """Write the manifest anew."""
    write_manifest(folder, name=folder.name, version=VERSION, commit="0" * 40, build="demo")


def make_data(folder: str) -> None:
    """What `make_bundle` reads."""
    Path(folder).mkdir()
    (Path(folder) / "values.txt").write_text("0.1 0.2 0.3\n")


def edit(folder: Path, name: str, change: Any) -> None:
    """Change the content of a configuration in place."""
    path = folder / f"configs/{name}.json"
    content = json.loads(path.read_text())
    change(content)
    write_config(content, path)
