# SPDX-License-Identifier: Apache-2.0
"""From a list of volumes to a list of their axial slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.transforms.slices import open_in_ras
from shared.transforms.volumes import PICTURE_SUFFIX, as_paths


def slice_items(
    data: Sequence[Mapping[str, Any]], *, key: str = "t1w", slab: Sequence[int | None] | None = None
) -> list[dict[str, Any]]:
    """One item per axial slice, for `shared.transforms.slices.LoadSlicesd`.

    MONAI's `PatchDataset` and `GridPatchDataset` do not fit: they load whole volumes and shuffle within a few of them.

    Args:
        data: items of volumes (`shared.datalist.load_datalist`). `num_slices` saves reading the header.
        key: the volume that is counted; of a list of paths the first. A PNG has one slice.
        slab: (start, stop), only the slices start..stop-1; None as stop is the end. None: all slices. A volume that is
            too small is refused, not cut: its slab would show other anatomy.

    Returns:
        Per slice the volume's item with `"session"` ("" where it has none) and `"slice"`: its number along the
        inferior-superior axis after reorientation to RAS, 0 = most inferior. Volumes in the given order, slices
        ascending.

    Raises:
        FileNotFoundError: a volume whose header is needed is missing.
        ValueError: item without the key, unreadable header, `num_slices` not a positive integer, or a slab outside of
            a volume. The message starts with the file, or with the key.
    """
    start, stop = _check_slab(slab)
    items: list[dict[str, Any]] = []
    for number, item in enumerate(data):
        if item.get(key) in (None, "", []):
            raise ValueError(
                f"{key}: expected a volume in every item, but item {number} has the keys {sorted(item)}; "
                "correct the data list or name another key"
            )
        path = as_paths(item[key], key=key)[0]
        count = _count_slices(item, path)
        end = count if stop is None else stop
        if not start < end <= count:
            raise ValueError(
                f"{path}: expected the slices {start}..{end - 1} of `slab`, but the last one is {count - 1}; "
                "correct `slab` or resample the volume to the template's grid"
            )
        session = item.get("session") or ""  # every item has the keys of the others, as batches need
        items.extend({**item, "session": session, "slice": index} for index in range(start, end))
    return items


def _check_slab(slab: Sequence[int | None] | None) -> tuple[int, int | None]:
    if slab is None:
        return 0, None
    whole = len(slab) == 2 and all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in slab)
    start, stop = (slab[0] or 0, slab[1]) if whole else (-1, None)
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"slab: expected [start, stop] with 0 <= start < stop, or null for all slices, but got {slab}")
    return start, stop


def _count_slices(item: Mapping[str, Any], path: str) -> int:
    if path.lower().endswith(PICTURE_SUFFIX):
        return 1
    count = item.get("num_slices")
    if count is None:
        return open_in_ras(path).shape[2]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{path}: expected `num_slices` to be an integer above 0, but got {count!r}; correct it")
    return count
