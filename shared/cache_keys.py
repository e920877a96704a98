# SPDX-License-Identifier: Apache-2.0
"""What the name of a cache file depends on: files and settings."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def file_signature(path: str | os.PathLike) -> str:
    """Name, size in bytes and modification time in ns of a file: another where the file was changed, the same where its
    folder was moved or copied with its times.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected this file, but it does not exist; correct the item or prepare anew")
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def describe(component: Any, depth: int = 4) -> Any:
    """Class names and plain attributes of nested transforms: equal settings, equal descriptions, as JSON takes them.

    Attributes in ``__slots__`` are left out: a component keeps there what its results do not depend on.
    """
    if isinstance(component, (str, int, float, bool, type(None))):
        return component
    if isinstance(component, (np.ndarray, np.generic)):
        return [str(component.dtype), component.tolist()]
    if isinstance(component, Mapping):
        return {str(key): describe(value, depth - 1) for key, value in component.items()}
    if isinstance(component, (list, tuple)):
        return [describe(value, depth - 1) for value in component]
    name = f"{type(component).__module__}.{type(component).__qualname__}"
    attributes = vars(component) if depth > 0 and hasattr(component, "__dict__") else {}
    described = {key: describe(value, depth - 1) for key, value in attributes.items() if isinstance(key, Hashable)}
    return [name, described]
