# SPDX-License-Identifier: Apache-2.0
"""A bundle's own configuration, from which the benchmark builds what the bundle runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

BUNDLES = Path(__file__).parents[2] / "bundles"


def bundle_config(bundle: str, names: Sequence[str], changes: Mapping[str, Any] | None = None) -> ConfigParser:
    """Read configurations of a bundle, later ones over earlier ones, and change some of their values.

    Args:
        bundle: name of its folder.
        names: of the files in ``configs``, without ``.json``.
        changes: values by id: ``{"unet_def#channels": [32, 64]}``.

    Raises:
        FileNotFoundError: when there is no such file; the benchmark needs the repository, not only its packages.
    """
    files = [BUNDLES / bundle / "configs" / f"{name}.json" for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: expected a configuration, found no file; run from a clone of the project."
            )
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser["bundle_root"] = str(BUNDLES / bundle)
    for key, value in (changes or {}).items():
        parser[key] = value
    return parser


def options_of(parser: ConfigParser, name: str) -> dict[str, Any]:
    """The arguments in a definition that holds plain values only, such as ``unet_def``."""
    return {key: value for key, value in parser[name].items() if not key.startswith("_")}
