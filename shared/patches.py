# SPDX-License-Identifier: Apache-2.0
"""Volumes as lists of overlapping patches: where they start, and one item for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from monai.data.utils import dense_patch_slices

from shared.diffusion_series import path_of, series_of
from shared.transforms.diffusion_mri import load_brain


def patch_starts(shape: Sequence[int], size: int | Sequence[int], stride: int | Sequence[int]) -> list[tuple[int, ...]]:
    """First voxels of patches that cover a volume, the last one of an axis flush with its end.

    Published arithmetic: shape (68, 86, 68), size 32 and stride 18 give starts {0, 18, 36}, {0, 18, 36, 54} and
    {0, 18, 36}, 36 patches. An axis shorter than ``size`` has the one start 0; who loads the patch pads with zeros.

    Args:
        shape: voxels of the volume.
        size: voxels of a patch, one number or one per axis.
        stride: voxels from one patch to the next, at most ``size``.

    Returns:
        Starts, the last axis fastest.

    Raises:
        ValueError: a number below 1, or a stride larger than the patch, which leaves gaps.
    """
    sizes = _per_axis("patch_size", size, len(shape))
    strides = _per_axis("stride", stride, len(shape))
    if any(n < 1 for n in shape):
        raise ValueError(f"shape: expected at least one voxel along each axis, got {tuple(shape)}; check the volume.")
    if any(step > extent for step, extent in zip(strides, sizes, strict=True)):
        raise ValueError(
            f"stride: expected at most the patch size {list(sizes)}, got {list(strides)}, which leaves voxels out; "
            "lower the stride or raise patch_size."
        )
    slices = dense_patch_slices(shape, sizes, strides)
    return [tuple(int(part.start) for part in parts) for parts in slices]


def patch_items(
    data: Sequence[Mapping[Any, Any]],
    *,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int],
    min_foreground: float = 0.0,
    maps: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """One item for every patch of every volume; only headers are read, unless patches are chosen by a mask.

    Args:
        data: items with the path of a 4-D NIfTI under ``dwi`` or ``image``.
        patch_size: voxels of a patch on the low-resolution grid, in RAS orientation; one number or one per axis.
        stride: voxels from one patch to the next.
        min_foreground: least share, in [0, 1], of a patch's voxels (padding counts as outside) that lie in the item's
            ``mask``. At 0 no mask is read; an item without a mask keeps all its patches.
        maps: names of the maps where each is an item of its own (the published form); ``None``: all are channels.

    Returns:
        For each item in turn its patches, the last axis fastest: the item, ``patch`` (start, 3 integers) and
        ``patch_size``; with ``maps`` each patch once per map, in that order, with ``map_id``.

    Raises:
        FileNotFoundError: no such volume.
        ValueError: bad sizes (see ``patch_starts``), a file that is not a volume, or no patch of a volume that has
            enough foreground.
    """
    if not 0.0 <= min_foreground <= 1.0:
        raise ValueError(f"min_foreground: expected a share in [0, 1], got {min_foreground}; 0 keeps all patches.")
    if maps is not None and len(maps) == 0:
        raise ValueError("maps: expected at least one name, got an empty list; null makes all maps channels.")
    sizes = _per_axis("patch_size", patch_size, 3)
    result = []
    for item in data:
        for start in _kept_starts(item, sizes, stride, min_foreground):
            patch = {**item, "patch": list(start), "patch_size": list(sizes)}
            result.extend([patch] if maps is None else [{**patch, "map_id": m} for m in range(len(maps))])
    return result


def _kept_starts(
    item: Mapping[Any, Any], sizes: Sequence[int], stride: int | Sequence[int], min_foreground: float
) -> Iterator[tuple[int, ...]]:
    series = series_of(item)
    if series is None:
        raise ValueError(f"dwi: expected the path of a series in every item, got {sorted(item)}; correct the datalist.")
    starts = patch_starts(series.ras_shape, sizes, stride)
    if min_foreground == 0 or path_of(item, ("mask",)) is None:
        yield from starts
        return
    brain = load_brain(item)[0].numpy() > 0
    voxels = 8 * sizes[0] * sizes[1] * sizes[2]
    kept = 0
    for start in starts:
        inside = brain[tuple(slice(2 * first, 2 * (first + size)) for first, size in zip(start, sizes, strict=True))]
        if inside.sum() / voxels >= min_foreground:
            kept += 1
            yield start
    if kept == 0:
        raise ValueError(
            f"{item['mask']}: expected a patch of which at least {min_foreground:g} lies in the mask, got none of "
            f"{len(starts)}; check the mask or lower min_foreground."
        )


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * axes
    if len(values) != axes or any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in values):
        raise ValueError(f"{name}: expected a positive integer or {axes} of them, got {value!r}; correct the setting.")
    return tuple(int(v) for v in values)
