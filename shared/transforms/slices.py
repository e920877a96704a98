# SPDX-License-Identifier: Apache-2.0
"""Axial slices straight from volumes on disk: what a training on hundreds of thousands of slices reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from shared.intensity import scale_intensity
from shared.pair_checks import check_same_grid
from shared.transforms.volumes import VolumeFile, as_paths, open_volume, read_voxels, scaling_of

_HEADERS = 1024  # kept per process; some kB each


@dataclass(frozen=True)
class _Source:
    """One file and its grid in RAS, the way nibabel's `as_closest_canonical` turns it: axes swapped and flipped."""

    file: VolumeFile
    orientation: np.ndarray
    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def by_slice(self) -> bool:
        """Whether an axial slice lies in one piece on the disk: uncompressed, RAS already, three axes."""
        in_ras = np.array_equal(self.orientation, [[0, 1], [1, 1], [2, 1]])
        proxy = self.file.proxy
        return proxy is not None and in_ras and len(proxy.shape) == 3 and self.file.path.lower().endswith(".nii")

    @property
    def scaled_by_header(self) -> bool:
        """Whether no value that the file can hold lies outside of [0, 1]: true for prepared volumes."""
        proxy = self.file.proxy
        if proxy is None or proxy.dtype.kind not in "iu" or not proxy.slope > 0:
            return False
        limits = np.iinfo(proxy.dtype)
        return proxy.inter + limits.min * proxy.slope >= 0 and proxy.inter + limits.max * proxy.slope <= 1 + 1e-6


def open_in_ras(path: str) -> _Source:
    """Read the header of a volume; errors as `shared.transforms.volumes.open_volume`.

    Returns:
        The file with its `shape` and `affine` after reorientation to RAS.
    """
    file = open_volume(path)
    orientation = nibabel.orientations.io_orientation(file.affine)
    shape = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        shape[int(target)] = file.shape[axis]
    affine = file.affine @ nibabel.orientations.inv_ornt_aff(orientation, file.shape)
    return _Source(file, orientation, tuple(shape), affine)


