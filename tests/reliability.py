# SPDX-License-Identifier: Apache-2.0
"""The fifteen reliability tests and how their figures are counted.

A test that belongs to a row is marked ``@pytest.mark.reliability(row)``. It counts as one case tried, survived if it
passed; a test that goes through several cases says how many with ``record_property("cases", n)``, and one that measures
something says what with ``record_property("figure", "x0 recovered within 3e-06")``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

ROWS = {
    1: "kill -9 at random moments",
    2: "disk full",
    3: "bad input",
    4: "NaN and Inf injected",
    5: "no network, empty HOME",
    6: "odd sizes",
    7: "damaged weights, golden outputs",
    8: "two networks, frozen parts",
    9: "schedulers",
    10: "metric oracles",
    11: "two processes",
    12: "planted identifiers",
    13: "planted copies",
    14: "exported bundles alone and together",
    15: "memory over 100 iterations",
}


@dataclass
class Tally:
    """Figures of one row: cases tried, survived and skipped, and what was measured, by test."""

    row: int
    tried: int = 0
    survived: int = 0
    skipped: int = 0
    figures: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.row:2d} {ROWS[self.row]}: {self.tried} tried, {self.survived} survived{skipped}"


def tallies(reports: Iterable[Any]) -> list[Tally]:
    """The rows that reports of pytest belong to; each test counts once, with its worst outcome."""
    found: dict[int, Tally] = {}
    outcomes: dict[str, set[str]] = defaultdict(set)
    properties: dict[str, dict[str, Any]] = {}
    for report in reports:
        outcomes[report.nodeid].add(report.outcome)
        # A module that does not import has none.
        properties.setdefault(report.nodeid, {}).update(dict(getattr(report, "user_properties", ())))
    for test, known in properties.items():
        if "reliability" not in known:
            continue
        row, cases = int(known["reliability"]), int(known.get("cases", 1))
        tally = found.setdefault(row, Tally(row))
        if "failed" in outcomes[test]:
            tally.tried += cases
            tally.failed.append(test)
        elif "skipped" in outcomes[test]:
            tally.skipped += cases
        else:
            tally.tried += cases
            tally.survived += cases
            if "figure" in known:
                tally.figures[test] = str(known["figure"])
    return [found[row] for row in sorted(found)]


def as_json(rows: Iterable[Tally]) -> list[dict[str, Any]]:
    return [{"title": ROWS[row.row], **asdict(row)} for row in rows]
