# SPDX-License-Identifier: Apache-2.0
"""From an item of diffusion MRI to tensors: input features, NODDI maps on the doubled grid, and the brain mask.

All come out in RAS order. Voxel axes are turned first and features computed then, which is the same as the other way
round: they are numbers of one voxel each, computed from directions that stay in the frame of the gradient table.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple

from shared.diffusion_features import mean_b0
from shared.diffusion_series import (
    Series,
    foreground_of,
    path_of,
    ras_affine_of,
    ras_shape_of,
    series_of,
    table_of,
    voxels_in_ras,
)
from shared.gradients import GradientTable
from shared.pair_checks import check_same_grid, orientation_of
from shared.resolution import block_average, doubled_affine
from shared.transforms.volumes import VolumeFile, as_volume_tensor, open_volume

MAP_KEYS = ("ndi", "odi", "fwf")
FOREGROUND_KEY = "dwi_foreground"  # from `LoadDiffusionFeaturesd` to `LoadBrainMaskd`
_GRID_TOLERANCE = 1e-2  # mm; programs round the affine differently
_RANGE_TOLERANCE = 1e-3  # of a map outside [0, 1]; rounding of a fit


class Features(Protocol):
    """What computes the input channels, see `shared.diffusion_features`."""

    @property
    def num_channels(self) -> int: ...

    def __call__(self, signal: np.ndarray, table: GradientTable, mask: np.ndarray | None = None) -> np.ndarray: ...


def _needed_series(item: Mapping[Hashable, Any]) -> Series:
    series = series_of(item)
    if series is None:
        raise ValueError(f"dwi: expected the path of a series, but the item has the keys {sorted(map(str, item))}")
    return series


def _doubled(shape: Sequence[int]) -> tuple[int, int, int]:
    return 2 * shape[0], 2 * shape[1], 2 * shape[2]


def _check_grid(file: VolumeFile, shape: Sequence[int], affine: np.ndarray, reference: str) -> None:
    """Refuse a file whose voxels, in RAS order, do not lie on a grid."""
    check_same_grid(
        file.path,
        ras_shape_of(file),
        ras_affine_of(file),
        reference=reference,
        reference_shape=shape,
        reference_affine=affine,
        tolerance=_GRID_TOLERANCE,
    )


def _read_mask(path: str, series: Series) -> np.ndarray:
    """Mask in RAS order, bool: on the grid of the series, or on exactly the doubled one."""
    file = open_volume(path)
    shape = ras_shape_of(file)
    grids = {series.ras_shape: ("", series.ras_affine)}
    grids[_doubled(series.ras_shape)] = (" at half the voxel size", doubled_affine(series.ras_affine))
    if shape not in grids:
        raise ValueError(
            f"{path}: expected a mask on the grid of {series.file.path} {series.ras_shape}, or on the doubled one "
            f"{_doubled(series.ras_shape)}, but got {shape} (axes in RAS order); resample the mask to either"
        )
    suffix, affine = grids[shape]
    _check_grid(file, shape, affine, series.file.path + suffix)
    mask = voxels_in_ras(file) > 0.5
    if not mask.any():
        raise ValueError(f"{path}: expected a brain mask, but no voxel is above 0.5; make it anew (bet, median_otsu)")
    return mask


def load_features(item: Mapping[Hashable, Any], features: Features) -> MetaTensor:
    """Input channels of a series, in RAS order.

    Reads the series once as float32: 0.43 GB for one of HCP size (68 x 86 x 68 x 270), besides which the integers of
    the file lie in memory while they are scaled. Features are computed in chunks of voxels.

    Args:
        item: `dwi` (or `image`), a 4-D NIfTI file; `bval` and `bvec`, or those beside it; optionally `mask`, on the
            grid of the series or on the doubled one (a voxel is inside where any of its eighths is). Without a mask,
            the foreground of the mean b0.
        features: computes the channels.

    Returns:
        (F, X, Y, Z) float32 in [0, 1]. Its affine is that of the RAS order; the metadata hold `original_affine`,
        `original_axcodes` (such as `LPS`), `spatial_shape` (all of the file) and `filename_or_obj`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or does not belong to the others; a shell is missing;
            NaN inside the brain. The message starts with the path.
    """
    return _features_and_foreground(item, features)[0]


def _features_and_foreground(item: Mapping[Hashable, Any], features: Features) -> tuple[MetaTensor, np.ndarray | None]:
    """The channels, and the foreground of the mean b0 (X, Y, Z) bool where the item has no mask."""
    series = _needed_series(item)
    table = table_of(item, series)
    mask_path = path_of(item, ("mask",))
    mask = None if mask_path is None else _read_mask(mask_path, series)
    foreground = None
    signal = series.read()
    if mask is None:
        mask = foreground = foreground_of(mean_b0(signal, table), name=series.file.path)
    elif mask.shape != series.ras_shape:
        mask = block_average(mask) > 0
    try:
        channels = features(signal, table, mask)
    except ValueError as error:
        raise ValueError(f"{series.file.path}: {error}") from error
    tensor = as_volume_tensor(torch.from_numpy(channels), series.file)
    tensor.affine = torch.from_numpy(series.ras_affine)
    tensor.meta["original_axcodes"] = orientation_of(series.file.affine)
    return tensor, foreground


def load_maps(item: Mapping[Hashable, Any], keys: Sequence[str] = MAP_KEYS) -> MetaTensor:
    """NODDI maps on the doubled grid, in RAS order.

    Args:
        item: a path per key, and the series (`dwi` or `image`), of which only the header is read. Without a series,
            the maps need only lie on one grid of even size.
        keys: of the maps, in the order of the channels.

    Returns:
        (len(keys), 2X, 2Y, 2Z) float32 in [0, 1], with the metadata of `LoadVolumed`, the affine that of the RAS order.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, not on the doubled grid, or outside [0, 1] by more
            than 1e-3. The message starts with the path or the key.
    """
    series = series_of(item)
    files = []
    for key in keys:
        if (path := path_of(item, (key,))) is None:
            raise ValueError(f"{key}: expected the path of a map, but the item has the keys {sorted(map(str, item))}")
        files.append(open_volume(path))
    first = files[0]
    if series is None:
        shape, affine, reference = ras_shape_of(first), ras_affine_of(first), first.path
        if any(size % 2 for size in shape):
            raise ValueError(
                f"{first.path}: expected even sizes, twice those of a series, but got {shape} (RAS); crop by one voxel"
            )
    else:
        shape, affine = _doubled(series.ras_shape), doubled_affine(series.ras_affine)
        reference = f"{series.file.path} at half the voxel size"
    maps = [_read_map(file, shape, affine, reference) for file in files]
    tensor = as_volume_tensor(torch.from_numpy(np.stack(maps)), first)
    tensor.affine = torch.from_numpy(affine)
    return tensor


def _read_map(file: VolumeFile, shape: Sequence[int], affine: np.ndarray, reference: str) -> np.ndarray:
    _check_grid(file, shape, affine, reference)
    values = voxels_in_ras(file)
    low, high = float(values.min()), float(values.max())
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise ValueError(
            f"{file.path}: expected fractions in [0, 1], but got {low:.4g}..{high:.4g}; divide percentages by 100, and "
            "check that this is the map named by the key"
        )
    if low == high:
        raise ValueError(f"{file.path}: expected a map, but all voxels are {low:g}; fit again")
    return np.clip(values, 0, 1)


def load_brain(item: Mapping[Hashable, Any]) -> MetaTensor:
    """Brain mask on the doubled grid, in RAS order.

    Args:
        item: as for `load_features`; the series is read only where there is neither a `mask` nor what
            `LoadDiffusionFeaturesd` found in its place.

    Returns:
        (1, 2X, 2Y, 2Z) float32, 0 or 1: the mask as it is if it lies on the doubled grid, else every voxel of the mask,
        or of the foreground of the mean b0, as 2 x 2 x 2. The affine is that of the RAS order.

    Raises:
        FileNotFoundError, ValueError: as for `load_features`.
    """
    series = _needed_series(item)
    mask_path = path_of(item, ("mask",))
    if mask_path is not None:
        mask = _read_mask(mask_path, series)
    elif item.get(FOREGROUND_KEY) is not None:
        mask = item[FOREGROUND_KEY]
    else:
        mask = foreground_of(mean_b0(series.read(), table_of(item, series)), name=series.file.path)
    if mask.shape == series.ras_shape:
        mask = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    tensor = as_volume_tensor(torch.from_numpy(mask[None].astype(np.float32)), series.file)
    tensor.affine = torch.from_numpy(doubled_affine(series.ras_affine))
    return tensor


class LoadDiffusionFeaturesd(MapTransform):
    """Load the input channels of a series, see `load_features`.

    Of a series without a mask the foreground comes along, for `LoadBrainMaskd`, which would read all of it again.

    Args:
        keys: of the series; the first that the item has is taken, or `image`, under which MONAI Label hands it over.
        features: computes the channels: `RotationInvariantFeatures` or `DirectionFeatures`.
        name: key of the result.

    Raises:
        FileNotFoundError, ValueError: see `load_features`.
    """

    def __init__(self, keys: KeysCollection = "dwi", *, features: Features, name: str = "image") -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.features, self.name = features, name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = path_of(data, (*self.keys, "image"))
        item = {**data, "dwi": path}  # kept for the mask: the result may take the place of MONAI Label's path
        channels, foreground = _features_and_foreground(item, self.features)
        # Of an earlier series none may stay; and where there is a mask, items are as they were.
        kept = {key: value for key, value in item.items() if key != FOREGROUND_KEY}
        found: dict[Hashable, Any] = {} if foreground is None else {FOREGROUND_KEY: foreground}
        return {**kept, **found, self.name: channels}


class LoadNoddiMapsd(MapTransform):
    """Load NODDI maps as channels of one tensor, see `load_maps`.

    Args:
        keys: of the maps, in the order of the channels.
        name: key of the result.

    Raises:
        FileNotFoundError, ValueError: see `load_maps`.
    """

    def __init__(self, keys: KeysCollection = MAP_KEYS, *, name: str = "maps") -> None:
        super().__init__(keys)
        self.name = name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, self.name: load_maps(data, [str(key) for key in ensure_tuple(self.keys)])}


class LoadBrainMaskd(Transform):
    """Load the brain mask on the doubled grid, see `load_brain`; the foreground that `LoadDiffusionFeaturesd` left is
    used up.

    Args:
        name: key of the result.

    Raises:
        FileNotFoundError, ValueError: see `load_brain`.
    """

    def __init__(self, *, name: str = "brain") -> None:
        self.name = name

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        brain = load_brain(data)
        return {**{key: value for key, value in data.items() if key != FOREGROUND_KEY}, self.name: brain}
