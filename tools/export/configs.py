# SPDX-License-Identifier: Apache-2.0
"""Configurations of an exported bundle: an overlay baked in, and components found in `<task>_lib`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from shared.files import atomic_path
from tools.export.vendor import PACKAGE

# Consumers that never execute `run` (federated clients, MONAI Label, `monai.bundle.load`) do not put the bundle's
# folder on the path, and `initialize` runs before `run` does.
IMPORTS = ["$import os", "$import sys", "$from importlib.util import find_spec"]
ON_PATH = "bundle_on_path"
_ROOT = "os.path.abspath(@bundle_root)"
ON_PATH_EXPRESSION = f"$sys.path.insert(0, {_ROOT}) if {_ROOT} not in sys.path else None"
_REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*)")


def read_config(path: Path) -> dict[str, Any]:
    """A configuration as it stands in its file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_config(config: Any, path: Path) -> None:
    """Write JSON as the Model Zoo's checks want it: four spaces, ASCII, a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(config, indent=4, ensure_ascii=True) + "\n", encoding="utf-8")


def is_standalone(config: Mapping[str, Any]) -> bool:
    """Whether a workflow's file runs alone; an overlay does not define where the bundle lies."""
    return "bundle_root" in config


def baked(config: Path, overlay: Path) -> dict[str, Any]:
    """A configuration with an overlay laid over it, less what only other configurations need.

    Args:
        config: a file that stands alone.
        overlay: the file laid over it, in MONAI's rules (`+id` merges, `a#b` is a nested id).
    """
    base = read_config(config)
    merged = dict(ConfigParser.load_config_files([str(config), str(overlay)]))
    merged["_desc_"] = base["_desc_"]
    added = [key for key in merged if key not in base]
    needed = {key for key in merged if key in base}
    while True:
        named = {name for key in needed for name in _names(merged[key])} & set(added)
        if named <= needed:
            return {key: value for key, value in merged.items() if key in needed}
        needed |= named


def targets(config: Any) -> Iterator[str]:
    """Every `_target_` that lies in `shared`."""
    if isinstance(config, Mapping):
        target = config.get("_target_")
        if isinstance(target, str) and target.startswith(f"{PACKAGE}."):
            yield target
    for value in _entries(config):
        yield from targets(value)


def self_contained(config: dict[str, Any], package: str) -> dict[str, Any]:
    """A configuration whose own components come from `package` and find it wherever the bundle lies.

    Args:
        config: a workflow's file or an overlay; without references to other files.
        package: name of the vendored package.
    """
    result = {key: _vendored(value, package) for key, value in config.items()}
    if not is_standalone(config):
        return result
    # Federated clients and `monai.bundle.load` execute `initialize` before they say where the bundle lies.
    absent = f"$@{ON_PATH} or find_spec({package!r}) is None"
    result["initialize"] = [_unless(step, absent) if _is_own(step, package) else step for step in result["initialize"]]
    # There the steps above were left out, so a run from a wrong folder says what is wrong here.
    show = _vendored({"_target_": f"{PACKAGE}.errors.show_cause_last"}, package)
    result |= {name: [show, *result[name]] for name in ("run", "training") if isinstance(result.get(name), list)}
    head = {"_desc_": result.pop("_desc_"), "imports": [*IMPORTS, *result.pop("imports", [])]}
    return {**head, "bundle_root": result.pop("bundle_root"), ON_PATH: ON_PATH_EXPRESSION, **result}


def _vendored(config: Any, package: str) -> Any:
    if isinstance(config, list):
        return [_vendored(value, package) for value in config]
    if not isinstance(config, Mapping):
        return config
    result = {key: _vendored(value, package) for key, value in config.items()}
    target = result.get("_target_")
    if isinstance(target, str) and target.startswith(f"{PACKAGE}."):
        earlier = result.pop("_requires_", [])
        earlier = earlier if isinstance(earlier, list) else [earlier]
        rest = {key: value for key, value in result.items() if key != "_target_"}
        needs: Any = [f"@{ON_PATH}", *earlier] if earlier else f"@{ON_PATH}"
        return {"_target_": package + target[len(PACKAGE) :], "_requires_": needs, **rest}
    return result


def _is_own(step: Any, package: str) -> bool:
    return isinstance(step, Mapping) and step["_target_"].startswith(f"{package}.")


def _unless(step: Mapping[str, Any], condition: str) -> dict[str, Any]:
    return {"_target_": step["_target_"], "_disabled_": condition, **step}


def _names(config: Any) -> Iterator[str]:
    """First parts of all ids that strings refer to."""
    if isinstance(config, str) and config[:1] in ("@", "$", "%"):
        yield from _REFERENCE.findall(config)
    for value in _entries(config):
        yield from _names(value)


def _entries(config: Any) -> Iterator[Any]:
    if isinstance(config, Mapping):
        yield from config.values()
    elif isinstance(config, list):
        yield from config
