# SPDX-License-Identifier: Apache-2.0
"""Bundles as users download them, exported once for all tests that look at them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.export.archive import write_zip
from tools.export.bundle import export

TASKS = ("cxr_ldm", "brain_controlnet", "sdseg", "dmri2noddi")


@functools.cache
def _out() -> tempfile.TemporaryDirectory:
    """Deleted when the tests end."""
    return tempfile.TemporaryDirectory(prefix="exports")


@functools.cache
def exported(task: str) -> Path:
    """Folder of the demo build; tests that change files in it work on a copy."""
    return export(task, Path(_out().name))


@functools.cache
def zipped(task: str) -> Path:
    """The demo build as a zip."""
    path = Path(_out().name) / f"{task}.zip"
    write_zip(exported(task), path)
    return path


def run_alone(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python words in a folder as someone would who has never seen this repository.

    The packages are those of the tests' Python, less the repository itself: `-S`-like isolation would lose them all, so
    the editable install is hidden by a finder that refuses its packages.
    """
    hidden = (
        "import sys, runpy\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('shared', 'tools', 'tests'):\n"
        "            raise ModuleNotFoundError(f'{name} is not part of a bundle')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "words = sys.argv[1:]\n"
        "sys.argv = words[1:] if words[0] == '-m' else words\n"
        "if words[0] == '-m':\n"
        "    runpy.run_module(words[1], run_name='__main__', alter_sys=True)\n"
        "elif words[0] == '-c':\n"
        "    exec(compile(words[1], 'words', 'exec'), {'__name__': '__main__'})\n"
        "else:\n"
        "    raise SystemExit('expected -m or -c')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", hidden, *words],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
