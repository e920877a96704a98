# SPDX-License-Identifier: Apache-2.0
"""Latents of frozen networks in the place of what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from torch import nn

from shared.latent_store import Encoding, LatentStore


class LatentDataset(Dataset):
    """Items whose image is replaced by the posterior of a frozen autoencoder.

    A frozen encoder gives the same posterior in every epoch, so mean and log-variance are stored
    (``shared.latent_store.LatentStore``) and only the draw from them is new each time (``shared.prepare_batch``). The
    same holds for what other frozen networks make of an item, such as the estimate of an encoder that conditions the
    trained network: each ``further`` encoding has a file of its own beside it.

    Args:
        data: items with the image's path and whatever ``transform`` needs.
        transform: applied to the item, e.g. text to ``tokens``; with a cache it finds the image as a path, by which its
            errors name the item, and the path is removed afterwards.
        image_transform: deterministic transforms from the item to ``encoded_key``, ``(C, H, W)`` in [0, 1].
        autoencoder: frozen, with ``encode(x) -> (mean, sigma)``, or ``encode(x) -> z``, one latent without a draw.
        cache_dir: folder of the cache; ``None`` or "" (MONAI's command line drops ``None``) leaves ``encoded_key`` in
            the items (random image transforms are then possible, and the encoder runs in every step).
        device: where the encoder runs.
        batch_size: images per encoder call.
        num_workers: processes that load images while the cache is made.
        image_keys: what ``image_transform`` needs of an item: the key of the path, then e.g. that of a slice's number.
        encoded_key: what ``image_transform`` makes and the autoencoder encodes.
        path_keys: which of ``image_keys`` hold paths, where that is not the first alone.
        further: further encodings, each with one latent, by the key under which items hold it. Without a cache their
            transforms are applied to the item instead, after ``image_transform``.

    Items then hold ``latent_mean`` and ``latent_log_variance`` ``(C, h, w)``, of volumes ``(C, d, h, w)``, float32 (the
    mean alone where ``encode`` gives one latent), the ``further`` latents, ``item_id`` and the transform's keys.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable | None = None,
        *,
        image_transform: Callable,
        autoencoder: nn.Module,
        cache_dir: str | Path | None,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        num_workers: int = 0,
        image_keys: Sequence[str] = ("image",),
        encoded_key: str = "image",
        path_keys: Sequence[str] | None = None,
        further: Mapping[str, Encoding] | None = None,
    ) -> None:
        super().__init__(data=data, transform=transform)
        options: dict[str, Any] = {"device": device, "batch_size": batch_size, "num_workers": num_workers}
        encoding = Encoding(autoencoder, image_transform, keys=image_keys, path_keys=path_keys, encoded_key=encoded_key)
        self._latents = LatentStore(data, encoding, cache_dir, **options)
        self._further = {
            key: LatentStore(data, other, cache_dir, name=key, **options) for key, other in (further or {}).items()
        }

    @property
    def cache_path(self) -> Path | None:
        """File of the autoencoder's latents; ``None`` without a cache."""
        return self._latents.path

    def posterior(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance ``(C, h, w)`` of one item, on the CPU; encoded anew where there is no cache. The
        log-variance of a latent that is not drawn is ``None``."""
        parts = self._latents[index]
        return parts[0], parts[1] if len(parts) == 2 else None

    def _transform(self, index: int) -> dict[str, Any]:
        item = dict(self.data[index])
        if self.cache_path is None:
            for store in (self._latents, *self._further.values()):
                item = store.encoding.transform(item)
        else:
            mean, log_variance = self.posterior(index)
            item["latent_mean"] = mean
            if log_variance is not None:
                item["latent_log_variance"] = log_variance
            item |= {key: store[index][0] for key, store in self._further.items()}
        item["item_id"] = str(index)
        if self.transform is not None:
            item = self.transform(item)
        if self.cache_path is not None:
            for store in (self._latents, *self._further.values()):
                for key in store.encoding.path_keys:
                    item.pop(key, None)
        return item


def check_augmentation(cache_dir: str | Path | None, **probabilities: float) -> None:
    """Refuse random changes of images whose latents are computed once: they would silently not happen.

    Args:
        cache_dir: folder of the cache; ``None`` or "" is no cache.
        probabilities: of random image transforms, by the name of the option.

    Raises:
        ValueError: for a probability above 0 with a cache; the message starts with its name.
    """
    for name, probability in probabilities.items():
        if cache_dir and probability > 0:
            raise ValueError(
                f"{name}: expected 0 with a cache of latents, which are computed once from unchanged images, got "
                f'{probability}; give --latent_cache_dir "" to encode anew in every step, or leave it at 0.'
            )


def measure_scale_factor(dataset: LatentDataset, max_items: int = 4096) -> float:
    """Reciprocal standard deviation of sampled latents over up to ``max_items`` evenly spaced items.

    Scaling by it gives the diffusion model latents of unit variance (arXiv:2112.10752, appendix G), there estimated
    from the first batch alone. The variance of a draw is the variance of the means plus the mean variance, so no draw
    is needed and the number does not depend on a seed.

    Raises:
        ValueError: when the standard deviation is zero or not finite.
    """
    count, total, total_square, total_variance = 0, 0.0, 0.0, 0.0
    for index in _evenly_spaced(len(dataset), max_items):
        mean, log_variance = dataset.posterior(index)
        count += mean.numel()
        total += mean.double().sum().item()
        total_square += mean.double().square().sum().item()
        if log_variance is not None:
            total_variance += log_variance.double().exp().sum().item()
    variance = total_square / count - (total / count) ** 2 + total_variance / count
    if not np.isfinite(variance) or variance <= 0:
        raise ValueError(
            f"{dataset.cache_path}: expected latents with a positive, finite variance, got {variance}; "
            "train the autoencoder first or delete the file so that it is made again."
        )
    return float(variance**-0.5)


def latent_statistics(dataset: LatentDataset, max_items: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation ``(C,)`` float32 of each channel of sampled latents over up to ``max_items`` evenly
    spaced items, by which latents are scaled to zero mean and unit variance.

    Of latents, not of the codebook's entries, as published for a VQ-GAN: the diffusion model sees what the encoder
    gives, and codes that are never chosen would count as much as the others. As in ``measure_scale_factor`` no draw is
    needed. Sums are of float64, relative to the first item's mean.

    Raises:
        ValueError: when a channel's standard deviation is zero or not finite.
    """
    count, shift = 0, None
    for index in _evenly_spaced(len(dataset), max_items):
        mean, log_variance = dataset.posterior(index)
        values = mean.double().flatten(1)
        if shift is None:
            shift = values.mean(dim=1, keepdim=True)
            total, total_square = torch.zeros(2, len(values), dtype=torch.float64)
        count += values.shape[1]
        total += (values - shift).sum(dim=1)
        total_square += (values - shift).square().sum(dim=1)
        if log_variance is not None:
            total_square += log_variance.double().exp().flatten(1).sum(dim=1)
    if shift is None:
        raise ValueError(f"{dataset.cache_path or 'latents'}: expected at least one item, got an empty list.")
    variance = total_square / count - (total / count).square()
    # Of a constant channel rounding leaves less than this.
    constant = ~(variance > 1e-12 * shift[:, 0].square())
    if constant.any() or not variance.isfinite().all():
        bad = (constant | ~variance.isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{dataset.cache_path or 'latents'}: expected latents that vary, with finite values, in each of "
            f"{len(variance)} channels, got the variance {variance[bad[0]].item()} in channel {bad[0]} "
            f"({len(bad)} such channels); train the autoencoder first or delete the file so that it is made again."
        )
    return (shift[:, 0] + total / count).float(), variance.sqrt().float()


def _evenly_spaced(length: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()
