# SPDX-License-Identifier: Apache-2.0
"""The networks of ``brain_controlnet``: the bundle's, from its own configs, and the published ones with its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from shared.checkpoints import convert_state_dict
from shared.inferers import seeded_noise
from shared.networks.text_encoder import TransformerTextEncoder
from tools.benchmarks.bundle_config import bundle_config, options_of
from tools.benchmarks.published_networks import published_network, spread_zeros
from tools.benchmarks.workload import Setting, Size

BUNDLE = "brain_controlnet"
CONTEXT_LENGTH = 77
# Token ids of the null prompt and of "T1-weighted image of a brain.", as the published sampler pads them.
_WORDS = [49406, 339, 272, 268, 34700, 2867, 539, 320, 8124, 269, 49407]
TOKENS = torch.tensor([[49406, *[49407] * (CONTEXT_LENGTH - 1)], _WORDS + [0] * (CONTEXT_LENGTH - len(_WORDS))])


def image_size(setting: Setting) -> list[int]:
    """As published but for tests."""
    return setting.pick([32, 64], [160, 224], [160, 224])


def width_share(setting: Setting) -> Fraction:
    """Width of the networks as a share of the published one."""
    return setting.pick(Fraction(1, 32), Fraction(1, 4), Fraction(1))


def width_in_words(share: Fraction) -> str:
    return "published widths" if share == 1 else f"{share} of the published widths"


def brain_config(
    setting: Setting, file: str, share: Fraction | None = None, changes: dict[str, Any] | None = None
) -> ConfigParser:
    """A training configuration of the bundle at a share of its width; layers, levels and heads stay.

    Args:
        setting: where and how large; at tiny size with one residual block instead of two.
        file: "train" or "train_diffusion".
        share: of the widths; ``None``: ``width_share``.
        changes: values by id, over all others.
    """
    share = width_share(setting) if share is None else share
    size = image_size(setting)
    parser = bundle_config(BUNDLE, [file])
    values: dict[str, Any] = {
        "device": str(setting.device),
        "image_size": size,
        "latent_shape": [3, size[0] // 8, size[1] // 8],
        # An embedded sentence, as published, and not a learned one.
        "prompt_def#learned": False,
        "unet_def#cross_attention_dim": int(1024 * share),
    }
    networks = ("autoencoder", "unet", "controlnet") if file == "train" else ("autoencoder", "unet")
    for network in networks:
        for key in ("channels", "num_head_channels", "conditioning_embedding_num_channels"):
            if key in parser[f"{network}_def"]:
                values[f"{network}_def#{key}"] = [int(n * share) for n in parser[f"{network}_def#{key}"]]
        values[f"{network}_def#norm_num_groups"] = math.gcd(32, *values[f"{network}_def#channels"])
        if setting.size == Size.TINY:
            values[f"{network}_def#num_res_blocks"] = 1
    if file == "train":
        values["controlnet_def#cross_attention_dim"] = int(1024 * share)
        values["controlnet_def#conditioning_embedding_in_channels"] = 1
    for key, value in (values | (changes or {})).items():
        parser[key] = value
    return parser


def attention(file: str, fused: bool) -> dict[str, Any]:
    """Changes for ``brain_config``: scaled-dot-product attention, or MONAI core's default."""
    names = ("unet_def", "controlnet_def") if file == "train" else ("unet_def",)
    return {f"{name}#use_flash_attention": fused for name in names}


def random_model(parser: ConfigParser, setting: Setting) -> Any:
    """``network_def`` with random weights everywhere, also where training starts at zero, in training mode.

    The embeddings of its prompt are those of ``text_encoder``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model = parser.get_parsed_content("network_def")
    spread_zeros(model, setting.seed)
    diffusion = getattr(model, "diffusion", model)
    diffusion.scale_factor.fill_(0.3)
    return model


def text_encoder(setting: Setting, width: int) -> nn.Module:
    """A text encoder of the depth, heads and vocabulary of the published one, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed + 1)
        encoder = TransformerTextEncoder(
            embed_dim=width,
            num_layers=setting.pick(2, 23, 23),
            num_heads=max(width // 64, 1),
            embedding_size=None,
            vocab_size=49408,
        )
    return encoder.to(setting.device)


def whole_controlnet(model: Any) -> nn.Module:
    """A copy of a ``ControlNetModel``'s ControlNet with its embedding network in it, as MONAI core has it."""
    network = copy.deepcopy(model.controlnets[0])
    network.controlnet_cond_embedding = copy.deepcopy(model.embeddings[0])
    return network


@dataclass
class Networks:
    """The parts as the published programs use them; ``controlnet`` is ``None`` in stage 2."""

    autoencoder: Any
    unet: Any
    controlnet: Any
    scale_factor: float

    def to(self, device: torch.device) -> Networks:
        for network in (self.autoencoder, self.unet, self.controlnet):
            if network is not None:
                network.to(device)
        return self


def core_networks(model: Any) -> Networks:
    """Copies of the parts of a ``ControlNetModel`` or ``ConstantPromptModel``: MONAI core's own networks."""
    diffusion = getattr(model, "diffusion", model)
    controlnet = whole_controlnet(model) if hasattr(model, "controlnets") else None
    autoencoder, unet = (copy.deepcopy(part).requires_grad_(True) for part in (diffusion.autoencoder, diffusion.unet))
    return Networks(autoencoder, unet, controlnet, float(diffusion.scale_factor))


def published_networks(model: Any, parser: ConfigParser) -> Networks:
    """The same from monai-generative, with the same weights, on the CPU."""
    parts = core_networks(model)
    cond = {"conditioning_embedding_in_channels": 1}
    return Networks(
        published_network(parts.autoencoder, options_of(parser, "autoencoder_def")),
        published_network(parts.unet, _plain(parser, "unet_def")),
        None
        if parts.controlnet is None
        else published_network(parts.controlnet, _plain(parser, "controlnet_def") | cond),
        parts.scale_factor,
    )


def in_core_order(values: Mapping[str, torch.Tensor], network: nn.Module) -> torch.Tensor:
    """Numbers by weight, named as by monai-generative or MONAI core, as one vector in the order of ``network``."""
    return torch.cat([value.flatten() for value in convert_state_dict(values, network).values()])


def _plain(parser: ConfigParser, name: str) -> dict[str, Any]:
    return {key: parser.get_parsed_content(f"{name}#{key}") for key in options_of(parser, name)}


def random_pairs(setting: Setting, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and conditions ``(count, 1, H, W)`` in [0, 1]: time does not depend on what they show."""
    shape = (1, *(side // 4 for side in image_size(setting)))
    coarse = seeded_noise(range(setting.seed, setting.seed + 2 * count), shape).sigmoid()
    images = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").to(setting.device)
    return images[:count], images[count:]
