# SPDX-License-Identifier: Apache-2.0
"""Networks of ``dmri2noddi`` with random weights, from the bundle's own configuration, narrower where time is short."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from tools.benchmarks.bundle_config import bundle_config
from tools.benchmarks.published_networks import spread_zeros
from tools.benchmarks.workload import Setting

HEAD_CHANNELS = 64


def noddi_config(
    setting: Setting, names: Sequence[str], *, share: float, patch: Sequence[int], **changes: Any
) -> ConfigParser:
    """The bundle's configuration on a device, with a share of the published channels.

    Args:
        setting: gives the device; the tiny size also takes fewer codes.
        names: configurations, see ``bundle_config``.
        share: of the channels of all three networks. Heads of the attention keep 64 channels as far as they go, so that
            attention has about its share of the work.
        patch: sides of a patch on the low-resolution grid.
        changes: further values by id.
    """

    def part(count: int) -> int:
        return max(1, round(count * share))

    head = min(HEAD_CHANNELS, part(256))
    values: dict[str, Any] = {
        "device": setting.device,
        "amp": False,
        "patch_size": list(patch),
        "unet_def#channels": [part(128), part(256), part(256), part(512)],
        "unet_def#num_head_channels": [0, head, head, head],
        "unet_def#norm_num_groups": min(32, part(128)),
        "autoencoder_def#num_hiddens": part(64),
        "autoencoder_def#norm_num_groups": min(32, part(64)),
        "autoencoder_def#num_embeddings": setting.pick(64, 8192, 8192),
        "encoder_def#num_hiddens": part(128),
        "encoder_def#kernel_channels": [part(64), part(32), part(16), part(16)],
        "encoder_def#norm_num_groups": min(32, part(128)),
    }
    return bundle_config(
        "dmri2noddi", names, values | {key.replace("__", "#"): value for key, value in changes.items()}
    )


def random_model(parser: ConfigParser, setting: Setting) -> Any:
    """The configuration's ``NoddiModel`` in evaluation mode, on the device.

    Nothing is zero and codes lie where latents do, lest differences hide; decoded maps have values around 0.5, since
    what is clipped at 0 hides differences too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model: Any = spread_zeros(parser.get_parsed_content("network_def"), setting.seed)
        with torch.no_grad():
            model.autoencoder.codebook.embedding.weight.normal_()
            model.autoencoder.decoder.conv_out.get_parameter("1.conv.bias").fill_(0.5)
    return model.to(setting.device).eval()


def with_default_attention(model: nn.Module) -> Any:
    """A copy with the same weights whose attention is what MONAI core computes by default: the whole matrix."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = False  # type: ignore[assignment]
    return other


def in_words(share: float) -> str:
    """A share of the published channels, for ``sizes``."""
    return "published channels" if share == 1 else f"1/{round(1 / share)} of the published channels"


def random_features(setting: Setting, shape: Sequence[int], *, channels: int = 8) -> torch.Tensor:
    """Features of a volume ``(1, channels, *shape)`` in [0, 1]."""
    generator = torch.Generator().manual_seed(setting.seed)
    return torch.rand(1, channels, *shape, generator=generator).to(setting.device)
