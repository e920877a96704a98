# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import SpatialTransformer
from torch import nn

from shared.networks.constant_prompt import ConstantPrompt
from shared.networks.latent_diffusion import ConstantPromptModel, LatentDiffusionModel, TextToImageModel
from tests.conftest import ROOT
from tests.tiny_networks import diffusion_model, inputs


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

    def forward(self, x, timesteps, context, **residuals):
        self.seen = (timesteps, context)
        self.residuals = residuals
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


@pytest.mark.reliability(8)
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


@pytest.fixture
def constant():
    return ConstantPromptModel(Doubling(), Recording(), ConstantPrompt(3, 4))


def test_both_models_share_freezing_scale_and_decoding(model, constant):
    assert isinstance(model, LatentDiffusionModel)
    image = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    constant.scale_factor.fill_(0.25)
    torch.testing.assert_close(constant.decode(constant.autoencoder.encode(image)[0] * 0.25), image)
    torch.testing.assert_close(constant.reconstruct(image), image)
    constant.train()
    assert not constant.autoencoder.norm.training
    assert constant.unet.training
    trained = {id(parameter) for parameter in constant.trainable_parameters()}
    assert trained == {id(constant.unet.weight), id(constant.prompt.embeddings)}
    assert "scale_factor" in constant.state_dict()


def test_a_loaded_prompt_is_not_trained():
    constant = ConstantPromptModel(Doubling(), Recording(), ConstantPrompt(3, 4, learned=False))
    assert [id(parameter) for parameter in constant.trainable_parameters()] == [id(constant.unet.weight)]


def test_the_prompt_is_the_context(constant):
    x, timesteps = torch.rand(2, 3, 4, 6), torch.tensor([3, 7])
    constant(x, timesteps)
    null, prompt = constant.prompt.embeddings
    assert constant.unet.seen[0] is timesteps
    assert torch.equal(constant.unet.seen[1], torch.stack((prompt, prompt)))
    constant(x, timesteps, null_prompt=torch.tensor([False, True]))
    assert torch.equal(constant.unet.seen[1], torch.stack((prompt, null)))


def test_residuals_are_handed_on_or_absent(constant):
    x, timesteps = torch.rand(2, 3, 4, 6), torch.tensor([3, 7])
    constant(x, timesteps)
    assert constant.unet.residuals == {
        "down_block_additional_residuals": None, "mid_block_additional_residual": None,
    }  # fmt: skip
    parts, middle = [torch.ones(1), torch.zeros(1)], torch.ones(1)
    constant(x, timesteps, down_residuals=parts, middle_residual=middle)
    assert constant.unet.residuals["down_block_additional_residuals"] == tuple(parts)
    assert constant.unet.residuals["mid_block_additional_residual"] is middle


@torch.no_grad()
def test_monais_unet_under_a_constant_prompt():
    network = diffusion_model()
    x, timesteps, _ = inputs()
    prompt = network.prompt.embeddings[1]
    expected = network.unet(x, timesteps, prompt.expand(2, -1, -1))
    assert torch.equal(network(x, timesteps), expected)
    null = network(x, timesteps, null_prompt=torch.tensor([True, True]))
    assert (null - expected).abs().max() > 1e-3
    steered = network(x, timesteps, middle_residual=torch.ones(2, 16, 4, 6))
    assert (steered - expected).abs().max() > 1e-3


def unet_of(bundle: str) -> dict:
    config = json.loads((ROOT / "bundles" / bundle / "configs" / "inference.json").read_text())["unet_def"]
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("bundle", ["cxr_ldm", "brain_controlnet"])
def test_attention_is_fused_and_drops_nothing(bundle):
    """MONAI's fused attention would drop in evaluation too."""
    with torch.device("meta"):
        network = DiffusionModelUNet(**unet_of(bundle))
    blocks = [module for module in network.modules() if isinstance(module, SABlock | CrossAttentionBlock)]
    assert len(blocks) == 22
    assert all(block.use_flash_attention for block in blocks)
    assert {block.dropout_rate for block in blocks} == {0.0}


@pytest.mark.parametrize("level", [1, 2])
def test_fused_attention_equals_the_plain_one_with_the_published_heads(level):
    config = unet_of("cxr_ldm")
    channels, head = config["channels"][level], config["num_head_channels"][level]
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        block = SpatialTransformer(
            2, channels, channels // head, head, cross_attention_dim=1024, use_flash_attention=fused
        )
        nn.init.normal_(block.proj_out.conv.weight, std=channels**-0.5)
        x, context = torch.randn(2, channels, 4, 6), torch.randn(2, 77, 1024)
        x.requires_grad_()
        output = block(x, context)
        output.square().mean().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all((one - two).norm() <= 1e-5 * one.norm() for one, two in zip(*results, strict=True))
    assert min(part.norm() for part in results[0]) > 0
