# SPDX-License-Identifier: Apache-2.0
"""What the commands that write phantoms share: options as numbers, the folder to write into, several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shared.datalist import SECTIONS


def numbers(name: str, value: Any, *, count: int, repeat: bool = False) -> list[float]:
    """Numbers of an option given as "a,b,c", as a sequence or, with `repeat`, as one number for all.

    Raises:
        ValueError: other than `count` finite numbers.
    """
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    if repeat and not isinstance(parts, Sequence):
        parts = [parts]
    try:
        found = [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected {count} numbers such as 1,2,3, got {value!r}") from error
    if repeat and len(found) == 1:
        found = found * count
    if len(found) != count or not np.isfinite(found).all():
        raise ValueError(f"{name}: expected {count} numbers{' or one' if repeat else ''}, got {value!r}")
    return found


def shares_of(split: Sequence[float] | str) -> list[float]:
    """Shares of training, validation and test.

    Raises:
        ValueError: other than three numbers of at least 0 that sum to 1.
    """
    shares = numbers("split", split, count=len(SECTIONS))
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"split: expected shares >= 0 that sum to 1 ({', '.join(SECTIONS)}), got {split!r}")
    return shares


def empty_folder(folder: Path, *, overwrite: bool, made: Sequence[str]) -> Path:
    """A folder without what an earlier run made; with it, and what else is in it, only to `overwrite`.

    Args:
        folder: made if absent.
        overwrite: delete the files `made` and the folders that this leaves empty; others stay.
        made: patterns inside the folder, the file that says that it is complete first.

    Raises:
        FileExistsError: not empty, and `overwrite` is false.
    """
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{folder}: expected an empty or absent folder; choose another one or use --overwrite"
            )
        for path in [path for pattern in made for path in folder.glob(pattern)]:
            path.unlink()
            while (path := path.parent) != folder and not any(path.iterdir()):
                path.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_all(write: Callable[[int], dict[str, Any]], count: int, *, workers: int) -> list[dict[str, Any]]:
    """What `write` returns for the numbers 1 to `count`, which so many processes share."""
    if workers == 1:
        return [write(number) for number in range(1, count + 1)]
    # a fresh interpreter per process: forking a process that has loaded torch can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(write, range(1, count + 1)))
