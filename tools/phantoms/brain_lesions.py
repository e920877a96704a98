# SPDX-License-Identifier: Apache-2.0
"""White-matter lesions of the head phantom: bright on FLAIR, dark on T1w, mostly beside the ventricles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tools.phantoms.brain_anatomy import draw_waves
from tools.phantoms.brain_signal import TISSUES
from tools.phantoms.brain_tissues import Maps

__all__ = ["add_lesions"]

_WHITE, _LESION = (list(TISSUES).index(name) for name in ("white", "lesion"))
REACH = 6.0  # mm from the ventricles at which lesions become rare


def add_lesions(maps: Maps, axes: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[Maps, np.ndarray]:
    """Turn some white matter into lesions: 3 to 12 irregular spots of 2 to 7 mm radius.

    Args:
        maps: healthy head.
        axes: the three axes of its grid in mm.
        rng: draws number, places, sizes, and how much of the tissue is lost.

    Returns:
        The maps with lesions (a copy) and the mask (X, Y, Z) uint8 of voxels that are at least half lesion.
    """
    fractions = maps.fractions.copy()
    white = fractions[_WHITE]
    # voxels fully inside white matter; the distance has no meaning far outside of the ventricles' slices
    chance = np.where(white > 0.95, np.exp(-maps.ventricle_distance / REACH), 0).astype(np.float64).ravel()
    total = np.zeros_like(white)
    if chance.sum() > 0:
        chosen = rng.choice(chance.size, size=int(rng.integers(3, 13)), p=chance / chance.sum())
        edge = 1 + 0.25 * draw_waves(rng, 16, (8, 20)).on(axes)
        width = float(np.mean([axis[1] - axis[0] for axis in axes if len(axis) > 1]))
        for index in chosen:
            centre = [axis[i] for axis, i in zip(axes, np.unravel_index(index, white.shape), strict=True)]
            radius = float(np.clip(rng.lognormal(np.log(3.2), 0.4), 2.0, 7.0))
            stretch = rng.uniform(0.75, 1.35, size=3)
            x, y, z = (
                ((axis - middle) / factor).astype(np.float32)
                for axis, middle, factor in zip(axes, centre, stretch, strict=True)
            )
            distance = np.sqrt(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2) * edge - radius
            np.maximum(total, rng.uniform(0.75, 1.0) * np.clip(0.5 - distance / (1.5 * width), 0, 1), out=total)
    lesion = white * total
    fractions[_WHITE] -= lesion
    fractions[_LESION] += lesion
    return replace(maps, fractions=fractions), (lesion >= 0.5).astype(np.uint8)
