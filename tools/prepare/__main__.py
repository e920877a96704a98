# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.prepare NAME --source DIR --out DIR ...`; `... NAME --help` lists the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.command_line import run
from tools.prepare.brain_pairs import brain_pairs
from tools.prepare.btcv import btcv
from tools.prepare.cvc_clinicdb import cvc_clinicdb
from tools.prepare.dmri_pairs import dmri_pairs
from tools.prepare.image_mask_folder import image_mask_folder
from tools.prepare.image_text_folder import image_text_folder
from tools.prepare.kvasir_seg import kvasir_seg
from tools.prepare.mimic_cxr import mimic_cxr
from tools.prepare.openi import openi
from tools.prepare.refuge2 import refuge2
from tools.prepare.sts3d import sts3d

COMMANDS: dict[str, Callable[..., Any]] = {
    "mimic_cxr": mimic_cxr,
    "openi": openi,
    "image_text_folder": image_text_folder,
    "brain_pairs": brain_pairs,
    "cvc_clinicdb": cvc_clinicdb,
    "kvasir_seg": kvasir_seg,
    "refuge2": refuge2,
    "sts3d": sts3d,
    "btcv": btcv,
    "image_mask_folder": image_mask_folder,
    "dmri_pairs": dmri_pairs,
}

if __name__ == "__main__":
    run(COMMANDS, name="tools.prepare")
