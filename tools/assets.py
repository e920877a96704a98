# SPDX-License-Identifier: Apache-2.0
"""List, check and fetch pretrained files.

    python -m tools.assets list
    python -m tools.assets check [NAME ...] [--folder pretrained]
    python -m tools.assets fetch NAME ... [--folder pretrained]

``list`` and ``check`` work on any machine; ``fetch`` is the only command of this project that uses the network.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from shared.assets import ASSETS, check_asset, fetch_asset
from tools import command_line


def list_assets(*, as_json: bool = False) -> None:
    """Print the table of pretrained files: source, size, checksum, licence, use."""
    rows = [dataclasses.asdict(asset) for asset in ASSETS]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(row.pop("name"))
        for field, value in row.items():
            if value != "":
                print(f"  {field:11}{'unknown or none' if value is None else value}")


def check(*names: str, folder: str = "pretrained") -> None:
    """Compare local copies with the table; exit status 1 when one is missing or damaged. Without names: all."""
    failed = False
    for name in names or [asset.name for asset in ASSETS]:
        status, sentence = check_asset(name, folder)
        failed = failed or status in ("missing", "damaged")
        print(f"{name}: {status}\n  {sentence}")
    if failed:
        sys.exit(1)


def fetch(*names: str, folder: str = "pretrained") -> None:
    """Download files into the folder and check them."""
    if not names:
        raise ValueError("fetch: name at least one asset; `python -m tools.assets list` shows them")
    for name in names:
        print(fetch_asset(name, folder))


if __name__ == "__main__":
    command_line.run({"list": list_assets, "check": check, "fetch": fetch}, name="tools.assets")
