# SPDX-License-Identifier: Apache-2.0
"""The encoder through which SDSeg sees the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.vision_encoder import VisionEncoder

TINY: dict[str, Any] = {"channels": [16, 32, 32], "attention_levels": [False] * 3, "norm_num_groups": 8}


def test_the_published_size():
    with torch.device("meta"):
        network = VisionEncoder()
        assert network(torch.empty(1, 1, 256, 192)).shape == (1, 4, 32, 24)
    head = 8 * 4 + 4
    with torch.device("meta"):
        encoder = KLAutoencoder().encoder
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in encoder.parameters()) + head
    assert sum(isinstance(module, torch.nn.Dropout) and module.p == 0.2 for module in network.modules()) == 10


@torch.no_grad()
def test_it_starts_as_the_autoencoders_encoder_with_a_random_head():
    torch.manual_seed(0)
    network, autoencoder = VisionEncoder(**TINY).eval(), KLAutoencoder(**TINY).eval()
    image = torch.rand(2, 3, 16, 24)
    assert not torch.equal(network.encoder(image), autoencoder.encoder(image))
    head = network.head.weight.clone()
    network.start_from(autoencoder)
    assert torch.equal(network.encoder(image), autoencoder.encoder(image))
    assert torch.equal(network.head.weight, head)
    assert network(image).shape == (2, 4, 4, 6)
    assert torch.equal(network(image), network.head(autoencoder.encoder(image)))
    assert torch.equal(network(image[:, :1]), network(image[:, :1].expand(-1, 3, -1, -1)))
    # Copied, not shared: the encoder is trained and the autoencoder is not.
    network.encoder.blocks[0].conv.weight.zero_()
    assert autoencoder.encoder.blocks[0].conv.weight.abs().max() > 0


@pytest.mark.parametrize(
    "options", [{"channels": [16, 32, 64]}, {"num_res_blocks": 1}, {"attention_levels": [False, True, False]}]
)
def test_another_encoder_is_refused_as_a_whole(options: dict[str, Any]):
    network = VisionEncoder(**TINY)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"^vision_encoder_def: .* autoencoder_def, but blocks\.\d+\."):
        network.start_from(KLAutoencoder(**{**TINY, **options}))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_dropout_acts_in_training_only():
    network = VisionEncoder(**TINY)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(network.eval()(image), network(image))
    assert not torch.equal(network.train()(image), network(image))
    network(image).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
