# SPDX-License-Identifier: Apache-2.0
"""Read bundle configurations without building anything.

This module and those that the worker imports (`tools.bundle_checks.worker`) import nothing of `shared`: the worker
looks at a foreign bundle in a process in which the repository's own code must not stand in for the bundle's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

# `@id`, `@a#b` and `@a::b`.
REFERENCE = re.compile(r"@((?:[A-Za-z_]\w*)(?:(?:#|::)\w+)*)")
# What a consumer starts from: MONAI's runner, federated clients and MONAI Label.
ENTRIES = ("initialize", "run", "training", "finalize")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: not JSON in UTF-8, or a key is written twice, which JSON readers lose silently. The message starts
            with the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise ValueError(f"expected each key once, got {repeated} again; remove one")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path.name}: {error}") from error


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        yield from ((str(key), value) for key, value in config.items())
    elif isinstance(config, list):
        yield from ((str(index), value) for index, value in enumerate(config))


def strings(config: Any, where: str = "", *, descriptions: bool = False) -> Iterator[tuple[str, str]]:
    """Every string of a configuration with its id; descriptions, which are for people, only if asked for."""
    if isinstance(config, str):
        yield where, config
    for key, value in _entries(config):
        if descriptions or key != "_desc_":
            yield from strings(value, f"{where}#{key}" if where else key, descriptions=descriptions)


def components(config: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dictionary with a `_target_`, with its id."""
    if isinstance(config, Mapping) and "_target_" in config:
        yield where, config
    for key, value in _entries(config):
        yield from components(value, f"{where}#{key}" if where else key)


def references(text: str) -> list[str]:
    """Ids that a value names: `@id` in values and expressions, `%id` macros."""
    if text.startswith("%"):
        return [text[1:].replace("::", "#")]
    return [name.replace("::", "#") for name in REFERENCE.findall(text)] if text.startswith(("@", "$")) else []


def undefined_references(config: Mapping[str, Any]) -> list[str]:
    """Ids that the values of a configuration name and that it does not define; `_meta_` comes from another file."""
    parser = ConfigParser(dict(config))
    return [
        f"{where}: {name} is not defined"
        for where, text in strings(config)
        for name in references(text)
        if name not in parser and name.split("#")[0] != "_meta_"
    ]


def unreachable_references(config: Mapping[str, Any], entries: tuple[str, ...]) -> list[str]:
    """As `undefined_references`, of the values alone that some ids need, directly or not.

    An overlay may define more than one configuration can use, such as a discriminator where there is none.
    """
    parser = ConfigParser(dict(config))
    waiting = [name for name in entries if name in parser]
    seen: set[str] = set()
    faults = []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for where, text in strings(parser.get(name), name):
            for needed in references(text):
                if needed.split("#")[0] == "_meta_":
                    continue
                if needed in parser:
                    waiting.append(needed)
                else:
                    faults.append(f"{where}: {needed} is not defined")
    return sorted(set(faults))


def merged(files: list[Path]) -> dict[str, Any]:
    """Configuration files laid over one another in MONAI's rules (`+id` merges, `a#b` is a nested id)."""
    return dict(ConfigParser.load_config_files([str(path) for path in files]))
