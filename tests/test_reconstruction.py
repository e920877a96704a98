# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from monai.networks.nets import AutoencoderKL
from torch import nn

from shared.networks.vq_autoencoder import VQAutoencoder
from shared.reconstruction import DecodedLatents, PosteriorMeanReconstruction, QuantizedReconstruction


def quantizing() -> VQAutoencoder:
    torch.manual_seed(0)
    sizes = {"num_hiddens": 4, "num_embeddings": 8, "embedding_dim": 4, "norm_num_groups": 2}
    network = VQAutoencoder(in_channels=2, **sizes)
    network.train()(torch.rand(2, 2, 8, 8, 8))  # codes start from data
    return network.eval()


@torch.no_grad()
def test_posterior_mean_is_decoded():
    torch.manual_seed(0)
    sizes = {"channels": (4, 4), "attention_levels": (False, False), "num_res_blocks": 1, "norm_num_groups": 2}
    network = AutoencoderKL(spatial_dims=2, in_channels=1, out_channels=1, latent_channels=2, **sizes).eval()
    image = torch.rand(2, 1, 16, 24)
    found = PosteriorMeanReconstruction()(image, network)
    assert torch.equal(found, network.decode(network.encode(image)[0]))
    assert torch.equal(found, PosteriorMeanReconstruction()(image, network))


@torch.no_grad()
def test_nearest_codes_are_decoded():
    network, maps = quantizing(), torch.rand(3, 2, 8, 6, 4)
    found = QuantizedReconstruction()(maps, network)
    torch.testing.assert_close(found, network(maps)[0])
    assert not torch.allclose(found, network.decode(network.encode(maps), quantize=False), atol=1e-3)


@torch.no_grad()
def test_predicted_latents_are_decoded():
    network, features = quantizing(), torch.rand(3, 4, 4, 3, 2)
    found = DecodedLatents(network)(features, nn.Conv3d(4, 4, 1).requires_grad_(False))
    assert found.shape == (3, 2, 8, 6, 4)
    for factor in (1.0, -1.0):
        expected = network.decode(factor * features)
        assert torch.equal(DecodedLatents(network)(features, lambda x, by=factor: by * x), expected)
