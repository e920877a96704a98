# SPDX-License-Identifier: Apache-2.0
"""The parts of `shared` that a bundle needs, copied into a package of its own: `<task>_lib`.

A downloaded bundle finds nothing but its own folder, and two bundles in one process that carry a package of the same
name run the code of whichever was imported first. So each gets a copy under a name of its own, with relative imports.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from shared.files import atomic_path

PACKAGE = "shared"
_REFERENCE = re.compile(rf"\b{PACKAGE}\.(?=[a-z_]+)")
# What the Model Zoo's checks want: black with --skip-magic-trailing-comma and isort, both at 120 columns.
MAX_COLUMNS = 120
_FORMAT = ("--config", f"line-length={MAX_COLUMNS}", "--config", "format.skip-magic-trailing-comma=true")
_SORT = (*_FORMAT[:2], "--config", "lint.isort.split-on-trailing-comma=false", "--select", "I", "--fix")


def needed_modules(targets: Iterable[str], root: Path) -> list[str]:
    """Dotted names of all modules that some classes and functions need, directly or not, packages included.

    Args:
        targets: dotted names of classes and functions, such as `shared.losses.AutoencoderLoss`.
        root: folder that holds the package `shared`.

    Raises:
        ValueError: a target or an import lies in no module, or an import has a form that cannot be made relative. The
            message starts with the target or the file.
    """
    waiting = [_module_of(target, root, where=target) for target in targets]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        path = _path(name, root)
        for node in _imports(path):
            assert node.module is not None
            waiting += [_module_of(f"{node.module}.{alias.name}", root, where=str(path)) for alias in node.names]
    return sorted(found)


def vendor(modules: Iterable[str], package: str, *, root: Path, out: Path, stamp: dict[str, str]) -> None:
    """Copy modules into a package of another name, with relative imports, formatted as the Model Zoo asks.

    Args:
        modules: what `needed_modules` found.
        package: name of the new package, such as `sdseg_lib`.
        root: folder that holds the package `shared`.
        out: folder in which the new package is made.
        stamp: names and values that its `__init__` states, such as `__version__`.
    """
    for name in modules:
        source = _path(name, root)
        target = out / package / source.relative_to(root / PACKAGE)
        text = renamed(relative_imports(source.read_text(encoding="utf-8"), name, source), package)
        if name == PACKAGE:
            text += "".join(f'\n{key} = "{value}"' for key, value in stamp.items()).lstrip("\n") + "\n"
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _format(out / package)


def renamed(text: str, package: str) -> str:
    """Text in which names such as `shared.losses` begin with the name of the new package, or with nothing.

    Nothing where a line, which is then one of a docstring or a comment, would grow beyond what the Model Zoo allows.
    """
    lines = []
    for line in text.splitlines(keepends=True):
        longer = _REFERENCE.sub(f"{package}.", line)
        lines.append(longer if len(longer.rstrip("\n")) <= MAX_COLUMNS else _REFERENCE.sub("", line))
    return "".join(lines)


def relative_imports(text: str, module: str, path: Path) -> str:
    """The source of a module with `from shared.x import y` as `from .x import y` or with more dots."""
    lines = text.splitlines(keepends=True)
    is_package = path.name == "__init__.py"
    depth = module.count(".") + (1 if is_package else 0)
    for node in _imports(path):
        assert node.module is not None
        line = lines[node.lineno - 1]
        head = f"from {node.module} import"
        if head not in line:
            raise ValueError(f"{path}, line {node.lineno}: expected {head!r} in one line; write it so")
        own = module.split(".")[: depth or 1]
        wanted = node.module.split(".")
        common = 1
        while common < min(len(own), len(wanted)) and own[common] == wanted[common]:
            common += 1
        dots = "." * (len(own) - common + 1)
        lines[node.lineno - 1] = line.replace(head, f"from {dots}{'.'.join(wanted[common:])} import")
    return "".join(lines)


def _imports(path: Path) -> Iterator[ast.ImportFrom]:
    """Imports from `shared`; any form other than `from shared.x import y` is refused."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(
                f"{path}, line {node.lineno}: expected `from {PACKAGE}.x import y`, got `import`; write it so"
            )
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module or ""):
            yield node


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _module_of(name: str, root: Path, *, where: str) -> str:
    """The module that holds a dotted name: the longest part of it that is a file."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        if any(path.is_file() for path in _candidates(candidate, root)):
            if end < len(parts) - 1 and not _defines_class(candidate, parts[end], root):
                break
            if candidate != PACKAGE:
                return candidate
    raise ValueError(f"{where}: expected a module of {root / PACKAGE} for {name}, found none; correct the name")


def _defines_class(module: str, name: str, root: Path) -> bool:
    """Whether a module has a class of that name, so that `module.Class.method` is a target."""
    body = ast.parse(_path(module, root).read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in body)


def _candidates(name: str, root: Path) -> tuple[Path, Path]:
    folder = root.joinpath(*name.split("."))
    return folder.with_name(f"{folder.name}.py"), folder / "__init__.py"


def _path(name: str, root: Path) -> Path:
    return next(path for path in _candidates(name, root) if path.is_file())


def _format(folder: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        raise ValueError("ruff: expected the formatter, found none; pip install -e '.[dev]'")
    for command in (("check", *_SORT), ("format", *_FORMAT)):
        done = subprocess.run(
            [ruff, command[0], "--isolated", "--no-cache", "--quiet", *command[1:], str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"{folder}: ruff {command[0]} failed: {done.stdout}{done.stderr}")
