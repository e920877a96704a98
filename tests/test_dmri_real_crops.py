# SPDX-License-Identifier: Apache-2.0
"""Real diffusion MRI through loading, features, the data check and the sampler; by path only, none of it is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet

from shared.data_check import check_dataset
from shared.diffusion_features import RotationInvariantFeatures
from shared.networks.low_resolution_encoder import LowResolutionEncoder
from shared.networks.noddi import NoddiModel
from shared.networks.vq_autoencoder import VQAutoencoder
from shared.noddi_items import inference_items
from shared.noddi_sampler import NoddiSampler
from shared.resolution import doubled_affine
from shared.schedulers import DDIMScheduler
from shared.transforms.diffusion_mri import LoadDiffusionFeaturesd, load_brain, load_features
from shared.transforms.noddi_saving import SaveNoddiMapsd
from tests.conftest import HANDBOOK

DATA = HANDBOOK / "data" / "dmri2noddi"
BRAIN, SINGLE_SHELL = DATA / "mrtrix_msmt", DATA / "small_64D"
SHAPE = (15, 15, 11)
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real diffusion data is not here")


def item_of(folder: Path) -> dict[str, str]:
    files = {"dwi": "dwi.nii.gz", "bval": "dwi.bval", "bvec": "dwi.bvec", "mask": "mask.nii.gz"}
    return {key: str(folder / name) for key, name in files.items()}


@pytest.fixture(scope="module")
def features() -> MetaTensor:
    return load_features(item_of(BRAIN), RotationInvariantFeatures())


def model(num_features: int) -> NoddiModel:
    """Networks of few channels with random weights."""
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(num_hiddens=4, num_embeddings=32, norm_num_groups=2)
    encoder = LowResolutionEncoder(
        in_channels=num_features, num_hiddens=4, kernel_sizes=(3,), kernel_channels=(4,), norm_num_groups=2
    )
    unet = DiffusionModelUNet(
        3, 16, 8, channels=(8, 8), attention_levels=(False, False), num_res_blocks=1, norm_num_groups=4
    )
    return NoddiModel(autoencoder, encoder, unet).eval()


def sampler(**options) -> NoddiSampler:
    scheduler = DDIMScheduler(1000, schedule="scaled_linear_beta", beta_start=1e-4, beta_end=0.02)
    return NoddiSampler(scheduler=scheduler, patch_size=8, num_inference_steps=3, **options)


def test_features_of_brain_are_those_of_tissue(features: MetaTensor):
    names = RotationInvariantFeatures().names
    inside = block_of(load_brain(item_of(BRAIN)))
    values = dict(zip(names, features.numpy()[:, inside], strict=True))
    assert features.shape == (len(names), *SHAPE)
    assert torch.isfinite(features).all()
    assert 0 <= features.min() <= features.max() <= 1
    assert features.numpy()[:, ~inside].max() == 0
    # fluid and tissue lie in the crop: the signal falls with b, and MD spans 0.6 to 3e-3 mm2/s
    assert np.median(values["mean_b1000"]) > np.median(values["mean_b2000"]) > 0.05
    assert 0.15 < np.median(values["md"]) < 0.6
    assert 0.1 < np.median(values["fa"]) < 0.5
    white = values["fa"] > 0.5
    assert white.sum() > 50
    assert values["power2_b2000"][white].mean() > 2 * values["power2_b2000"][values["fa"] < 0.15].mean()


def block_of(brain: MetaTensor) -> np.ndarray:
    """The mask (1, 2X, 2Y, 2Z) of a series, on its own grid."""
    assert set(np.unique(brain)) <= {0, 1}
    return brain.numpy()[0, ::2, ::2, ::2] > 0


def test_the_brain_mask_is_doubled_and_turned():
    stored = nibabel.load(BRAIN / "mask.nii.gz")
    brain = load_brain(item_of(BRAIN))
    assert brain.shape == (1, *(2 * size for size in SHAPE))
    assert brain.sum() == 8 * (stored.get_fdata() > 0.5).sum()
    assert nibabel.aff2axcodes(brain.affine.numpy()) == ("R", "A", "S")


def test_a_shell_that_was_not_measured_is_named():
    path = SINGLE_SHELL / "dwi.nii.gz"
    with pytest.raises(ValueError, match="missing shell: expected b-values around 2000") as error:
        load_features(item_of(SINGLE_SHELL), RotationInvariantFeatures())
    assert str(error.value).startswith(f"{path}: ")
    assert "shells (volumes) 994 (64)" in str(error.value)


def test_one_shell_serves_a_model_of_one_shell():
    found = load_features(item_of(SINGLE_SHELL), RotationInvariantFeatures(shells=(1000,)))
    assert found.shape == (5, 10, 10, 10)
    assert torch.isfinite(found).all()
    assert found[0].max() > 0
    maps = sampler()(found[None], model(5))
    assert maps.shape == (1, 3, 20, 20, 20)
    assert torch.isfinite(maps).all()


def test_the_data_check_finds_no_fault(tmp_path: Path):
    shutil.copytree(BRAIN, tmp_path / "brain")
    shutil.copytree(SINGLE_SHELL, tmp_path / "single")
    for name in ("brain", "single"):  # the fit lies on the grid of the series, a data set wants it at twice that
        for path in (tmp_path / name).glob("noddi_*"):
            path.unlink()
    files = {"dwi": "dwi.nii.gz", "bval": "dwi.bval", "bvec": "dwi.bvec", "mask": "mask.nii.gz"}
    items = [{key: f"{name}/{file}" for key, file in files.items()} | {"subject": name} for name in ("brain", "single")]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items[:1], "test": items[1:]}))
    assert check_dataset(tmp_path).problems == []
    fitted = dict(zip(("ndi", "odi", "fwf"), ("ICVF", "OD", "ISOVF"), strict=True))
    for key, name in fitted.items():
        shutil.copy(BRAIN / f"noddi_{name}.nii.gz", tmp_path / "brain")
        items[0][key] = f"brain/noddi_{name}.nii.gz"
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items[:1], "test": items[1:]}))
    problems = "\n".join(check_dataset(tmp_path).problems)
    for name in fitted.values():
        assert f"noddi_{name}.nii.gz: expected" in problems
    assert "twice the resolution" in problems


@pytest.mark.parametrize(
    "options",
    [{"deterministic": True}, {}, {"fusion": "maps"}, {"num_samples": 2}],
    ids=["deterministic", "steps", "maps", "two samples"],
)
def test_inference_saves_maps_on_the_doubled_grid(tmp_path: Path, features: MetaTensor, options: dict):
    [item] = [one for one in inference_items(BRAIN) if one["dwi"].endswith("dwi.nii.gz")]
    loaded = LoadDiffusionFeaturesd(features=RotationInvariantFeatures())(item)
    torch.testing.assert_close(loaded["image"].as_tensor(), features.as_tensor())
    maps = sampler(**options)(features[None], model(len(features)))[0]
    count = 6 if options.get("num_samples") else 3
    assert maps.shape == (count, *(2 * size for size in SHAPE))
    assert torch.isfinite(maps).all()
    assert 0 <= maps.min() <= maps.max() <= 1
    assert maps[:3].std(dim=(1, 2, 3)).min() > 0
    SaveNoddiMapsd(output_dir=tmp_path)({**item, "image": features, "pred": maps})
    source = nibabel.load(item["dwi"])
    names = [f"{item['name']}_{kind}{end}" for end in ("", "_sd")[: count // 3] for kind in ("ndi", "odi", "fwf")]
    turn = nibabel.orientations.io_orientation(source.affine)
    for name, expected in zip(names, maps.numpy(), strict=True):
        saved = nibabel.load(tmp_path / f"{name}.nii.gz")
        assert saved.shape == tuple(2 * size for size in source.shape[:3])
        assert saved.get_data_dtype() == np.float32
        np.testing.assert_allclose(saved.affine, doubled_affine(source.affine), atol=1e-5)
        np.testing.assert_array_equal(nibabel.orientations.apply_orientation(saved.get_fdata(), turn), expected)
    assert len(list(tmp_path.glob("*.nii.gz"))) == count
