# SPDX-License-Identifier: Apache-2.0
"""What the report shows of an evaluation: measures, comparisons of methods, spread over images, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.report_data import Run
from tools.report_html import Element, element, figure, missing, number, table, words

_FAILURE_WORDS = ("failure", "worst")
_PANELS = "image, truth, prediction, probability"
_CAPTIONS = {
    name: f"{name.capitalize()} by Dice, from left to right: {_PANELS}" for name in ("worst", "median", "best")
}
_CAPTIONS |= {
    f"{name}_{key}": f"{key.upper()} of the subject of {name} PSNR; patient's right and anterior on the left"
    for name in ("worst", "median", "best")
    for key in ("ndi", "odi", "fwf")
}


def evaluation_of(run: Run) -> list[Element]:
    """Tables of `evaluation/summary.json` and `per_image.csv`, then the pictures.

    A row with `group` stands in a table under that heading. Rows with `method` and `measure` become one table of
    methods by measures, or of what `row_heading` says instead of methods. A column "Mean ± sd" replaces "Value" where
    a row of the table has `sd`. The conventions of `evaluation/protocol.json` follow.
    """
    parts = [element("h3", "Evaluation")]
    if run.evaluation is None:
        parts.append(missing("The evaluation left pictures but no numbers (no evaluation/summary.json)."))
    else:
        for group, rows in _groups(run.evaluation).items():
            if group:
                parts.append(element("h3", group))
            parts += _tables(rows)
    if run.protocol is not None:
        parts += _protocol(run.protocol)
    if run.per_image:
        parts += _spread_over_images(run.per_image, run.per_image_of, run.per_image_unit)
    failures = [path for path in run.evaluation_pictures if any(word in path.stem for word in _FAILURE_WORDS)]
    grids = [path for path in run.evaluation_pictures if path not in failures]
    if grids:
        parts += [element("h3", "Pictures of the evaluation"), _wide(grids)]
    parts.append(element("h3", "Failure cases"))
    parts.append(_wide(failures) if failures else missing("No failure cases were saved by the evaluation."))
    return parts


def _protocol(protocol: dict[str, Any]) -> list[Element]:
    """Facts beside one another, then the conventions as a list."""
    facts = {name: value for name, value in protocol.items() if name != "conventions" and value is not None}
    pairs = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {version}" for part, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif name.endswith("_sha256"):
            name, value = f"{name.removesuffix('_sha256')}, SHA-256", f"{str(value)[:16]}…"
        pairs.append(element("div", element("dt", words(name)), element("dd", str(value))))
    conventions = protocol.get("conventions")
    items = [
        element("li", element("strong", words(str(name))), f": {text}")
        for name, text in (conventions.items() if isinstance(conventions, dict) else ())
    ]
    summary = element("summary", "Conventions and how it was measured")
    return [element("details", summary, element("dl", *pairs), element("ul", *items, class_="small"))]


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Heading -> its rows, in the order of first appearance; rows without a group come first."""
    groups: dict[str, list[dict[str, Any]]] = {"": []}
    for row in rows:
        groups.setdefault(str(row.get("group") or ""), []).append(row)
    return {heading: found for heading, found in groups.items() if found} or groups


def _tables(rows: Sequence[dict[str, Any]]) -> list[Element]:
    compared = [row for row in rows if row.get("method") and row.get("measure")]
    single = [row for row in rows if row not in compared]
    methods = {row["method"] for row in compared}
    pairs = {f"{one} - {other}" for one in methods for other in methods}
    headings = _headings(compared)
    parts = _comparison([row for row in compared if row["method"] not in pairs], headings)
    if differences := [row for row in compared if row["method"] in pairs]:
        parts += [element("h3", "Differences between methods"), *_comparison(differences, headings)]
    if single and compared:
        parts.append(element("h3", "Further measures"))
    return parts + ([_measures(single)] if single or not rows else [])


def _measures(rows: Sequence[dict[str, Any]]) -> Element:
    value = "Mean ± sd" if any(row.get("sd") is not None for row in rows) else "Value"
    body = [
        element(
            "tr",
            element("th", words(str(row["name"])), scope="row"),
            element("td", _mean(row), class_="num value"),
            element("td", _interval(row.get("ci_low"), row.get("ci_high")), class_="num"),
            element("td", _value(row["n"]), class_="num"),
            element("td", str(row.get("note") or ""), class_="small quiet"),
        )
        for row in rows
    ]
    return table(("Measure", value, "95 % interval", "n", "Note"), body, numeric={value, "95 % interval", "n"})


