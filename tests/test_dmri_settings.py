# SPDX-License-Identifier: Apache-2.0
"""What the configurations of ``dmri2noddi`` ship: published sizes and settings, and what MONAI's zoo checks."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out

from shared.patches import patch_starts
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps
from tests.bundle_tools import components
from tests.dmri_runs import DMRI, MAPS, MODEL, TRAININGS, network

# Spec dmri2noddi 4.2; the adversarial start is ours, in epochs.
VQGAN = {
    **{"in_channels": "$1 if @one_map else len(@maps)", "num_hiddens": 64, "num_levels": 1, "norm_num_groups": 32},
    **{"num_embeddings": 8192, "embedding_dim": 8, "restart_threshold": 1.0},
}
ENCODER = {
    **{"num_hiddens": 128, "kernel_sizes": [3, 5, 9, 13], "kernel_channels": [64, 32, 16, 16]},
    **{"norm_num_groups": 32, "head_num_groups": 8},
}
UNET = {
    **{"spatial_dims": 3, "in_channels": 16, "out_channels": 8, "num_res_blocks": 2},
    **{"channels": [128, 256, 256, 512], "attention_levels": [False, True, True, True]},
}


def size_of(net: torch.nn.Module) -> float:
    """Millions of parameters."""
    return round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", ["train", "inference"])
def test_networks_have_the_published_size(name):
    parser = ConfigParser(DMRI.config(name))
    with torch.device("meta"):
        autoencoder, encoder, unet = (
            parser.get_parsed_content(f"{part}_def") for part in ("autoencoder", "encoder", "unet")
        )
    assert [size_of(one) for one in (autoencoder, encoder)] == [4.25, 7.44]
    assert size_of(unet) == pytest.approx(195.5, abs=0.1)
    assert autoencoder.codebook.embedding.weight.shape == (8192, 8)
    assert encoder.in_channels == 8
    assert VQGAN.items() <= parser.get("autoencoder_def").items()
    assert ENCODER.items() <= parser.get("encoder_def").items()
    assert UNET.items() <= parser.get("unet_def").items()


def test_discriminators_are_the_published_ones():
    config = DMRI.config("train_vqgan")["discriminator_def"]
    for name, axes in (("slice", 2), ("volume", 3)):
        found = {key: config[f"{name}_discriminator"][key] for key in ("spatial_dims", "num_layers_d", "channels")}
        assert found == {"spatial_dims": axes, "num_layers_d": 3, "channels": 64}


def test_training_settings_are_the_published_ones():
    """Spec dmri2noddi 4.3 and 4.5."""
    for name in TRAININGS[:3]:
        config = DMRI.config(name)
        published = {"learning_rate": 1e-4, "batch_size": 2, "maps": list(MAPS)}
        published |= {"patch_size": [32] * 3, "patch_stride": [18] * 3, "flip_probability": 0.0}
        assert {key: config[key] for key in published} == published
    stage_1, stage_2, stage_3 = (DMRI.config(name) for name in TRAININGS[:3])
    assert (stage_1["optimizer"]["_target_"], stage_1["optimizer"]["betas"]) == ("torch.optim.Adam", [0.5, 0.9])
    assert stage_1["discriminator_optimizer"]["betas"] == [0.5, 0.9]
    assert stage_1["loss"]["reconstruction_weight"] == 4.0
    trainer = stage_1["train"]["trainer"]
    assert trainer["adversarial_loss"]["_target_"].endswith(".HingeAdversarialLoss")
    assert trainer["adversarial_weight"] == 1.0
    assert stage_1["adaptive_weight"] is True
    assert 1 < stage_1["adversarial_start"] < stage_1["max_epochs"]
    assert (stage_2["optimizer"]["_target_"], stage_2["optimizer"]["weight_decay"]) == ("torch.optim.AdamW", 5e-5)
    expected = {"_target_": "torch.optim.Adam", "betas": [0.9, 0.99], "weight_decay": 5e-5}
    assert {key: stage_3["optimizer"][key] for key in expected} == expected
    assert stage_2["loss"] == stage_3["loss"] == {"_target_": "torch.nn.L1Loss"}
    assert stage_3["accumulation_steps"] == 1


def test_a_published_volume_has_36_patches():
    """Spec dmri2noddi 4.1: 136 x 172 x 136 voxels of the maps."""
    config = DMRI.config("train")
    starts = patch_starts((68, 86, 68), config["patch_size"], config["patch_stride"])
    assert len(starts) == 36
    assert [sorted({start[axis] for start in starts}) for axis in range(3)] == [
        [0, 18, 36],
        [0, 18, 36, 54],
        [0, 18, 36],
    ]
    # The same distance where whole volumes are made.
    for name in ("inference", "evaluate"):
        assert config["patch_size"][0] * (1 - DMRI.config(name)["overlap"]) == config["patch_stride"][0]


@pytest.mark.parametrize("name", ["train", "inference"])
def test_schedule_is_the_published_one(name):
    """Spec dmri2noddi 4.4: linear in the square root, 1e-4 to 2e-2, 1000 steps; noise is predicted."""
    parser = ConfigParser(DMRI.config(name))
    schedulers = [*parser.get_parsed_content("noise_schedulers").values()]
    assert [type(scheduler) for scheduler in schedulers] == [DPMSolverMultistepScheduler, DDIMScheduler]
    for scheduler in schedulers + ([parser.get_parsed_content("noise_scheduler")] if name == "train" else []):
        assert scheduler.num_train_timesteps == 1000
        assert scheduler.prediction_type == "epsilon"
        assert scheduler.betas[0].item() == pytest.approx(1e-4)
        assert scheduler.betas[-1].item() == pytest.approx(2e-2)
        steps = scheduler.betas.double().sqrt().diff()
        assert (steps / steps.mean() - 1).abs().max() < 1e-3
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(7.33e-4, rel=1e-3)


def test_inference_arrives_at_the_clean_latent_with_either_solver():
    parser = ConfigParser(DMRI.config("inference"))
    sampler = parser.get_parsed_content("inferer")
    assert isinstance(sampler.scheduler, DPMSolverMultistepScheduler)
    assert (sampler.num_inference_steps, sampler.num_samples, sampler.deterministic) == (30, 1, False)
    assert (sampler.overlap, sampler.start) == (0.4375, 1.0)
    assert sampler.patch_size == (32, 32, 32)
    assert sampler.fusion == "steps"
    published = parser.get_parsed_content("noise_schedulers#ddim")
    assert diffusion_timesteps(published, 100) == list(range(999, 0, -10))
    for scheduler, steps in ((sampler.scheduler, 30), (published, 100)):
        noise, clean = torch.randn(2, 1, 8, 4, 3, 2)
        x = scheduler.add_noise(clean, noise, torch.tensor([999]))
        for t in diffusion_timesteps(scheduler, steps):
            x, _ = scheduler.step(noise, t, x)
        torch.testing.assert_close(x, clean, rtol=0, atol=1e-3)


def test_options_of_a_client_reach_sampler_and_description():
    overrides = {"seed": 7, "num_samples": 3, "num_inference_steps": 5, "scheduler": "dpm", "deterministic": False}
    parser = ConfigParser(DMRI.config("inference"))
    for key, value in overrides.items():
        parser.set(value, f"displayable_configs#{key}")
    sampler = parser.get_parsed_content("inferer")
    saver = parser.get_parsed_content("postprocessing").transforms[-1].transform
    solver = parser.get_parsed_content("noise_schedulers")["dpm"]
    assert {key: getattr(sampler, key) for key in overrides} == overrides | {"scheduler": solver}
    assert saver.settings == overrides | {"start": sampler.start}
    assert saver.map_names == MAPS
    # MONAI Label's apps show these, the options of the command line by the same name lead to them.
    shown = DMRI.config("inference")["displayable_configs"]
    assert shown == {key: f"@{key}" for key in overrides} | {"map": "@map_choices"}


@pytest.mark.parametrize("name", [*TRAININGS, "inference", "evaluate"])
def test_every_part_gets_features_maps_and_patch(name):
    wanted = {
        "LoadFeaturePatchd": {"keys": "dwi", "features": "@features_def", "cache_dir": "@volume_cache_dir"},
        "LoadMapPatchd": {"keys": "@maps", "cache_dir": "@volume_cache_dir"},
        "LoadDiffusionFeaturesd": {"keys": "dwi", "features": "@features_def"},
        "LoadNoddiMapsd": {"keys": "@maps"},
        "patch_items": {"patch_size": "@patch_size", "stride": "@patch_stride", "min_foreground": "@min_foreground"},
        "NoddiSampler": {"patch_size": "@patch_size"},
        "PatchwiseReconstruction": {"patch_size": "@patch_size", "overlap": "@overlap", "one_map": "@one_map"},
        "UpsamplingBaseline": {"patch_size": "@patch_size", "overlap": "@overlap"},
        "NoddiModel": {"one_map": "@one_map", "num_maps": "$len(@maps)"},
    }
    found = [(part["_target_"].rsplit(".", 1)[-1], part) for _, part in components(DMRI.config(name))]
    assert any(kind in wanted for kind, _ in found)
    for kind, part in found:
        assert wanted.get(kind, {}).items() <= part.items()
        if kind == "NoddiSampler":  # one of those that differ in their solver alone; without diffusion any will do
            assert part.get("schedulers") == "@noise_schedulers" or part["deterministic"] is True


@pytest.mark.parametrize("overlays", [("inference",), ("train",)])
def test_zoo_finds_the_shape_that_the_metadata_state(overlays):
    """``network_def(image)`` gives the maps without diffusion in one pass."""
    files = [str(DMRI.folder / f"configs/{name}.json") for name in (*overlays, "tiny")]
    metadata = str(DMRI.folder / "configs/metadata.json")
    # 32 voxels, as stated; networks of a few channels, for time.
    small = {key: value for key, value in MODEL.items() if key.endswith("_def")}
    verify_net_in_out("network_def", meta_file=metadata, config_file=files, device="cpu", **small)
    stated = DMRI.config("metadata")["network_data_format"]
    channels = stated["inputs"]["image"]["num_channels"]
    with torch.no_grad():
        maps = network()(torch.rand(2, channels, 6, 8, 4))
    assert maps.shape == (2, stated["outputs"]["pred"]["num_channels"], 12, 16, 8)
    assert stated["outputs"]["pred"]["value_range"] == [0, 1]
    assert 0 <= maps.min() < maps.max() <= 1
    assert maps.std() > 1e-3


def test_metadata_name_the_features_and_maps():
    stated = DMRI.config("metadata")["network_data_format"]
    features = ConfigParser(DMRI.config("inference")).get_parsed_content("features_def")
    assert stated["inputs"]["image"]["num_channels"] == features.num_channels == len(features.names)
    assert sorted(stated["inputs"]["image"]["channel_def"]) == [str(n) for n in range(features.num_channels)]
    assert [text.split(",")[0].lower() for text in stated["outputs"]["pred"]["channel_def"].values()] == list(MAPS)
    shape = stated["inputs"]["image"]["spatial_shape"]
    assert shape == DMRI.config("inference")["patch_size"]
    assert stated["outputs"]["pred"]["spatial_shape"] == [2 * side for side in shape]


def test_tiny_networks_are_those_of_the_paper_with_fewer_channels():
    tiny = DMRI.config("tiny")
    for key, config in (("autoencoder_def", "train"), ("encoder_def", "train"), ("unet_def", "train")):
        full = DMRI.config(config)[key]
        assert tiny[key].keys() == full.keys() - {"_desc_"}
        assert tiny[key]["_target_"] == full["_target_"]
    assert tiny["ckpt_dir"].endswith("/models/tiny'")
