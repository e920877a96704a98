# SPDX-License-Identifier: Apache-2.0
"""Grey slices for networks of three input channels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform


class ThreeChannelsd(MapTransform):
    """Repeat one channel to three; pictures of three stay as they are.

    ``monai.transforms.RepeatChanneld`` repeats whatever comes, a colour picture too.

    Raises:
        ValueError: for another number of channels; the message starts with the key.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if image.shape[0] not in (1, 3):
                raise ValueError(f"{key}: expected 1 or 3 channels, got {image.shape[0]}; load it as a picture.")
            result[key] = image.expand(3, *image.shape[1:]) if image.shape[0] == 1 else image
        return result
