# SPDX-License-Identifier: Apache-2.0
"""The workflows of ``dmri2noddi``, small: networks of a few channels, heads of few voxels."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from shared.datalist import load_datalist
from tests.bundle_runs import BundleRuns
from tests.bundle_tools import read
from tests.conftest import ROOT
from tools.phantoms.dmri2noddi import make_dataset
from tools.phantoms.noddi_acquisition import default_table

LR_SHAPE = (16, 20, 18)
HR_SHAPE = (32, 40, 36)
MAPS = ("ndi", "odi", "fwf")
PATCH = 8
# Of the phantoms' gradient table.
DIRECTIONS = 60
TINY = read(ROOT / "bundles/dmri2noddi/configs/tiny.json")
AUTOENCODER = {**TINY["autoencoder_def"], "num_hiddens": 4, "num_embeddings": 32, "norm_num_groups": 2}
JUDGE = {"num_layers_d": 1, "channels": 4}
DISCRIMINATOR = {
    **TINY["discriminator_def"],
    **{name: {**TINY["discriminator_def"][name], **JUDGE} for name in ("slice_discriminator", "volume_discriminator")},
}
ENCODER = {
    **TINY["encoder_def"],
    **{"num_hiddens": 4, "kernel_sizes": [3, 5], "kernel_channels": [3, 3], "norm_num_groups": 2},
    "head_num_groups": 2,
}
UNET = {
    **TINY["unet_def"],
    **{"channels": [8, 8], "attention_levels": [False, True], "num_head_channels": [0, 4], "norm_num_groups": 4},
}
BASELINE = {**TINY["baseline_def"], "divisor": 2}
BASELINE["unet"] = {**BASELINE["unet"], "channels": [4, 8], "strides": [2], "num_res_units": 1}
SMALL: dict[str, Any] = {"patch_size": [PATCH] * 3, "device": "$torch.device('cpu')"}
# As published, whatever the demonstration takes.
SCHEDULE = read(ROOT / "bundles/dmri2noddi/configs/train.json")["noise_schedule"]
MODEL = {**SMALL, "noise_schedule": SCHEDULE, "autoencoder_def": AUTOENCODER, "encoder_def": ENCODER, "unet_def": UNET}
TRAINING = {
    **{"max_epochs": 2, "batch_size": 4, "num_workers": 0, "tracking_uri": "", "learning_rate": 0.01},
    **{"patch_stride": [PATCH] * 3, "min_foreground": 0.3},
}
STAGES: dict[str, dict[str, Any]] = {
    "train_vqgan": {
        **{**SMALL, **TRAINING, "autoencoder_def": AUTOENCODER, "discriminator_def": DISCRIMINATOR},
        **{"adversarial_start": 2, "preview_interval": 2},
    },
    "train_encoder": {**SMALL, **TRAINING, "autoencoder_def": AUTOENCODER, "encoder_def": ENCODER},
    # A warm-up that a resumed run must go on with.
    "train": {**MODEL, **TRAINING, "warmup_steps": 12, "preview_interval": 2},
    "train_baseline": {**SMALL, **TRAINING, "baseline_def": BASELINE},
    "inference": {**MODEL, "num_inference_steps": 4},
}
TRAININGS = ("train_vqgan", "train_encoder", "train", "train_baseline")
RELEASED = {"train_vqgan": "stages/vqgan", "train_encoder": "stages/encoder", "train": "model"}
RELEASED |= {"train_baseline": "stages/baseline"}


class DmriRuns(BundleRuns):
    """With the cache of whole volumes, beside the data set: it depends on the data alone."""

    def folders(self, root: Path, stage: str, *, volumes: Path | None = None) -> dict[str, str]:
        result = super().folders(root, stage)
        if stage.startswith("train"):
            result["volume_cache_dir"] = str(volumes or root / "runs/volumes")
        return result


DMRI = DmriRuns("dmri2noddi", STAGES, cached=("train_encoder", "train"))


def make_phantoms(folder: Path, *, num_subjects: int = 5) -> Path:
    """Heads of ``HR_SHAPE`` voxels: training 3, validation 1, test 1."""
    make_dataset(str(folder), num_subjects=num_subjects, shape=HR_SHAPE, split=(0.6, 0.2, 0.2), lesions=0.0)
    assert (~default_table().b0).sum() == DIRECTIONS
    return folder


def network(**overrides: Any) -> Any:
    """The whole model with random weights, also those that start at zero, and with codes and statistics of its own."""
    with torch.random.fork_rng(), DMRI.small("inference", Path("unused"), overrides) as workflow:
        torch.manual_seed(0)
        model = workflow.parser.get_parsed_content("network_def")
        channels = model.autoencoder.encoder.conv_in[1].conv.in_channels
        with torch.no_grad():
            # Codes start from data.
            model.autoencoder.train()(torch.rand(2, channels, 16, 16, 16))
            for parameter in model.unet.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.3 * parameter[0].numel() ** -0.5)
            codes = model.autoencoder.codebook.embedding.weight
            model.latent_mean.copy_(codes.mean(dim=0))
            model.latent_std.copy_(codes.std(dim=0))
        return model.eval()


def save_network(models: Path, **overrides: Any) -> Path:
    """Random weights as a training would leave them: the model and the stages in it."""
    (models / "stages").mkdir(parents=True, exist_ok=True)
    model = network(**overrides)
    torch.save(model.state_dict(), models / "model.pt")
    torch.save(model.autoencoder.state_dict(), models / "stages/vqgan.pt")
    torch.save(model.encoder.state_dict(), models / "stages/encoder.pt")
    return models


def weights(root: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(root / f"models/{name}.pt", weights_only=True)


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def changed(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def copy_stages(trained: Path, root: Path, *stages: str) -> Path:
    """The weights of earlier stages in a folder of models of its own; returns ``root``."""
    (root / "models/stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        shutil.copyfile(trained / f"models/stages/{stage}.pt", root / f"models/stages/{stage}.pt")
    return root


def rewritten(dataset: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a data set with ``change`` made to the content of its data list; files can be replaced."""
    shutil.copytree(dataset, folder)
    content = json.loads((folder / "datalist.json").read_text())
    change(content)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


