# SPDX-License-Identifier: Apache-2.0
"""What may import what, and how large and what called a module may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted(path for folder in ("shared", "tools", "tests") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 320
# Parts that know tensors: they are handed to engines and must not know them.
PARTS = ("shared/networks", "shared/losses.py", "shared/transforms", "shared/metrics")
ENGINES = ("ignite", "monai.engines", "monai.handlers", "shared.handlers", "shared.engines", "shared.prepare_batch")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of all imported modules and objects, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    return [name for name in names if any(f"{name}.".startswith(f"{prefix}.") for prefix in forbidden)]


def test_modules_are_found():
    names = {relative(path) for path in MODULES}
    assert {"shared/engines.py", "shared/networks/latent_diffusion.py", "tools/demo.py"} <= names
    assert all(any(name.startswith(part) for name in names) for part in PARTS)


def test_checker_sees_every_form_of_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    import tools.demo\n    from monai import engines, data\nfrom toolsmith import a\n")
    assert imported(path, ("tools", "monai.engines")) == ["tools.demo", "monai.engines"]


@pytest.mark.parametrize("path", [path for path in MODULES if relative(path).startswith("shared/")], ids=relative)
def test_shared_imports_neither_tools_nor_tests(path: Path):
    assert imported(path, ("tools", "tests", "bundles")) == []


@pytest.mark.parametrize("path", [path for path in MODULES if relative(path).startswith(PARTS)], ids=relative)
def test_parts_do_not_know_engines(path: Path):
    assert imported(path, ENGINES) == []


@pytest.mark.parametrize("path", [path for path in MODULES if relative(path).startswith("tools/")], ids=relative)
def test_tools_do_not_import_tests(path: Path):
    assert imported(path, ("tests", "bundles")) == []


def test_modules_stay_small():
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {name: count for name, count in lines.items() if count > MAX_LINES and not name.startswith("tests/")}
    assert long == {}


def test_names_say_what_a_module_holds():
    vague = {"utils.py", "helpers.py", "common.py", "base.py", "misc.py"}
    assert [relative(path) for path in MODULES if path.name in vague] == []


def test_every_module_names_its_licence_first():
    first = "# SPDX-License-Identifier: Apache-2.0"
    assert [relative(path) for path in MODULES if path.read_text(encoding="utf-8").split("\n")[0] != first] == []


def test_bundles_hold_no_python():
    assert [relative(path) for path in (ROOT / "bundles").rglob("*.py*")] == []
