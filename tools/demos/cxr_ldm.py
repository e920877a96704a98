# SPDX-License-Identifier: Apache-2.0
"""Demo of `cxr_ldm`: samples and an evaluation of the shipped demo weights, then short trainings of both stages."""

from __future__ import annotations

from pathlib import Path

from tools.demo_steps import Step, bundle_step

PROMPTS = (
    "Normal chest radiograph.",
    "The heart is markedly enlarged, consistent with cardiomegaly.",
    "There is a large left pleural effusion.",
    "There is a large right pleural effusion.",
    "There is a large consolidation in the left mid lung.",
    "There is a large consolidation in the right mid lung.",
    "There is a large right pneumothorax.",
)


def steps(bundle: Path, root: Path, *, n: int | None = None) -> list[Step]:
    """The sentences to draw are in `ROOT/prompts.txt`, written here when absent.

    Args:
        bundle: the bundle's folder.
        root: folder for everything that the demo writes.
        n: number of phantom films; None is 200.
    """
    prompts = root / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    data, weights, shipped = root / "data", root / "models", bundle / "models/tiny"
    trained = {"dataset_dir": data, "ckpt_dir": weights, "tracking_uri": f"sqlite:///{root}/mlflow.db"}
    cached = {"latent_cache_dir": root / "latents"}
    # The demo weights saw phantoms of another seed.
    return [
        Step(
            "sample data", ("tools.phantoms", "cxr_ldm", f"--out={data}", f"--n={200 if n is None else n}"), makes=data
        ),
        bundle_step(
            "samples of the shipped weights",
            bundle,
            "run",
            ["inference"],
            {"prompt": prompts, "num_samples": 4, "batch_size": 14, "output_dir": root / "samples"},
            reads=[prompts, shipped / "model.pt"],
        ),
        bundle_step(
            "evaluation of the shipped weights",
            bundle,
            "run",
            ["train", "evaluate"],
            {"dataset_dir": data, "output_dir": root / "evaluation", **cached},
            reads=[data / "datalist.json", shipped / "model.pt", shipped / "stages/classifier.pt"],
        ),
        bundle_step(
            "short training of the autoencoder",
            bundle,
            "training",
            ["train_autoencoder"],
            {**trained, "output_dir": root / "autoencoder", "max_epochs": 50},
            reads=[data / "datalist.json"],
        ),
        bundle_step(
            "short training of the diffusion model",
            bundle,
            "training",
            ["train"],
            {**trained, "output_dir": root / "diffusion", **cached, "max_epochs": 100},
            reads=[data / "datalist.json", weights / "stages/autoencoder.pt"],
        ),
    ]
