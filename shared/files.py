# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TEMPORARY_SUFFIX = ".incomplete"


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


# Read once: the only way to read the mask is to set it, which would race between threads.
_UMASK = _read_umask()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there only when the block ends without an error.

    A reader never sees a half-written file and a failed write leaves the previous file as it was.

    Raises:
        OSError: when the disk is full; the message starts with ``path`` and states the bytes written and free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; the result follows the user's umask like any other file.
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except BaseException as error:
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        if _is_full_disk(error):
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                errno.ENOSPC,
                f"{path}: the write failed after {size} bytes with {free} bytes free; the previous file is unchanged. "
                f"Free some space or choose another folder, then resume. Cause: {error}",
            ) from error
        raise


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    # torch's zip writer reports a short write as a RuntimeError without an errno.
    text = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text)


def remove_incomplete(folder: str | os.PathLike) -> list[Path]:
    """Delete temporary files that a killed process left in ``folder``; returns what was deleted."""
    stray = sorted(Path(folder).glob(f".*{TEMPORARY_SUFFIX}"))
    for path in stray:
        path.unlink(missing_ok=True)
    return stray


def save_tensors(content: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that is atomic."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def save_json(content: Any, path: str | os.PathLike) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    # hashlib.file_digest is new in Python 3.11 and the bundles run on 3.10 too.
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_state(state: dict[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of a state dict: names, types, shapes and values, independent of device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
