# SPDX-License-Identifier: Apache-2.0
"""Demo of `dmri2noddi`: NODDI maps of whole volumes by the shipped demo weights, by the encoder alone and by diffusion
with standard deviations, their evaluation, then short trainings of the three stages."""

from __future__ import annotations

from pathlib import Path

from tools.demo_steps import Step, bundle_step

SEED = 1  # the demo weights saw phantoms of seed 0
SPLIT = "0.5,0.17,0.33"  # two of six subjects are measured
# Seconds instead of minutes for each brain; the defaults are 0.4375, 100 and 1, in the evaluation 8.
QUICK = {"overlap": 0.25, "scheduler": "ddim", "num_inference_steps": 5, "num_samples": 4}


def steps(bundle: Path, root: Path, *, n: int | None = None) -> list[Step]:
    """The test subjects get maps and are measured; the others serve the short trainings.

    Args:
        bundle: the bundle's folder.
        root: folder for everything that the demo writes.
        n: number of phantom subjects, at least 3; None is 6.
    """
    data, weights, shipped = root / "data", root / "models", bundle / "models/tiny"
    volumes = {"volume_cache_dir": root / "volumes"}
    # Patches side by side: half of those that the configuration takes.
    trained = {
        **{"dataset_dir": data, "ckpt_dir": weights, "tracking_uri": f"sqlite:///{root}/mlflow.db"},
        **{**volumes, "patch_stride": "[16,16,16]"},
    }
    cached = {"latent_cache_dir": root / "latents"}
    phantoms = ("tools.phantoms", "dmri2noddi", f"--out={data}", f"--num_subjects={6 if n is None else n}")
    return [
        Step("sample data", (*phantoms, f"--seed={SEED}", f"--split={SPLIT}"), makes=data),
        bundle_step(
            "maps by the encoder of the shipped weights, without diffusion",
            bundle,
            "run",
            ["inference"],
            {
                "dataset_dir": data,
                "output_dir": root / "maps_deterministic",
                "deterministic": True,
                "overlap": QUICK["overlap"],
            },
            reads=[data / "datalist.json", shipped / "model.pt"],
        ),
        bundle_step(
            "maps and standard deviations by diffusion with the shipped weights",
            bundle,
            "run",
            ["inference"],
            {"dataset_dir": data, "output_dir": root / "maps", **QUICK},
            reads=[data / "datalist.json", shipped / "model.pt"],
        ),
        bundle_step(
            "evaluation of the shipped weights",
            bundle,
            "run",
            ["train", "evaluate"],
            {"dataset_dir": data, "output_dir": root / "evaluation", **volumes, **cached, **QUICK},
            reads=[data / "datalist.json", shipped / "model.pt", shipped / "stages/baseline.pt"],
        ),
        bundle_step(
            "short training of the VQ-GAN",
            bundle,
            "training",
            ["train_vqgan"],
            {**trained, "output_dir": root / "vqgan", "max_epochs": 3, "adversarial_start": 3, "preview_interval": 3},
            reads=[data / "datalist.json"],
        ),
        bundle_step(
            "short training of the low-resolution encoder",
            bundle,
            "training",
            ["train_encoder"],
            {**trained, "output_dir": root / "encoder", **cached, "max_epochs": 3},
            reads=[data / "datalist.json", weights / "stages/vqgan.pt"],
        ),
        bundle_step(
            "short training of the diffusion model",
            bundle,
            "training",
            ["train"],
            {**trained, "output_dir": root / "diffusion", **cached, "max_epochs": 4, "preview_interval": 4},
            reads=[data / "datalist.json", weights / "stages/vqgan.pt", weights / "stages/encoder.pt"],
        ),
    ]
