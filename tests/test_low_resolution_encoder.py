# SPDX-License-Identifier: Apache-2.0
"""The encoder of low-resolution features: published sizes, its parts, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shared.networks.low_resolution_encoder import LowResolutionEncoder
from shared.networks.vq_autoencoder import VQAutoencoder

TINY: dict[str, Any] = {
    **{"in_channels": 5, "num_hiddens": 8, "embedding_dim": 4, "norm_num_groups": 4, "head_num_groups": 2},
    **{"kernel_sizes": (3, 5, 7), "kernel_channels": (4, 2, 2)},
}


def tiny(**options: Any) -> LowResolutionEncoder:
    torch.manual_seed(0)
    return LowResolutionEncoder(**{**TINY, **options})


def test_published_size():
    with torch.device("meta"):
        network = LowResolutionEncoder(in_channels=1)
        latent = network(torch.empty(2, 1, 32, 32, 32))
    assert latent.shape == (2, 8, 32, 32, 32)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv3d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        *[(64, 1, 3, 3, 3), (32, 1, 5, 5, 5), (16, 1, 9, 9, 9), (16, 1, 13, 13, 13)],
        *[(128, 128, 3, 3, 3), (256, 128, 4, 4, 4), (256, 256, 3, 3, 3), (256, 256, 3, 3, 3)],
        *[(256, 128, 3, 3, 3), (8, 256, 3, 3, 3)],
    ]
    norms = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32, 32, 32, 8]
    kernels = 64 * 27 + 32 * 125 + 16 * 729 + 16 * 2197 + 128
    block = 2 * (256 * 256 * 27 + 256) + 2 * 2 * 256
    encoder = (128 * 128 * 27 + 128) + (128 * 256 * 64 + 256) + block + 2 * 256
    rest = (128 * 256 * 27 + 256) + 2 * 256 + (256 * 8 * 27 + 8)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == kernels + encoder + rest == 7_074_376


@pytest.mark.parametrize("shape", [(8, 6, 4), (5, 3, 7), (1, 1, 1)])
def test_latent_has_the_grid_of_the_features(shape):
    assert tiny()(torch.rand(2, 5, *shape)).shape == (2, 4, *shape)


def test_latent_fits_that_of_the_autoencoder():
    autoencoder = VQAutoencoder(num_hiddens=4, num_embeddings=16, embedding_dim=4, norm_num_groups=2)
    latent = tiny()(torch.rand(1, 5, 4, 3, 5))
    assert latent.shape == autoencoder.encode(torch.rand(1, 3, 8, 6, 10)).shape
    assert autoencoder.decode(latent).shape == (1, 3, 8, 6, 10)


@torch.no_grad()
def test_parts_are_joined_as_described():
    network = tiny().eval()
    features = torch.rand(2, 5, 4, 3, 5)
    up = nn.functional.interpolate(features, scale_factor=2, mode="trilinear", align_corners=False)
    parts = [
        nn.functional.conv3d(up, kernel.conv.weight, kernel.conv.bias, padding=size // 2)
        for kernel, size in zip(network.kernels, (3, 5, 7), strict=True)
    ]
    embedded = torch.cat(parts, dim=1)
    assert embedded.shape == (2, 8, 8, 6, 10)
    shortcut = network.shortcut.conv
    joined = network.encoder(embedded) + nn.functional.conv3d(
        embedded, shortcut.weight, shortcut.bias, stride=2, padding=1
    )
    torch.testing.assert_close(network(features), network.head(joined))


def test_every_parameter_learns():
    network = tiny()
    network(torch.rand(1, 5, 4, 3, 5)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_sizes": (3, 4, 7)}, r"kernel_sizes: expected odd sizes.*got \[3, 4, 7\]"),
        ({"kernel_sizes": ()}, "kernel_sizes: expected odd sizes"),
        ({"kernel_sizes": (3, 5)}, r"kernel_channels: expected 2 numbers.*got \[4, 2, 2\]"),
        ({"head_num_groups": 3}, "norm_num_groups: expected a divisor of the 16 channels, got 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="in_channels: expected 5 features, got 3"):
        tiny()(torch.rand(1, 3, 4, 4, 4))
