# SPDX-License-Identifier: Apache-2.0
"""The catalogue of deliberate faults fits the tree, and its document. ``make mutations`` plants them (minutes)."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tests.conftest import ROOT
from tests.mutation import KINDS, Mutation
from tests.mutation_runs import Outcome
from tests.mutations import BUNDLES, catalogue, document, first_notice, planted

CATALOGUE = catalogue()
DOCUMENT = ROOT / "docs/measurements/mutations.md"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_fault_changes_one_place_of_the_product(bundle: str):
    own = f"bundles/{bundle}/configs/"
    for mutation in CATALOGUE:
        if mutation.bundle == bundle:
            mutation.applied(ROOT)
            assert mutation.file.startswith(("shared/", "tools/", own))
            assert mutation.file.endswith(".json" if mutation.file.startswith(own) else ".py")


@functools.cache
def names_in(file: str) -> set[str]:
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def test_named_tests_exist():
    for mutation in CATALOGUE:
        file, name = mutation.test.split("::", 1)
        assert name.split("[")[0] in names_in(file), mutation.test


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_has_ten_faults_of_different_names(bundle: str):
    names = [mutation.name for mutation in CATALOGUE if mutation.bundle == bundle]
    assert len(names) == len(set(names)) >= 10


def test_every_kind_of_fault_occurs():
    assert {mutation.kind for mutation in CATALOGUE} == {*KINDS, ""}


def test_document_lists_the_catalogue():
    found: list[tuple[str, ...]] = []
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        bundle, *lines = section.splitlines()
        rows = [line.removeprefix("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
        found += [(bundle, *(cell.strip("`") for cell in row[:3])) for row in rows]
    expected = [(one.bundle, one.name, one.file, one.test.removeprefix("tests/")) for one in CATALOGUE]
    assert found == expected


FAULT = Mutation("nothing is left", "sdseg", "shared/part.py", "a - b", "b", "tests/test_part.py::test_part")


def test_a_planted_fault_leaves_no_trace(tmp_path):
    (tmp_path / "shared").mkdir()
    file = tmp_path / FAULT.file
    file.write_text("def rest(a, b):\n    return a - b\n")
    before = file.stat().st_mtime_ns
    with planted(FAULT, tmp_path):
        assert file.read_text().endswith("return b\n")
        assert file.stat().st_mtime_ns > before + 10**9
    assert file.read_text().endswith("return a - b\n")
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "once, but got it 0 times"),
        ("x = a - b\ny = a - b\n", "once, but got it 2 times"),
        ("def f(:\n    a - b\n", "cannot be read"),
    ],
)
def test_a_fault_that_does_not_fit_is_named(tmp_path, text, message):
    (tmp_path / "shared").mkdir()
    (tmp_path / FAULT.file).write_text(text)
    with pytest.raises(ValueError, match=rf"^shared/part.py: .*{message}"):
        FAULT.applied(tmp_path)


def outcome(result: str, kind: str = "", raised_in: str = "") -> Outcome:
    return Outcome(FAULT.test, result, tuple(kind.split()), "assert rest(3, 2) == 1 | 2", raised_in)


def test_an_accident_is_no_notice():
    """Neither a test that cannot start nor an error by chance says that a test looks at the fault."""
    noticed = [outcome("failed", "AssertionError", "tests/test_part.py"), outcome("failed", "Failed", "tests/x.py")]
    noticed += [outcome("failed", "RuntimeError ValueError", "shared/part.py")]
    chance = [outcome("passed"), outcome("skipped"), outcome("error", "AssertionError", "tests/conftest.py")]
    chance += [outcome("failed", "KeyError", "shared/part.py"), outcome("failed", "ValueError", "tests/test_part.py")]
    assert [one.notices for one in noticed] == [True] * 3
    assert [one.notices for one in chance] == [False] * 5
    assert first_notice([*chance, *noticed]) is noticed[0]
    assert first_notice(chance) is None


def test_document_of_a_campaign():
    text = document([FAULT], {FAULT: outcome("failed", "AssertionError")})
    assert "1 of 1 deliberate faults" in text
    row = "| nothing is left | `shared/part.py` | `test_part.py::test_part` | `assert rest(3, 2) == 1 \\| 2` |"
    assert text.splitlines()[-3:] == ["| fault | file | caught by | how it failed |", "|---|---|---|---|", row]
