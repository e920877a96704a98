# SPDX-License-Identifier: Apache-2.0
"""Command line: write the embedded sample data of a bundle.

python -m tools.phantoms cxr_ldm --out DIR --n 200 [--size 128] [--seed 0] [--split 0.7,0.15,0.15]
python -m tools.phantoms brain_controlnet --out DIR --n 40 [--size 80,112,24] [--spacing 2] [--seed 0] [--lesions 0.5]
python -m tools.phantoms sdseg --out DIR --num_images 400 [--size 160,128] [--seed 0] [--kind polyp|fundus|both]
python -m tools.phantoms sdseg_abdomen --out DIR --num_volumes 30 [--size 64,56,20] [--seed 0]
python -m tools.phantoms dmri2noddi --out DIR --num_subjects 40 [--shape 64,72,56] [--seed 0] [--snr 40]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.command_line import run
from tools.phantoms import brain_controlnet, cxr_ldm, dmri2noddi, sdseg, sdseg_abdomen

BUNDLES: dict[str, Callable[..., Any]] = {
    "cxr_ldm": cxr_ldm.make_dataset,
    "brain_controlnet": brain_controlnet.make_dataset,
    "sdseg": sdseg.make_dataset,
    "sdseg_abdomen": sdseg_abdomen.make_dataset,
    "dmri2noddi": dmri2noddi.make_dataset,
}


def main(command: list[str] | None = None) -> None:
    """Write the sample dataset of one bundle and print the path of its `datalist.json`.

    Args:
        command: words of the command line; None reads `sys.argv`.
    """
    run(BUNDLES, command=command, name="python -m tools.phantoms")


if __name__ == "__main__":
    main()
