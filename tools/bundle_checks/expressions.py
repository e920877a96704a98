# SPDX-License-Identifier: Apache-2.0
"""Which expressions (`$...`) a configuration may hold: they are code that runs as soon as the file is opened."""

from __future__ import annotations

import ast
import re
from typing import Any

from tools.bundle_checks.reading import REFERENCE, strings

MAX_EXPRESSION = 80
# What an expression may name: everything else is a component with `_target_`.
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
IMPORTS = ("import os", "import sys", "from importlib.util import find_spec")
# Consumers that never execute `run` do not put the bundle's folder on the path: the exporter adds this one.
_ROOT = "os.path.abspath(@bundle_root)"
ON_PATH = f"sys.path.insert(0, {_ROOT}) if {_ROOT} not in sys.path else None"
# Federated clients execute `initialize` before they say where the bundle lies: its steps are left out until then.
ABSENT = re.compile(r"@bundle_on_path or find_spec\('\w+'\) is None")


def expression_faults(config: Any) -> list[str]:
    """Expressions that are too long, needless, or reach for something outside the allow-list."""
    return [
        f"{where}: {text}: {problem}"
        for where, text in strings(config)
        if text.startswith("$") and text[1:] not in (*IMPORTS, ON_PATH) and not ABSENT.fullmatch(text[1:])
        for problem in _problems(text[1:])
    ]


def _problems(code: str) -> list[str]:
    problems = []
    if len(code) + 1 > MAX_EXPRESSION:
        problems.append(f"longer than {MAX_EXPRESSION} characters")
    if REFERENCE.fullmatch(code.strip()) or code.strip() in ("True", "False", "None"):
        problems.append("needs no $")
    try:
        tree = ast.parse(REFERENCE.sub(lambda match: "ref_" + re.sub(r"\W+", "_", match[1]), code), mode="eval")
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
