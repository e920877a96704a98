# SPDX-License-Identifier: Apache-2.0
"""Masks that a run left on disk, as the JSON beside each of them tells, read for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PICTURES = {"overlay": "mask", "probability": "probability", "agreement": "agreement of the samples"}
_SETTINGS = ("num_samples", "num_inference_steps", "seed", "threshold")


@dataclass
class Mask:
    """A mask: the pictures of it that can be shown (what it shows -> file; of a volume the overlay alone), what varies
    (`settings`), each class with its size in words, what made it (`origin`)."""

    pictures: dict[str, Path]
    settings: dict[str, Any]
    sizes: list[str]
    origin: dict[str, Any]


def is_mask(content: Mapping[str, Any]) -> bool:
    """Whether the JSON is one that `SaveSegmentationd` wrote beside a mask."""
    files = content.get("files")
    return content.get("synthetic") is True and isinstance(files, dict) and "mask" in files


def read_mask(content: Mapping[str, Any], place: Path, origin: dict[str, Any]) -> Mask:
    """A mask from the JSON in the folder `place`.

    Only names of files are taken: a JSON from elsewhere must not put other files of this machine into the page.
    """
    files = {what: place / Path(str(name)).name for what, name in content["files"].items()}
    pictures = {
        words: files[what]
        for what, words in _PICTURES.items()
        if what in files and files[what].suffix == ".png" and files[what].is_file()
    }
    settings = {key: content[key] for key in _SETTINGS if content.get(key) is not None}
    sizes = [_size(entry) for entry in content.get("classes") or () if isinstance(entry, dict)]
    return Mask(pictures, settings, [size for size in sizes if size], origin)


def _size(entry: Mapping[str, Any]) -> str:
    """`liver 1432.1 ml`, `polyp 7.2 %`."""
    name, millilitres, fraction = str(entry.get("name")), entry.get("ml"), entry.get("fraction")
    if isinstance(millilitres, int | float):
        return f"{name} {millilitres:.1f} ml"
    return f"{name} {100 * fraction:.1f} %" if isinstance(fraction, int | float) else ""
