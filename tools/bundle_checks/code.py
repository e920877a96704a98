# SPDX-License-Identifier: Apache-2.0
"""The bundle's own package: relative imports, Python 3.10, licence headers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.bundle_checks.bundle import Bundle

# New in Python 3.11 or later; not syntax, so that the parser does not see them.
NEWER = {
    "asyncio": {"TaskGroup", "timeout", "Runner"},
    "contextlib": {"chdir"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "verify", "member", "nonmember"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "tomllib": {"*"},
    "typing": {
        *("LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple", "Unpack", "assert_never"),
        *("assert_type", "dataclass_transform", "override", "reveal_type"),
    },
}
LICENCE = re.compile(r"# (?:SPDX-License-Identifier: Apache-2\.0|Copyright .*)")


def code_faults(bundle: Bundle) -> list[str]:
    """Syntax, imports and headers of every Python file of the bundle."""
    faults = []
    for name in (name for name in bundle.files if name.endswith(".py")):
        text = (bundle.folder / name).read_text(encoding="utf-8", errors="replace")
        if not LICENCE.match(text):
            faults.append(
                f"{name}: expected a licence in the first line, such as '# SPDX-License-Identifier: Apache-2.0'"
            )
        if not name.startswith(f"{bundle.package}/"):
            faults.append(
                f"{name}: expected code in {bundle.package} alone: other names clash with those of other bundles"
            )
        try:
            tree = ast.parse(text, feature_version=(3, 10))
        except SyntaxError as error:
            faults.append(f"{name}, line {error.lineno}: no Python 3.10: {error.msg}")
            continue
        faults += [
            f"{name}, line {line}: {fault}" for line, fault in _import_faults(tree, bundle, bundle.folder / name)
        ]
        faults += [f"{name}, line {line}: {new} is not in Python 3.10" for line, new in _newer(tree)]
    return faults


def _import_faults(tree: ast.Module, bundle: Bundle, path: Path) -> Iterator[tuple[int, str]]:
    own = (bundle.package, "shared", "tools", "tests", "bundles")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in own:
                    yield node.lineno, f"import {alias.name}: expected a relative import"
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").split(".")[0] in own:
                yield node.lineno, f"from {node.module} import: expected a relative import"
            elif node.level:
                wanted = f"from {'.' * node.level}{node.module or ''} import"
                folder = path.parents[node.level - 1]
                if bundle.folder / bundle.package not in (folder, *folder.parents):
                    yield node.lineno, f"{wanted}: leads out of {bundle.package}"
                    continue
                target = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
                modules = [target] if node.module else [target / alias.name for alias in node.names]
                for module in modules:
                    if not (module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()):
                        yield node.lineno, f"{wanted} ...: there is no module {module.name}"


def _newer(tree: ast.Module) -> Iterator[tuple[int, str]]:
    # What stands under a condition or in a `try` has been thought of.
    guards = (ast.If, ast.IfExp, ast.Try)
    guarded = {id(node) for guard in ast.walk(tree) if isinstance(guard, guards) for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = NEWER.get(node.module or "", set())
            yield from (
                (node.lineno, f"{node.module}.{alias.name}") for alias in node.names if {alias.name, "*"} & names
            )
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if "*" in NEWER.get(alias.name, ()))
        elif isinstance(node, ast.Attribute) and node.attr in NEWER.get(ast.unparse(node.value), ()):
            yield node.lineno, ast.unparse(node)
