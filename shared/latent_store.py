# SPDX-License-Identifier: Apache-2.0
"""What a frozen network makes of every item of a list, computed once and kept on disk."""

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
from shared.files import atomic_path, remove_incomplete, save_json, sha256_of_state

logger = logging.getLogger(__name__)


class Encoding:
    """How an item becomes latents: what is read of it, by which transform, and the frozen network.

    Args:
        network: frozen, with ``encode(x) -> (mean, sigma)``, or ``encode(x) -> z``, one latent without a draw.
        transform: deterministic, from the item to ``encoded_key``, ``(C, *spatial)``.
        keys: what ``transform`` needs of an item: the key of the path, then e.g. that of a slice's number.
        path_keys: which of ``keys`` hold paths, where that is not the first alone.
        encoded_key: what ``transform`` makes and the network encodes.

    Raises:
        ValueError: where a key of a path is not among ``keys``.
    """

    def __init__(
        self,
        network: Any,
        transform: Callable,
        *,
        keys: Sequence[str] = ("image",),
        path_keys: Sequence[str] | None = None,
        encoded_key: str = "image",
    ) -> None:
        self.keys = tuple(keys)
        self.path_keys = self.keys[:1] if path_keys is None else tuple(path_keys)
        if not {*self.path_keys} <= {*self.keys}:
            raise ValueError(
                f"path_keys: expected keys of image_keys {list(self.keys)}, got {list(self.path_keys)}; add them."
            )
        self.network, self.transform, self.encoded_key = network, transform, encoded_key

    def __getstate__(self) -> dict[str, Any]:
        # Workers load and encode nothing.
        return {**self.__dict__, "network": None}

    def source(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The part of an item on which its latents depend."""
        return {key: item[key] for key in self.keys if key in item}

    def inputs(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Only what the network takes: whatever else an item has need not be alike in all of them."""
        return {"image": self.transform(dict(source))[self.encoded_key]}

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Collated ``inputs`` to posteriors ``(B, 2, C, *spatial)``, mean and log-variance, in float32; ``(B, 1, C,
        *spatial)`` where the network gives one latent, not a mean and a sigma."""
        encoded = self.network.encode(self.placed(batch["image"]))
        if isinstance(encoded, torch.Tensor):
            return encoded.float()[:, None]
        mean, sigma = encoded
        return torch.stack((mean.float(), 2.0 * sigma.float().log()), dim=1)

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        """A plain tensor of the type and on the device of the network."""
        parameter = next(self.network.parameters())
        return torch.as_tensor(x, dtype=parameter.dtype, device=parameter.device).as_subclass(torch.Tensor)


class LatentStore:
    """The latents of a list of items; with a folder computed once, else whenever one is asked for.

    ``monai.data.PersistentDataset`` does not fit: it stores one file per item after the transforms, where the network
    would run item by item and in every worker; here encoding is batched on the training device and reading is a memory
    map, which workers open anew instead of copying it.

    The file's name carries a hash of the network's weights, the transform and the path, size and modification time of
    every file, so that a change of any of them makes a new one; one stored item is compared with a fresh encoding
    before a file is used. In distributed runs rank 0 encodes while the others wait.

    Args:
        items: of which each has a latent, by its index.
        encoding: how an item becomes latents.
        folder: of the file; ``None`` or "" (MONAI's command line drops ``None``) keeps nothing.
        name: start of the file's name.
        device: where the network runs.
        batch_size: items per call of the network.
        num_workers: processes that load items while the file is made.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        encoding: Encoding,
        folder: str | Path | None,
        *,
        name: str = "latents",
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        self.items, self.encoding, self.path = items, encoding, None
        self._device = torch.device(device)
        self._stored: np.ndarray | None = None
        if folder:
            # Ranks would also disagree about the key: a transform that has run has other attributes than a new one.
            path = self._prepared(Path(folder), name, batch_size, num_workers) if is_main_process() else None
            self.path = from_main_process(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        """``(2, C, *spatial)``, mean and log-variance, or ``(1, C, *spatial)``; float32 on the CPU."""
        if self.path is None:
            inputs = self.encoding.inputs(self.encoding.source(self.items[index]))
            return self.encoding.encode(list_data_collate([inputs]))[0].cpu()
        if self._stored is None:
            self._stored = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(np.array(self._stored[index]))

    def _prepared(self, folder: Path, name: str, batch_size: int, num_workers: int) -> Path:
        sources = [self.encoding.source(item) for item in self.items]
        key = cache_key(sources, self.encoding.path_keys, self.encoding.transform, self.encoding.network)
        path = folder / f"{name}_{key}.npy"
        inputs = Dataset(data=sources, transform=self.encoding.inputs)
        network = self.encoding.network
        was_training = network.training
        network.to(self._device).eval()
        remove_incomplete(folder)
        if not self._is_usable(path, inputs):
            self._build(path, inputs, batch_size, num_workers)
        network.train(was_training)
        return path

    def _is_usable(self, path: Path, inputs: Dataset) -> bool:
        if not path.exists():
            return False
        try:
            # Not np.load, which takes a file for a zip archive or a pickle when its first bytes look like one.
            stored = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, OSError) as error:
            logger.warning("%s: unreadable latent cache (%s); it is made again", path, error)
            return False
        index = len(inputs) // 2
        fresh = self.encoding.encode(list_data_collate([inputs[index]]))[0].cpu().numpy()
        shape = (len(inputs), *fresh.shape)
        if stored.shape != shape or not np.allclose(stored[index], fresh, rtol=1e-2, atol=1e-2):
            logger.warning("%s: the stored latents differ from fresh ones; the cache is made again", path)
            return False
        return True

    def _build(self, path: Path, inputs: Dataset, batch_size: int, num_workers: int) -> None:
        # A generator of its own: whether the cache exists must not change the random numbers of the training.
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        loader = DataLoader(inputs, generator=torch.Generator(), collate_fn=list_data_collate, **options)
        # Written in turn: through a memory map a full disk would end the process without a word (SIGBUS).
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            start = 0
            for batch in tqdm(loader, desc="encoding items once", unit="batch", leave=False):
                latents = self.encoding.encode(batch).cpu().numpy()
                if start == 0:
                    shape = (len(inputs), *latents.shape[1:])
                    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
                if not np.isfinite(latents).all():
                    raise ValueError(
                        f"{path}: expected finite latents, got NaN or infinity for items {start} to "
                        f"{start + len(latents) - 1}; check the network's weights with its own training curves."
                    )
                file.write(np.ascontiguousarray(latents, dtype=np.float32).tobytes())
                start += len(latents)
            if start == 0:
                raise ValueError(f"{path}: expected at least one image to encode, got an empty list.")
        save_json({"items": len(inputs)}, path.with_suffix(".json"))
        logger.info("stored the latents of %d items in %s", len(inputs), path)


def cache_key(
    sources: Sequence[Mapping[str, Any]], path_keys: Sequence[str], transform: Callable, network: nn.Module
) -> str:
    """Equal for equal files, settings and weights: 16 hexadecimal digits.

    Args:
        sources: what of each item its latents depend on.
        path_keys: keys of ``sources`` that hold paths, of which name, size and modification time count.
        transform: of which class names and attributes count.
        network: of which the state dict counts.
    """
    digest = hashlib.sha256(sha256_of_state(network.state_dict()).encode())
    digest.update(json.dumps(describe(transform), sort_keys=True).encode())
    for source in sources:
        files = " ".join(file_signature(source[key]) for key in path_keys if key in source)
        rest = "".join(f" {key}={value}" for key, value in source.items() if key not in path_keys)
        digest.update(f"{files}{rest}".encode())
    return digest.hexdigest()[:16]
