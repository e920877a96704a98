# SPDX-License-Identifier: Apache-2.0
"""Labels of a data list on their way through a data loader."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import Transform

# The order is the classifier's output order and must not change once weights are released.
FINDINGS = (
    "no_finding",
    "cardiomegaly",
    "left_pleural_effusion",
    "right_pleural_effusion",
    "left_opacity",
    "right_opacity",
    "pneumothorax",
)


class FindingToIndexd(Transform):
    """Write the class index of an item's finding.

    ``monai.transforms.MapLabelValued`` maps values inside an array; here a name inside the item's ``labels`` dictionary
    becomes a new key.

    Args:
        key: where the finding is: a dictionary with the entry ``field``, or the name itself.
        field: entry of that dictionary.
        output_key: new key; holds a 0-dim int64 tensor.
        classes: names in the order of their indices.
    """

    def __init__(
        self,
        key: str = "labels",
        *,
        field: str = "finding",
        output_key: str = "label",
        classes: Sequence[str] = FINDINGS,
    ) -> None:
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"classes: expected at least two different names, got {list(classes)}")
        self.key, self.field, self.output_key = key, field, output_key
        self.classes = tuple(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Item -> item with ``output_key``.

        Raises:
            ValueError: the item has no finding, or one that is not among the classes.
        """
        label = data.get(self.key)
        finding = label.get(self.field) if isinstance(label, Mapping) else label
        if finding not in self.classes:
            place = f"{self.key}.{self.field}" if isinstance(label, Mapping) else self.key
            raise ValueError(
                f"{place}: expected one of {', '.join(self.classes)}, got {finding!r}; "
                "correct the item in datalist.json or pass other classes"
            )
        return {**data, self.output_key: torch.tensor(self.classes.index(finding))}


class LabelsToTextd(Transform):
    """Write an item's label dictionary as JSON text.

    A data loader joins dictionaries key by key, as they are in the first item: labels that only some items have raise a
    KeyError or are dropped. Texts pass unchanged, and ``shared.handlers.evaluation`` reads them.

    Args:
        key: label dictionary; an item without one gets ``"{}"``.
    """

    def __init__(self, key: str = "labels") -> None:
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Item -> item whose labels are a string.

        Raises:
            ValueError: the labels are no dictionary, or hold what JSON does not know.
        """
        labels = data.get(self.key)
        if labels is not None and not isinstance(labels, Mapping):
            raise ValueError(
                f"{self.key}: expected a dictionary, name -> value, got {labels!r}; correct the item in datalist.json"
            )
        try:
            return {**data, self.key: json.dumps(dict(labels or {}))}
        except TypeError as error:
            raise ValueError(f"{self.key}: expected texts and numbers, got {labels!r} ({error})") from error
