# SPDX-License-Identifier: Apache-2.0
"""Read bundle configurations without instantiating anything, and name what is wrong with them."""

from __future__ import annotations

import ast
import inspect
import json
import pydoc
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser

from tests.conftest import ROOT

MAX_EXPRESSION = 80
# The same in every bundle.
MULTI_GPU = ("multi_gpu_train", "multi_gpu_evaluate", "multi_gpu_inference")
OVERLAYS = ("tiny", "evaluate", "evaluate_diffusion", "directions", *MULTI_GPU)
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
WORKFLOWS = [path for path in CONFIGS if path.stem != "metadata"]
STANDALONE = [path for path in WORKFLOWS if path.stem not in OVERLAYS]
TRAINING = [path for path in STANDALONE if path.stem.startswith("train")]

# What an expression may name: everything else is a component with `_target_`, or a function of `shared`.
ALLOWED_NAMES = {
    "bool",
    "len",
    "max",
    "monai.data.utils.pickle_hashing",
    "monai.handlers.from_engine",
    "os.path.abspath",
    "torch.bfloat16",
    "torch.cuda.is_available",
    "torch.device",
}
ALLOWED_NODES = (
    *(ast.Expression, ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.Load, ast.List, ast.Starred, ast.IfExp),
    *(ast.BinOp, ast.Add, ast.Compare, ast.Eq, ast.Gt, ast.UnaryOp, ast.Not, ast.USub),
)

# Classes whose `**kwargs` go to a function: the names that it takes.
FORWARDED = {
    "monai.networks.schedulers.scheduler.Scheduler": {"beta_start", "beta_end"},
    "shared.metrics.measures.ReconstructionMsssim": {"kernel_size"},
    "shared.metrics.measures._Diversity": {"kernel_size"},
    # Settings that are stated beside a result.
    "shared.transforms.mask_saving.SaveSegmentationd": {"seed", "num_inference_steps"},
    "shared.transforms.noddi_saving.SaveNoddiMapsd": {
        "seed",
        "num_samples",
        "num_inference_steps",
        "deterministic",
        "start",
    },
}

_REFERENCE = re.compile(r"@((?:[A-Za-z_]\w*)(?:#\w+)*)")
_locator = ComponentLocator()


def label(path: Path) -> str:
    """``cxr_ldm/train.json``, for the names of parametrised tests."""
    return f"{path.parent.parent.name}/{path.name}"


def read(path: Path) -> dict[str, Any]:
    """A configuration; a key that is written twice is an error instead of a silent loss of the first."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise ValueError(f"{path}: expected each key once, got {sorted(repeated)} again")
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)


def strings(config: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a configuration with its id; descriptions are no code and left out."""
    if isinstance(config, str):
        yield where, config
        return
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in entries:
        if key != "_desc_":
            yield from strings(value, f"{where}#{key}" if where else str(key))


def components(config: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dictionary with a ``_target_``, with its id."""
    if isinstance(config, Mapping) and "_target_" in config:
        yield where, config
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in entries:
        yield from components(value, f"{where}#{key}" if where else str(key))


def undefined_references(config: Mapping[str, Any]) -> list[str]:
    """``@id`` in values and expressions, and ``%id`` macros, that the configuration does not define."""
    parser = ConfigParser(dict(config))
    found = []
    for where, text in strings(config):
        names = _REFERENCE.findall(text) if text.startswith(("@", "$")) else []
        names += [text[1:]] if text.startswith("%") and not text.startswith("%/") else []
        found += [f"{where}: {name}" for name in names if name not in parser]
    return found


def signature_faults(config: Any) -> list[str]:
    """Components whose ``_target_`` does not exist or does not take the given arguments."""
    faults = []
    for where, component in components(config):
        target = component["_target_"]
        if target.startswith(("$", "@")):
            continue
        candidates = _locator.get_component_module_name(target)
        if isinstance(candidates, list):
            faults.append(f"{where}: {target} is ambiguous ({', '.join(candidates)})")
            continue
        found: Any = pydoc.locate(f"{candidates}.{target}" if candidates else target)
        if not callable(found):
            faults.append(f"{where}: {target} does not exist")
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
        known.update(FORWARDED.get(f"{ancestor.__module__}.{ancestor.__qualname__}", ()))
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    unknown = sorted(set(arguments) - known)
    return f"got an unexpected keyword argument {unknown[0]!r}" if unknown else None


def expression_faults(config: Any) -> list[str]:
    """Expressions that are too long, needless, or reach for something outside the allow-list."""
    faults = []
    for where, text in strings(config):
        if text.startswith("$"):
            faults += [f"{where}: {text}: {problem}" for problem in _expression_problems(text[1:])]
    return faults


def _expression_problems(code: str) -> list[str]:
    if re.fullmatch(r"import os", code):
        return []
    problems = []
    if len(code) + 1 > MAX_EXPRESSION:
        problems.append(f"longer than {MAX_EXPRESSION} characters")
    if _REFERENCE.fullmatch(code.strip()) or code.strip() in ("True", "False", "None"):
        problems.append("needs no $")
    try:
        tree = ast.parse(_REFERENCE.sub(lambda match: f"ref_{match[1].replace('#', '_')}", code), mode="eval")
    except SyntaxError as error:
        return [*problems, f"no expression ({error.msg})"]
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED_NODES):
            problems.append(f"{type(node).__name__} is not allowed")
        if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner:
            problems += [problem for problem in [_name_problem(ast.unparse(node))] if problem]
    return problems


def _name_problem(name: str) -> str | None:
    if "__" in name:
        return f"{name} is not allowed"
    if name.startswith("ref_") or name in ALLOWED_NAMES:
        return None
    # The attribute of a result: torch.device(@device).type
    if "(" in name and name.split("(")[0] in ALLOWED_NAMES:
        return None
    return f"{name} is not allowed"
