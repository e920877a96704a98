# SPDX-License-Identifier: Apache-2.0
"""Whether every `_target_` exists and takes the arguments that a configuration gives it; nothing is built."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

from monai.bundle import ComponentLocator

from tools.bundle_checks.reading import components

# Classes whose `**kwargs` go to a function: the names that it takes. An exported bundle has them in `<task>_lib`.
FORWARDED = {
    "networks.schedulers.scheduler.Scheduler": {"beta_start", "beta_end"},
    "metrics.measures.ReconstructionMsssim": {"kernel_size"},
    "metrics.measures._Diversity": {"kernel_size"},
    # Settings that are stated beside a result.
    "transforms.mask_saving.SaveSegmentationd": {"seed", "num_inference_steps"},
    "transforms.noddi_saving.SaveNoddiMapsd": {
        *("seed", "num_samples", "num_inference_steps", "scheduler", "deterministic", "start"),
    },
}
_locator = ComponentLocator()


def signature_faults(config: Any) -> list[str]:
    """Components whose `_target_` does not exist or does not take the given arguments."""
    faults = []
    for where, component in components(config):
        target = component["_target_"]
        if not isinstance(target, str):
            faults.append(f"{where}: expected the name of a class or function, got {target!r}")
            continue
        if target.startswith(("$", "@")):
            continue
        candidates = _locator.get_component_module_name(target)
        if isinstance(candidates, list):
            faults.append(f"{where}: {target} is ambiguous ({', '.join(candidates)})")
            continue
        try:
            found: Any = pydoc.locate(f"{candidates}.{target}" if candidates else target)
        except pydoc.ErrorDuringImport as error:
            faults.append(f"{where}: {target} cannot be imported ({error.value})")
            continue
        if not callable(found):
            faults.append(f"{where}: {target} does not exist")
            continue
        home, package = str(getattr(found, "__module__", "")).split(".")[0], (candidates or target).split(".")[0]
        if home != package:
            faults.append(f"{where}: {target} belongs to {home}, expected something of {package}")
            continue
        arguments = {key: None for key in component if not key.startswith("_")}
        problem = _binding_problem(found, arguments, partial=component.get("_mode_", "default") != "default")
        if problem:
            faults.append(f"{where}: {target}: {problem}")
    return faults


def _binding_problem(target: Any, arguments: dict[str, Any], *, partial: bool) -> str | None:
    signature = inspect.signature(target)
    try:
        (signature.bind_partial if partial else signature.bind)(**arguments)
    except TypeError as error:
        return str(error)
    if not inspect.isclass(target):
        return None
    # `**kwargs` take any name; what they may hold is what the classes above take.
    known: set[str] = set()
    for ancestor in target.__mro__[:-1]:
        if "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(vars(ancestor)["__init__"]).parameters.values()
        known.update(parameter.name for parameter in parameters)
        module = ancestor.__module__.partition(".")[2]
        known.update(FORWARDED.get(f"{module}.{ancestor.__qualname__}", ()))
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    unknown = sorted(set(arguments) - known)
    return f"got an unexpected keyword argument {unknown[0]!r}" if unknown else None
