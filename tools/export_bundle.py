# SPDX-License-Identifier: Apache-2.0
"""Make a bundle that runs anywhere: `python -m tools.export_bundle sdseg --out DIST`.

Writes `DIST/<task>`, a folder in the form of the MONAI Model Zoo that carries its own code and weights,
`DIST/<task>_v<version>.zip` and the Model Zoo's unit tests below `DIST/ci/unit_tests`.
"""

from __future__ import annotations

from pathlib import Path

from tools import command_line
from tools.export.archive import write_zip
from tools.export.bundle import export, tasks
from tools.export.configs import read_config
from tools.export.unit_tests import write_unit_tests

ALL = "all"


def export_bundle(task: str, out: str = "dist", weights: str = "", overlay: str = "", url_base: str = "") -> None:
    """Export one bundle or all of them.

    Args:
        task: name of the bundle, or `all`.
        out: folder of the results; an earlier export there is replaced.
        weights: folder with the weights to ship, as trainings leave it: `model.pt` and `stages/`. Without it: the demo
            weights, with `tiny.json` baked into the configurations.
        overlay: configuration file that the weights were trained with, if they were: it is baked into the others.
        url_base: address below which the bundle's files will be served; written into `large_files.yml` for weights
            over 25 MB.

    Raises:
        ValueError: `all` together with weights, which fit one bundle; an overlay without weights.
    """
    if weights and task == ALL:
        raise ValueError("--weights: expected the name of one bundle beside it, got 'all'; export one after the other")
    if overlay and not weights:
        raise ValueError("--overlay: expected --weights beside it, the weights that were trained with it, got none")
    folder = Path(out)
    for name in tasks() if task == ALL else [task]:
        bundle = export(
            name,
            folder,
            weights=Path(weights) if weights else None,
            overlay=Path(overlay) if overlay else None,
            url_base=url_base,
        )
        version = read_config(bundle / "configs/metadata.json")["version"]
        archive = folder / f"{name}_v{version}.zip"
        write_zip(bundle, archive)
        write_unit_tests(name, folder / "ci/unit_tests")
        print(f"{bundle}  {archive}  {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line.run(export_bundle, name="python -m tools.export_bundle")
