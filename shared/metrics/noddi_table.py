# SPDX-License-Identifier: Apache-2.0
"""From the scores of single scans to the rows of a report: methods by measures of each map, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.metrics.noddi_maps import FLATTENED, MAPS, MEASURES, SSIMWindow
from shared.metrics.segmentation_table import summary_over_groups

AS_PUBLISHED = "As published (not comparable with other work)"


@dataclass(frozen=True)
class SubjectScore:
    """What a method reached on a scan.

    Attributes:
        subject: as the data list has it; intervals draw whole subjects.
        name: of the scan, from its file.
        method: whose maps they are.
        scores: of :func:`shared.metrics.noddi_maps.map_scores`.
        seconds: that the method took; None where it was not measured.
    """

    subject: Any
    name: str
    method: str
    scores: Mapping[str, float]
    seconds: float | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The line of ``per_subject.csv``; what could not be measured is None."""
        known = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        return {"subject": self.subject, "name": self.name, "method": self.method, **known, "seconds": self.seconds}


def scored_rows(
    scores: Sequence[SubjectScore],
    methods: Mapping[str, str],
    *,
    pairs: Sequence[tuple[str, str]],
    window: SSIMWindow,
) -> list[dict[str, Any]]:
    """Summary rows of every measure and method, and the paired differences.

    Args:
        scores: of all scans and methods; every method with scores has all scans in the same order.
        methods: method -> note, in the order of the table; a method without scores becomes rows without values.
        pairs: (method, other): the difference method minus other is given with its interval.
        window: of the SSIM, for the notes.

    Returns:
        Rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}`` with ``sd`` and ``median`` over scans, the number
        of ``groups`` (subjects), ``method``, ``measure``, and the heading ``group``: the map's name.
    """
    by_method: dict[str, list[SubjectScore]] = {method: [] for method in methods}
    for one in scores:
        by_method[one.method].append(one)
    tables = {title: {f"{key}_{name}": text for name, text in MEASURES.items()} for key, title in MAPS.items()}
    rows = []
    for heading, columns in (tables | {AS_PUBLISHED: FLATTENED}).items():
        found = []
        for column, title in columns.items():
            better = _direction(column, window)
            for method, note in methods.items():
                lines = by_method[method]
                values = [one.scores[column] for one in lines]
                text = f"{better}; {note}" if lines else note
                found.append(_row(f"{title}, {method}", column, method, lines, values, text))
        for column, title in columns.items():
            for method, other in pairs:
                own, theirs = by_method[method], by_method[other]
                both = list(zip(own, theirs, strict=True)) if own and theirs else []
                values = [one.scores[column] - two.scores[column] for one, two in both]
                sign = "below" if "_mae" in column else "above"
                text = f"paired by scan; {sign} 0: better than it" if both else methods[method if not own else other]
                name = f"{method} - {other}"
                found.append(_row(f"{title}, {name}", column, name, own if both else [], values, text))
        rows += [row | {"group": heading} for row in found]
    return rows


def _direction(column: str, window: SSIMWindow) -> str:
    if "_mae" in column:
        return "lower is better"
    if column in FLATTENED:
        return (
            "one-dimensional window along the voxel order; higher is better" if "ssim" in column else "higher is better"
        )
    return f"{window.note}; higher is better" if "_ssim" in column else "higher is better"


def _row(
    name: str, column: str, method: str, lines: Sequence[SubjectScore], values: Sequence[float], note: str
) -> dict[str, Any]:
    known = [(value, one.subject) for value, one in zip(values, lines, strict=True) if math.isfinite(value)]
    if left := len(values) - len(known):
        note += f"; {left} of {len(values)} scans could not be measured"
    found, subjects = [value for value, _ in known], [subject for _, subject in known]
    row = summary_over_groups(name, found, subjects, note, of=("scans", "subjects"))
    return row | {"method": method, "measure": column}
