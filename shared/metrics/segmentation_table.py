# SPDX-License-Identifier: Apache-2.0
"""From the scores of single images to the rows of a report: methods by measures, with intervals over groups.

Means are over images (a volume is one), as published; the intervals come from drawing whole groups, since frames of one
video or images of one patient are no independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.metrics.confidence import Interval, grouped_bootstrap_interval
from shared.metrics.measures import summary_row
from shared.metrics.segmentation import MEAN, MaskScore

_LEAST_GROUPS = 3  # the bootstrap of two knows three means only


@dataclass(frozen=True)
class ItemScore:
    """A :class:`~shared.metrics.segmentation.MaskScore` and what it is of.

    Attributes:
        name: of the image, from its file.
        group: what must not be split between training and test.
        method: whose mask it is.
        resolution: "native", or the working size in words.
        score: the agreement.
        unit: of the surface distances, "mm" or "px".
        millilitres: of a voxel; None for pictures.
        seconds: that the method took for the image; None where it was not measured.
    """

    name: str
    group: Any
    method: str
    resolution: str
    score: MaskScore
    unit: str
    millilitres: float | None = None
    seconds: float | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The line of ``per_image.csv``; sizes in ml of volumes, else in pixels."""
        score, size = self.score, self.millilitres if self.millilitres is not None else 1
        return {
            "name": self.name,
            "group": self.group,
            "method": self.method,
            "resolution": self.resolution,
            "class": score.name,
            "dice": score.dice,
            "iou": score.iou,
            "hd95": score.hd95,
            "assd": score.assd,
            "distance_unit": self.unit,
            "true_size": score.true_pixels * size,
            "predicted_size": score.predicted_pixels * size,
            "size_unit": "px" if self.millilitres is None else "ml",
            "both_empty": int(score.both_empty),
            "one_empty": score.one_empty,
            "seconds": self.seconds,
        }


def scored_rows(scores: Sequence[ItemScore], methods: Mapping[str, str], *, own: Sequence[str]) -> list[dict[str, Any]]:
    """Summary rows of Dice, IoU and surface distances, and the paired differences of Dice.

    Args:
        scores: of all images, methods, resolutions and classes.
        methods: method -> note, in the order of the table; a method without scores becomes rows without values.
        own: which of them are what is evaluated; each is compared with every other method but these.

    Returns:
        Rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}`` with ``sd`` and ``median`` over images, the number
        of ``groups``, ``method``, ``measure``, ``resolution``, ``class``, and the heading ``group``.
    """
    rows: list[dict[str, Any]] = []
    tables: dict[tuple[str, str], dict[str, list[ItemScore]]] = {}
    for one in scores:
        tables.setdefault((one.resolution, one.score.name), {}).setdefault(one.method, []).append(one)
    several = len({name for _, name in tables}) > 1
    for (resolution, name), table in sorted(tables.items(), key=lambda entry: entry[0][1] != MEAN):
        heading = "Native resolution" if resolution == "native" else f"Working size {resolution}"
        fields = {"resolution": resolution, "class": name, "group": f"{heading}, {name}" if several else heading}
        lines = [one for scored in table.values() for one in scored]
        cells = [cell for cell in _CELLS if any(cell.taken(one) for one in lines)]
        if any(one.score.both_empty for one in lines):
            cells.insert(1, _NOT_EMPTY)
        for cell in cells:
            rows += [_row(cell, method, table.get(method, []), note) | fields for method, note in methods.items()]
        if any(one.score.one_empty for one in lines):
            rows += [_count(method, table.get(method, []), note) | fields for method, note in methods.items()]
        if name == MEAN or not several:
            for method in own:
                others = [other for other in methods if other not in own] if method in table else []
                rows += [_difference(method, other, table, methods[other]) | fields for other in others]
    return rows


@dataclass(frozen=True)
class _Cell:
    """A measure: which images it takes, and its value for them."""

    measure: str
    heading: str
    note: str
    taken: Callable[[ItemScore], bool]
    value: Callable[[ItemScore], float]


