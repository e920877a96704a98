# SPDX-License-Identifier: Apache-2.0
"""What a sampler returns for several samples, taken apart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform


class SplitSamplesd(MapTransform):
    """Split ``(2, ...)``, mean and standard deviation over samples, into ``pred`` and ``pred_sd``, ``(1, ...)`` each.

    One sample, ``(1, ...)``, stays as it is and gets no deviation. ``monai.transforms.SplitDimd`` does not fit: its
    names depend on the number of channels.

    Args:
        keys: keys of the results.

    Raises:
        ValueError: for another number of channels.
    """

    def __init__(self, keys: KeysCollection = "pred") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            value = d[key]
            if len(value) not in (1, 2):
                raise ValueError(f"{key}: expected one channel, or mean and standard deviation, got {len(value)}.")
            d[key] = value[:1]
            if len(value) == 2:
                d[f"{key}_sd"] = value[1:]
        return d
