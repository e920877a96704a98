# SPDX-License-Identifier: Apache-2.0
"""Folders for the files that a workload reads."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def temporary_folder(topic: str) -> Path:
    """A new folder that is there until the process ends.

    ``tempfile.TemporaryDirectory`` is gone, with a warning, as soon as nothing refers to it; ways of a workload refer
    to its files alone.
    """
    folder = tempfile.mkdtemp(prefix=f"benchmark_{topic}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
