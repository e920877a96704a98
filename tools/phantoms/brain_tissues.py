# SPDX-License-Identifier: Apache-2.0
"""A head from formulas: fractions of tissue per voxel, folded cortex, ventricles, deep nuclei, skull and scalp.

Surfaces are given by approximate signed distances in mm, so that a voxel cut by a surface holds a share of both sides
(partial volume). Places are in the frame of `brain_anatomy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from tools.phantoms.brain_anatomy import Field, Head, Place, coordinates
from tools.phantoms.brain_signal import TISSUES

__all__ = ["Maps", "tissue_maps"]

NAMES = tuple(TISSUES)

# Lateral ventricle along y (mm): medial wall |x|, height z, half width, half height, all before the subject's scaling.
_VENTRICLE_Y = (-52.0, -45.0, -35.0, -25.0, -15.0, 0.0, 15.0, 30.0, 40.0, 46.0)
_VENTRICLE_MEDIAL = (23.0, 22.0, 20.0, 17.0, 11.0, 3.0, 1.2, 1.3, 4.0, 7.0)
_VENTRICLE_Z = (-6.0, -4.0, -1.0, 2.0, 7.0, 11.0, 11.0, 6.0, 2.0, 0.0)
_VENTRICLE_X_RADIUS = (0.0, 2.5, 4.0, 6.0, 7.0, 6.0, 5.5, 5.0, 3.5, 0.0)
_VENTRICLE_Z_RADIUS = (0.0, 3.5, 6.0, 9.0, 8.0, 5.0, 5.0, 8.0, 7.0, 0.0)
# Caudate along y: radius; it rides on the lateral wall of the ventricle.
_CAUDATE_Y = (-20.0, -10.0, 5.0, 20.0, 30.0, 38.0, 45.0)
_CAUDATE_RADIUS = (0.0, 2.0, 3.0, 4.5, 6.0, 5.5, 0.0)
_CAUDATE_Z = (8.0, 10.0, 8.0, 3.0, 0.0, -2.0, -4.0)
_LATTICE = np.arange(-112.0, 112.1, 2.0, dtype=np.float32)
_MIRROR = 0.65  # share of the left half's folds that the right half repeats


@dataclass(frozen=True)
class Maps:
    """What is where: `fractions` (tissues, X, Y, Z) in the order of `TISSUES`, summing to 1; boolean `brain` mask;
    `ventricle_distance` in mm outside of the lateral ventricles."""

    fractions: np.ndarray
    brain: np.ndarray
    ventricle_distance: Field


def tissue_maps(head: Head, axes: Sequence[np.ndarray]) -> Maps:
    """Tissue fractions of a head on a grid.

    Args:
        head: the subject.
        axes: three 1-D arrays of voxel centres in mm in the frame of the module, evenly spaced.
    """
    width = float(np.mean([axis[1] - axis[0] for axis in axes if len(axis) > 1]))
    skull, (x, y, z) = coordinates(head, axes)
    paint = _Painter(x.shape, width)
    side = np.where(x > 0, np.float32(head.ventricles[0]), np.float32(head.ventricles[1]))
    across = np.abs(x)

    hull = _hull(head, *skull)
    cerebellum = np.minimum(
        _ellipsoid((across, y, z), (21, -42, -47), (25, 27, 19)), _ellipsoid((x, y, z), (0, -46, -44), (12, 24, 18))
    )
    stem = _ellipsoid((x, y, z), (0, -8, -45), (13, 11, 34))
    inside = np.minimum(np.minimum(hull, cerebellum), stem)
    fossa = _ellipsoid((x, y, z), (0, -42, -46), (48, 30, 23))
    _paint_outside(paint, head, np.minimum(hull, fossa), head.layers.on(axes), (across, y, z))

    fissure = _fissure(across, y, z)
    pial = np.minimum(_pial_distance(head, hull, fissure, axes, (x, y, z)), -hull)
    paint("grey", -pial)
    paint("white", head.cortex - pial)
    _paint_below(paint, cerebellum, stem)
    ventricle = _paint_deep(paint, head, side, (x, y, z))
    return Maps(paint.fractions, inside < 0.3, ventricle)


class _Painter:
    """Tissue fractions, painted one over the other; a surface is blurred over one voxel."""

    def __init__(self, shape: tuple[int, ...], width: float) -> None:
        self.fractions = np.zeros((len(NAMES), *shape), dtype=np.float32)
        self.fractions[NAMES.index("air")] = 1.0
        self.width = np.float32(width)

    def __call__(self, name: str, distance: Field, share: float | Field = 1.0) -> None:
        """Put `share` of a tissue where the signed distance in mm is negative."""
        alpha = np.clip(0.5 - distance / self.width, 0, 1) * share
        self.fractions *= 1 - alpha
        self.fractions[NAMES.index(name)] += alpha


def _ellipsoid(point: Place, centre: Sequence[float], radii: Sequence[float], turn: float = 0.0) -> Field:
    """Approximate signed distance to an ellipsoid that is turned by `turn` degrees about z; negative inside."""
    x, y, z = (p - np.float32(m) for p, m in zip(point, centre, strict=True))
    if turn:
        cosine, sine = np.float32(np.cos(np.radians(turn))), np.float32(np.sin(np.radians(turn)))
        x, y = cosine * x + sine * y, cosine * y - sine * x
    rho = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    # |q| / |grad q| of the implicit function: exact on the surface to first order
    slope = np.sqrt((x / radii[0] ** 2) ** 2 + (y / radii[1] ** 2) ** 2 + (z / radii[2] ** 2) ** 2)
    return (rho * (rho - 1) / np.maximum(slope, 1e-6)).astype(np.float32)


def _normalised(head: Head, x: Field, y: Field, z: Field) -> Place:
    a, b, c = head.half_axes
    v = y / b
    w = np.where(z > 0, z / c, z / (0.82 * c))
    return x / (a * (1 - head.taper * v)), v, w


def _hull(head: Head, x: Field, y: Field, z: Field) -> Field:
    """Signed distance along the ray to the convex outside of the cerebrum: an egg, slightly squared."""
    u, v, w = _normalised(head, x, y, z)
    rho = (np.abs(u) ** 2.3 + np.abs(v) ** 2.3 + np.abs(w) ** 2.3) ** np.float32(1 / 2.3)
    return np.sqrt(x * x + y * y + z * z) * (1 - 1 / np.maximum(rho, 1e-3))


def _fissure(across: Field, y: Field, z: Field) -> Field:
    """Distance to the sheet between the hemispheres, which ends at the corpus callosum."""
    rho = np.sqrt(((y - 12) / 42) ** 2 + ((z + 4) / 26) ** 2)
    outside = np.sqrt((y - 12) ** 2 + (z + 4) ** 2) * (1 - 1 / np.maximum(rho, 1e-3))
    return np.hypot(across, np.minimum(outside, 0))


def _pial_distance(head: Head, hull: Field, fissure: Field, axes: Sequence[np.ndarray], point: Place) -> Field:
    """Distance from the nearest sulcus into the tissue, negative inside the sulcus.

    Sulci are sheets, the zero set of a random field g that hardly changes along the rays from the middle; |g|/|grad g|
    is the distance to the sheet. Each ends at a depth below the surface that varies along it.
    """
    x, y, z = point
    across = np.abs(x)
    # rays start from a rod in the white matter of each hemisphere, so that folds meet every surface upright
    rod = np.clip(y, -48, 40)
    out = np.stack([across - (23 - 0.004 * rod**2), y - rod, z - 2])
    reach = np.sqrt((out**2).sum(axis=0))
    out *= np.maximum(reach / 32, 0.15) ** np.float32(-0.7)
    where = np.stack([np.sign(x) * (23 + out[0]), rod + out[1], 2 + out[2]])
    lattice = head.folds.on((_LATTICE, _LATTICE, _LATTICE))
    lattice = lattice + np.float32(_MIRROR) * lattice[::-1]
    step = _LATTICE[1] - _LATTICE[0]
    field = map_coordinates(lattice, (where - _LATTICE[0]) / step, order=1, mode="nearest")
    slope = sum(np.gradient(field, axis, axis=i) ** 2 for i, axis in enumerate(axes) if len(axis) > 1)
    floor = 0.12 * float(np.sqrt(np.mean(slope[hull < 0]))) if (hull < 0).any() else 1.0
    sheet = np.abs(field) / np.sqrt(slope + floor**2)
    below = np.minimum(-hull, fissure)
    ends = np.float32(head.sulcus_depth) + 5 * np.clip(head.depth.on(axes), -1.8, 1.8)
    # open at the surface, closing with depth
    half_width = head.sulcus_width * (1.4 - 0.8 * np.clip(below / np.maximum(ends, 1), 0, 1))
    sulci = np.hypot(sheet, np.maximum(below - ends, 0)) - half_width

    deep = _sylvian(across, y, z) - 0.8 - 0.8 * head.sulcus_width
    return np.minimum(np.minimum(sulci, deep), fissure - 0.7 - 0.5 * head.sulcus_width)


def _sylvian(across: Field, y: Field, z: Field) -> Field:
    """Distance to the fissure that opens at the side of the head and to the insula at its floor."""
    climbing = y - 12 + 0.7 * (z + 7) + 5 * np.sin((across - 38) / 8)
    span = np.maximum(np.abs(z + 6) - 15, 0)
    opening = np.hypot(np.hypot(0.8 * climbing, np.maximum(37 - across, 0)), span)
    floor = np.hypot(across - 39 + 0.009 * (y - 13) ** 2, np.maximum(np.abs(y - 14) - 19, 0))
    return np.minimum(opening, np.hypot(floor, span))


def _paint_outside(paint: _Painter, head: Head, hull: Field, noise: Field, point: Place) -> None:
    """Skin, fat, temporal muscle, two tables of bone with marrow between, and the CSF around the brain."""
    across, y, z = point
    noise = np.clip(noise, -2, 2)
    csf = head.csf * (1 + 0.25 * noise)
    skull = csf + head.skull * (1 + 0.15 * noise)
    muscle = 7 * np.exp(-(((y - 38) / 22) ** 2) - ((z + 22) / 24) ** 2) * (across > 20)
    scalp = skull + muscle + head.scalp * (1 - 0.15 * noise) + 2.0 * np.exp(-(((y + 75) / 25) ** 2))
    neck = _ellipsoid(point, (0, 18, -75), (58, 72, 62))
    outer = np.minimum(hull - scalp, neck)
    paint("muscle", outer)
    paint("fat", outer + 1.6, 0.9)
    paint("muscle", np.minimum(hull - skull - muscle, neck + 9), 0.95)
    paint("bone", hull - skull)
    paint("fat", np.abs(hull - (csf + skull) / 2) - 0.22 * (skull - csf), 0.5)
    paint("csf", hull - csf)


def _paint_below(paint: _Painter, cerebellum: Field, stem: Field) -> None:
    paint("grey", cerebellum)
    paint("white", np.maximum(cerebellum + 4, np.abs(np.mod(cerebellum, 6) - 3) - 1.2), 0.6)
    paint("white", cerebellum + 13)
    paint("white", stem, 0.9)


def _paint_deep(paint: _Painter, head: Head, side: Field, point: Place) -> Field:
    """Nuclei, then the ventricles; returns the distance from the lateral ventricles."""
    x, y, z = point
    across = np.abs(x)
    nuclei = np.where(x > 0, np.float32(head.nuclei[0]), np.float32(head.nuclei[1]))
    here = (across / nuclei, y, z)

    def along(knots: Sequence[float], values: Sequence[float]) -> Field:
        return np.interp(y, knots, values).astype(np.float32)

    radius_x = along(_VENTRICLE_Y, _VENTRICLE_X_RADIUS) * side
    radius_z = along(_VENTRICLE_Y, _VENTRICLE_Z_RADIUS) * (0.5 + 0.5 * side)
    medial, height = along(_VENTRICLE_Y, _VENTRICLE_MEDIAL), along(_VENTRICLE_Y, _VENTRICLE_Z)
    ventricle = _tube(across - medial - radius_x, z - height, radius_x, radius_z)
    caudate = along(_CAUDATE_Y, _CAUDATE_RADIUS)
    rides = _tube(
        across - medial - 2 * radius_x - 0.55 * caudate, z - along(_CAUDATE_Y, _CAUDATE_Z), caudate, 1.35 * caudate
    )
    # the internal capsule runs between caudate and thalamus on one side and the lentiform nucleus on the other
    paint("deep", rides)
    paint("deep", _ellipsoid(here, (10.5, -1, -1), (8.5, 14.5, 9.5), turn=22))
    paint("deep", _ellipsoid(here, (25.5, 19, -6), (5.0, 15.5, 11.0), turn=16))
    paint("deep", _ellipsoid(here, (19.5, 14, -8), (4.0, 9.0, 7.5), turn=22), 0.45)
    third = _ellipsoid(point, (0, 3, -11), (1.2 + 1.0 * float(np.mean(head.ventricles)), 12, 9))
    cistern = _ellipsoid((across, y, z), (0, -24, -20), (9, 4.5, 8))
    paint("csf", np.minimum(np.minimum(third, cistern), ventricle))
    return np.maximum(ventricle, 0)


def _tube(x: Field, z: Field, radius_x: Field, radius_z: Field) -> Field:
    """Approximate signed distance to a tube with an elliptic section; a radius of 0 is outside."""
    radius_x, radius_z = np.maximum(radius_x, 0.05), np.maximum(radius_z, 0.05)
    rho = np.sqrt((x / radius_x) ** 2 + (z / radius_z) ** 2)
    slope = np.sqrt((x / radius_x**2) ** 2 + (z / radius_z**2) ** 2)
    return rho * (rho - 1) / np.maximum(slope, 1e-6)