# What is read, by nibabel and numpy alone: the phantoms lie in RAS order


def voxels(item: dict[str, Any], key: str) -> np.ndarray:
    return np.asarray(nibabel.load(item[key]).dataobj, dtype=np.float32)


def patch_of(volume: np.ndarray, item: dict[str, Any], factor: int = 1) -> torch.Tensor:
    """Padded with zeros behind."""
    start, size = ([factor * n for n in item[key]] for key in ("patch", "patch_size"))
    padded = np.pad(volume, [(0, 0), *((0, n) for n in size)])
    return torch.from_numpy(padded[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))].copy())


def true_maps(item: dict[str, Any]) -> torch.Tensor:
    return patch_of(np.stack([voxels(item, key) for key in MAPS]), item, 2)


def patches(phantoms: Path, section: str) -> list[dict[str, Any]]:
    """Patches of ``PATCH`` side by side, the last flush with the end, that hold enough of the brain."""
    result = []
    for item in load_datalist(phantoms, section):
        mask = voxels(item, "mask")[None]
        starts = [[*range(0, side - PATCH, PATCH), side - PATCH] for side in LR_SHAPE]
        for start in itertools.product(*starts):
            place = {**item, "patch": list(start), "patch_size": [PATCH] * 3}
            if patch_of(mask, place, 2).mean() >= 0.3:
                result.append(place)
    return result


def check_maps(phantoms: Path, root: Path, folder: Path, stage: str = "inference", **overrides: Any) -> None:
    """Make maps of the test section with the models of ``root``: three for each series, no two alike."""
    DMRI.execute(stage, phantoms, ckpt_dir=str(root / "models"), output_dir=str(folder), **overrides)
    for item in load_datalist(phantoms, "test"):
        stem = folder / f"subjects/{item['subject']}/{item['subject']}"
        found = [nibabel.load(f"{stem}_{name}.nii.gz") for name in MAPS]
        assert [image.shape for image in found] == [HR_SHAPE] * 3
        assert len({np.asarray(image.dataobj).tobytes() for image in found}) == 3
