# SPDX-License-Identifier: Apache-2.0
"""Sizes that the networks of a latent diffusion model can halve and double again."""

from __future__ import annotations

from collections.abc import Sequence


def size_divisor(autoencoder_channels: Sequence[int], unet_channels: Sequence[int] = ()) -> int:
    """What both sides of an image must be multiples of: every level but the last halves it.

    Args:
        autoencoder_channels: channels of each autoencoder level.
        unet_channels: channels of each U-Net level, which halves the latent in the same way; empty without a U-Net.
    """
    return 2 ** (len(autoencoder_channels) - 1 + max(len(unet_channels) - 1, 0))


def check_sizes(
    image_size: Sequence[int],
    *,
    autoencoder_channels: Sequence[int],
    unet_channels: Sequence[int] = (),
    latent_shape: Sequence[int] | None = None,
    ms_ssim_kernel_size: int | None = None,
) -> None:
    """Stop before any work is done when an image does not survive the networks' down- and upsampling.

    MONAI's ``AutoencoderKL`` returns a smaller image for an odd size (60 -> 56) and ``DiffusionModelUNet`` fails in a
    concatenation; both appear far from the number that is wrong.

    Args:
        image_size: ``(H, W)`` in pixels.
        autoencoder_channels: channels of each autoencoder level; each level but the last halves the size.
        unet_channels: channels of each U-Net level, which halves the latent in the same way; empty without a U-Net.
        latent_shape: ``(C, h, w)`` of the configuration, compared with ``image_size``; ``None`` where there is none.
        ms_ssim_kernel_size: window of MS-SSIM, which halves the image four times (Wang et al. 2003), or ``None``.

    Raises:
        ValueError: the message starts with the key and names the nearest legal value.
    """
    factor = 2 ** (len(autoencoder_channels) - 1)
    step = size_divisor(autoencoder_channels, unet_channels)
    if any(side < step or side % step for side in image_size):
        nearest = [max(step, round(side / step) * step) for side in image_size]
        raise ValueError(
            f"image_size: expected multiples of {step}, because the networks halve the image "
            f"{step.bit_length() - 1} times, got {list(image_size)}; the nearest is {nearest}."
        )
    latent_size = [side // factor for side in image_size]
    if latent_shape is not None and list(latent_shape[1:]) != latent_size:
        raise ValueError(
            f"latent_shape: expected {[latent_shape[0], *latent_size]} for image_size {list(image_size)}, which the "
            f"autoencoder divides by {factor}, got {list(latent_shape)}; change both together."
        )
    if ms_ssim_kernel_size is not None and min(image_size) // 16 < ms_ssim_kernel_size:
        largest = min(image_size) // 16
        raise ValueError(
            f"ms_ssim_kernel_size: expected at most {largest - 1 + largest % 2} for image_size {list(image_size)}, "
            f"got {ms_ssim_kernel_size}: at the smallest of 5 scales the window must fit into the image."
        )


def check_patch(patch_size: Sequence[int], *, stride: Sequence[int], unet_channels: Sequence[int] = ()) -> None:
    """Stop before any work is done when patches leave gaps or do not survive the U-Net's down- and upsampling.

    Args:
        patch_size: three sides in voxels of the low-resolution grid, which is that of the latents.
        stride: three distances from patch to patch.
        unet_channels: channels of each U-Net level, each but the last halves the patch; empty without a U-Net.

    Raises:
        ValueError: the message starts with the key and names a legal value.
    """
    step = 2 ** max(len(unet_channels) - 1, 0)
    if len(patch_size) != 3 or any(side < step or side % step for side in patch_size):
        nearest = [max(step, round(side / step) * step) for side in patch_size]
        raise ValueError(
            f"patch_size: expected three multiples of {step}, because the U-Net halves the patch "
            f"{step.bit_length() - 1} times, got {list(patch_size)}; the nearest is {nearest}."
        )
    if len(stride) != 3 or any(not 1 <= step <= side for step, side in zip(stride, patch_size, strict=True)):
        raise ValueError(
            f"patch_stride: expected three numbers from 1 to the side of the patch {list(patch_size)}, got "
            f"{list(stride)}; larger ones leave voxels out."
        )
