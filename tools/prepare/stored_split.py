# SPDX-License-Identifier: Apache-2.0
"""Sections of a data set: given ones kept as they are, others drawn by group; the same picture never in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.datalist import SECTIONS, write_datalist
from tools.prepare.preparation import Preparation, split_and_write

_KEPT_FIRST = ("test", "validation", "training")


@dataclass(frozen=True)
class Entry:
    """One item on its way into `datalist.json`.

    Attributes:
        item: as it will be written; `subject` is the unit of the split.
        section: the one that is given by the publishers; None: to be drawn.
        links: further marks of the unit: entries that share one (content, sequence of another table) stay together.
    """

    item: dict[str, Any]
    section: str | None = None
    links: tuple[str, ...] = ()


def join_groups(entries: Sequence[Entry]) -> list[str]:
    """The subject of each entry after joining subjects that share a link; the first name (sorted) stands for all.

    Independent of the order of the entries.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for entry in entries:
        subject = root(("subject", str(entry.item["subject"])))
        for link in entry.links:
            parent[root(("link", link))] = subject
    names: dict[tuple[str, str], str] = {}
    for entry in entries:
        name = str(entry.item["subject"])
        head = root(("subject", name))
        names[head] = min(names.get(head, name), name)
    return [names[root(("subject", str(entry.item["subject"])))] for entry in entries]


def write_sections(
    entries: Sequence[Entry],
    out: Path,
    preparation: Preparation,
    *,
    what: str,
    seed: int,
    fractions: str | Sequence[float],
    **description: Any,
) -> Preparation:
    """Join groups, split, check for leaks, write `datalist.json` and `preparation.json`, and print the counts.

    Given sections are kept; of a group that reaches into several of them only the part in the test section stays
    (else that in validation), the rest is dropped and named: a published test set stays what it is.

    Args:
        entries: whose files are written already; `section` is given for all or for none.
        out: dataset folder.
        preparation: the record, to which the counts are added.
        what: what an entry is called in the counts and in the error: pictures, volumes.
        seed: of a drawn split.
        fractions: share of the subjects for training, validation and test of a drawn split.
        description: further top-level entries of `datalist.json`.

    Raises:
        ValueError: nothing is left, nothing is left for training, or there are too few subjects to split.
    """
    subjects = join_groups(entries)
    for entry, subject in zip(entries, subjects, strict=True):
        if subject != entry.item["subject"]:
            preparation.warn("joined with another group (same content or sequence)",
                             f"{entry.item['image']}: {entry.item['subject']} counts as {subject}")  # fmt: skip
    # `group` is what segmentation calls the unit, `subject` is what `shared.datalist` splits and checks by
    items = [
        {**entry.item, "subject": subject, "group": subject} for entry, subject in zip(entries, subjects, strict=True)
    ]
    given = [entry.section for entry in entries]
    if not items or None in given:
        return split_and_write(items, out, preparation, what=what, seed=seed, fractions=fractions, **description)
    split = _keep_sections(items, [str(section) for section in given], preparation)
    preparation.counts[what] = sum(len(part) for part in split.values())
    preparation.counts["subjects"] = len({item["subject"] for part in split.values() for item in part})
    preparation.counts |= {section: len(part) for section, part in split.items()}
    for section in SECTIONS[1:]:
        if not split[section]:
            preparation.warn("empty section", section)
    if not split["training"]:
        record = preparation.write(out)
        raise ValueError(f"{record}: expected {what} for training, but none is left; this file says why each was "
                         "dropped and in which section the others are")  # fmt: skip
    write_datalist(out, split, name=preparation.name, **description)
    preparation.write(out)
    print(preparation)
    return preparation


def _keep_sections(
    items: Sequence[Mapping[str, Any]], given: Sequence[str], preparation: Preparation
) -> dict[str, list[dict[str, Any]]]:
    reached: dict[str, set[str]] = {}
    for item, section in zip(items, given, strict=True):
        reached.setdefault(item["subject"], set()).add(section)
    split: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for item, section in sorted(zip(items, given, strict=True), key=lambda pair: str(pair[0]["image"])):
        kept = next(name for name in _KEPT_FIRST if name in reached[item["subject"]])
        if section == kept:
            split[section].append(dict(item))
        else:
            preparation.drop(f"same group as an item in {kept}", str(item["image"]))
    return split
