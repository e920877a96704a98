# SPDX-License-Identifier: Apache-2.0
"""Every stage of `sdseg` trained, evaluated and applied, on made pictures.

Run from the root of the Model Zoo: `python ci/unit_tests/runner.py --b sdseg`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigWorkflow
from PIL import Image
from utils import check_workflow

BUNDLE = "models/sdseg"
# Weights that a stage releases, in the order of training.
STAGES = {"train_autoencoder": "stages/autoencoder.pt", "train": "model.pt", "train_baseline": "stages/baseline.pt"}
SIZES = {"training": 8, "validation": 4, "test": 3}


def options(name: str) -> dict[str, Any]:
    """Overrides that make a workflow small, over `tiny.json`."""
    small = {
        "image_size": [64, 48],
        "autoencoder_def#channels": [4, 8, 8],
        "autoencoder_def#norm_num_groups": 4,
        "unet_def#channels": [8, 16, 16],
        "unet_def#num_heads": 2,
        "unet_def#norm_num_groups": 4,
        "baseline_def#channels": [4, 8],
        "baseline_def#strides": [2],
    }
    if name.startswith("train"):
        small |= {"max_epochs": 1, "batch_size": 4, "tracking_uri": "", "flips": "none", "ms_ssim_kernel_size": 3}
    return small


def make_data(folder: Path) -> None:
    """Pictures with a bright ellipse, and its mask."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:80, :64]
    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {"num_classes": 1, "labels": {"0": "background", "1": "ellipse"}}
    for section, count in SIZES.items():
        content[section] = []
        for number in range(count):
            name = f"{section}_{number}"
            height, width = generator.uniform(10, 25, size=2)
            mask = ((rows - 40) / height) ** 2 + ((columns - 32) / width) ** 2 < 1
            picture = generator.integers(0, 60, size=(80, 64, 3)) + 150 * mask[..., None]
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"images/{name}.png")
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"images/{name}_mask.png")
            item = {"image": f"images/{name}.png", "label": f"images/{name}_mask.png", "group": name}
            content[section].append(item)
    (folder / "datalist.json").write_text(json.dumps(content))


def folders(root: Path, name: str) -> dict[str, Any]:
    """Where a workflow reads and writes: nothing in the bundle's own folder."""
    paths = {"dataset_dir": root / "data", "ckpt_dir": root / "models", "output_dir": root / "runs" / name}
    if name.split("_evaluate")[0] == "train":
        paths["latent_cache_dir"] = root / "runs/latents"
    return {"bundle_root": BUNDLE} | {key: str(path) for key, path in paths.items()}


class TestSdseg(unittest.TestCase):
    folder: Path
    trained: set[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder, cls.trained = Path(tempfile.mkdtemp()), set()
        make_data(cls.folder / "data")

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.folder)

    def execute(self, *names: str, **override: Any) -> Path:
        """Check and run the workflow of some configurations, small; returns the folder of its output."""
        paths = folders(self.folder, "_".join(names))
        workflow = ConfigWorkflow(
            workflow_type="train" if names[0].startswith("train") else "inference",
            config_file=[f"{BUNDLE}/configs/{name}.json" for name in (*names, "tiny")],
            logging_file=f"{BUNDLE}/configs/logging.conf",
            meta_file=f"{BUNDLE}/configs/metadata.json",
            **(options(names[0]) | paths | override),
        )
        check_workflow(workflow, check_properties=True)
        return Path(paths["output_dir"])

    def train(self, *stages: str) -> None:
        """Train what has not been trained yet, so that a test also runs alone."""
        for stage in stages:
            if stage not in self.trained:
                self.execute(stage)
                self.trained.add(stage)
                assert (self.folder / "models" / STAGES[stage]).is_file()

    def test_1_train(self) -> None:
        for stage in STAGES:
            with self.subTest(stage):
                self.train(stage)

    def test_2_evaluate(self) -> None:
        self.train(*STAGES)
        output = self.execute("train", "evaluate", num_samples=2)
        assert (output / "evaluation/summary.json").is_file()

    def test_3_infer(self) -> None:
        self.train("train_autoencoder", "train")
        output = self.execute("inference", num_samples=2)
        masks = sorted(output.rglob("*_mask.png"))
        assert len(masks) == SIZES["test"]
        for path in masks:
            mask = np.asarray(Image.open(path))
            assert (mask.shape, mask.dtype) == ((80, 64), np.uint8)


if __name__ == "__main__":
    unittest.main()