def _comparison(rows: Sequence[dict[str, Any]], headings: dict[str, str]) -> list[Element]:
    """Methods down, measures across, those that these rows have; below it what holds for all cells, and the notes."""
    if not rows:
        return []
    cells = {(str(row["method"]), str(row["measure"])): row for row in rows}
    methods = list(dict.fromkeys(method for method, _ in cells))
    measured = {measure for _, measure in cells}
    headings = {measure: heading for measure, heading in headings.items() if measure in measured}
    counts = {row["n"] for row in rows if row["value"] is not None}
    body = []
    for method in methods:
        shown = [_cell(cells.get((method, measure)), with_n=len(counts) > 1) for measure in headings]
        body.append(element("tr", element("th", method.replace(" - ", " − "), scope="row"), *shown))
    columns = [element("th", name, scope="col", class_="num") for name in headings.values()]
    first = str(rows[0].get("row_heading") or "Method")
    head = element("thead", element("tr", element("th", first, scope="col"), *columns))
    said = ["Mean ± standard deviation"] if any(row.get("sd") is not None for row in rows) else []
    said += ["below it the 95 % interval"] if any(row.get("ci_low") is not None for row in rows) else []
    said += [f"n = {_value(counts.pop())}"] if len(counts) == 1 else []
    general, particular = _notes(rows, headings)
    text = "; ".join([*said, *general])
    parts = [element("div", element("table", head, element("tbody", *body), class_="compared"), class_="scroll")]
    if text:
        parts.append(element("p", f"{text[:1].upper()}{text[1:]}.", class_="quiet small"))
    if particular:
        notes = [
            element("li", element("strong", where), f": {'; '.join(clauses)}") for where, clauses in particular.items()
        ]
        summary = element("summary", "Notes on methods and measures")
        parts.append(element("details", summary, element("ul", *notes, class_="small")))
    return parts


def _headings(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Measure -> its heading: what stands before the method in the name of a row ("PSNR (dB), U-Net"), else its key."""
    headings: dict[str, str] = {}
    for row in rows:
        measure, name, ending = str(row["measure"]), str(row["name"]), f", {row['method']}"
        if name.endswith(ending):
            headings[measure] = name.removesuffix(ending)
        else:
            headings.setdefault(measure, words(measure))
    return headings


def _notes(rows: Sequence[dict[str, Any]], headings: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Clauses of the notes that hold for all cells, and the others by the methods and measures for which they hold.

    A note is a list of clauses separated by "; "; most are the same along a row or a column of the table.
    """
    cells: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for clause in dict.fromkeys(str(row.get("note") or "").split("; ")):
            if clause:
                cells.setdefault(clause, []).append((str(row["method"]), str(row["measure"])))
    everywhere = [(str(row["method"]), str(row["measure"])) for row in rows]
    general: list[str] = []
    particular: dict[str, list[str]] = {}
    for clause, held in cells.items():
        if len(held) == len(everywhere) and len(rows) > 1:
            general.append(clause)
            continue
        methods = list(dict.fromkeys(method for method, _ in held))
        measures = list(dict.fromkeys(measure for _, measure in held))
        of_methods = {measure for method, measure in everywhere if method in methods}
        of_measures = {method for method, measure in everywhere if measure in measures}
        named = [] if set(methods) == of_measures and len(of_measures) > 1 else [" and ".join(methods)]
        named += [] if set(measures) == of_methods and named else [", ".join(headings[m] for m in measures)]
        particular.setdefault(" – ".join(named), []).append(clause)
    return general, particular


def _cell(row: dict[str, Any] | None, *, with_n: bool) -> Element:
    if row is None or row["value"] is None:
        return element("td", "–", class_="num")
    below = []
    if row.get("ci_low") is not None and row.get("ci_high") is not None:
        low, high = (f"{row[end]:.{_decimals(row['value'])}f}" for end in ("ci_low", "ci_high"))
        below.append(element("div", f"{low} to {high}", class_="small quiet"))
    if row.get("median") is not None:
        below.append(element("div", f"median {row['median']:.{_decimals(row['value'])}f}", class_="small quiet"))
    if with_n:
        below.append(element("div", f"n = {_value(row['n'])}", class_="small quiet"))
    return element("td", element("div", _mean(row), class_="value"), *below, class_="num")


def _spread_over_images(per_image: dict[str, list[float]], of: str, unit: str) -> list[Element]:
    rows = []
    for column, values in per_image.items():
        cells = [str(len(values)), *(number(float(np.quantile(values, q))) for q in (0, 0.25, 0.5, 0.75, 1))]
        cells_html = [element("td", cell, class_="num") for cell in cells]
        rows.append(element("tr", element("th", words(column), scope="row"), *cells_html))
    columns = ("Measure", "n", "Lowest", "25 %", "Median", "75 %", "Highest")
    return [
        element("h3", f"Spread over {unit}{', ' + of if of else ''}"),
        table(columns, rows, numeric=set(columns[1:])),
    ]


def _mean(row: dict[str, Any]) -> str:
    value, deviation = row["value"], row.get("sd")
    if value is None or deviation is None:
        return _value(value)
    digits = _decimals(value)
    return f"{value:.{digits}f} ± {deviation:.{digits}f}"


def _decimals(value: float) -> int:
    """Decimals that show four significant digits, at most five: 26.25, 0.9526, 0.02632."""
    return 4 if value == 0 else min(max(3 - math.floor(math.log10(abs(value))), 0), 5)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def _interval(low: Any, high: Any) -> str:
    return f"{_value(low)} to {_value(high)}" if low is not None and high is not None else "–"


def _wide(paths: Sequence[Path]) -> Element:
    figures = [
        figure(path, _CAPTIONS.get(path.stem, words(path.stem)), alt=f"Picture grid: {words(path.stem)}")
        for path in paths
    ]
    return element("div", *figures, class_="pictures wide")
