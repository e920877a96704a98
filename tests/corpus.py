# SPDX-License-Identifier: Apache-2.0
"""Bad inputs: what one is, and how it comes into an otherwise good dataset folder.

The inputs themselves are made by `tests.corpus_pictures` (pictures, text, data lists) and `tests.corpus_volumes`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commands import Finished
from tools.phantoms import cxr_ldm, sdseg

COMMANDS = ("check_data", "training", "evaluation", "inference")
DATALIST = "datalist.json"


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Attributes:
        name: unique, words joined by "-": the id of its tests.
        bundle: folder below ``bundles/`` that it fits.
        kind: what it is: "picture", "mask", "DICOM", "report", "datalist", "prompt", "volume", ...
        make: given a good dataset folder (a copy of its own), writes the bad file into it and returns the path with
            which the last line of every command has to begin.
        key: the key of an item of the data list under which `place` puts the path of the file; None: `make` has done
            all that is needed, such as writing another data list.
        commands: those of `COMMANDS` that it concerns.
        words: a part of the last line, so that the refusal has the right reason.
        accepted: None where all commands must refuse it; else why some read it (exit code 0), as documented.
        accepted_by: those that read it, where ``accepted`` says why.
        value: for what stands on the command line and in no file: (key, value); the last line begins with the key.
    """

    name: str
    bundle: str
    kind: str
    make: Callable[[Path], Path]
    key: str | None = "image"
    commands: tuple[str, ...] = COMMANDS
    words: str = ""
    accepted: str | None = None
    accepted_by: tuple[str, ...] = COMMANDS
    value: tuple[str, str] | None = None

    def __str__(self) -> str:
        return self.name


def good_pictures(bundle: str, folder: Path) -> Path:
    """A small dataset of phantoms without any fault, with several items in each section."""
    if bundle == "cxr_ldm":
        cxr_ldm.make_dataset(str(folder), n=14, size=64, split=(0.5, 0.2, 0.3))
    else:
        sdseg.make_dataset(str(folder), num_images=18, size=(64, 48), split=(0.5, 0.25, 0.25))
    return folder


def copied(good: Path, folder: Path) -> Path:
    """A copy of a dataset folder whose files are hard links: replace them, never write into them."""
    shutil.copytree(good, folder, copy_function=os.link)
    datalist = folder / DATALIST
    content = datalist.read_bytes()
    datalist.unlink()
    datalist.write_bytes(content)
    return folder


def edit_list(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the content of the data list; returns its path."""
    datalist = folder / DATALIST
    content = json.loads(datalist.read_text())
    change(content)
    datalist.write_text(json.dumps(content))
    return datalist


def place(folder: Path, file: Path, *, key: str, section: str, index: int = 0) -> None:
    """Let an item of the data list name a file of the folder under a key."""

    def change(content: dict[str, Any]) -> None:
        content[section][index][key] = os.path.relpath(file, folder)

    edit_list(folder, change)


def complaint(finished: Finished, begin: str | Path, words: str = "") -> str | None:
    """What is wrong with the way in which a command refused a bad input; None: nothing.

    Args:
        finished: the command, which writes its verdict to standard error.
        begin: what the last line has to begin with: the path of the bad file, or a key.
        words: what else the last line has to hold.
    """
    last = finished.last_line
    begin = f"{begin}".encode(errors="backslashreplace").decode()  # as standard error writes it
    faults = {
        "it was still running at the limit": finished.timed_out,
        "exit code 0": finished.code == 0,
        f"killed by signal {-finished.code}": finished.code < 0 and not finished.timed_out,
        "a traceback": "Traceback" in finished.err,
        f"the last line does not begin with {begin}": not last.startswith(begin),
        f"the last line does not say {words!r}": words not in last,
        "it tried the network": bool(finished.network_attempts),
    }
    found = [fault for fault, present in faults.items() if present]
    return f"{'; '.join(found)}; the last line: {last!r}" if found else None
