# SPDX-License-Identifier: Apache-2.0
"""`large_files.yml`: where to get the files of a bundle that are too large for the Model Zoo's git."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, urlsplit

import yaml

from shared.files import sha256_of_file
from tools.export.archive import files_of

LARGE_FILES = "large_files.yml"
# The zoo's limit for one file, read in the stricter way (10^6 bytes).
LIMIT = 25_000_000


def large_files(folder: Path, *, url_base: str) -> str | None:
    """Text of `large_files.yml` for the files of a folder that are larger than 25 MB.

    `hash_type` is written because its default in MONAI was md5 and is sha256 since 1.6.

    Args:
        folder: an exported bundle with all its files.
        url_base: address under which the folder's files lie, such as
            `https://huggingface.co/ORG/NAME/resolve/0.1.0`; `file://` works too.

    Returns:
        YAML for `monai.bundle.download_large_files`, sorted by path; None when no file is that large.

    Raises:
        ValueError: some file is that large and `url_base` is not the address of a folder.
    """
    large = [name for name in files_of(folder) if (folder / name).stat().st_size > LIMIT]
    if not large:
        return None
    address = urlsplit(url_base)
    if address.scheme not in ("https", "http", "file") or address.query or address.fragment:
        raise ValueError(
            f"url_base: expected an https://, http:// or file:// address of a folder, got {url_base!r}; "
            f"{', '.join(large)} must be downloaded from there, as the Model Zoo takes no file over 25 MB"
        )
    entries = [
        {
            "path": name,
            "url": f"{url_base.rstrip('/')}/{quote(name)}",
            "hash_val": sha256_of_file(folder / name),
            "hash_type": "sha256",
        }
        for name in large
    ]
    return yaml.safe_dump({"large_files": entries}, sort_keys=False)