class LoadSlicesd(MapTransform):
    """Load slice `item["slice"]` (index along RAS axis 2) of each volume: path -> plain float32 tensor (C, X, Y).

    Every file is seen in RAS and scaled to [0, 1] by the rule of `shared.intensity`, with the range of its *whole*
    volume, so that a slice equals that of `LoadVolumed`, `Orientationd`, `RobustScaled`. MONAI core has no lazy slice
    reader: `LoadImaged` reads whole volumes, and its `PatchWSIDataset` is for pathology.

    - A prepared volume (uncompressed `.nii`, RAS, header that guarantees [0, 1]): only the slice is read.
    - Another uncompressed `.nii` in RAS: read whole once per process for its range, then by slice.
    - Anything else (compressed, another orientation): read whole; the last `cache_volumes` are kept per process. Slow
      with shuffled slices (each is a decompression); `python -m tools.prepare brain_pairs` writes the first kind.

    Constant slices are fine (air above the head). All volumes of an item lie on one grid, which is checked once
    per combination of files and process.

    Args:
        keys: keys that hold the path of a volume (NIfTI, or PNG as its only slice), or a list of paths = channels.
        optional_keys: keys that may be absent (or None, or empty); they become zeros (1, X, Y) then.
        mask_keys: which of both are masks: binary (above 0.5 -> 1.0, else 0.0) instead of scaled.
        grid_key: key of a volume that lies on the same grid and is not loaded, only compared, once per combination of
            files; ``None``: the volumes are compared with one another.
        cache_volumes: whole volumes kept per process, about 30 MB each at 1 mm; never fewer than one item needs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see `LoadVolumed`; different grids, or a slice outside of the volume. The message starts with the
            path, or with the key where an item lacks one.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        optional_keys: KeysCollection = ("mask",),
        mask_keys: KeysCollection = ("mask",),
        grid_key: str | None = None,
        cache_volumes: int = 4,
    ) -> None:
        super().__init__(keys)
        if cache_volumes < 1:
            raise ValueError(f"cache_volumes: expected at least 1, but got {cache_volumes}")
        self.optional_keys = ensure_tuple(optional_keys)
        self.mask_keys = ensure_tuple(mask_keys)
        self.grid_key = grid_key
        self.cache_volumes = cache_volumes
        self._forget()

    def _forget(self) -> None:
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._volumes: OrderedDict[tuple[str, bool], np.ndarray] = OrderedDict()
        self._ranges: dict[str, tuple[float, float]] = {}  # of files that are read by slice; never dropped, tiny
        self._matched: set[tuple[str, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Workers start with empty caches: arrays and file handles would be copied to each of them."""
        caches = ("_sources", "_volumes", "_ranges", "_matched")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        paths: dict[Hashable, list[str]] = {}
        for key in self.keys:
            if key not in result:
                raise ValueError(
                    f"{key}: expected the path of a volume, but the item has the keys {sorted(map(str, result))}"
                )
            paths[key] = as_paths(result[key], key=key)
        for key in self.optional_keys:
            if result.get(key) not in (None, "", []):
                paths[key] = as_paths(result[key], key=key)
        files = [path for several in paths.values() for path in several]
        reference = [] if self.grid_key is None else as_paths(result.get(self.grid_key), key=self.grid_key)
        self._check_grids([*reference, *files])
        first = self._source(files[0])
        index = _slice_index(result, first)
        limit = max(self.cache_volumes, len(files))
        for key, several in paths.items():
            planes = [self._plane(path, index, key in self.mask_keys, limit) for path in several]
            result[key] = torch.from_numpy(np.stack(planes))
        for key in self.optional_keys:
            if key not in paths:
                result[key] = torch.zeros(1, *first.shape[:2])
        return result

    def _source(self, path: str) -> _Source:
        if path not in self._sources:
            self._sources[path] = open_in_ras(path)
            if len(self._sources) > _HEADERS:
                self._sources.popitem(last=False)
        self._sources.move_to_end(path)
        return self._sources[path]

    def _check_grids(self, files: list[str]) -> None:
        if tuple(files) in self._matched:
            return
        first, *others = (self._source(path) for path in files)
        for other in others:
            try:
                _check_pair(first, other, first.shape, first.affine, other.shape, other.affine)
            except ValueError:
                # A flipped header is the likeliest reason, and hidden once both are in RAS.
                _check_pair(first, other, first.file.shape, first.file.affine, other.file.shape, other.file.affine)
                raise
        self._matched.add(tuple(files))

    def _plane(self, path: str, index: int, mask: bool, limit: int) -> np.ndarray:
        """Slice of one file, (X, Y) float32: a mask's in {0, 1}, else in [0, 1]."""
        source = self._source(path)
        if not source.by_slice:
            return self._volume(source, mask, limit)[..., index]
        plane = read_voxels(path, source.file.proxy, (..., index))
        if mask:
            return _binary(plane)
        if source.scaled_by_header:
            return np.clip(plane, 0.0, 1.0)
        if path not in self._ranges:
            self._ranges[path] = scaling_of(source.file.read(), name=path)
        return scale_intensity(plane, *self._ranges[path])

    def _volume(self, source: _Source, mask: bool, limit: int) -> np.ndarray:
        """Whole volume in RAS, (X, Y, Z) float32, scaled or binary; the least recently used one makes room."""
        key = (source.file.path, mask)
        if key not in self._volumes:
            values = source.file.read(mask=mask)
            values = _binary(values) if mask else scale_intensity(values, *scaling_of(values, name=source.file.path))
            while len(self._volumes) >= limit:
                self._volumes.popitem(last=False)
            self._volumes[key] = nibabel.orientations.apply_orientation(values, source.orientation)
        self._volumes.move_to_end(key)
        return self._volumes[key]


def _binary(values: np.ndarray) -> np.ndarray:
    return (values > 0.5).astype(np.float32)


def _check_pair(
    first: _Source, other: _Source, shape: Any, affine: np.ndarray, other_shape: Any, other_affine: np.ndarray
) -> None:
    check_same_grid(
        other.file.path,
        other_shape,
        other_affine,
        reference=first.file.path,
        reference_shape=shape,
        reference_affine=affine,
    )


def _slice_index(item: Mapping[Hashable, Any], source: _Source) -> int:
    index = item.get("slice")
    if not isinstance(index, int | np.integer) or isinstance(index, bool):
        raise ValueError(
            f"slice: expected the number of a slice in the item, but got {index!r}; make items with "
            "shared.slices.slice_items"
        )
    if not 0 <= index < source.shape[2]:
        raise ValueError(
            f"{source.file.path}: expected a slice of 0..{source.shape[2] - 1}, but got {index}; "
            "correct `num_slices` in the data list (python -m tools.prepare writes it)"
        )
    return int(index)
