# SPDX-License-Identifier: Apache-2.0
"""What a configuration may call by `_target_`: MONAI would call anything that can be imported, such as `os.system`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from monai.bundle import ComponentLocator

# Beginnings of full names. Of `torch` and MONAI the parts that hold components, not those that load, fetch or compile.
ALLOWED_TARGETS = (
    *(f"monai.{part}." for part in ("data", "engines", "handlers", "inferers", "losses", "metrics", "networks")),
    *("monai.optimizers.", "monai.transforms.", "monai.utils.set_determinism"),
    *("torch.nn.", "torch.optim.", "ignite.metrics.", "shared."),
)
_LIBRARY = re.compile(r"[a-z][a-z0-9_]*_lib\.")  # the package of an exported bundle
_NAME = re.compile(r"[A-Za-z]\w*(?:\.[A-Za-z]\w*)*", re.ASCII)
# A module also has what it imports as attributes: `monai.data.utils.os.system`.
_IMPORTED = sys.stdlib_module_names | {"torch", "monai", "ignite", "numpy", "np", "nibabel", "nib", "scipy", "pd"}


def target_faults(config: Any) -> list[str]:
    """Each `_target_` that is not plainly the name of something of the allowed packages; nothing of it is imported."""
    return [
        f"{where}: {value}: {problem}" for where, value in _targets(config) if (problem := _problem(value)) is not None
    ]


def _targets(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under `_target_`, also under a key such as `network#_target_`."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            place = f"{where}#{key}" if where else str(key)
            if re.split("#|::", str(key))[-1].lstrip("+") == "_target_":
                yield place, value
            yield from _targets(value, place)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _targets(value, f"{where}#{index}" if where else str(index))


def _problem(target: Any) -> str | None:
    if not isinstance(target, str) or not _NAME.fullmatch(target):
        return "expected the name of a class or function, written out"
    name = target
    if "." not in target:
        module = _locator().get_component_module_name(target)
        if not isinstance(module, str):
            return "is not the name of one component of MONAI; write it out with its package"
        name = f"{module}.{target}"
    allowed = any(name.startswith(start) if start.endswith(".") else name == start for start in ALLOWED_TARGETS)
    if not (allowed or _LIBRARY.match(name)):
        return "expected a component of MONAI, torch.nn, torch.optim, ignite.metrics or the bundle"
    borrowed = next((part for part in name.split(".")[1:] if part in _IMPORTED), None)
    return f"{borrowed} is a module of its own, not part of {name.split('.')[0]}" if borrowed else None


@cache
def _locator() -> ComponentLocator:
    return ComponentLocator()
