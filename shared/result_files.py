# SPDX-License-Identifier: Apache-2.0
"""Names of results that derive from the names of inputs, and the JSON beside them that says whose they are.

A result called ``x.nii.gz`` has ``x.json`` beside it: with ``"synthetic": true``, the SHA-256 of its input under
``source_sha256`` and, under ``files``, the names of everything that was written for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.data import MetaTensor

from shared.distributed import first_owner
from shared.transforms.volumes import as_paths


class ResultFiles:
    """Finds names that overwrite nothing but what an earlier run wrote for the same input.

    Args:
        output_dir: folder of the results.
        source: folder below which the inputs lie: their subfolders are kept below ``output_dir``; a file or ``None``:
            all results go into ``output_dir`` itself.
    """

    def __init__(self, output_dir: str | os.PathLike, source: str | os.PathLike | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.source = None if source is None else Path(os.path.abspath(source))
        self._claimed: dict[Path, str] = {}

    def claim(self, path: str, name: str, *, source_sha256: str, endings: Sequence[str]) -> Path:
        """Where the results of an input go, without their endings.

        The same input overwrites what an earlier run wrote for it. Of another input with the same name the files are
        kept and the new ones are called ``<name>_1...``.

        Args:
            path: input file.
            name: wanted name, without ending.
            source_sha256: SHA-256 of the input.
            endings: what the names of the results end in, such as ``.nii.gz``; the first is the result itself.

        Raises:
            ValueError: a file that no run wrote is in the way; or several processes have inputs of one name, which only
                a single one can number in their order. The message starts with the file.
        """
        folder = self.output_dir
        absolute = Path(os.path.abspath(path))
        if self.source is not None and self.source.is_dir() and absolute.is_relative_to(self.source):
            folder = folder / absolute.parent.relative_to(self.source)
        number = 0
        while True:
            stem = folder / f"{name}{f'_{number}' if number else ''}"
            number += 1
            if stem not in self._claimed:
                _refuse_shared(stem, absolute)
            sidecar_path = stem.with_name(f"{stem.name}.json")
            sidecar = read_sidecar(sidecar_path)
            results = [stem.with_name(stem.name + ending) for ending in endings]
            if sidecar is None and (results[0].exists() or sidecar_path.exists()):
                raise _not_ours(results[0])
            # Copies of one file in two folders are two inputs.
            owner = self._claimed.get(stem, str(absolute))
            if owner == str(absolute) and (sidecar is None or sidecar.get("source_sha256") == source_sha256):
                ours = set((sidecar or {}).get("files", {}).values())
                for result in results:
                    if result.exists() and result.name not in ours:
                        raise _not_ours(result)
                self._claimed[stem] = owner
                return stem


def _refuse_shared(stem: Path, path: Path) -> None:
    """Only a single process could number the results of inputs of one name in the order of the list."""
    owner = first_owner(os.path.abspath(stem), str(path))
    if owner != str(path):
        raise ValueError(
            f"{path}: expected inputs of different names in several processes, but the results of {owner} are called "
            f"{stem.name} too; rename one of them, or run in one process, which numbers them"
        )


def _not_ours(path: Path) -> ValueError:
    return ValueError(
        f"{path}: expected no file or a synthetic one, found one that this program did not write; "
        "choose another output_dir."
    )


def path_of(value: Any) -> str | None:
    """The (first) file of an item's entry: a path, a list of paths, or a tensor that remembers its file; else None."""
    if isinstance(value, MetaTensor):
        value = value.meta.get("filename_or_obj")
    if not isinstance(value, str | os.PathLike | list | tuple) or not value:
        return None
    return as_paths(value, key="image")[0]


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What an earlier run said about its result; None where there is no such file or another program's."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("synthetic") is True else None


def remove_earlier(sidecar: Path, kept: set[str]) -> None:
    """Delete what an earlier run wrote beside ``sidecar`` and this one will not: it would belong to other voxels."""
    earlier = (read_sidecar(sidecar) or {}).get("files", {})
    for name in set(earlier.values()) - kept:
        sidecar.with_name(Path(name).name).unlink(missing_ok=True)
