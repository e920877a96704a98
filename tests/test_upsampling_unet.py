# SPDX-License-Identifier: Apache-2.0
"""The baseline U-Net: grid, padding, errors."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from shared.networks.upsampling_unet import UpsamplingUNet


class Recorder(nn.Identity):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def test_volume_comes_back_at_twice_the_size():
    unet = UNet(3, 5, 3, channels=(4, 8, 8), strides=(2, 2), num_res_units=1)
    network = UpsamplingUNet(unet, divisor=4)
    maps = network(torch.rand(2, 5, 7, 4, 5))
    assert maps.shape == (2, 3, 14, 8, 10)
    with pytest.raises(RuntimeError):
        UpsamplingUNet(unet)(torch.rand(2, 5, 7, 4, 5))


def test_padding_repeats_the_border_and_is_cut_off():
    unet = Recorder()
    features = torch.rand(1, 2, 3, 4, 5)
    maps = UpsamplingUNet(unet, divisor=8)(features)
    assert unet.seen.shape == (1, 2, 8, 8, 16)
    torch.testing.assert_close(unet.seen[:, :, 6:, :, :10], unet.seen[:, :, 5:6, :, :10].expand(1, 2, 2, 8, 10))
    torch.testing.assert_close(unet.seen[..., 10:], unet.seen[..., 9:10].expand(1, 2, 8, 8, 6))
    expected = nn.functional.interpolate(features, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.equal(maps, expected)


def test_grid_is_that_of_doubled_voxels():
    """A ramp over low-resolution voxels: the two halves of voxel i lie a quarter to its sides."""
    ramp = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 2, 3)
    maps = UpsamplingUNet(nn.Identity())(ramp)
    inner = torch.arange(6.0).repeat_interleave(2) + torch.tensor([-0.25, 0.25]).repeat(6)
    torch.testing.assert_close(maps[0, 0, 1:-1, 0, 0], inner[1:-1])


@pytest.mark.parametrize("options", [{"scale": 0}, {"divisor": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected at least 1, got 0"):
        UpsamplingUNet(nn.Identity(), **options)
