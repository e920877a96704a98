# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
