# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AutoencoderKL

from shared.sizes import check_patch, check_sizes, size_divisor

CHANNELS = (4, 4, 8, 8)


@pytest.mark.parametrize("size", [(64, 64), (8, 96), (512, 512)])
def test_multiples_pass(size):
    check_sizes(size, autoencoder_channels=CHANNELS)


def test_check_agrees_with_the_autoencoder():
    network = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=CHANNELS,
        latent_channels=3,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False,) * 4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    for side in (16, 18, 20, 24):
        returned = network.reconstruct(torch.zeros(1, 1, side, 16)).shape[-2]
        try:
            check_sizes((side, 16), autoencoder_channels=CHANNELS)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (returned == side)


@pytest.mark.parametrize(
    ("size", "unet", "message"),
    [
        ((60, 64), (), r"^image_size: expected multiples of 8, .* 3 times, got \[60, 64\]; the nearest is \[64, 64\]"),
        ((72, 64), (8, 8, 8), r"^image_size: expected multiples of 32, .* 5 times, got \[72, 64\]; .* \[64, 64\]"),
        ((0, 8), (), r"^image_size: expected multiples of 8.* nearest is \[8, 8\]"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(size, unet, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(size, autoencoder_channels=CHANNELS, unet_channels=unet)


def test_latent_shape_follows_the_image():
    check_sizes((64, 96), autoencoder_channels=CHANNELS, latent_shape=(3, 8, 12))
    with pytest.raises(
        ValueError, match=r"^latent_shape: expected \[3, 8, 12\] for image_size \[64, 96\], .*\[3, 8, 8\]"
    ):
        check_sizes((64, 96), autoencoder_channels=CHANNELS, latent_shape=(3, 8, 8))


@pytest.mark.parametrize(("side", "largest"), [(64, 3), (128, 7), (160, 9), (176, 11), (512, 31)])
def test_ms_ssim_window_must_fit_the_smallest_scale(side, largest):
    """Halved four times, the image still holds the window; MONAI's own rule is looser and then returns NaN."""
    check_sizes((side, side), autoencoder_channels=CHANNELS, ms_ssim_kernel_size=largest)
    with pytest.raises(ValueError, match=rf"^ms_ssim_kernel_size: expected at most {largest} "):
        check_sizes((side, side), autoencoder_channels=CHANNELS, ms_ssim_kernel_size=largest + 2)


def test_divisor_counts_the_halvings_of_both_networks():
    assert size_divisor([128, 256, 256, 512], [256, 512, 768]) == 32
    assert size_divisor([16, 32, 64], [32, 64, 96]) == 16
    assert size_divisor([16, 32, 64]) == 4


@pytest.mark.parametrize(
    ("size", "stride", "channels"),
    [
        ([32, 32, 32], [18, 18, 18], [128, 256, 256, 512]),
        ([8, 16, 24], [8, 16, 24], [4, 8, 8, 8]),
        ([7, 5, 3], [1, 5, 2], []),
        ([7, 5, 3], [7, 5, 3], [4]),
    ],
)
def test_patches_that_fit_pass(size, stride, channels):
    check_patch(size, stride=stride, unet_channels=channels)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            [32, 36, 32],
            r"^patch_size: expected three multiples of 8, .* 3 times, got \[32, 36, 32\]; .* \[32, 32, 32\]",
        ),
        ([32, 0, 32], r"^patch_size: .* got \[32, 0, 32\]; the nearest is \[32, 8, 32\]"),
        ([32, 32], r"^patch_size: expected three multiples of 8"),
    ],
)
def test_other_patches_are_refused_with_the_nearest(size, message):
    with pytest.raises(ValueError, match=message):
        check_patch(size, stride=[8, 8, 8], unet_channels=(4, 8, 8, 8))


@pytest.mark.parametrize("stride", [[8, 17, 8], [8, 0, 8], [8, 8], [-1, 8, 8], [8, 8, 8, 8]])
def test_strides_that_leave_voxels_out_are_refused(stride):
    with pytest.raises(
        ValueError, match=r"^patch_stride: expected three numbers from 1 to the side of .* leave voxels"
    ):
        check_patch([16, 16, 16], stride=stride)
