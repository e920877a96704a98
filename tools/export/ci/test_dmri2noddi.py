# SPDX-License-Identifier: Apache-2.0
"""Every stage of `dmri2noddi` trained, evaluated and applied, on made diffusion series.

Run from the root of the Model Zoo: `python ci/unit_tests/runner.py --b dmri2noddi`.
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

BUNDLE = "models/dmri2noddi"
# Weights that a stage releases, in the order of training.
STAGES = {
    "train_vqgan": "stages/vqgan.pt",
    "train_encoder": "stages/encoder.pt",
    "train": "model.pt",
    "train_baseline": "stages/baseline.pt",
}
SIZES = {"training": 2, "validation": 1, "test": 1}
MAPS = ("ndi", "odi", "fwf")
SHAPE = (16, 20, 18)


def options(name: str) -> dict[str, Any]:
    """Overrides that make a workflow small, over `tiny.json`."""
    small: dict[str, Any] = {"patch_size": [8, 8, 8], "num_inference_steps": 2}
    small |= {"autoencoder_def#num_hiddens": 4, "autoencoder_def#num_embeddings": 32}
    small |= {"autoencoder_def#norm_num_groups": 2, "encoder_def#num_hiddens": 4, "encoder_def#norm_num_groups": 2}
    small |= {"encoder_def#kernel_channels": [3, 3], "encoder_def#head_num_groups": 2}
    small |= {"unet_def#channels": [8, 8], "unet_def#attention_levels": [False, True]}
    small |= {"unet_def#num_head_channels": [0, 4], "unet_def#norm_num_groups": 4}
    small |= {"baseline_def#divisor": 2, "baseline_def#unet#channels": [4, 8], "baseline_def#unet#strides": [2]}
    if name.startswith("train"):
        small |= {"max_epochs": 1, "batch_size": 4, "tracking_uri": "", "patch_stride": [8, 8, 8]}
        small |= {"min_foreground": 0.3}
    return small


def make_data(folder: Path) -> None:
    """An ellipsoid of free water and tissue: maps, and a series of half the resolution with two shells."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(3, 42))
    directions /= np.linalg.norm(directions, axis=0)
    bvals = np.array([0.0] + [1000.0] * 20 + [0.0] + [2000.0] * 20)
    directions[:, bvals == 0] = 0
    fine = np.diag([1.25, 1.25, 1.25, 1.0])
    coarse = np.diag([2.5, 2.5, 2.5, 1.0])
    # The centres of eight small voxels.
    coarse[:3, 3] = 0.625
    shape = tuple(2 * n for n in SHAPE)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    content: dict[str, Any] = {}
    for section, count in SIZES.items():
        content[section] = []
        for number in range(count):
            name = f"{section}-{number}"
            (folder / name).mkdir(parents=True)
            radius = (grid**2).sum(axis=0)
            mask = radius < 0.9 + 0.1 * generator.uniform()
            water = mask * np.clip(radius, 0, 1)
            tissue = mask * generator.uniform(0.3, 0.7, size=shape)
            maps = {"ndi": tissue, "odi": mask * generator.uniform(0.1, 0.5, size=shape), "fwf": water}
            means = [volume.reshape(16, 2, 20, 2, 18, 2).mean(axis=(1, 3, 5)) for volume in (mask, water, tissue)]
            brain, free, slow = (volume[..., None] for volume in means)
            along = directions[2] ** 2
            signal = free * np.exp(-bvals * 3e-3) + (1 - free) * np.exp(-bvals * 1.7e-3 * (1 - slow * (1 - along)))
            series = 1000 * brain * signal + generator.uniform(1, 30, size=(*SHAPE, 42))
            nibabel.save(nibabel.Nifti1Image(series.astype(np.int16), coarse), folder / name / "dwi.nii.gz")
            np.savetxt(folder / name / "dwi.bval", bvals[None], fmt="%d")
            np.savetxt(folder / name / "dwi.bvec", directions, fmt="%.6f")
            for key, volume in {**maps, "mask": mask}.items():
                dtype = np.uint8 if key == "mask" else np.float32
                nibabel.save(nibabel.Nifti1Image(volume.astype(dtype), fine), folder / name / f"{key}.nii.gz")
            item = {key: f"{name}/{key}.nii.gz" for key in ("dwi", "mask", *MAPS)}
            item |= {key: f"{name}/dwi.{key}" for key in ("bval", "bvec")}
            content[section].append({**item, "subject": name})
    (folder / "datalist.json").write_text(json.dumps(content))


def folders(root: Path, name: str) -> dict[str, Any]:
    """Where a workflow reads and writes: nothing in the bundle's own folder."""
    paths = {"dataset_dir": root / "data", "ckpt_dir": root / "models", "output_dir": root / "runs" / name}
    if name.startswith("train"):
        paths["volume_cache_dir"] = root / "runs/volumes"
    if name.split("_evaluate")[0] in ("train", "train_encoder"):
        paths["latent_cache_dir"] = root / "runs/latents"
    return {"bundle_root": BUNDLE} | {key: str(path) for key, path in paths.items()}


class TestDmri2Noddi(unittest.TestCase):
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
        self.train("train_vqgan", "train_encoder", "train")
        for deterministic in (True, False):
            with self.subTest(deterministic=deterministic):
                output = self.execute("inference", deterministic=deterministic)
                for key in MAPS:
                    (path,) = output.rglob(f"*_{key}.nii.gz")
                    assert nibabel.Nifti1Image.from_filename(path).shape == tuple(2 * n for n in SHAPE)


if __name__ == "__main__":
    unittest.main()
