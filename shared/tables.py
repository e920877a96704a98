# SPDX-License-Identifier: Apache-2.0
"""Tables as CSV files and as text."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.files import atomic_path


def write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """CSV with the columns of all lines in order of appearance; six digits of a float, None is an empty cell.

    Without columns the file of an earlier run is deleted: it would be misread.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    if not names:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_cell(line.get(name)) for name in names] for line in lines)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def without_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """What there was nothing to measure in as an empty cell; infinite distances stay."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in line.items()}


def summary_text(summary: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a ``summary.json`` for a log: name, value, interval, n."""
    width = max((len(row["name"]) for row in summary), default=0)
    lines = []
    for row in summary:
        value, low, high = ("-" if row[k] is None else f"{row[k]:.4g}" for k in ("value", "ci_low", "ci_high"))
        lines.append(f"{row['name']:<{width}}  {value:>9}  [{low}, {high}]  n = {row['n']}")
    return "\n".join(lines)
