# SPDX-License-Identifier: Apache-2.0
"""Upsampling and convolution in one, beside the two one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.networks.blocks import Convolution, UpSample
from torch import nn

from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.upsampling_convolution import UpsampledConvolution, transposed_weight


def upsample(channels: int = 6, out: int = 6, kernel: int = 3, dims: int = 2, **options: Any) -> UpSample:
    torch.manual_seed(0)
    padding = kernel // 2
    post = Convolution(dims, channels, out, strides=1, kernel_size=kernel, padding=padding, conv_only=True)
    settings: dict[str, Any] = {
        **{"mode": "nontrainable", "interp_mode": "nearest", "align_corners": None, "scale_factor": 2.0},
        **{"in_channels": channels, "out_channels": channels, "post_conv": post},
    }
    return UpSample(dims, **{**settings, **options})


def image(channels: int = 6, size: tuple[int, int] = (5, 8)) -> torch.Tensor:
    return torch.randn((2, channels, *size), generator=torch.Generator().manual_seed(1))


def test_four_taps_hold_what_nine_do():
    weight = torch.randn(3, 2, 3, 3)
    folded = transposed_weight(weight)
    assert folded.shape == (2, 3, 4, 4)
    # Each of the four phases of the output sees every weight once.
    for rows in ((0, 2), (1, 3)):
        for columns in ((0, 2), (1, 3)):
            phase = folded[:, :, rows][:, :, :, columns].sum(dim=(2, 3))
            torch.testing.assert_close(phase, weight.sum(dim=(2, 3)).T)


@torch.no_grad()
@pytest.mark.parametrize("out", [6, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_two_one_after_the_other(out, memory_format):
    block = upsample(out=out).to(memory_format=memory_format)
    fused = UpsampledConvolution(block)
    assert fused.state_dict().keys() == block.state_dict().keys()
    expected = block(image())
    assert expected.shape == (2, out, 10, 16)
    torch.testing.assert_close(fused(image()), expected, atol=2e-6, rtol=0)
    assert torch.equal(copy.deepcopy(fused)(image()), fused(image()))


def test_in_training_it_computes_what_monai_does():
    block = upsample()
    fused, x = UpsampledConvolution(copy.deepcopy(block)), image()
    results = []
    for module in (block, fused):
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), *(parameter.grad for parameter in module.parameters())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_under_autocast_the_weights_are_rounded_once():
    block = upsample(channels=32, out=32)
    fused, x = UpsampledConvolution(block), image(32)
    exact = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, result = block(x), fused(x)
    assert result.dtype == torch.bfloat16
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (plain, result)]
    assert errors[1] < 5e-3
    assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_the_decoder_uses_it_and_nothing_changes(monkeypatch):
    torch.manual_seed(0)
    network = KLAutoencoder(channels=(16, 32, 32), attention_levels=[False] * 3, norm_num_groups=8).eval()
    blocks = [block for block in network.decoder.blocks if isinstance(block, UpsampledConvolution)]
    assert len(blocks) == 2
    z = torch.randn((1, 4, 6, 4), generator=torch.Generator().manual_seed(1))
    result = network.decode(z)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_grad_enabled", lambda: True)
        expected = network.decode(z)
    assert expected.std() > 0.01, "the comparison would be blind"
    assert not torch.equal(result, expected), "the fast path was not taken"
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 5},
        {"dims": 3},
        {"scale_factor": 3.0},
        {"interp_mode": "linear"},
        {"mode": "deconv", "scale_factor": 2},
        {"post_conv": nn.Conv2d(6, 6, 3, padding=1)},
        {"post_conv": None},
    ],
    ids=str,
)
def test_other_blocks_are_refused(options):
    with pytest.raises(ValueError, match=r"^block: expected nearest upsampling by 2 and a 3 x 3 convolution in 2-D"):
        UpsampledConvolution(upsample(**options))
