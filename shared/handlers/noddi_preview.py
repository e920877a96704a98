# SPDX-License-Identifier: Apache-2.0
"""Middle axial slices of a few fixed patches of NODDI maps while networks train; for ``PreviewGrid``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shared.handlers.previews import evaluating
from shared.pictures import spread_indices
from shared.resolution import block_average
from shared.transforms.volumes import for_display

# Errors are small beside the maps; so many times as bright they can be seen.
DIFFERENCE_GAIN = 4


class NoddiPreview:
    """Rows of low resolution | generated | true | difference: a row for each map of each of the same few items.

    For ``PreviewGrid`` with ``columns: 4``. The low resolution is the block average of the true map, its voxels shown
    as blocks of 2 x 2; the difference is ``|generated - true|``, times 4 and clipped. The same seeds each time. Items
    stand in the middle of ``n`` equal parts of the dataset. Items with a ``map_id`` hold that one map only.

    Args:
        network: network to sample from, e.g. the moving average.
        sampler: ``sampler(features (1, F, p, p, p), network, seeds=[seed]) -> (1, 3 or more, 2p, 2p, 2p)`` in [0, 1];
            of several samples, the first three channels are the mean.
        dataset: gives items with features ``image`` (F, p, p, p) and ``maps`` (3 or 1, 2p, 2p, 2p).
        n: number of items.
        seed: seed of the first item; the next ones count up.
        device: where the network is.
        image_key: key of the features.
        maps_key: key of the true maps.

    Raises:
        ValueError: the dataset is empty.
    """

    def __init__(
        self,
        network: nn.Module,
        sampler: Callable[..., torch.Tensor],
        dataset: Any,
        *,
        n: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_key: str = "image",
        maps_key: str = "maps",
    ) -> None:
        self.network, self.sampler, self.dataset = network, sampler, dataset
        self.n, self.seed, self.device = n, seed, device
        self.image_key, self.maps_key = image_key, maps_key

    def __call__(self) -> torch.Tensor:
        """(n * maps * 4, 1, 2p, 2p) in [0, 1]."""
        rows = []
        with evaluating(self.network):
            for row, item in enumerate(_shown(self.dataset, self.n)):
                features = _plain(item[self.image_key])[None].to(self.device)
                generated = self.sampler(features, self.network, seeds=[self.seed + row])[0]
                true = _plain(item[self.maps_key]).float().cpu()
                kept = [int(item["map_id"])] if len(true) == 1 and "map_id" in item else list(range(len(true)))
                rows.append(_compared(_low_resolution(true), _plain(generated).float().cpu()[kept], true))
        return torch.cat(rows)


class VolumeReconstructionPreview:
    """Rows of true | reconstructed | difference: a row for each map of each of the same few items.

    For ``PreviewGrid`` with ``columns: 3``; see :class:`NoddiPreview`.

    Args:
        autoencoder: ``autoencoder(maps (1, C, x, y, z))[0]`` is the reconstruction.
        dataset: gives items with maps (C, x, y, z) in [0, 1].
        key: key of the maps.
        n: number of items.
        device: where the network is.

    Raises:
        ValueError: the dataset is empty.
    """

    def __init__(
        self, autoencoder: nn.Module, dataset: Any, *, key: str = "maps", n: int = 4, device: torch.device | str = "cpu"
    ) -> None:
        self.autoencoder, self.dataset, self.key, self.n, self.device = autoencoder, dataset, key, n, device

    def __call__(self) -> torch.Tensor:
        """(n * C * 3, 1, x, y) in [0, 1]."""
        rows = []
        with evaluating(self.autoencoder), torch.no_grad():
            for item in _shown(self.dataset, self.n):
                true = _plain(item[self.key]).float()
                reconstruction = self.autoencoder(true[None].to(self.device))[0][0]
                rows.append(_compared(None, reconstruction.float().cpu(), true.cpu()))
        return torch.cat(rows)


def _shown(dataset: Any, n: int) -> list[Any]:
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one item to show, got none; check the data list")
    return [dataset[index] for index in spread_indices(len(dataset), n)]


def _low_resolution(maps: torch.Tensor) -> torch.Tensor:
    """(C, x, y, z) averaged over blocks, at its own size."""
    low = block_average(maps)
    for axis in (1, 2, 3):
        low = low.repeat_interleave(2, dim=axis)
    return low


def _compared(low: torch.Tensor | None, estimate: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Middle axial slices of (C, x, y, z) as pictures (C * 3 or 4, 1, H, W), map by map."""
    difference = DIFFERENCE_GAIN * (estimate - true).abs()
    volumes = [part for part in (low, estimate, true, difference) if part is not None]
    if low is None:
        volumes = [true, estimate, difference]
    middle = true.shape[-1] // 2
    slices = torch.stack([volume[..., middle] for volume in volumes], dim=1)
    return for_display(slices.flatten(0, 1)[:, None]).clamp(0, 1)


def _plain(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).detach().as_subclass(torch.Tensor)
