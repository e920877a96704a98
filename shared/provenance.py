# SPDX-License-Identifier: Apache-2.0
"""What made a result: versions, commit, configuration."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

_PACKAGES = ("monai", "torch", "numpy", "pytorch-ignite", "monai-generative", "transformers", "torchxrayvision")


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: str | Path = ".") -> str | None:
    """Commit of the checkout that holds ``folder``, ending in ``+changes`` when files differ; ``None`` elsewhere.

    In an exported bundle it is the commit that the code was copied from, wherever the copy lies.
    """
    exported_from = getattr(sys.modules[__name__.partition(".")[0]], "__commit__", None)
    if exported_from is not None:
        return exported_from
    describe = ["describe", "--always", "--dirty=+changes", "--abbrev=40", "--match", ""]
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *describe], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def active_config() -> dict[str, Any] | None:
    """The configuration from which the caller is being instantiated, with all overlays and command-line overrides.

    MONAI hands a component its arguments but not the configuration around it, and a copy through a macro would
    instantiate everything a second time. The parser is an ancestor in the call stack, so it is looked up there.

    Returns:
        The configuration as JSON-compatible data, references and expressions unevaluated; ``None`` when the caller was
        not instantiated by a ``ConfigParser``.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            config = {key: value for key, value in parser.get().items() if key != parser.meta_key}
            return json.loads(json.dumps(config, default=str))
        frame = frame.f_back
    return None


def sha256_of_json(content: Any) -> str:
    """SHA-256 of data as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
