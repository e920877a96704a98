# SPDX-License-Identifier: Apache-2.0
"""What a super-resolution of NODDI maps has to beat: interpolation, the encoder alone, a plain U-Net.

A baseline is a callable ``item -> (3, 2X, 2Y, 2Z) in [0, 1]`` on the CPU, or None where it cannot be had, with a
``note`` that goes into the table. An item has ``image``, the features (F, X, Y, Z), and ``maps``, the truth.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from monai.inferers import sliding_window_inference
from monai.networks import eval_mode
from torch import nn

from shared.metrics.baselines import LateWeights
from shared.metrics.noddi_maps import MAPS
from shared.resolution import block_average, upsample


class NoddiBaseline(Protocol):
    """Item -> maps, or None and a note that says why."""

    note: str

    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor | None: ...


class UpsampledMaps:
    """The true maps averaged over blocks of 2 x 2 x 2 voxels and interpolated back.

    **It sees the truth**: no user has these low-resolution maps. A fit to real low-resolution data has noise, which
    these have not, and the average of a map is not the fit to the average of the signals. So this baseline is stronger
    than interpolation can be in use, and what beats it adds detail that interpolation cannot.

    Args:
        mode: "trilinear" or "cubic" (spline; its overshoot is clamped to [0, 1]).
        key: of the true maps (3, 2X, 2Y, 2Z).
    """

    def __init__(self, mode: str = "cubic", *, key: str = "maps") -> None:
        if mode not in ("trilinear", "cubic"):
            raise ValueError(f"mode: expected trilinear or cubic, got {mode!r}")
        self.mode, self.key = mode, key
        self.note = (
            f"{mode} upsampling of the block-averaged true maps, noise-free low-resolution maps that no user has"
        )

    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor:
        return upsample(block_average(_plain(item[self.key]).cpu()), mode=self.mode).clamp(0, 1)


class EncoderOnly:
    """The low-resolution encoder and the decoder alone, without diffusion.

    Args:
        network: the evaluated network.
        sampler: deterministic: ``sampler(features (1, F, X, Y, Z), network) -> (1, 3, 2X, 2Y, 2Z)``, such as
            ``shared.noddi_sampler.NoddiSampler`` with ``deterministic=True``.
        device: where the network is.
        key: of the features.
    """

    def __init__(
        self,
        network: nn.Module,
        sampler: Callable[[torch.Tensor, nn.Module], torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        key: str = "image",
    ) -> None:
        self.network, self.sampler, self.device, self.key = network, sampler, torch.device(device), key
        self.note = "the low-resolution encoder, quantised and decoded, without diffusion"

    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor:
        with eval_mode(self.network):
            maps = self.sampler(_plain(item[self.key])[None].to(self.device), self.network)[0]
        return _plain(maps).float().clamp(0, 1).cpu()


class UpsamplingBaseline:
    """A network that maps features directly to maps at twice the resolution, in overlapping patches.

    Args:
        network: (B, F, x, y, z) -> (B, 3, 2x, 2y, 2z), such as an up-sampling followed by a U-Net.
        weights_path: its state dict, read at the first call.
        required: True: missing weights are an error, at once. False: they are a row without a value that says so.
        device: where it runs.
        patch_size: side, or sides, of a patch on the low-resolution grid; that of training.
        overlap: of neighbouring patches, as part of a patch; they are blended by a Gaussian weight.
        batch_size: patches per forward pass.
        key: of the features.
        remedy: how to get the weights.

    Raises:
        FileNotFoundError: ``required`` and no such file.
        ValueError: (first call) the file holds other weights; the network returns another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        weights_path: str | os.PathLike[str],
        *,
        required: bool = False,
        device: torch.device | str = "cpu",
        patch_size: int | Sequence[int] = 32,
        overlap: float = 0.5,
        batch_size: int = 1,
        key: str = "image",
        remedy: str = "Train it with configs/train_baseline.json.",
    ) -> None:
        self.network, self.device, self.key = network, torch.device(device), key
        self.patch_size, self.overlap, self.batch_size = _sides(patch_size), overlap, batch_size
        self.weights = LateWeights(
            network, weights_path, what="the U-Net baseline", device=device, required=required, remedy=remedy
        )
        self.note = "plain 3-D U-Net, from features directly to maps, trained on the same data"

    @torch.no_grad()
    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor | None:
        if not self.weights.loaded():
            self.note = self.weights.absence
            return None
        features = _plain(item[self.key]).float()[None].to(self.device)
        maps = _in_patches(features, self.network, self.patch_size, self.overlap, self.batch_size)
        expected = (1, len(MAPS), *(2 * length for length in features.shape[2:]))
        if maps.shape != expected:
            raise ValueError(f"network: expected maps {expected} of the U-Net baseline, got {tuple(maps.shape)}")
        return maps[0].clamp(0, 1).cpu()


class PatchwiseReconstruction:
    """Maps through the autoencoder and back, in overlapping patches: what no result through it can beat by much.

    Args:
        autoencoder: ``autoencoder(maps (B, C, x, y, z))[0]`` is the reconstruction.
        patch_size: side, or sides, of a patch on the low-resolution grid, as of the other parts; a patch of maps is
            twice as large. None takes the whole volume at once.
        overlap: of neighbouring patches, as part of a patch; they are blended by a Gaussian weight.
        one_map: the autoencoder takes one map (C = 1) at a time.
        batch_size: patches per forward pass.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        patch_size: int | Sequence[int] | None = None,
        overlap: float = 0.25,
        one_map: bool = False,
        batch_size: int = 1,
    ) -> None:
        self.autoencoder, self.one_map = autoencoder, one_map
        self.patch_size = None if patch_size is None else [2 * side for side in _sides(patch_size)]
        self.overlap, self.batch_size = overlap, batch_size

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """(1, 3, 2X, 2Y, 2Z) in [0, 1], on the network's device -> reconstruction of the same shape in [0, 1]."""
        batch = maps.transpose(0, 1) if self.one_map else maps
        with eval_mode(self.autoencoder):
            if self.patch_size is None:
                result = self.autoencoder(batch)[0]
            else:
                result = _in_patches(batch, self._reconstruct, self.patch_size, self.overlap, self.batch_size)
        return (result.transpose(0, 1) if self.one_map else result).float().clamp(0, 1)

    def _reconstruct(self, patches: torch.Tensor) -> torch.Tensor:
        return self.autoencoder(patches)[0]


def _in_patches(
    volume: torch.Tensor, predictor: Callable[..., torch.Tensor], sides: list[int], overlap: float, batch_size: int
) -> torch.Tensor:
    # MONAI's sliding window takes outputs of another scale: patches on one grid, blending on the other.
    result = sliding_window_inference(
        volume, roi_size=sides, sw_batch_size=batch_size, predictor=predictor, overlap=overlap, mode="gaussian"
    )
    assert isinstance(result, torch.Tensor)
    return result.float()


def _sides(patch_size: int | Sequence[int]) -> list[int]:
    sides = [patch_size] * 3 if isinstance(patch_size, int) else list(patch_size)
    if len(sides) != 3 or min(sides) < 1:
        raise ValueError(f"patch_size: expected one side or three, each at least 1, got {patch_size!r}")
    return sides


def _plain(values: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values).detach().as_subclass(torch.Tensor)
