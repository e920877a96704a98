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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
    import resource
except ImportError:  # not on Windows
    fcntl = resource = None  # type: ignore[assignment]

TEMPORARY_SUFFIX = ".incomplete"
# Where files cannot be locked, a temporary file that nobody has touched for a day belongs to nobody.
_ABANDONED_SECONDS = 24 * 3600


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


# Read once: the only way to read the mask is to set it, which would race between threads.
_UMASK = _read_umask()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, needed: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there only when the block ends without an error.

    A reader never sees a half-written file and a failed write leaves the previous file as it was.

    Args:
        path: file to write; its folder is made if absent.
        needed: bytes that the file will take, for the message of a full disk; None: not known.

    Raises:
        OSError: when the disk is full; the message starts with ``path`` and states the bytes needed, written and free.
    """
    path = Path(path)
    temporary, handle = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _new_temporary(path)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; the result follows the user's umask like any other file.
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except BaseException as error:
        size = 0
        if temporary is not None:
            size = temporary.stat().st_size if temporary.exists() else 0
            temporary.unlink(missing_ok=True)
        if _is_full_disk(error):
            raise _full_disk(path, size, needed, error) from error
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _new_temporary(path: Path) -> tuple[Path, int | None]:
    """A file beside ``path`` and the handle whose lock says, until it is closed, that the file is being written."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
        if fcntl is None:  # no open file can be moved there
            os.close(handle)
            return Path(name), None
        # Between its making and its lock another process may have taken it for one that a killed process left.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:
            return Path(name), handle
        os.close(handle)


def _full_disk(path: Path, size: int, needed: int | None, cause: BaseException) -> OSError:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    room = f"{shutil.disk_usage(folder).free} bytes free"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource is not None else -1
    if resource is not None and limit != resource.RLIM_INFINITY:
        room += f" and {limit} bytes allowed in a file (ulimit -f)"
    # More arguments than one would put "[Errno 28]" before the path.
    error = OSError(
        f"{path}: the write failed after {size} bytes{f' of at least {needed} needed' if needed else ''} with {room}; "
        "a previous file is unchanged. Free some space or choose another folder, then resume. "
        f"Cause: {' '.join(str(cause).split())[:200]}"
    )
    error.errno = errno.ENOSPC
    return error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno:
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    # torch's zip writer reports a short write as a RuntimeError, numpy's tofile as an OSError without an errno.
    text = str(error)
    if isinstance(error, OSError):
        return "requested and" in text and "written" in text
    said = ("PytorchStreamWriter", "unexpected pos", "iostream error")
    return isinstance(error, RuntimeError) and any(words in text for words in said)


def remove_incomplete(folder: str | os.PathLike, *, below: bool = False) -> list[Path]:
    """Delete temporary files that killed processes left in ``folder``, but none that a process still writes.

    Args:
        folder: need not exist.
        below: also in the folders below it.

    Returns:
        what was deleted.
    """
    pattern = f".*{TEMPORARY_SUFFIX}"
    found = sorted(Path(folder).rglob(pattern) if below else Path(folder).glob(pattern))
    return [path for path in found if _removed(path)]


def _removed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "files cannot be locked here")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False  # being written, or gone
    except OSError:
        if time.time() - path.stat().st_mtime < _ABANDONED_SECONDS:
            return False
        path.unlink(missing_ok=True)
    return True


def save_tensors(content: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that is atomic."""
    with atomic_path(path, needed=_tensor_bytes(content)) as temporary:
        torch.save(content, temporary)


def _tensor_bytes(content: Any) -> int:
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(content)}.values())


def _storages(content: Any) -> Iterator[Any]:
    if isinstance(content, torch.Tensor):
        yield content.untyped_storage()
    elif isinstance(content, (Mapping, list, tuple)):
        for entry in content.values() if isinstance(content, Mapping) else content:
            yield from _storages(entry)


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
