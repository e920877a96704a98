# SPDX-License-Identifier: Apache-2.0
"""The VQ-GAN's autoencoder: published sizes, borders, and what training and evaluation do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from shared.networks.vq_autoencoder import (
    VQAutoencoder,
    VQDecoder,
    VQEncoder,
    VQResidualBlock,
    normalised,
    replicate_padding,
    same_convolution,
)

TINY: dict[str, Any] = {"num_hiddens": 8, "num_embeddings": 64, "embedding_dim": 4, "norm_num_groups": 4}


def tiny(**options: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(**{**TINY, **options})


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    """Of the weights of all convolutions, in the order of the data."""
    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    return [tuple(layer.weight.shape) for layer in network.modules() if isinstance(layer, kinds)]


# Published size: handbook, spec/dmri2noddi.md, section 4.2


@pytest.fixture(scope="module")
def published() -> VQAutoencoder:
    with torch.device("meta"):
        return VQAutoencoder()


def test_published_encoder(published):
    assert shapes(published.encoder) == [
        *[(64, 3, 3, 3, 3), (128, 64, 4, 4, 4)],
        *[(128, 128, 3, 3, 3)] * 2,
    ]
    assert shapes(published.pre_quantization) == [(8, 128, 1, 1, 1)]


def test_published_decoder(published):
    assert shapes(published.post_quantization) == [(128, 8, 1, 1, 1)]
    assert shapes(published.decoder) == [(128, 128, 4, 4, 4), *[(128, 128, 3, 3, 3)] * 4, (3, 128, 3, 3, 3)]
    # The transposed convolution keeps its width, so the order of its first two sizes must be looked up.
    with torch.device("meta"):
        deep = VQDecoder(out_channels=3, num_hiddens=32, num_levels=2)
    assert shapes(deep)[0] == (128, 128, 4, 4, 4)
    assert shapes(deep)[5] == (128, 64, 4, 4, 4)
    assert shapes(deep)[-1] == (3, 64, 3, 3, 3)


def test_published_codebook_and_norms(published):
    assert published.codebook.embedding.weight.shape == (8192, 8)
    settings = {"decay": 0.99, "epsilon": 1e-7, "commitment_cost": 0.25, "restart_threshold": 1.0}
    assert {name: getattr(published.codebook, name) for name in settings} == settings
    norms = [layer for layer in published.modules() if isinstance(layer, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels, norm.eps) for norm in norms] == [(32, 128, 1e-6)] * 8


def test_published_number_of_parameters(published):
    block = 2 * (128 * 128 * 27 + 128) + 2 * 2 * 128
    encoder = (3 * 64 * 27 + 64) + (64 * 128 * 64 + 128) + block + 2 * 128
    decoder = 2 * 128 + (128 * 128 * 64 + 128) + 2 * block + (128 * 3 * 27 + 3)
    around_codes = (128 * 8 + 8) + (8 * 128 + 128)
    count = sum(parameter.numel() for parameter in published.parameters())
    assert count == encoder + around_codes + decoder == 4_247_947


def test_published_latent(published):
    maps = torch.empty(2, 3, 64, 64, 64, device="meta")
    latent = published.encode(maps)
    assert latent.shape == (2, 8, 32, 32, 32)
    assert published.decode(latent, quantize=False).shape == maps.shape


# Layers


@pytest.mark.parametrize(
    ("kernel", "stride", "front", "back"), [(3, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (1, 1, 0, 0)]
)
def test_padding_puts_the_odd_voxel_in_front(kernel, stride, front, back):
    line = torch.arange(1.0, 5.0).view(1, 1, 4, 1, 1)
    padded = replicate_padding(kernel, stride)(line)
    assert padded.shape[2:] == (4 + front + back, 1 + front + back, 1 + front + back)
    assert padded[0, 0, :, 0, 0].tolist() == [1.0] * front + [1.0, 2.0, 3.0, 4.0] + [4.0] * back


def test_borders_repeat_in_every_layer():
    """What is constant stays constant up to the border, through convolutions of all kinds; zeros would show."""
    torch.manual_seed(0)
    constant = torch.full((1, 3, 12, 8, 16), 0.7)
    encoder = VQEncoder(in_channels=3, num_hiddens=4, num_levels=2, norm_num_groups=1)
    for layer in (same_convolution(3, 2), same_convolution(3, 2, kernel_size=4, stride=2)):
        values = layer(constant)
        torch.testing.assert_close(values, values[:, :, :1, :1, :1].expand_as(values))
    latent = encoder(constant)
    assert latent.shape == (1, 16, 3, 2, 4)
    torch.testing.assert_close(latent, latent[:, :, :1, :1, :1].expand_as(latent), rtol=1e-4, atol=1e-5)


def test_strided_convolution_looks_at_the_right_voxels():
    layer = same_convolution(1, 1, kernel_size=4, stride=2)
    with torch.no_grad():
        layer[1].conv.weight.zero_()[0, 0, 1, 0, 2] = 1.0
        layer[1].conv.bias.zero_()
    volume = torch.arange(6.0 * 8 * 4).view(1, 1, 6, 8, 4)
    # Kernel position k reads voxel 2 i + k - 1; outside, the outermost one.
    expected = volume[:, :, 0::2][:, :, :, [0, 1, 3, 5]][..., [1, 3]]
    assert torch.equal(layer(volume), expected)


def test_doubling_pads_then_transposes():
    torch.manual_seed(0)
    decoder = VQDecoder(out_channels=1, num_hiddens=2, num_levels=1, norm_num_groups=1)
    pad, convolution = decoder.levels[0]
    x = torch.randn(1, 4, 3, 5, 4)
    padded = nn.functional.pad(x, [1] * 6, mode="replicate")
    weight, bias = convolution.conv.weight, convolution.conv.bias
    expected = nn.functional.conv_transpose3d(padded, weight, bias, stride=2, padding=3)
    assert expected.shape == (1, 4, 6, 10, 8)
    assert torch.equal(convolution(pad(x)), expected)


def test_residual_block_adds_its_input():
    block = VQResidualBlock(4, 2)
    with torch.no_grad():
        block.block[3][1].conv.weight.zero_()
        block.block[3][1].conv.bias.fill_(0.5)
    x = torch.randn(1, 4, 3, 5, 4)
    torch.testing.assert_close(block(x), x + 0.5)


def test_normalised_refuses_groups():
    with pytest.raises(ValueError, match="norm_num_groups: expected a divisor of the 24 channels, got 32"):
        normalised(24, 32)


# Whole


def test_sides_differ():
    network = tiny().eval()
    maps = torch.rand(2, 3, 12, 8, 10)
    reconstruction, commitment, perplexity, usage = network(maps)
    assert reconstruction.shape == maps.shape
    assert commitment.shape == perplexity.shape == usage.shape == ()
    assert network.encode(maps).shape == (2, 4, 6, 4, 5)
    assert not perplexity.requires_grad
    assert not usage.requires_grad


@pytest.mark.parametrize(("levels", "shape"), [(1, (8, 9, 8)), (2, (8, 8, 6)), (2, (8, 0, 8))])
def test_sides_that_cannot_be_halved_are_refused(levels, shape):
    with pytest.raises(ValueError, match=rf"patch_size: expected sides that are multiples of {2**levels}"):
        tiny(num_levels=levels).encode(torch.zeros(1, 3, *shape))


def test_forward_is_encode_then_decode():
    network = tiny().eval()
    maps = torch.rand(1, 3, 8, 4, 6)
    latent = network.encode(maps)
    torch.testing.assert_close(network(maps)[0], network.decode(latent))
    continuous = network.decode(latent, quantize=False)
    assert (continuous - network.decode(latent)).abs().max() > 1e-3
    codes = network.codebook.embed(network.codebook.nearest(latent))
    torch.testing.assert_close(network.decode(codes), network.decode(codes, quantize=False))


def test_codebook_moves_once_a_training_step_and_never_otherwise(monkeypatch):
    network = tiny()
    maps = torch.rand(2, 3, 8, 4, 6)
    network(maps)
    before = copy.deepcopy(network.codebook.state_dict())
    network.decode(network.encode(maps))
    network.eval()(maps)
    assert all(torch.equal(network.codebook.state_dict()[name], before[name]) for name in before)
    moves = []
    move = network.codebook._move
    monkeypatch.setattr(network.codebook, "_move", lambda *args: moves.append(move(*args)))
    network.train()(maps)
    assert len(moves) == 1
    assert not all(torch.equal(network.codebook.state_dict()[name], before[name]) for name in before)


def test_every_parameter_learns_and_codes_take_no_gradient():
    network = tiny(num_levels=2)
    reconstruction, commitment, *_ = network(torch.rand(2, 3, 8, 4, 12))
    (reconstruction.square().mean() + commitment).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert "codebook.embedding.weight" in dict(network.named_buffers())


def test_last_layer_is_the_weight_of_the_last_convolution():
    network = tiny()
    assert network.last_layer.shape == (3, 16, 3, 3, 3)
    assert isinstance(network.last_layer, nn.Parameter)
    before = network.decode(torch.zeros(1, 4, 2, 3, 2))
    with torch.no_grad():
        network.last_layer.zero_()
    after = network.decode(torch.zeros(1, 4, 2, 3, 2))
    assert not torch.equal(before, after)
    bias = network.decoder.conv_out[1].conv.bias
    assert torch.equal(after, bias.view(1, 3, 1, 1, 1).expand_as(after))


def test_reconstruction_learns():
    network = tiny()
    axes = torch.meshgrid(*(torch.linspace(0, 3, side) for side in (12, 8, 10)), indexing="ij")
    maps = torch.stack([0.5 + 0.4 * torch.sin(sum(axes) + shift) for shift in (0.0, 1.0, 2.0)])[None]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        reconstruction, commitment, *_ = network(maps)
        loss = (reconstruction - maps).abs().mean()
        optimizer.zero_grad()
        (4.0 * loss + commitment).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    with torch.no_grad():
        assert (network.eval()(maps)[0] - maps).abs().mean() < 0.35 * losses[0]


def test_state_survives_a_file(tmp_path):
    network = tiny()
    maps = torch.rand(1, 3, 8, 4, 6)
    network(maps)
    torch.save(network.state_dict(), tmp_path / "autoencoder.pt")
    loaded = tiny(num_embeddings=64)
    loaded.load_state_dict(torch.load(tmp_path / "autoencoder.pt", weights_only=True))
    assert torch.equal(loaded.eval()(maps)[0], network.eval()(maps)[0])
