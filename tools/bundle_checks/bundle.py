# SPDX-License-Identifier: Apache-2.0
"""A bundle's folder or zip, and which of its configurations is what."""

from __future__ import annotations

import contextlib
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tools.bundle_checks.reading import read_json

MANIFEST = "manifest.json"
# Full-size copies beside configurations into which an overlay was baked.
PUBLISHED = "published_"


@dataclass(frozen=True)
class Bundle:
    """A folder in the form of an exported bundle.

    Attributes:
        folder: the folder; of a zip a temporary one.
        archive_faults: what is wrong with the zip itself.
    """

    folder: Path
    archive_faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def package(self) -> str:
        return f"{self.name}_lib"

    @cached_property
    def files(self) -> list[str]:
        """Posix paths of all files and links below the folder, sorted."""
        paths = (path for path in self.folder.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    @cached_property
    def _read(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        contents, faults = {}, []
        for path in sorted((self.folder / "configs").glob("*.json")):
            try:
                content = read_json(path)
                if not isinstance(content, dict):
                    raise ValueError(f"{path.name}: expected an object, got {type(content).__name__}")
                contents[path.stem] = content
            except ValueError as error:
                faults.append(f"configs/{error}")
        return contents, tuple(faults)

    @property
    def unreadable(self) -> list[str]:
        """Faults of configurations that cannot be read."""
        return list(self._read[1])

    @property
    def metadata(self) -> dict[str, Any]:
        """Content of `metadata.json`; empty where it cannot be read, which is a fault of its own."""
        return self._read[0].get("metadata", {})

    @property
    def workflows(self) -> dict[str, dict[str, Any]]:
        """Content of every readable configuration but the metadata, by name without `.json`."""
        return {name: content for name, content in self._read[0].items() if name != "metadata"}

    @property
    def standalone(self) -> dict[str, dict[str, Any]]:
        """Configurations that run alone: those that are called like one."""
        return {name: content for name, content in self.workflows.items() if is_inference(name) or is_training(name)}

    def path(self, name: str) -> Path:
        """The file of a configuration."""
        return self.folder / f"configs/{name}.json"


def is_inference(name: str) -> bool:
    return name.removeprefix(PUBLISHED).startswith("inference")


def is_training(name: str) -> bool:
    return name.removeprefix(PUBLISHED).startswith("train")


@contextlib.contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """The bundle of a folder, or of a zip whose root is the bundle's folder.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: neither a folder nor a zip, or a zip without one root folder. The message starts with the path.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected the folder or zip of a bundle, found nothing; correct the path")
    if path.is_dir():
        yield Bundle(path.resolve())
        return
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected the folder or zip of a bundle, got another kind of file")
    with tempfile.TemporaryDirectory(prefix="check_bundle_") as folder:
        faults = _unpack(path, Path(folder))
        roots = sorted(entry for entry in Path(folder).iterdir() if entry.is_dir())
        if len(roots) != 1:
            raise ValueError(
                f"{path}: expected one folder at the root, called like the bundle, got "
                f"{[root.name for root in roots]}; pack the folder, not its content"
            )
        yield Bundle(roots[0], tuple(faults))


def _unpack(path: Path, folder: Path) -> list[str]:
    """Unpack what is harmless, and name what is not."""
    faults = []
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        faults += [f"{name}: packed twice" for name in sorted({name for name in names if names.count(name) > 1})]
        for entry in archive.infolist():
            parts = PurePosixPath(entry.filename).parts
            if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename or ":" in entry.filename:
                faults.append(f"{entry.filename}: expected a path inside the zip's folder")
            elif stat.S_ISLNK(entry.external_attr >> 16):
                faults.append(f"{entry.filename}: expected a file, got a symbolic link")
            elif len(parts) == 1 and not entry.is_dir():
                faults.append(f"{entry.filename}: expected everything in one folder, found it beside")
            else:
                archive.extract(entry, folder)
    return faults
