# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.prepare NAME --source DIR --out DIR ...`; `... NAME --help` lists the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.command_line import run
from tools.prepare.brain_pairs import brain_pairs
from tools.prepare.image_text_folder import image_text_folder
from tools.prepare.mimic_cxr import mimic_cxr
from tools.prepare.openi import openi

COMMANDS: dict[str, Callable[..., Any]] = {
    "mimic_cxr": mimic_cxr,
    "openi": openi,
    "image_text_folder": image_text_folder,
    "brain_pairs": brain_pairs,
}

if __name__ == "__main__":
    run(COMMANDS, name="tools.prepare")
