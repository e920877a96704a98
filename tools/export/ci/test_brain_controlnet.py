# SPDX-License-Identifier: Apache-2.0
"""Every stage of `brain_controlnet` trained, evaluated and applied, on made volumes.

Run from the root of the Model Zoo: `python ci/unit_tests/runner.py --b brain_controlnet`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigWorkflow
from utils import check_workflow

BUNDLE = "models/brain_controlnet"
# Weights that a stage releases, in the order of training.
STAGES = {
    "train_autoencoder": "stages/autoencoder.pt",
    "train_diffusion": "stages/diffusion.pt",
    "train": "model.pt",
    "train_regression": "stages/regression.pt",
}
SIZES = {"training": 3, "validation": 1, "test": 2}
SHAPE = (48, 64, 4)


def options(name: str) -> dict[str, Any]:
    """Overrides that make a workflow small, over `tiny.json`."""
    small: dict[str, Any] = {"image_size": [48, 64], "latent_shape": [3, 12, 16], "num_inference_steps": 2}
    small |= {"autoencoder_def#channels": [4, 4, 8], "autoencoder_def#norm_num_groups": 4}
    for part in ("unet_def", "controlnet_def"):
        small |= {f"{part}#channels": [8, 16, 16], f"{part}#num_head_channels": [0, 8, 8]}
        small |= {f"{part}#norm_num_groups": 8, f"{part}#cross_attention_dim": 8}
    small["controlnet_def#conditioning_embedding_num_channels"] = [4, 4, 8]
    small |= {"regression_def#channels": [4, 8], "regression_def#strides": [2]}
    if name.startswith("train"):
        small |= {"max_epochs": 1, "batch_size": 4, "tracking_uri": "", "ms_ssim_kernel_size": 3}
    return small


def make_data(folder: Path) -> None:
    """Two contrasts of an ellipsoid with its mask, on an oblique grid."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    affine = np.array([[3.4, 0.17, 0.2, -70], [-0.17, 3.5, 0.2, -110], [-0.1, -0.1, 6, -12], [0, 0, 0, 1]])
    content: dict[str, Any] = {}
    for section, count in SIZES.items():
        content[section] = []
        for number in range(count):
            name = f"{section}-{number}"
            (folder / name).mkdir(parents=True)
            head = (grid / np.array([0.8, 0.9, 2.0]).reshape(3, 1, 1, 1) * generator.uniform(1, 1.2)) ** 2
            mask = head.sum(axis=0) < 1
            noise = generator.uniform(0, 100, size=SHAPE)
            volumes = {"t1w": mask * (700 - 400 * head.sum(axis=0)) + noise, "flair": mask * 500 + noise, "mask": mask}
            for key, volume in volumes.items():
                dtype = np.uint8 if key == "mask" else np.int16
                nibabel.save(nibabel.Nifti1Image(volume.astype(dtype), affine), folder / name / f"{key}.nii.gz")
            item = {key: f"{name}/{key}.nii.gz" for key in volumes}
            content[section].append({**item, "subject": name, "num_slices": SHAPE[2]})
    (folder / "datalist.json").write_text(json.dumps(content))


def folders(root: Path, name: str) -> dict[str, Any]:
    """Where a workflow reads and writes: nothing in the bundle's own folder."""
    paths = {"dataset_dir": root / "data", "ckpt_dir": root / "models", "output_dir": root / "runs" / name}
    if name.split("_evaluate")[0] in ("train", "train_diffusion"):
        paths["latent_cache_dir"] = root / "runs/latents"
    return {"bundle_root": BUNDLE} | {key: str(path) for key, path in paths.items()}


class TestBrainControlnet(unittest.TestCase):
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
        output = self.execute("train", "evaluate")
        assert (output / "evaluation/summary.json").is_file()

    def test_3_evaluate_diffusion(self) -> None:
        self.train("train_autoencoder", "train_diffusion")
        output = self.execute("train_diffusion", "evaluate_diffusion")
        assert (output / "evaluation/summary.json").is_file()

    def test_4_infer(self) -> None:
        self.train("train_autoencoder", "train_diffusion", "train")
        output = self.execute("inference")
        results = sorted(output.rglob("T1w.nii.gz"))
        assert len(results) == SIZES["test"]
        for number, path in enumerate(results):
            sources = self.folder / f"data/test-{number}/flair.nii.gz"
            result, source = (nibabel.Nifti1Image.from_filename(name) for name in (path, sources))
            assert result.shape == SHAPE
            np.testing.assert_allclose(result.affine, source.affine, atol=1e-4)

    def test_5_draw(self) -> None:
        self.train("train_autoencoder", "train_diffusion")
        output = self.execute("inference_unconditional", num_samples=2)
        assert len(list(output.glob("*.png"))) == 2


if __name__ == "__main__":
    unittest.main()
