# SPDX-License-Identifier: Apache-2.0
"""Latents of a frozen autoencoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, list_data_collate
from torch import nn
from tqdm import tqdm

from shared.cache_keys import describe, file_signature
from shared.distributed import from_main_process, is_main_process
from shared.files import atomic_path, save_json, sha256_of_state

logger = logging.getLogger(__name__)


class LatentDataset(Dataset):
    """Items whose image is replaced by the posterior of a frozen autoencoder.

    A frozen encoder gives the same posterior in every epoch, so mean and log-variance are stored and only the draw from
    them is new each time (``shared.prepare_batch``). ``monai.data.PersistentDataset`` does not fit: it stores one file
    per item after the transforms, where the encoder would run item by item and in every worker; here encoding is
    batched on the training device and reading is a memory map.

    The file's name carries a hash of the autoencoder's weights, the image transforms and the path, size and
    modification time of every image, so that a change of any of them makes a new cache; one stored item is compared
    with a fresh encoding before a cache is used.

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

    Items then hold ``latent_mean`` and ``latent_log_variance`` ``(C, h, w)``, of volumes ``(C, d, h, w)``, float32 (the
    mean alone where ``encode`` gives one latent), ``item_id`` and the transform's keys.
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
    ) -> None:
        super().__init__(data=data, transform=transform)
        self.image_keys = tuple(image_keys)
        self.path_keys = self.image_keys[:1] if path_keys is None else tuple(path_keys)
        if not {*self.path_keys} <= {*self.image_keys}:
            raise ValueError(
                f"path_keys: expected keys of image_keys {list(self.image_keys)}, got {list(self.path_keys)}; add them."
            )
        self.encoded_key = encoded_key
        self.image_transform = image_transform
        self.cache_path: Path | None = None
        self._posterior: np.ndarray | None = None
        self._encode = _Encoder(autoencoder, torch.device(device))
        if cache_dir:
            # Ranks would also disagree about the key: a transform that has run has other attributes than a new one.
            path = self._prepared_cache(Path(cache_dir), batch_size, num_workers) if is_main_process() else None
            self.cache_path = from_main_process(path)

    def __getstate__(self) -> dict[str, Any]:
        # Workers reopen the memory map instead of copying it, and encode nothing.
        return {**self.__dict__, "_posterior": None, "_encode": None}

    def posterior(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance ``(C, h, w)`` of one item, on the CPU; encoded anew where there is no cache. The
        log-variance of a latent that is not drawn is ``None``."""
        if self.cache_path is None:
            image = self.image_transform(self._source(self.data[index]))[self.encoded_key]
            return _as_posterior(self._encode(image[None])[0])
        if self._posterior is None:
            self._posterior = np.load(self.cache_path, mmap_mode="r")
        return _as_posterior(np.array(self._posterior[index]))

    def _prepared_cache(self, folder: Path, batch_size: int, num_workers: int) -> Path:
        sources = [self._source(item) for item in self.data]
        key = _cache_key(sources, self.path_keys, self.image_transform, self._encode.autoencoder)
        path = folder / f"latents_{key}.npy"
        images = Dataset(data=sources, transform=_Encoded(self.image_transform, self.encoded_key))
        if not _is_usable(path, images, self._encode):
            _build(path, images, self._encode, batch_size, num_workers)
        return path

    def _source(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {key: item[key] for key in self.image_keys if key in item}

    def _transform(self, index: int) -> dict[str, Any]:
        item = dict(self.data[index])
        if self.cache_path is None:
            item = self.image_transform(item)
        else:
            mean, log_variance = self.posterior(index)
            item["latent_mean"] = mean
            if log_variance is not None:
                item["latent_log_variance"] = log_variance
        item["item_id"] = str(index)
        if self.transform is not None:
            item = self.transform(item)
        if self.cache_path is not None:
            for key in self.path_keys:
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


def _as_posterior(stored: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = torch.from_numpy(stored)
    return parts[0], parts[1] if len(parts) == 2 else None


class _Encoder:
    """Images ``(B, 1, H, W)`` to posteriors ``(B, 2, C, h, w)`` on the CPU, in float32; ``(B, 1, C, h, w)`` where the
    autoencoder gives one latent, not a mean and a sigma."""

    def __init__(self, autoencoder: Any, device: torch.device) -> None:
        self.autoencoder, self.device = autoencoder, device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        parameter = next(self.autoencoder.parameters())
        encoded = self.autoencoder.encode(torch.as_tensor(images, dtype=parameter.dtype, device=parameter.device))
        if isinstance(encoded, torch.Tensor):
            return encoded.float()[:, None].cpu().numpy()
        mean, sigma = encoded
        return torch.stack((mean.float(), 2.0 * sigma.float().log()), dim=1).cpu().numpy()


def _build(path: Path, images: Dataset, encode: _Encoder, batch_size: int, num_workers: int) -> None:
    was_training = encode.autoencoder.training
    encode.autoencoder.to(encode.device).eval()
    # A generator of its own: whether the cache exists must not change the random numbers of the training.
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": list_data_collate}
    loader = DataLoader(images, generator=torch.Generator(), **options)
    with atomic_path(path) as temporary:
        stored: np.memmap | None = None
        start = 0
        for batch in tqdm(loader, desc="encoding images once", unit="batch", leave=False):
            posterior = encode(batch["image"])
            if stored is None:
                shape = (len(images), *posterior.shape[1:])
                stored = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            if not np.isfinite(posterior).all():
                raise ValueError(
                    f"{path}: expected finite latents, got NaN or infinity for items {start} to "
                    f"{start + len(posterior) - 1}; check the autoencoder's weights with its own training curves."
                )
            stored[start : start + len(posterior)] = posterior
            start += len(posterior)
        if stored is None:
            raise ValueError(f"{path}: expected at least one image to encode, got an empty list.")
        stored.flush()
        del stored
    save_json({"items": len(images)}, path.with_suffix(".json"))
    encode.autoencoder.train(was_training)
    logger.info("stored the latents of %d images in %s", len(images), path)


class _Encoded:
    """Only what the autoencoder encodes: whatever else an item has need not be alike in all of them."""

    def __init__(self, transform: Callable, key: str) -> None:
        self.transform, self.key = transform, key

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": self.transform(item)[self.key]}


def _is_usable(path: Path, images: Dataset, encode: _Encoder) -> bool:
    if not path.exists():
        return False
    try:
        # Not np.load, which takes a file for a zip archive or a pickle when its first bytes look like one.
        stored = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        logger.warning("%s: unreadable latent cache (%s); it is made again", path, error)
        return False
    index = len(images) // 2
    encode.autoencoder.to(encode.device).eval()
    fresh = encode(images[index]["image"][None])[0]
    shape = (len(images), *fresh.shape)
    if stored.shape != shape or not np.allclose(stored[index], fresh, rtol=1e-2, atol=1e-2):
        logger.warning("%s: the stored latents differ from fresh ones; the cache is made again", path)
        return False
    return True


def _cache_key(
    sources: Sequence[Mapping[str, Any]], path_keys: Sequence[str], image_transform: Callable, autoencoder: nn.Module
) -> str:
    digest = hashlib.sha256(sha256_of_state(autoencoder.state_dict()).encode())
    digest.update(json.dumps(describe(image_transform), sort_keys=True).encode())
    for source in sources:
        files = " ".join(file_signature(source[key]) for key in path_keys if key in source)
        rest = "".join(f" {key}={value}" for key, value in source.items() if key not in path_keys)
        digest.update(f"{files}{rest}".encode())
    return digest.hexdigest()[:16]
