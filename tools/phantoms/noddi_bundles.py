# SPDX-License-Identifier: Apache-2.0
"""Fibre bundles of the diffusion phantom: a direction field from formulas, with places where two bundles cross.

Places are in the frame of `brain_anatomy` (mm; x to the right, y forwards, z up). A bundle is a weight, 1 on its core
and falling smoothly to 0, and the tangent of its path; directions have no sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.phantoms.brain_anatomy import Field, Place

__all__ = ["NAMES", "Fibres", "draw_fibres"]

# Base ODI of each bundle and its gain in NDI: compact tracts are dense and parallel.
_CHARACTER = {
    "radiation": (0.20, 0.00),
    "callosum": (0.05, 0.09),
    "corticospinal": (0.08, 0.07),
    "cingulum": (0.12, 0.03),
    "superior longitudinal": (0.14, 0.03),
    "inferior longitudinal": (0.12, 0.02),
    "pontine": (0.14, 0.02),
}
NAMES = tuple(_CHARACTER)
MIN_SHARE = 0.12  # of the second bundle; below it the voxel counts as having one

_CST_Z = (-75.0, -50.0, -28.0, -8.0, 15.0, 35.0, 60.0)
_CST_X = (6.0, 6.5, 10.0, 19.5, 23.0, 27.0, 34.0)
_CST_Y = (-12.0, -3.0, -3.0, -3.0, -5.0, -7.0, -9.0)
_CST_WIDTH = (5.0, 5.0, 5.0, 6.0, 8.0, 13.0, 20.0)  # along y: the tract fans out


@dataclass(frozen=True)
class Fibres:
    """Direction field of one subject.

    Attributes:
        first, second: unit vectors (3, X, Y, Z) of the strongest and the second bundle.
        share: of the second bundle (X, Y, Z), 0 or from `MIN_SHARE` to 0.5.
        odi: dispersion (X, Y, Z) of each bundle for itself. density: gain of NDI (X, Y, Z).
    """

    first: np.ndarray
    second: np.ndarray
    share: Field
    odi: Field
    density: Field


def draw_fibres(point: Place, rng: np.random.Generator) -> Fibres:
    """Bundles of a subject: each is shifted by about 1 mm and widened or narrowed by about a tenth.

    Args:
        point: anatomical coordinates (x, y, z) of the voxels, with the subject's warp in them.
        rng: draws shifts, widths and the opening of the callosal fan.
    """
    x, y, z = point
    side = np.where(x > 0, np.float32(1), np.float32(-1))
    bundles = [
        bundle((np.abs(x) + shift[0], y + shift[1], z + shift[2]), np.float32(rng.normal(1, 0.1)), rng)
        for bundle, shift in zip(_BUNDLES, rng.normal(0, 1.2, (len(_BUNDLES), 3)).astype(np.float32), strict=True)
    ]
    weights = np.stack([weight for weight, _ in bundles]).astype(np.float32)
    tangents = []
    for _, (along_x, along_y, along_z) in bundles:
        tangent = np.stack([np.broadcast_to(part, x.shape) for part in (side * along_x, along_y, along_z)])
        tangents.append(tangent / np.maximum(np.sqrt((tangent**2).sum(axis=0)), 1e-6))
    order = np.argsort(weights, axis=0)[::-1][:2]
    two = np.take_along_axis(weights, order, axis=0)
    every = np.stack(tangents).astype(np.float32)
    first, second = (np.take_along_axis(every, rank[None, None], axis=0)[0] for rank in order)
    share = two[1] / two.sum(axis=0)
    share = np.where(share < MIN_SHARE, 0, share).astype(np.float32)
    table = np.array([_CHARACTER[name] for name in NAMES], dtype=np.float32)
    total = weights.sum(axis=0)
    odi, density = (np.tensordot(column, weights, axes=1) / total for column in table.T)
    return Fibres(first, second, share, odi, density)


def _bell(squared: Field) -> Field:
    """1 around 0, one half at 1, 0 far away: flatter and steeper than a Gaussian."""
    return 1 / (1 + squared**2)


def _gate(value: Field, width: float) -> Field:
    return 1 / (1 + np.exp(np.clip(-value / np.float32(width), -30, 30)))


def _radiation(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    """What fills the rest: fibres from the inner white matter straight to the cortex; in the cerebellum alike."""
    across, y, z = point
    rod = np.clip(y, -48, 40)
    below = _gate(-z - 34, 2.0) * _gate(-y - 18, 3.0)
    along_x = (1 - below) * (across - (23 - 0.004 * rod**2)) + below * (across - 18)
    along_y = (1 - below) * (y - rod) + below * (y + 24)
    along_z = (1 - below) * (z - 2) + below * (z + 42)
    return np.full(across.shape, 0.22, np.float32), (along_x + 0.5, along_y, along_z)


def _sagittal(point: Place) -> tuple[Field, Field, Field]:
    """Distance in mm outside of the ellipse on which the callosum lies, and the outward normal (y, z)."""
    _, y, z = point
    v, w = (y - 10) / 39, (z + 4) / 23
    rho = np.maximum(np.sqrt(v * v + w * w), 1e-3)
    normal_y, normal_z = v / 39, w / 23
    length = np.maximum(np.hypot(normal_y, normal_z), 1e-6)
    return rho * (rho - 1) / length, normal_y / length, normal_z / length


def _callosum(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    """Across the midline, then bending up (in front and behind: outwards) into a fan."""
    across, _, z = point
    distance, normal_y, normal_z = _sagittal(point)
    angle = np.radians(rng.uniform(58, 72)) * np.clip((np.abs(across) - 6) / 26, 0, 1)
    rise = np.interp(across, (0, 8, 16, 24, 32, 48), (0, 1, 4, 9, 18, 40)).astype(np.float32)
    spread = (4.0 + 0.22 * np.abs(across)) * width
    weight = 1.5 * _bell(((distance - rise) / spread) ** 2) * _gate(z + 8, 3) * _gate(44 - across, 5)
    return weight, (np.cos(angle), np.sin(angle) * normal_y, np.sin(angle) * normal_z)


def _corticospinal(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    across, y, z = point

    def knots(values: tuple[float, ...]) -> tuple[Field, Field]:
        # slopes of the interpolated path, smoothed over 6 mm so that directions do not jump at the knots
        here, above, below = (np.interp(z + step, _CST_Z, values).astype(np.float32) for step in (0, 6, -6))
        return (above + here + below) / 3, (above - below) / 12

    (middle_x, slope_x), (middle_y, slope_y), (wide, widening) = knots(_CST_X), knots(_CST_Y), knots(_CST_WIDTH)
    offset = (y - middle_y) / (wide * width)
    weight = 1.1 * _bell(((across - middle_x) / (0.45 * wide + 2.2)) ** 2 + offset**2)
    return weight, (slope_x, slope_y + np.clip(offset, -1.5, 1.5) * widening, np.ones_like(z))


def _cingulum(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    across, _, z = point
    distance, normal_y, normal_z = _sagittal(point)
    weight = 0.9 * _bell(((distance - 7) / (3.2 * width)) ** 2 + ((across - 8) / 4) ** 2) * _gate(z + 6, 3)
    return weight, (np.zeros_like(z), normal_z, -normal_y)


def _superior_longitudinal(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    across, y, z = point
    height = 22 - 0.009 * (y + 4) ** 2
    squared = ((across - 35) / (6 * width)) ** 2 + ((z - height) / (7 * width)) ** 2
    weight = 0.9 * _bell(squared) * _gate(y + 52, 5) * _gate(46 - y, 5)
    return weight, (0.08 * y / 20, np.ones_like(y), -0.018 * (y + 4))


def _inferior_longitudinal(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    across, y, z = point
    middle = 33 - 0.0035 * (y - 5) ** 2
    squared = ((across - middle) / (5.5 * width)) ** 2 + ((z + 14 - 0.05 * y) / (6 * width)) ** 2
    weight = 0.9 * _bell(squared) * _gate(y + 72, 5) * _gate(58 - y, 5)
    return weight, (-0.007 * (y - 5), np.ones_like(y), np.full_like(y, 0.05))


def _pontine(point: Place, width: np.float32, rng: np.random.Generator) -> tuple[Field, Place]:
    """Across the front of the pons and back into the cerebellum."""
    across, y, z = point
    path = 2 - 0.035 * across**2
    weight = 0.9 * _bell(((y - path) / (5 * width)) ** 2 + ((z + 40) / (8 * width)) ** 2) * _gate(32 - across, 4)
    return weight, (np.ones_like(y), -0.07 * across, np.zeros_like(y))


_BUNDLES = (
    _radiation, _callosum, _corticospinal, _cingulum, _superior_longitudinal, _inferior_longitudinal, _pontine,
)  # fmt: skip
