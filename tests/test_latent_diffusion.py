# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.networks.latent_diffusion import TextToImageModel


class Doubling(nn.Module):
    """Autoencoder whose latents are twice the image, with a sigma that must not show in a reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.norm = nn.BatchNorm2d(1)

    def encode(self, x):
        return x * self.weight, torch.ones_like(x)

    def decode(self, z):
        return z / self.weight


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, timesteps, context):
        self.seen = (timesteps, context)
        return x * self.weight


@pytest.fixture
def model():
    return TextToImageModel(Doubling(), Recording(), nn.Embedding(10, 4))


def test_decoding_undoes_the_scale_factor(model):
    image = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model.scale_factor.fill_(0.25)
    mean, _ = model.autoencoder.encode(image)
    torch.testing.assert_close(model.decode(mean * 0.25), image)
    torch.testing.assert_close(model.reconstruct(image), image)


def test_scale_factor_travels_with_the_weights(model):
    model.scale_factor.fill_(0.407)
    other = TextToImageModel(Doubling(), Recording(), nn.Embedding(10, 4))
    other.load_state_dict(model.state_dict())
    assert other.scale_factor.item() == pytest.approx(0.407)


def test_autoencoder_is_frozen_and_stays_in_evaluation_mode(model):
    model.train()
    assert not model.autoencoder.training
    assert not model.autoencoder.norm.training
    assert model.unet.training
    names = {name for name, p in model.named_parameters() if any(p is q for q in model.trainable_parameters())}
    assert names == {"unet.weight", "text_encoder.weight"}
    assert not any(parameter.requires_grad for parameter in model.autoencoder.parameters())


def test_tokens_are_embedded_unless_a_context_is_given(model):
    x, timesteps, tokens = torch.rand(2, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([[1, 2], [3, 4]])
    model(x, timesteps, tokens=tokens)
    assert model.unet.seen[0] is timesteps
    torch.testing.assert_close(model.unet.seen[1], model.text_encoder.weight[tokens])
    context = torch.rand(2, 5, 4)
    model(x, timesteps, tokens=tokens, context=context)
    assert model.unet.seen[1] is context
    with pytest.raises(ValueError, match="context: expected text embeddings or tokens, got neither"):
        model(x, timesteps)
