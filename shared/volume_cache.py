# SPDX-License-Identifier: Apache-2.0
"""Whole volumes, computed once and kept on disk, from which patches are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared.files import atomic_path, remove_incomplete

logger = logging.getLogger(__name__)


class VolumeCache:
    """Arrays by key, each in a file of its own, given as read-only memory maps.

    ``monai.data.PersistentDataset`` does not fit: it stores what a whole chain of transforms makes of an item, here a
    patch, and reads the whole file back; 36 patches of a subject would each hold overlapping parts and each fit the
    signal again. A memory map reads only the pages of the patch.

    Files appear whole or not at all. Processes that miss the same key at once each compute the array, and the last
    to end replaces the equal file of the others. A file that is cut or is no array is made again, with a warning.

    Size: arrays are kept as they are made. Features of a subject of the Human Connectome Project, 68 x 86 x 68 voxels
    x 8 channels in float32, take 12.7 MB, three maps at twice the resolution 38 MB.

    Args:
        cache_dir: folder of the files; "" or ``None`` keeps arrays in the memory of this object. A data loader's
            workers then each keep arrays of their own, and forget them when they end (after every epoch, unless
            ``persistent_workers``), so that it suits small data or ``num_workers`` 0.
    """

    # Not in `vars`: where volumes are kept does not change what is made of them (`shared.cache_keys.describe`).
    __slots__ = ("_memory", "folder")

    def __init__(self, cache_dir: str | os.PathLike | None) -> None:
        self.folder = Path(cache_dir) if cache_dir else None
        self._memory: dict[str, np.ndarray] = {}
        if self.folder is not None:
            remove_incomplete(self.folder)

    def __reduce__(self) -> tuple[type[VolumeCache], tuple[str]]:
        # Copies in other processes open the files themselves.
        return VolumeCache, ("" if self.folder is None else str(self.folder),)

    def get(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key, read-only; ``make`` is called when there is none yet.

        Args:
            key: name of the file without its ending; says all that the array depends on.
            make: gives a numeric array.

        Raises:
            OSError: the file cannot be written.
            ValueError: ``make`` gives no array of numbers.
        """
        if self.folder is None:
            if key not in self._memory:
                made = _checked(key, make()).view()
                made.flags.writeable = False
                self._memory[key] = made
            return self._memory[key]
        path = self.folder / f"{key}.npy"
        stored = _opened(path)
        if stored is None:
            array = _checked(str(path), make())
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            stored = _opened(path)
            if stored is None:
                raise OSError(f"{path}: expected the array just written, got an unreadable file; check the disk.")
        return stored


def _checked(where: str, array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where}: expected an array of numbers, got {array.dtype}; check what makes the volume.")
    return array


def _opened(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        # Not np.load, which takes a file for a zip archive or a pickle when its first bytes look like one.
        stored = np.lib.format.open_memmap(path, mode="r")
        expected, size = stored.offset + stored.nbytes, path.stat().st_size
    except (ValueError, OSError) as error:
        logger.warning("%s: unreadable volume cache (%s); it is made again", path, error)
        return None
    if size != expected:
        logger.warning("%s: expected %d bytes, got %d; the volume is made again", path, expected, size)
        return None
    return stored
