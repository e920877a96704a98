# SPDX-License-Identifier: Apache-2.0
"""Files damaged at random, and how a command that reads one may end."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from tests import commands

HEADER_BYTES = 352  # of NIfTI
_FIRST = re.compile(r"^(\S+?): ")


def damage(content: bytes, rng: random.Random, *, first: int | None = None) -> tuple[bytes, str]:
    """The content with some bytes changed, cut off, inserted or set to zero, and what was done.

    Args:
        content: not empty.
        rng: decides everything.
        first: only these first bytes are changed; None: all.
    """
    end = min(first or len(content), len(content))
    kind = rng.choice(["flip", "flip", "bytes", "cut", "insert", "zeros"])
    place = rng.randrange(end)
    count = rng.choice([1, 1, 2, 4, 16, 64])
    if kind == "cut":
        return content[:place], f"cut to {place} of {len(content)} bytes"
    if kind == "insert":
        return content[:place] + rng.randbytes(count) + content[place:], f"{count} bytes inserted at {place}"
    if kind == "zeros":
        return content[:place] + bytes(count) + content[place + count :], f"{count} bytes from {place} set to 0"
    changed = bytearray(content)
    for _ in range(count):
        where = rng.randrange(end)
        changed[where] = rng.randrange(256) if kind == "bytes" else changed[where] ^ (1 << rng.randrange(8))
    return bytes(changed), f"{count} {'bytes' if kind == 'bytes' else 'bits'} changed in the first {end}"


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage a file in place; of zipped NIfTI mostly what is in it, and of that mostly the header."""
    content = path.read_bytes()
    if path.name.endswith(".nii.gz") and rng.random() < 0.75:
        inner, what = damage(gzip.decompress(content), rng, first=HEADER_BYTES if rng.random() < 0.6 else None)
        path.write_bytes(gzip.compress(inner, 1, mtime=0))
        return f"{what} of the unzipped file"
    changed, what = damage(content, rng)
    path.write_bytes(changed)
    return what


def complaints(done: commands.Finished, root: Path, allowed: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the end of a command that refused something: nothing if its last line begins with a file.

    Args:
        done: what ended.
        root: folder whose files may be named.
        allowed: other first words.
    """
    if done.timed_out:
        return [f"still running after {done.seconds:.0f} s"]
    if done.code == 0:
        return []
    problems = []
    match = _FIRST.match(done.last_line)
    if match is None or not (Path(match[1]).is_relative_to(root) or match[1] in allowed):
        problems.append(f"exit code {done.code}; the last line does not begin with the file: {done.last_line[:300]}")
    if "Traceback (most recent call last)" in done.err:
        problems.append(f"a traceback is shown: {done.last_line[:300]}")
    return problems


def values(path: Path) -> np.ndarray:
    if path.suffix == ".gz":
        image = nibabel.load(path)
        assert isinstance(image, nibabel.Nifti1Image)
        return np.asarray(image.dataobj)
    with Image.open(path) as picture:
        return np.asarray(picture)


def results(folder: Path) -> list[Path]:
    """Pictures and volumes below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".gz") and path.is_file())
