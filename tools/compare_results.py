# SPDX-License-Identifier: Apache-2.0
"""Compare what two runs of an inference wrote, file by file: pixels, voxels, affines, headers, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

NIFTI = ".nii.gz"
# Keys of JSON and of the text in a PNG that say when, where and with what a run was made.
_OF_THE_RUN = ("started", "output_dir", "config_sha256", "git_commit", "software")


@dataclass(frozen=True)
class Comparison:
    """One file of two runs.

    Attributes:
        bundle: name.
        python: label of the second interpreter, ``B`` and on; the first is ``A``.
        file: path below the output folder.
        equal_bytes: the files are the same.
        max_difference: largest absolute difference of pixels or voxels as stored; infinite for other shapes or NaN in
            other places; None for a file without any.
        affine_difference: the same of the affine (mm); None for anything but NIfTI.
        elsewhere: what else differs: keys of JSON or of the text in a PNG, ``header``, ``encoding`` (of equal content),
            ``content``, ``absent``.
    """

    bundle: str
    python: str
    file: str
    equal_bytes: bool
    max_difference: float | None
    affine_difference: float | None
    elsewhere: list[str]

    def acceptable(self, tolerance: float = 0.0) -> bool:
        """Whether the two results are the same but for rounding and for what says how they were made.

        Args:
            tolerance: largest allowed difference of values and affine.
        """
        differences = [d for d in (self.max_difference, self.affine_difference) if d is not None]
        return all(difference <= tolerance for difference in differences) and all(
            name == "encoding" or name.endswith("_version") or name.split(".")[0] in _OF_THE_RUN
            for name in self.elsewhere
        )


def compare_folders(one: Path, two: Path, bundle: str, python: str) -> list[Comparison]:
    """Every file of two output folders, by its path below them."""
    files = [path.relative_to(folder) for folder in (one, two) for path in folder.rglob("*") if path.is_file()]
    result = []
    for name in sorted({path.as_posix() for path in files}):
        a, b = one / name, two / name
        if not (a.is_file() and b.is_file()):
            result.append(Comparison(bundle, python, name, False, None, None, ["absent"]))
            continue
        equal = a.read_bytes() == b.read_bytes()
        values, affine, elsewhere = _difference(a, b)
        if not (equal or values or affine or elsewhere):
            elsewhere = ["encoding"]
        result.append(Comparison(bundle, python, name, equal, values, affine, elsewhere))
    return result


def _difference(a: Path, b: Path) -> tuple[float | None, float | None, list[str]]:
    """Largest difference of the values and of the affine, and the names of what else differs."""
    if a.name.endswith(NIFTI):
        x, y = _volume(a), _volume(b)
        same_header = x.header.binaryblock == y.header.binaryblock
        values = largest(np.asarray(x.dataobj), np.asarray(y.dataobj))
        return values, largest(x.affine, y.affine), [] if same_header else ["header"]
    if a.suffix == ".png":
        with Image.open(a) as p, Image.open(b) as q:
            rest = _keys({**p.info, "mode": p.mode}, {**q.info, "mode": q.mode})
            return largest(np.asarray(p), np.asarray(q)), None, rest
    if a.suffix == ".json":
        return None, None, _keys(*(json.loads(path.read_text(encoding="utf-8")) for path in (a, b)))
    return None, None, [] if a.read_bytes() == b.read_bytes() else ["content"]


def _volume(path: Path) -> Any:
    return nibabel.load(path)  # whose type has no affine


def largest(one: np.ndarray, two: np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes or types differ, or one value alone is NaN or infinite."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return math.inf
    x, y = one.astype(np.float64), two.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(x - y))
    return float(np.where(np.isnan(difference), math.inf, difference).max(initial=0.0))


def _keys(one: Any, two: Any, where: str = "") -> list[str]:
    """Keys below which two JSON contents differ, dotted."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        keys = sorted({*one, *two})
        return [name for key in keys for name in _keys(one.get(key), two.get(key), f"{where}.{key}" if where else key)]
    return [] if one == two else [where or "content"]
