# SPDX-License-Identifier: Apache-2.0
"""Which expressions (`$...`) a configuration may hold: they are code that runs as soon as the file is opened.

`python -m tools.bundle_checks.expressions FILES` reads configurations, runs nothing of them, and prints a line
`file: id: text: problem` for every expression, macro and `_target_` outside the allow-lists; exit code 1 if there is
one. It keeps our own configurations free of code; it is no sandbox for those of strangers (SECURITY.md).
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from tools.bundle_checks.reading import REFERENCE, read_json, strings
from tools.bundle_checks.targets import target_faults
from tools.command_line import run

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
# What it may ask of a reference or a result (`@network_def.to(@device)`): any other attribute can lead to the
# interpreter, such as `@generator.gi_frame.f_builtins`.
ALLOWED_ATTRIBUTES = {
    *("autoencoder", "ema_model", "last_layer", "names", "num_channels", "trained", "type", "unet"),
    *("eval", "parameter_groups", "parameters", "reconstruct", "requires_grad_", "run", "to", "trainable_parameters"),
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
# Stands for a reference while an expression is parsed.
_STAND_IN = "ref_"


def expression_faults(config: Any) -> list[str]:
    """Expressions that are too long, needless, or reach for something outside the allow-list.

    Also in descriptions: MONAI runs a `_desc_` that begins with `$`, although it leaves descriptions out of components.
    """
    return [
        f"{where}: {text}: {problem}"
        for where, text in strings(config, descriptions=True)
        for problem in _expression_problems(text)
    ]


def macro_faults(config: Any) -> list[str]:
    """Macros of other files: what these hold is not looked at here, and MONAI opens them wherever they lie."""
    return [
        f"{where}: {text}: a macro of another file is not allowed"
        for where, text in strings(config, descriptions=True)
        if text.startswith("%") and ConfigParser.split_path_id(text[1:])[0]
    ]


def _expression_problems(text: str) -> list[str]:
    if not text.startswith("$") or text[1:] in (*IMPORTS, ON_PATH) or ABSENT.fullmatch(text[1:]):
        return []
    if len(text) > MAX_EXPRESSION:
        return [f"longer than {MAX_EXPRESSION} characters"]
    # MONAI replaces text, not names: references also inside of quotes, and relative ones by keys, which can be any text
    code = text[1:].replace("#", "::")
    rest = REFERENCE.sub("", code)
    if "@" in rest or re.search("%:", rest):
        return ["a reference that is no absolute id is not allowed"]
    if _STAND_IN in rest:
        return [f"{_STAND_IN} is not allowed in a name or text"]
    problems = []
    if REFERENCE.fullmatch(code.strip()) or code.strip() in ("True", "False", "None"):
        problems.append("needs no $")
    try:
        # The blank keeps `@a@b` apart, which would be one name.
        tree = ast.parse(REFERENCE.sub(lambda match: f"{_STAND_IN}{_plain(match[1])} ", code), mode="eval")
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, lone surrogates, depth
        return [*problems, f"no expression ({type(error).__name__})"]
    except SyntaxError as error:
        return [*problems, f"no expression ({error.msg})"]
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED_NODES):
            problems.append(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Constant) and _STAND_IN in str(node.value):
            problems.append("a reference inside of a text is not allowed")
        if isinstance(node, ast.Call) and not _is_called_by_name(node.func):
            problems.append(f"a call of {ast.unparse(node.func)} is not allowed")
        if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner and not _is_allowed(node):
            problems.append(f"{ast.unparse(node)} is not allowed")
    return problems


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _is_called_by_name(called: ast.expr) -> bool:
    """Functions and methods; a reference itself or a result could be anything that a configuration made."""
    return isinstance(called, ast.Attribute) or (isinstance(called, ast.Name) and not called.id.startswith(_STAND_IN))


def _is_allowed(node: ast.Name | ast.Attribute) -> bool:
    """A name of the list, or attributes of the list asked of a reference or a result."""
    attributes: list[str] = []
    start: ast.expr = node
    while isinstance(start, ast.Attribute):
        attributes.append(start.attr)
        start = start.value
    if isinstance(start, ast.Name) and not start.id.startswith(_STAND_IN):
        return ast.unparse(node) in ALLOWED_NAMES
    return isinstance(start, (ast.Name, ast.Call)) and ALLOWED_ATTRIBUTES.issuperset(attributes)


def check_files(*files: str) -> None:
    """Print what is wrong with the expressions, macros and `_target_`s of configuration files; exit code 1 if any is.

    Args:
        files: JSON files.
    """
    if not files:
        raise ValueError("files: expected at least one configuration, got none; e.g. bundles/*/configs/*.json")
    faults = []
    for file in map(str, files):
        try:
            config = read_json(Path(file))
        except ValueError as error:
            faults.append(f"{file}: {str(error).removeprefix(f'{Path(file).name}: ')}")
            continue
        found = [*expression_faults(config), *macro_faults(config), *target_faults(config)]
        faults += [f"{file}: {fault}" for fault in found]
    print("\n".join(faults) if faults else f"{len(files)} configurations: all expressions and targets are allowed")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    run(check_files, name="tools.bundle_checks.expressions")
