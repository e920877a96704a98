# SPDX-License-Identifier: Apache-2.0
"""What the configurations of ``sdseg`` ship: published sizes and settings, and what MONAI's zoo checks."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out

from tests.bundle_tools import components
from tests.sdseg_runs import SDSEG, SIZE, STAGES, network


def test_networks_have_the_published_size():
    """Spec sdseg 3.2: 83.65 M and 294.97 M parameters; the vision encoder is the autoencoder's encoder and a 1 x 1."""
    for name in ("train", "inference"):
        parser = ConfigParser(SDSEG.config(name))
        with torch.device("meta"):
            parts = [parser.get_parsed_content(f"{part}_def") for part in ("autoencoder", "unet", "vision_encoder")]
        counts = [sum(parameter.numel() for parameter in network.parameters()) for network in parts]
        assert [round(count / 1e6, 2) for count in counts] == [83.65, 294.97, 34.16]


def test_settings_are_the_published_ones():
    """Spec sdseg 3.1, 3.3 to 3.5; the learning rate is the effective one."""
    config = SDSEG.config("train")
    published = {
        **{"learning_rate": 4e-5, "class_learning_rate_factor": 100, "batch_size": 4, "accumulation_steps": 1},
        **{"warmup_steps": 10000, "ema_decay": 0.9999, "latent_weight": 1.0, "condition_mode": "concat"},
        **{"train_vision_encoder": True, "flips": "both", "intensity_probability": 0.0, "image_size": [256, 256]},
    }
    assert {name: config[name] for name in published} == published
    # Kvasir-SEG's 800 training images in four flips, in batches of 4: the published 100 000 steps (spec 3.5).
    assert config["max_epochs"] * 800 * 4 // config["batch_size"] == 100_000
    assert config["noise_schedule"] | {"schedule": None} == {
        **{"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0155, "prediction_type": "epsilon"},
        "schedule": None,
    }
    for name in ("train", "inference"):
        given = SDSEG.config(name)["noise_scheduler"]
        assert {key: given[key] for key in config["noise_schedule"]} == {
            key: f"@noise_schedule#{key}" for key in config["noise_schedule"]
        }
    assert config["lr_scheduler"]["start_factor"] == 1e-6
    assert config["vision_encoder_def"]["dropout"] == config["unet_def"]["dropout"] == 0.2
    inference = SDSEG.config("inference")
    assert (inference["num_inference_steps"], inference["num_samples"], inference["threshold"]) == (1, 1, 0.5)


LOADERS = {
    "shared.transforms.segmentation_images.LoadPictured": {"window": "@window"},
    "shared.transforms.masks.LoadMaskd": {"num_classes": "@num_classes"},
    "shared.transforms.autoencoder_images.LoadPictureOrMaskd": {"window": "@window", "num_classes": "@num_classes"},
}


@pytest.mark.parametrize("name", [*STAGES, "evaluate"])
def test_every_loader_gets_window_and_classes(name):
    found = [part for _, part in components(SDSEG.config(name)) if part["_target_"] in LOADERS]
    assert found
    assert all(LOADERS[part["_target_"]].items() <= part.items() for part in found)


@pytest.mark.parametrize("overlays", [("inference",), ("train",)])
def test_zoo_finds_the_shape_that_the_metadata_state(overlays):
    """``network_def(image)`` gives the scores in one pass."""
    files = [str(SDSEG.folder / f"configs/{name}.json") for name in (*overlays, "tiny")]
    metadata = str(SDSEG.folder / "configs/metadata.json")
    verify_net_in_out("network_def", meta_file=metadata, config_file=files, device="cpu")
    stated = SDSEG.config("metadata")["network_data_format"]
    with torch.no_grad():
        scores = network().eval()(torch.rand(2, stated["inputs"]["image"]["num_channels"], *SIZE))
    assert scores.shape == (2, stated["outputs"]["pred"]["num_channels"], *SIZE)
    assert stated["outputs"]["pred"]["value_range"] == [-1, 1]
    assert scores.abs().max() <= 1
    assert scores.std() > 0


def test_mask_and_agreement_have_one_threshold():
    config = ConfigParser({**SDSEG.config("inference"), "threshold": 0.3})
    assert config.get_parsed_content("inferer").threshold == 0.3
    assert config.get("postprocessing#transforms#1#threshold") == config.get("inferer#threshold") == "@threshold"


@pytest.mark.parametrize("name", ["train", "train_baseline", "evaluate", "inference"])
def test_masks_take_the_nearest_pixel_and_images_the_mean(name):
    kind = "shared.transforms.in_plane.ResizeInPlaned"
    found = [part for _, part in components(SDSEG.config(name)) if part["_target_"] == kind]
    assert found
    assert all(part["mode"] == {"image": "bilinear", "label": "nearest"}[part["keys"]] for part in found)
