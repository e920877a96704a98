# SPDX-License-Identifier: Apache-2.0
"""What the masks of a dataset folder hold: which classes, in how many files, and how many are empty."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.transforms.masks import load_mask


def stated_classes(description: Mapping[str, Any]) -> int | None:
    """Number of classes that a data list states (`num_classes`, else its `labels`); 1 = binary; None: nothing stated.

    Args:
        description: `shared.datalist.read_description`.
    """
    count = description.get("num_classes")
    if count is None and isinstance(labels := description.get("labels"), Mapping | list):
        count = len(labels) if len(labels) > 2 else 1  # two names: background and foreground
    return count if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= 255 else None


class MaskCounts:
    """Counts mask files per section and class.

    Args:
        num_classes: 1 = binary, else with the background.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.files: Counter[str] = Counter()
        self.empty: Counter[str] = Counter()
        self.showing: dict[str, Counter[int]] = {}

    def add(self, path: str | os.PathLike, section: str) -> tuple[int, ...]:
        """Read one mask, count it, and return its shape; raises what `shared.transforms.masks.load_mask` raises."""
        mask = load_mask(os.fspath(path), num_classes=self.num_classes).numpy()[0]
        present = [int(value) for value in np.unique(mask) if value > 0]
        self.files[section] += 1
        self.empty[section] += not present
        self.showing.setdefault(section, Counter()).update(present)
        return mask.shape

    def missing(self, section: str) -> list[int]:
        """Classes that no mask of a section shows; none of a section without masks."""
        if not self.files[section]:
            return []
        return [c for c in range(1, max(self.num_classes, 2)) if not self.showing[section][c]]

    def summary(self) -> str:
        """Per section the masks, how many are empty and, of several classes, how many show each; "" without masks."""
        parts = []
        for section, count in self.files.items():
            part = f"{section} {count} masks, {self.empty[section]} empty"
            if self.num_classes > 1:
                shown = self.showing[section]
                part += f", with class {', '.join(f'{c}: {shown[c]}' for c in range(1, self.num_classes))}"
            parts.append(part)
        return "; ".join(parts)
