# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.reliability import ROWS, tallies


def report(test: str, outcome: str, row: int | None = 1, **properties: Any) -> SimpleNamespace:
    known = {**({"reliability": row} if row else {}), **properties}
    return SimpleNamespace(nodeid=test, outcome=outcome, user_properties=list(known.items()))


def test_cases_are_counted_once_with_their_worst_outcome():
    rows = tallies(
        [
            report("a", "passed", cases=20, figure="all equal"),
            report("b", "passed"),
            report("b", "failed"),  # its teardown
            report("c", "skipped", row=2, cases=5),
            report("d", "passed", row=None),
            SimpleNamespace(nodeid="e", outcome="failed"),  # does not import
        ]
    )
    assert [str(row) for row in rows] == [
        " 1 kill -9 at random moments: 21 tried, 20 survived",
        " 2 disk full: 0 tried, 0 survived, 5 skipped",
    ]
    assert rows[0].figures == {"a": "all equal"}
    assert rows[0].failed == ["b"]


def test_rows_are_those_of_the_design():
    assert list(ROWS) == list(range(1, 16))


@pytest.mark.parametrize(
    ("expression", "left"), [("", ["quick"]), ("reliability", ["quick"]), ("soak", ["slow", "quick"])]
)
def test_slow_tests_run_only_where_asked_for(expression, left):
    # pytest itself applies the expression afterwards.
    gone: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=expression), hook=hook)
    items: list[Any] = [
        SimpleNamespace(name="slow", get_closest_marker=lambda name: name == "soak"),
        SimpleNamespace(name="quick", get_closest_marker=lambda name: None),
    ]
    pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == left
    assert [item.name for item in gone] == [name for name in ("slow", "quick") if name not in left]
