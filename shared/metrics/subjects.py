# SPDX-License-Identifier: Apache-2.0
"""Which rows of an evaluation are slices of one subject, of one volume, and neighbours."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np


class SliceRows:
    """Rows of an evaluation, grouped.

    Args:
        subjects: subject of each row.
        sessions: session of each row, so that two scans of a subject are two volumes; None where there are none.
        slices: slice index of each row in its volume; None where unknown: rows then follow one another as they came.

    Attributes:
        by_subject: subject -> its rows, subjects in order of appearance.
        by_volume: (subject, session) -> its rows in order of slice.
    """

    def __init__(
        self, subjects: Sequence[Hashable], sessions: Sequence[Any] | None = None, slices: Sequence[Any] | None = None
    ) -> None:
        self.slices = slices
        self.by_subject: dict[Hashable, list[int]] = {}
        self.by_volume: dict[tuple[Hashable, Any], list[int]] = {}
        for row, subject in enumerate(subjects):
            self.by_subject.setdefault(subject, []).append(row)
            self.by_volume.setdefault((subject, sessions[row] if sessions else None), []).append(row)
        if slices is not None:
            for rows in self.by_volume.values():
                rows.sort(key=slices.__getitem__)

    def subject_means(self, values: np.ndarray) -> dict[Hashable, float]:
        """Mean of each subject's finite values; a subject without any is left out."""
        finite = np.isfinite(values)
        means = {}
        for subject, rows in self.by_subject.items():
            used = [row for row in rows if finite[row]]
            if used:
                means[subject] = float(values[used].mean())
        return means

    def neighbours(self) -> dict[Hashable, list[tuple[int, int]]]:
        """Subject -> pairs of rows that are slices k, k + 1 of one volume; {} where slices are unknown."""
        pairs: dict[Hashable, list[tuple[int, int]]] = {}
        if self.slices is None:
            return pairs
        for (subject, _), rows in self.by_volume.items():
            for row, following in zip(rows[:-1], rows[1:], strict=True):
                if self.slices[following] - self.slices[row] == 1:
                    pairs.setdefault(subject, []).append((row, following))
        return pairs

    def rows_of_another_subject(self) -> np.ndarray | None:
        """For each row, the row of the next subject at the nearest relative position; the last one's next is the first.

        The relative position goes from 0 at a volume's first evaluated slice to 1 at its last; a lone slice is at 0.5.

        Returns:
            (N,) integers, or None where there is one subject only.
        """
        subjects = list(self.by_subject)
        if len(subjects) < 2:
            return None
        positions = self._positions()
        result = np.empty(len(positions), dtype=np.int64)
        for subject, following in zip(subjects, subjects[1:] + subjects[:1], strict=True):
            candidates = np.array(self.by_subject[following])
            for row in self.by_subject[subject]:
                result[row] = candidates[np.abs(positions[candidates] - positions[row]).argmin()]
        return result

    def _positions(self) -> np.ndarray:
        positions = np.full(sum(map(len, self.by_subject.values())), 0.5)
        for rows in self.by_volume.values():
            places = np.arange(len(rows)) if self.slices is None else np.array([self.slices[row] for row in rows])
            if places[-1] > places[0]:
                positions[rows] = (places - places[0]) / (places[-1] - places[0])
        return positions


def slice_rows(collected: Mapping[str, Any], *, measure: str) -> SliceRows:
    """Groups of what an evaluation collected under ``info``: ``subject``, and ``session`` and ``slice`` where given.

    Raises:
        ValueError: no subjects, or slices that are known for some rows only; no message names a subject.
    """
    info = collected.get("info", {})
    subjects = info.get("subject")
    if subjects is None:
        raise ValueError(f"info_keys: expected 'subject' among them for {measure}, got {sorted(info)}; add it")
    if None in subjects:
        row = subjects.index(None)
        raise ValueError(f"subject: expected one for every image, got none in row {row}; add it to the data list")
    slices = info.get("slice")
    if slices is not None and None in slices:
        if any(place is not None for place in slices):
            raise ValueError(f"slice: expected it in every item or in none, got none in row {slices.index(None)}")
        slices = None
    return SliceRows(subjects, info.get("session"), slices)
