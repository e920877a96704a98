# SPDX-License-Identifier: Apache-2.0
"""The discriminator of slices and volumes: what each part sees, and the loss of both decisions."""

from __future__ import annotations

import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

from shared.losses import HingeAdversarialLoss
from shared.networks.slice_volume_discriminator import SliceVolumeDiscriminator


class Recorder(nn.Module):
    """Keeps what it was given and decides by its mean."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.seen = x
        return [x, x.mean(dim=1, keepdim=True)]


def patch_discriminators(channels: int = 4) -> SliceVolumeDiscriminator:
    torch.manual_seed(0)
    parts = [PatchDiscriminator(dims, channels, 3, num_layers_d=3, padding=2) for dims in (2, 3)]
    return SliceVolumeDiscriminator(*parts)


def test_one_slice_across_the_first_axis_of_each_volume():
    discriminator = SliceVolumeDiscriminator(Recorder(), Recorder())
    x = torch.arange(3.0 * 2 * 7 * 4 * 5).view(3, 2, 7, 4, 5)
    torch.manual_seed(0)
    drawn = set()
    for _ in range(60):
        discriminator(x)
        slices = discriminator.slice_discriminator.seen
        assert slices.shape == (3, 2, 4, 5)
        match = [[torch.equal(slices[b], x[b, :, i]) for i in range(7)] for b in range(3)]
        assert all(sum(row) == 1 for row in match)
        drawn.add(tuple(row.index(True) for row in match))
    assert {index for row in drawn for index in row} == set(range(7))
    assert any(len(set(row)) > 1 for row in drawn)  # each volume has a slice of its own
    assert discriminator.volume_discriminator.seen is x


def test_slices_follow_the_seed():
    discriminator = SliceVolumeDiscriminator(Recorder(), Recorder())
    x = torch.rand(4, 1, 9, 3, 2)
    seen = []
    for _ in range(2):
        torch.manual_seed(5)
        discriminator(x)
        seen.append(discriminator.slice_discriminator.seen)
    assert torch.equal(*seen)


def test_hinge_loss_takes_both_decisions():
    discriminator = patch_discriminators()
    x = torch.rand(2, 3, 16, 20, 12, requires_grad=True)
    decisions = discriminator(x)[-1]
    assert [decision.ndim for decision in decisions] == [4, 5]
    assert all(decision.shape[:2] == (2, 1) for decision in decisions)
    loss = HingeAdversarialLoss()
    for is_real, sign in ((True, -1.0), (False, 1.0)):
        expected = sum(torch.relu(1.0 + sign * decision).mean() for decision in decisions)
        torch.testing.assert_close(loss(decisions, target_is_real=is_real, for_discriminator=True), expected)
    loss(decisions, target_is_real=False, for_discriminator=True).backward()
    assert x.grad.any()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_published_layers():
    with torch.device("meta"):
        discriminator = patch_discriminators(channels=64)
    for part, kind in ((discriminator.slice_discriminator, nn.Conv2d), (discriminator.volume_discriminator, nn.Conv3d)):
        layers = [layer for layer in part.modules() if isinstance(layer, kind)]
        assert [(layer.in_channels, layer.out_channels) for layer in layers] == [
            *[(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
        ]
        assert [layer.stride[0] for layer in layers] == [2, 2, 2, 1, 1]
        assert [layer.kernel_size[0] for layer in layers] == [4] * 5
        norms = [layer for layer in part.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        assert [norm.num_features for norm in norms] == [128, 256, 512]
