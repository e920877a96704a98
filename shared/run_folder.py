# SPDX-License-Identifier: Apache-2.0
"""A run folder belongs to one training at a time."""

from __future__ import annotations

import atexit
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_NAME = ".training"
# Open for as long as the process trains: a lock ends when its file is closed, however the process ends.
_held: dict[Path, IO[str]] = {}


def claim_folder(folder: str | os.PathLike) -> None:
    """Keep other processes from training in ``folder`` until this one ends or says ``release_folder``.

    Two trainings in one folder would mix their curves and delete each other's checkpoints. The lock is one of POSIX
    (``lockf``): workers of a data loader do not inherit it, so a killed training leaves none behind, and within a
    process it is no obstacle. Where files cannot be locked nothing is checked.

    Raises:
        ValueError: another process trains there; the message starts with the folder.
    """
    path = Path(folder).resolve() / _NAME
    if fcntl is None or path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"{folder}: expected a folder in which no other training writes, but {owner} trains there; wait for it, or "
            "give --output_dir and --ckpt_dir of their own."
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file


@atexit.register
def _release_all() -> None:
    # A training that failed has not said release_folder.
    while _held:
        _held.popitem()[1].close()


def release_folder(folder: str | os.PathLike) -> None:
    """Let others train there again."""
    file = _held.pop(Path(folder).resolve() / _NAME, None)
    if file is not None:
        file.close()
