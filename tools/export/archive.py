# SPDX-License-Identifier: Apache-2.0
"""Manifest and zip of an exported bundle. The same files give the same bytes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from shared.files import atomic_path, sha256_of_file

MANIFEST = "manifest.json"
# The first moment that a zip can state: the time of the export would make every zip another one.
_MOMENT = (1980, 1, 1, 0, 0, 0)


def files_of(folder: Path) -> list[str]:
    """Posix paths of all files below a folder, sorted, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path, **about: Any) -> None:
    """Write `manifest.json`: what the bundle is, and the SHA-256 of each of its other files."""
    files = {name: sha256_of_file(folder / name) for name in files_of(folder) if name != MANIFEST}
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({**about, "files": files}, indent=4) + "\n", encoding="utf-8")


def write_zip(folder: Path, path: Path) -> None:
    """Pack a folder into a zip whose root is the folder's name; sorted, without the time of day."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name in files_of(folder):
            entry = zipfile.ZipInfo(f"{folder.name}/{name}", date_time=_MOMENT)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (folder / name).read_bytes())
