# SPDX-License-Identifier: Apache-2.0
"""Patches of features and maps, cut from whole volumes that are computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from shared.cache_keys import describe, file_signature
from shared.diffusion_series import gradient_files_of, path_of
from shared.transforms.diffusion_mri import MAP_KEYS, Features, load_features, load_maps
from shared.volume_cache import VolumeCache

# Part of every key; raise it when stored volumes change although files and settings do not.
_VERSION = 1


class LoadFeaturePatchd(MapTransform):
    """A patch of the features of a diffusion-weighted volume.

    The whole volume's features are computed once (``load_features``) and kept in a ``VolumeCache``, under a key that
    depends on the files of the item (folder, name, size and time of change) and the settings of ``features``.

    Args:
        keys: key of the path of the 4-D NIfTI.
        features: what makes channels of the signal, e.g. ``RotationInvariantFeatures``.
        cache_dir: folder of the cached volumes; "" or ``None``: see ``VolumeCache``.
        name: key of the patch.

    The item gives ``patch``, the first voxel of the patch on the low-resolution grid in RAS orientation, and
    ``patch_size`` (``shared.patches.patch_items``); without them the patch is the whole volume. It gains ``name``,
    ``(F, p, p, p)`` float32, a plain tensor, zero where the patch leaves the volume. What the item held stays.
    """

    def __init__(
        self,
        keys: KeysCollection = "dwi",
        *,
        features: Features,
        cache_dir: str | os.PathLike | None,
        name: str = "image",
    ) -> None:
        super().__init__(keys)
        self.features, self.name = features, name
        self.cache = VolumeCache(cache_dir)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        dwi = path_of(data, (*self.keys, "image"))
        if dwi is None:
            raise ValueError(f"{self.keys[0]}: expected the path of a series, got the keys {sorted(data)}; add it.")
        item = {**data, "dwi": dwi}
        files = [dwi, *gradient_files_of(item, dwi), path_of(item, ("mask",))]
        key = f"features_{_key(files, describe(self.features))}"
        volume = self.cache.get(key, lambda: load_features(item, self.features).as_tensor().numpy())
        return {**data, self.name: _patch(volume, data)}


class LoadMapPatchd(MapTransform):
    """A patch of the maps on the doubled grid, or of one of them.

    Whole maps are read and checked once (``load_maps``) and kept in a ``VolumeCache``.

    Args:
        keys: keys of the paths of the maps, in the order of the channels.
        cache_dir: folder of the cached volumes; "" or ``None``: see ``VolumeCache``.
        name: key of the patch.

    The item gives ``patch`` and ``patch_size`` on the low-resolution grid (see ``LoadFeaturePatchd``), ``dwi`` (the
    grid with which the maps are compared) and perhaps ``map_id``. It gains ``name``, ``(3, 2p, 2p, 2p)``, or
    ``(1, 2p, 2p, 2p)`` with a ``map_id``: float32 in [0, 1], a plain tensor, zero where the patch leaves the volume.
    """

    def __init__(
        self,
        keys: KeysCollection = MAP_KEYS,
        *,
        cache_dir: str | os.PathLike | None,
        name: str = "maps",
    ) -> None:
        super().__init__(keys)
        self.name = name
        self.cache = VolumeCache(cache_dir)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        names = [str(key) for key in self.keys]
        files = [path_of(data, (name,)) for name in (*names, "dwi")]
        volume = self.cache.get(f"maps_{_key(files, names)}", lambda: load_maps(data, names).as_tensor().numpy())
        if "map_id" in data:
            volume = volume[int(data["map_id"])][None]
        return {**data, self.name: _patch(volume, data, factor=2)}


def _key(files: Sequence[str | None], settings: Any) -> str:
    # With the folder: volumes of two subjects that were unpacked from an archive may share name, size and time.
    signatures = [None if path is None else [os.path.abspath(path), file_signature(path)] for path in files]
    text = json.dumps([_VERSION, signatures, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _patch(volume: np.ndarray, item: Mapping[Any, Any], *, factor: int = 1) -> torch.Tensor:
    shape = volume.shape[1:]
    starts = [factor * int(start) for start in item.get("patch", (0, 0, 0))]
    sizes = [factor * int(size) for size in item["patch_size"]] if "patch_size" in item else list(shape)
    if any(not 0 <= start < extent for start, extent in zip(starts, shape, strict=True)):
        raise ValueError(
            f"patch: expected a start within the volume {shape}, got {starts}; make the items anew (patch_items)."
        )
    patch = np.zeros((volume.shape[0], *sizes), dtype=np.float32)
    inside = volume[(slice(None), *(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)))]
    patch[tuple(slice(0, n) for n in inside.shape)] = inside
    return torch.from_numpy(patch)
