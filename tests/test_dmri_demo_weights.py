# SPDX-License-Identifier: Apache-2.0
"""The shipped demo weights of ``dmri2noddi`` on a phantom they never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from shared.diffusion_features import RotationInvariantFeatures
from shared.noddi_sampler import NoddiSampler
from shared.resolution import block_average, upsample
from shared.transforms.diffusion_mri import load_brain, load_features, load_maps
from shared.weights import load_weights
from tests.conftest import ROOT
from tools.phantoms.dmri2noddi import make_dataset

CONFIGS = ROOT / "bundles/dmri2noddi/configs"
WEIGHTS = ROOT / "bundles/dmri2noddi/models/tiny/model.pt"
PATCH, OVERLAP = 16, 0.4375


@pytest.fixture(scope="module")
def item(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("phantom")
    make_dataset(str(folder), num_subjects=1, seed=7, split="0,0,1")
    files = ("dwi.nii.gz", "dwi.bval", "dwi.bvec", "mask.nii.gz", "ndi.nii.gz", "odi.nii.gz", "fwf.nii.gz")
    subject = folder / "subjects/sub-001"
    return {name.split(".")[-1] if "bv" in name else name.split(".")[0]: str(subject / name) for name in files}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config([CONFIGS / "inference.json", CONFIGS / "tiny.json"])
    return load_weights(parser.get_parsed_content("network_def"), WEIGHTS).eval()


def estimate(item: dict, model: torch.nn.Module, **options) -> torch.Tensor:
    parser = ConfigParser()
    parser.read_config([CONFIGS / "inference.json", CONFIGS / "tiny.json"])
    options = {"scheduler": parser.get_parsed_content("noise_schedulers#ddim"), "patch_size": PATCH, **options}
    features = load_features(item, RotationInvariantFeatures())
    return NoddiSampler(**options)(torch.as_tensor(features)[None], model)[0].as_subclass(torch.Tensor)


def truth(item: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(load_maps(item)), torch.as_tensor(load_brain(item))[0] > 0


def psnr(maps: torch.Tensor, true: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    return -10 * ((maps - true)[:, brain].square().mean(dim=1)).log10()


def test_the_encoder_beats_cubic_upsampling_of_the_true_maps(item, model) -> None:
    true, brain = truth(item)
    maps = estimate(item, model, deterministic=True, overlap=OVERLAP)
    cubic = upsample(block_average(true), mode="cubic").clamp(0, 1)
    assert (psnr(maps, true, brain) > psnr(cubic, true, brain)).all()


def border_excess(error: torch.Tensor, seamless: torch.Tensor, starts: list[int]) -> float:
    """How much more the error jumps across borders of patches, in planes of axis 1, than one latent voxel beside.

    Both relative to the same planes of a volume denoised in one piece: anatomy makes errors jump too.
    """
    jumps, usual = (values.diff(dim=1).abs().mean(dim=(0, 2, 3)) for values in (error, seamless))
    borders = [2 * start - 1 for start in starts]
    beside = [index + step for index in borders for step in (-2, 2)]
    return float((jumps / usual)[borders].mean() / (jumps / usual)[beside].mean())


@pytest.mark.parametrize("fusion", ["maps", "steps"])
def test_patches_leave_no_seam_in_a_phantom(item, model, fusion: str) -> None:
    true, brain = truth(item)
    options = {"num_inference_steps": 2, "fusion": fusion, "seed": 3}
    seamless = (estimate(item, model, **options, patch_size=(32, 36, 28)) - true) * brain
    blended = (estimate(item, model, overlap=0.5, **options) - true) * brain
    # 32 voxels along x: patches of 16 start at 0, 8 and 16, and end at 16, 24 and 32.
    excess = border_excess(blended, seamless, [8, 16, 24])
    assert excess < 1.05
    apart = (estimate(item, model, overlap=0.0, blend="constant", **options) - true) * brain
    assert border_excess(apart, seamless, [16]) > 1.1  # the measure finds the seam of patches that do not overlap