def _distance(column: str, unit: str) -> _Cell:
    def value(one: ItemScore) -> float:
        return getattr(one.score, column)

    def taken(one: ItemScore) -> bool:
        return one.unit == unit and value(one) is not None and not one.score.both_empty

    note = "images in which one mask is empty are counted, not averaged; lower is better"
    return _Cell(f"{column}_{unit}", f"{column.upper()} ({unit})", note, taken, value)


_CELLS = [
    _Cell("dice", "Dice", "higher is better", lambda one: True, lambda one: one.score.dice),
    _Cell("iou", "IoU", "higher is better", lambda one: True, lambda one: one.score.iou),
    *(_distance(column, unit) for unit in ("mm", "px") for column in ("hd95", "assd")),
]
_NOT_EMPTY = _Cell(
    "dice_not_empty",
    "Dice without empty images",
    "images of which truth and prediction are both empty are left out; higher is better",
    lambda one: not one.score.both_empty,
    lambda one: one.score.dice,
)


def _row(cell: _Cell, method: str, lines: Sequence[ItemScore], note: str) -> dict[str, Any]:
    taken = [one for one in lines if cell.taken(one)]
    found = [one for one in taken if math.isfinite(cell.value(one))]
    values = [cell.value(one) for one in found]
    text = f"{cell.note}; {note}" if lines else note
    if left := len(taken) - len(found):
        text += f"; {left} of {len(taken)} images have one empty mask"
    if (empty := sum(one.score.both_empty for one in lines)) and cell.measure in ("dice", "iou"):
        shown = next(cell.value(one) for one in lines if one.score.both_empty)
        text += f"; both masks are empty in {empty} images, which count {shown:g}"
    return _filled(f"{cell.heading}, {method}", method, cell.measure, found, values, text)


def _count(method: str, lines: Sequence[ItemScore], note: str) -> dict[str, Any]:
    """How many images have a class of which exactly one mask is empty: missed, or invented."""
    values = [float(one.score.one_empty > 0) for one in lines]
    text = f"number of images in which a class is missed whole or invented; {note}"
    row = _filled(f"One mask empty, {method}", method, "one_empty", [], [], text) | {"n": len(lines)}
    return row | {"value": int(sum(values)) if lines else None, "groups": len({one.group for one in lines})}


def _difference(method: str, other: str, table: Mapping[str, Sequence[ItemScore]], note: str) -> dict[str, Any]:
    title = f"{method} - {other}"
    pairs = list(zip(table[method], table.get(other, []), strict=True)) if other in table else []
    values = [one.score.dice - two.score.dice for one, two in pairs]
    text = "paired by image; above 0: better than it" if pairs else note
    return _filled(f"Dice, {title}", title, "dice", [one for one, _ in pairs], values, text)


def _filled(
    name: str, method: str, measure: str, lines: Sequence[ItemScore], values: Sequence[float], note: str
) -> dict[str, Any]:
    return summary_over_groups(name, values, [one.group for one in lines], note) | {
        "method": method,
        "measure": measure,
    }


def summary_over_groups(
    name: str, values: Sequence[float], groups: Sequence[Any], note: str, *, of: tuple[str, str] = ("images", "groups")
) -> dict[str, Any]:
    """A row with mean, bootstrap interval over groups, ``sd`` and ``median`` over images, and ``groups``.

    ``n`` counts images. Without values the row is empty; from fewer than 3 groups there is no interval. ``of`` are the
    words for images and groups in the note.
    """
    if not len(values):
        nothing = summary_row(name, Interval(math.nan, math.nan, math.nan, 0), note)
        return nothing | {"sd": None, "median": None, "groups": 0}
    many, whole = of
    interval = grouped_bootstrap_interval(values, groups)
    if interval.n < _LEAST_GROUPS:
        interval = Interval(interval.value, math.nan, math.nan, interval.n)
        note += f"; no interval from fewer than {_LEAST_GROUPS} {whole}"
    text = f"{len(values)} {many} of {interval.n} {whole}, interval by bootstrap over {whole}; {note}"
    row = summary_row(name, interval._replace(n=len(values)), text)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row | {"sd": sd, "median": float(np.median(values)), "groups": interval.n}
