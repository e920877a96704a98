# SPDX-License-Identifier: Apache-2.0
"""Demo of `brain_controlnet`: FLAIR volumes translated by the shipped demo weights, with uncertainty maps, their
evaluation, then short trainings of the three stages."""

from __future__ import annotations

from pathlib import Path

from tools.demo_steps import Step, bundle_step

SPLIT = ("0.7,0.15,0.15", 0)  # shares and seed
MASK = "{subject}/anat/{subject}_desc-brain_mask.nii.gz"


def steps(bundle: Path, root: Path, *, n: int | None = None) -> list[Step]:
    """Volumes are translated as a user has them (`ROOT/raw`), training and evaluation read prepared ones.

    Args:
        bundle: the bundle's folder.
        root: folder for everything that the demo writes.
        n: number of phantom heads; None is 24.
    """
    raw, data, weights, shipped = root / "raw", root / "data", root / "models", bundle / "models/tiny"
    trained = {"dataset_dir": data, "ckpt_dir": weights, "tracking_uri": f"sqlite:///{root}/mlflow.db"}
    cached = {"latent_cache_dir": root / "latents"}
    # Both folders are split alike, so that the same subjects are translated and measured. The demo weights saw
    # phantoms of another seed.
    shares, seed = SPLIT
    phantoms = (
        "tools.phantoms",
        "brain_controlnet",
        f"--out={raw}",
        f"--n={24 if n is None else n}",
        f"--split={shares}",
    )
    prepare = ("tools.prepare", "brain_pairs", f"--source={raw}", f"--out={data}", "--size=80,112", "--slices=0")
    return [
        Step("sample data", (*phantoms, f"--seed={seed}"), makes=raw),
        Step(
            "preparation",
            (*prepare, f"--mask={MASK}", f"--fractions={shares}", f"--seed={seed}"),
            makes=data,
            reads=(raw / "datalist.json",),
        ),
        bundle_step(
            "volumes translated by the shipped weights",
            bundle,
            "run",
            ["inference"],
            {"dataset_dir": raw, "output_dir": root / "volumes", "num_samples": 4, "num_inference_steps": 20},
            reads=[raw / "datalist.json", shipped / "model.pt"],
        ),
        bundle_step(
            "evaluation of the shipped weights",
            bundle,
            "run",
            ["train", "evaluate"],
            {"dataset_dir": data, "output_dir": root / "evaluation", **cached, "num_inference_steps": 20},
            reads=[data / "datalist.json", shipped / "model.pt", shipped / "stages/regression.pt"],
        ),
        bundle_step(
            "short training of the autoencoder",
            bundle,
            "training",
            ["train_autoencoder"],
            {**trained, "output_dir": root / "autoencoder", "max_epochs": 4},
            reads=[data / "datalist.json"],
        ),
        bundle_step(
            "short training of the diffusion model",
            bundle,
            "training",
            ["train_diffusion"],
            {**trained, "output_dir": root / "diffusion", **cached, "max_epochs": 6, "preview_interval": 3},
            reads=[data / "datalist.json", weights / "stages/autoencoder.pt"],
        ),
        bundle_step(
            "short training of the ControlNet",
            bundle,
            "training",
            ["train"],
            {**trained, "output_dir": root / "controlnet", **cached, "max_epochs": 6, "preview_interval": 3},
            reads=[data / "datalist.json", weights / "stages/diffusion.pt"],
        ),
    ]
