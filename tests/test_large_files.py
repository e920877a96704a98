# SPDX-License-Identifier: Apache-2.0
"""Files over 25 MB are listed so that MONAI restores them, and only them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from monai.apps.utils import HashCheckError
from monai.bundle import download_large_files

from shared.files import sha256_of_file
from tools.export import large_files as module
from tools.export.large_files import LARGE_FILES, LIMIT, large_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of exactly the limit, one that is a byte longer (with a blank in its name), and a small one."""
    monkeypatch.setattr(module, "LIMIT", 1000)
    folder = tmp_path / "published here" / "toy"
    for name, size in (("models/model.pt", 1000), ("models/stages/auto encoder.pt", 1001), ("LICENSE", 7)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(b"weights")
            file.truncate(size)
    return folder


def test_limit_is_that_of_the_zoo():
    assert LIMIT == 25_000_000


def test_only_what_is_over_the_limit_is_listed(folder: Path):
    text = large_files(folder, url_base="https://example.org/resolve/0.1.0/")
    assert text is not None
    assert yaml.safe_load(text) == {
        "large_files": [
            {
                "path": "models/stages/auto encoder.pt",
                "url": "https://example.org/resolve/0.1.0/models/stages/auto%20encoder.pt",
                "hash_val": sha256_of_file(folder / "models/stages/auto encoder.pt"),
                "hash_type": "sha256",
            }
        ]
    }


def test_nothing_large_needs_no_file_and_no_address(folder: Path):
    (folder / "models/stages/auto encoder.pt").unlink()
    assert large_files(folder, url_base="") is None


@pytest.mark.parametrize("url_base", ["", "/data/bundles", "ftp://example.org", "https://example.org/x?token=1"])
def test_address_must_be_that_of_a_folder(folder: Path, url_base: str):
    with pytest.raises(ValueError, match=r"^url_base: expected an https://.*auto encoder.pt must be downloaded"):
        large_files(folder, url_base=url_base)


def test_monai_restores_the_file(folder: Path, tmp_path: Path):
    text = large_files(folder, url_base=folder.as_uri())
    assert text is not None
    received = tmp_path / "received" / "toy"
    received.mkdir(parents=True)
    (received / LARGE_FILES).write_text(text)
    download_large_files(str(received))
    name = "models/stages/auto encoder.pt"
    assert sha256_of_file(received / name) == sha256_of_file(folder / name)


def test_monai_refuses_other_content(folder: Path, tmp_path: Path):
    text = large_files(folder, url_base=folder.as_uri())
    assert text is not None
    (folder / "models/stages/auto encoder.pt").write_bytes(b"another")
    received = tmp_path / "received"
    received.mkdir()
    (received / LARGE_FILES).write_text(text)
    with pytest.raises(HashCheckError, match="sha256 hash check"):
        download_large_files(str(received))
