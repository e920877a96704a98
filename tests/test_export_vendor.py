# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.export import vendor

MODULES = {
    "shared/__init__.py": "# SPDX-License-Identifier: Apache-2.0\n",
    "shared/files.py": (
        "import json\n\nfrom shared.sizes import LIMIT\n\n\nclass File:\n    limit = LIMIT\n\n    def open(self): ...\n"
    ),
    "shared/sizes.py": '"""See `shared.files` and shared.\n"""\n\nLIMIT = 3\n',
    "shared/unused.py": "from shared.sizes import LIMIT\n",
    "shared/handlers/__init__.py": "",
    "shared/handlers/best.py": (
        "from __future__ import annotations\n\nfrom shared.files import (\n    File,\n)\n"
        "from shared.handlers.ema import average\n\n\ndef best():\n    from shared.sizes import LIMIT\n\n"
        "    return average(File.limit, LIMIT)\n"
    ),
    "shared/handlers/ema.py": "def average(a, b):\n    return (a + b) / 2\n",
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, text in MODULES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "source"


def copy(root: Path, *targets: str, **stamp: str) -> Path:
    out = root.parent / "out"
    vendor.vendor(vendor.needed_modules(targets, root), "x_lib", root=root, out=out, stamp=stamp)
    return out


def test_takes_what_is_needed_and_nothing_else(root):
    assert vendor.needed_modules(["shared.handlers.best.best"], root) == [
        *("shared", "shared.files", "shared.handlers", "shared.handlers.best", "shared.handlers.ema", "shared.sizes")
    ]
    assert vendor.needed_modules(["shared.files.File.open"], root) == ["shared", "shared.files", "shared.sizes"]


def test_copy_runs_without_the_source(root):
    out = copy(root, "shared.handlers.best.best", __version__="0.1.2")
    program = "import x_lib, x_lib.handlers.best as b; print(b.best(), x_lib.__version__, 'shared' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(out)!r}); {program}"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == ["3.0", "0.1.2", "False"], done.stderr


def test_imports_are_relative_and_texts_name_the_copy(root):
    out = copy(root, "shared.handlers.best.best")
    for path in out.rglob("*.py"):
        names = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in names if name.startswith("shared")], path
    assert "from ..files import File\n" in (out / "x_lib/handlers/best.py").read_text()
    assert "from .ema import average\n" in (out / "x_lib/handlers/best.py").read_text()
    # The word at the end of a sentence is no module.
    assert '"""See `x_lib.files` and shared.' in (out / "x_lib/sizes.py").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("files.py", "import shared.sizes\n", "files.py, line 1: expected `from shared.x import y`"),
        ("files.py", "from shared import missing\n", "files.py: expected a module of .*shared.missing"),
        ("files.py", "from shared.nowhere import x\n", "files.py: expected a module of .*shared.nowhere.x"),
        (
            "files.py",
            "from \\\n    shared.sizes import LIMIT\n",
            "files.py, line 1: expected 'from shared.sizes import'",
        ),
    ],
)
def test_refuses_imports_that_it_cannot_make_relative(root, name, text, message):
    (root / "shared" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        copy(root, "shared.files.File")


def test_unknown_target_is_named(root):
    with pytest.raises(ValueError, match=r"^shared.files.Missing.open: expected a module"):
        vendor.needed_modules(["shared.files.Missing.open"], root)
