# SPDX-License-Identifier: Apache-2.0
"""``sdseg`` at the size of a measurement: pictures and weights on disk, and the bundle's inference on them."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch import nn

from shared.networks.upsampling_convolution import UpsampledConvolution
from shared.weights import load_weights
from tools.benchmarks.bundle_config import BUNDLES, bundle_config
from tools.benchmarks.published_networks import spread_zeros
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Setting
from tools.phantoms.sdseg import make_dataset

Program = Callable[[], torch.Tensor]
"""Segments all pictures and returns their masks ``(N, H, W)``, boolean."""

NATIVE = (288, 384)  # of CVC-ClinicDB
REDUCED = {
    "tiny": "far below the published size in every respect",
    "quick": "a quarter of the published channels in all networks, with heads of the published width",
    "full": "networks as published",
}


def phantoms(folder: Path, count: int, *, size: tuple[int, int] = NATIVE, seed: int = 0) -> list[dict[str, str]]:
    """Write pictures with masks: items with the paths of ``image`` and ``label``; every mask has foreground."""
    make_dataset(str(folder), num_images=count + max(6, count // 2), size=size, seed=seed, split=(1.0, 0.0, 0.0))
    items = [{"image": str(path), "label": str(folder / "masks" / path.name)} for path in (folder / "images").iterdir()]
    items = sorted((item for item in items if np.asarray(Image.open(item["label"])).any()), key=lambda i: i["image"])
    return items[:count]


def model_changes(setting: Setting) -> dict[str, Any]:
    """Values of ``inference.json`` and ``train.json`` that make the networks as large as ``setting`` says."""
    changes = {
        "device": f"$torch.device('{setting.device}')",
        "image_size": setting.pick([64, 48], [256, 256], [256, 256]),
        # Random numbers for dropout would differ between memory layouts, and with them all results.
        "vision_encoder_def#dropout": 0.0,
        "unet_def#dropout": 0.0,
    }
    tiny = {
        "autoencoder_def#channels": [8, 16, 16],
        "autoencoder_def#num_res_blocks": 1,
        "autoencoder_def#norm_num_groups": 8,
        "autoencoder_def#attention_levels": [False] * 3,
        "unet_def#channels": [16, 32, 32],
        "unet_def#num_res_blocks": 1,
        "unet_def#attention_levels": [False, True, True],
        "unet_def#num_heads": 2,
        "unet_def#norm_num_groups": 8,
    }
    quick = {
        "autoencoder_def#channels": [32, 64, 128, 128],
        "unet_def#channels": [48, 96, 96, 192, 192],
        "unet_def#num_heads": 2,
        "unet_def#norm_num_groups": 16,
    }
    return {**changes, **setting.pick(tiny, quick, {})}


def with_default_attention(network: nn.Module) -> nn.Module:
    """Attention as MONAI computes it unless it is told to use fused kernels, in place."""
    for module in network.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = False  # type: ignore[assignment]
    return network


def with_default_upsampling(network: nn.Module) -> nn.Module:
    """Upsampling and the convolution after it one after the other, as in MONAI's decoder, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, UpsampledConvolution):
                layers: Any = OrderedDict(repeat=nn.Upsample(scale_factor=2.0, mode="nearest"), postconv=child.postconv)
                module._modules[name] = nn.Sequential(layers)
    return network


class Inference:
    """Pictures in a folder, weights, and ways to segment the one with the other, from file to file.

    Args:
        setting: where, and how large the networks are.
        count: number of pictures.
        shipped: the bundle's demo weights, 96 x 96, in place of random ones; the masks are then those of something.
    """

    def __init__(self, setting: Setting, count: int, *, shipped: bool = False) -> None:
        self.setting, self.shipped = setting, shipped
        self.folder = temporary_folder("sdseg")
        # Seed 0 made the pictures that the shipped weights were trained on.
        size = (128, 160) if shipped else NATIVE
        items = phantoms(self.folder / "data", count, size=size, seed=setting.seed + 1)
        self.pictures = self.folder / "pictures"
        self.pictures.mkdir()
        for item in items:
            shutil.copy(item["image"], self.pictures)
        self.labels = torch.stack([read_mask(item["label"]) for item in items])
        self.weights = BUNDLES / "sdseg/models/tiny/model.pt"
        if not shipped:
            self.weights = save_model(self._parser({}), self.folder / "models", setting.seed) / "model.pt"

    @property
    def sizes(self) -> str:
        """What is run, in words."""
        height, width = self.labels.shape[1:]
        networks = (
            "the bundle's shipped weights (3 M parameters, 96 x 96)" if self.shipped else REDUCED[self.setting.size]
        )
        return (
            f"pictures of {height} x {width} ({len(self.labels)}), from file to file: load, encode, denoise, decode, "
            f"save; {networks}; loading of the weights left out"
        )

    def program(self, *, default_attention: bool = False, default_upsampling: bool = False, **changes: Any) -> Program:
        """The bundle's inference.

        Args:
            default_attention: attention as MONAI has it by default.
            default_upsampling: upsampling likewise.
            changes: values of the configuration.
        """
        output = self.folder / f"masks_{len(list(self.folder.iterdir()))}"
        output.mkdir()
        parser = self._parser({"output_dir": str(output), "handlers": [], **changes})
        network = parser.get_parsed_content("network_def")
        load_weights(network, self.weights)
        if default_attention:
            with_default_attention(network)
        if default_upsampling:
            with_default_upsampling(network)
        evaluator = parser.get_parsed_content("evaluator")

        def run() -> torch.Tensor:
            evaluator.run()
            return torch.stack([read_mask(path) for path in sorted(output.glob("*_mask.png"))])

        return run

    def _parser(self, changes: Mapping[str, Any]) -> ConfigParser:
        names = ["inference", "tiny"] if self.shipped else ["inference"]
        sizes = {"device": f"$torch.device('{self.setting.device}')"} if self.shipped else model_changes(self.setting)
        places = {"dataset_dir": str(self.pictures)}
        if not self.shipped:
            places["ckpt_dir"] = str(self.folder / "models")
        # A configuration chooses bfloat16 on a GPU by itself; here each way says what it does.
        return bundle_config("sdseg", names, {**sizes, **places, "amp": False, **changes})


def save_model(parser: ConfigParser, folder: Path, seed: int) -> Path:
    """Write random weights where a training leaves its own; returns the folder.

    What starts at zero is random too, and the image is heard: differences have nothing to hide behind.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: Any = spread_zeros(parser.get_parsed_content("network_def"), seed)
    with torch.no_grad():
        network.vision_encoder.head.weight.mul_(20)
        # As if trained: the predicted noise is near the noise, so that the latent is not 39 times too large.
        network.scale_factor.fill_(10.0)
    (folder / "stages").mkdir(parents=True)
    torch.save(network.state_dict(), folder / "model.pt")
    torch.save(network.autoencoder.state_dict(), folder / "stages/autoencoder.pt")
    return folder


def read_mask(path: str | Path) -> torch.Tensor:
    """A mask of a file ``(H, W)``, boolean."""
    return torch.from_numpy(np.asarray(Image.open(path)) > 0)
