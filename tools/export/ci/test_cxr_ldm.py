# SPDX-License-Identifier: Apache-2.0
"""Every stage of `cxr_ldm` trained, evaluated and applied, on made pictures with sentences.

Run from the root of the Model Zoo: `python ci/unit_tests/runner.py --b cxr_ldm`.
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

BUNDLE = "models/cxr_ldm"
# Weights that a stage releases, in the order of training.
STAGES = {"train_autoencoder": "stages/autoencoder.pt", "train": "model.pt", "train_classifier": "stages/classifier.pt"}
SIZES = {"training": 8, "validation": 4, "test": 8}
FINDINGS = {"no_finding": "Normal chest radiograph.", "cardiomegaly": "Mild cardiomegaly is seen."}


def options(name: str) -> dict[str, Any]:
    """Overrides that make a workflow small, over `tiny.json`."""
    small = {
        "image_size": [64, 96],
        "latent_shape": [3, 8, 12],
        "autoencoder_def#channels": [4, 4, 8, 8],
        "autoencoder_def#norm_num_groups": 4,
        "unet_def#channels": [8, 16, 16],
        "unet_def#num_head_channels": [0, 8, 8],
        "unet_def#norm_num_groups": 8,
        "num_inference_steps": 2,
    }
    if name == "train_classifier":
        small = {}
    if name.startswith("train"):
        small |= {"max_epochs": 1, "batch_size": 4, "tracking_uri": "", "ms_ssim_kernel_size": 3}
    return small


def make_data(folder: Path) -> None:
    """Noise with a bright disc, large where the sentence says so."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :120]
    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {}
    for section, count in SIZES.items():
        content[section] = []
        for number in range(count):
            name = f"{section}_{number}"
            finding = list(FINDINGS)[number % 2]
            disc = (rows - 48) ** 2 + (columns - 60) ** 2 < (20 + 15 * (number % 2)) ** 2
            picture = generator.integers(0, 60, size=disc.shape) + 150 * disc
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"images/{name}.png")
            item = {"image": f"images/{name}.png", "text": FINDINGS[finding], "labels": {"finding": finding}}
            content[section].append({**item, "subject": name, "study": name, "view": "PA"})
    (folder / "datalist.json").write_text(json.dumps(content))


def folders(root: Path, name: str) -> dict[str, Any]:
    """Where a workflow reads and writes: nothing in the bundle's own folder."""
    paths = {"dataset_dir": root / "data", "ckpt_dir": root / "models", "output_dir": root / "runs" / name}
    if name.split("_evaluate")[0] == "train":
        paths |= {"latent_cache_dir": root / "runs/latents", "text_cache_dir": root / "runs/texts"}
    return {"bundle_root": BUNDLE} | {key: str(path) for key, path in paths.items()}


class TestCxrLdm(unittest.TestCase):
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
        classifier = str(self.folder / "models" / STAGES["train_classifier"])
        output = self.execute("train", "evaluate", **{"feature_extractor#weights_path": classifier})
        assert (output / "evaluation/summary.json").is_file()

    def test_3_infer(self) -> None:
        self.train("train_autoencoder", "train")
        output = self.execute("inference", prompt=list(FINDINGS.values()))
        pictures = [np.asarray(Image.open(path)) for path in sorted(output.glob("*.png"))]
        assert [picture.shape for picture in pictures] == [(64, 96)] * 2


if __name__ == "__main__":
    unittest.main()
