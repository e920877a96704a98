# SPDX-License-Identifier: Apache-2.0
"""Demo of `sdseg`: pictures segmented by the shipped demo weights, with several samples, their evaluation, then short
trainings of the autoencoder and of the segmentation."""

from __future__ import annotations

from pathlib import Path

from tools.demo_steps import Step, bundle_step

SEED = 1  # the demo weights saw phantoms of seed 0


def steps(bundle: Path, root: Path, *, n: int | None = None) -> list[Step]:
    """The test pictures are segmented and measured; the others serve the short trainings.

    Args:
        bundle: the bundle's folder.
        root: folder for everything that the demo writes.
        n: number of phantom pictures; None is 80.
    """
    data, weights, shipped = root / "data", root / "models", bundle / "models/tiny"
    trained = {"dataset_dir": data, "ckpt_dir": weights, "tracking_uri": f"sqlite:///{root}/mlflow.db"}
    phantoms = ("tools.phantoms", "sdseg", f"--out={data}", f"--num_images={80 if n is None else n}", f"--seed={SEED}")
    return [
        Step("sample data", phantoms, makes=data),
        bundle_step(
            "pictures segmented by the shipped weights",
            bundle,
            "run",
            ["inference"],
            {"dataset_dir": data, "output_dir": root / "masks", "num_samples": 4},
            reads=[data / "datalist.json", shipped / "model.pt"],
        ),
        bundle_step(
            "evaluation of the shipped weights",
            bundle,
            "run",
            ["train", "evaluate"],
            {"dataset_dir": data, "output_dir": root / "evaluation"},
            reads=[data / "datalist.json", shipped / "model.pt", shipped / "stages/baseline.pt"],
        ),
        bundle_step(
            "short training of the autoencoder",
            bundle,
            "training",
            ["train_autoencoder"],
            {**trained, "output_dir": root / "autoencoder", "max_epochs": 6, "flips": "none"},
            reads=[data / "datalist.json"],
        ),
        bundle_step(
            "short training of the segmentation",
            bundle,
            "training",
            ["train"],
            {
                **trained,
                "output_dir": root / "segmentation",
                "latent_cache_dir": root / "latents",
                "max_epochs": 8,
                "preview_interval": 2,
            },
            reads=[data / "datalist.json", weights / "stages/autoencoder.pt"],
        ),
    ]
