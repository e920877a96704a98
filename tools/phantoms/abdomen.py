# SPDX-License-Identifier: Apache-2.0
"""Abdomen phantom: thirteen organs as smooth bodies in a torso, as a CT volume and its labels.

Frame: millimetres, x to the patient's right, y forwards, z up; the origin lies in front of the first lumbar vertebra.
Organs are unions of ellipsoids and tubes in coordinates that a smooth random field has bent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.phantoms.brain_anatomy import Field, Place, Waves, draw_waves

# In the order of BTCV's labels 1 to 13.
ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
# HU in the portal venous phase
ORGAN_HU = dict(zip(ORGANS, (112, 118, 118, 32, 44, 100, 40, 120, 114, 116, 82, 62, 62), strict=True))
AIR, LUNG, FAT, MUSCLE, BOWEL, HEART, MARROW, CORTEX = -1000, -830, -100, 55, 42, 95, 160, 420
# Large organs first: small ones lie on top of them, so that none is buried.
DRAWN = ("liver", "stomach", "spleen", "right kidney", "left kidney", "pancreas", "gallbladder",
         "inferior vena cava", "aorta", "portal and splenic vein", "oesophagus",
         "right adrenal gland", "left adrenal gland")  # fmt: skip
LABELLED_Z = (-80.0, 158.0)  # mm: beyond, the great vessels run on but are not labelled
FIELD_OF_VIEW = (358.0, 313.0, 300.0)  # mm
MIDDLE = (0.0, 0.0, 42.0)  # mm, of the field of view
HALF_TORSO = (163.0, 118.0)  # mm

Ellipsoid = tuple[tuple[float, float, float], tuple[float, float, float]]  # middle, half axes
Tube = tuple[tuple[tuple[float, float, float], ...], float]  # points, radius

ELLIPSOIDS: dict[str, tuple[Ellipsoid, ...]] = {
    "liver": (((82, 4, 78), (68, 82, 74)), ((10, 42, 98), (66, 44, 38))),
    "spleen": (((-108, -42, 84), (31, 46, 52)),),
    "right kidney": (((66, -52, 0), (27, 25, 54)),),
    "left kidney": (((-64, -52, 14), (27, 25, 54)),),
    "gallbladder": (((58, 56, 22), (18, 27, 25)),),
    "stomach": (((-66, 34, 84), (45, 40, 46)), ((-38, 60, 46), (42, 27, 28))),
    "right adrenal gland": (((36, -34, 68), (7, 13, 16)),),
    "left adrenal gland": (((-34, -32, 70), (7, 13, 16)),),
}
TUBES: dict[str, Tube] = {
    "oesophagus": (((-2, -8, 175), (-6, -2, 140), (-22, 12, 112), (-44, 22, 98)), 11),
    "aorta": (((-16, -22, 240), (-10, -20, 100), (-6, -14, 0), (-4, -12, -150)), 11.5),
    "inferior vena cava": (((22, 8, 165), (24, -8, 100), (24, -14, 30), (20, -14, -150)), 12.5),
    "portal and splenic vein": (((58, 18, 66), (20, 14, 36), (-10, 16, 34), (-50, -4, 52), (-84, -26, 70)), 8.5),
    "pancreas": (((38, 14, -2), (30, 20, 14), (4, 30, 20), (-34, 22, 30), (-72, -8, 54)), 14),
}
# Tolerance of the tubes' and the small organs' size against coarse grids, in voxels
FINEST = 0.55


@dataclass(frozen=True)
class Abdomen:
    """One patient.

    Attributes:
        size: of the whole body relative to the drawing, along x, y and z.
        shifts, sizes: per organ, displacement in mm (3,) and scale.
        hu: per organ, its density.
        warp: displacement fields. warp_size: in mm.
        texture: of all tissues.
        bowels: loops of bowel (middle, half axes), gas in every other one.
        noise: HU.
    """

    size: tuple[float, float, float]
    shifts: dict[str, np.ndarray]
    sizes: dict[str, float]
    hu: dict[str, float]
    warp: tuple[Waves, Waves, Waves]
    warp_size: float
    texture: Waves
    bowels: tuple[Ellipsoid, ...]
    noise: float


def draw_abdomen(rng: np.random.Generator) -> Abdomen:
    """A random patient."""
    enhancement = rng.normal(0, 5)
    bowels = []
    for _ in range(12):
        middle = (rng.uniform(-100, 100), rng.uniform(5, 70), rng.uniform(-95, -8))
        bowels.append((middle, tuple(rng.uniform(13, 26, size=3).tolist())))
    size = np.clip(rng.normal(1, (0.05, 0.06, 0.03)), 0.9, 1.08)
    return Abdomen(
        size=(float(size[0]), float(size[1]), float(size[2])),
        shifts={name: rng.normal(0, (3, 3, 5)).clip(-8, 8) for name in ORGANS},
        sizes={name: float(np.clip(rng.normal(1, 0.07), 0.85, 1.18)) for name in ORGANS},
        hu={name: hu + float(rng.normal(0, 4)) + (enhancement if hu > 60 else 0) for name, hu in ORGAN_HU.items()},
        warp=(draw_waves(rng, 12, (90, 220)), draw_waves(rng, 12, (90, 220)), draw_waves(rng, 12, (90, 220))),
        warp_size=float(rng.uniform(3.0, 6.0)),
        texture=draw_waves(rng, 24, (10, 40)),
        bowels=tuple(bowels),
        noise=float(rng.uniform(9, 16)),
    )


def render(abdomen: Abdomen, axes: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scan a patient.

    Args:
        abdomen: the patient.
        axes: positions of the voxels in mm along x (to the right), y (forwards) and z (up).
        rng: source of the noise.

    Returns:
        int16 (X, Y, Z) in HU, at least -1024, and uint8 (X, Y, Z) labels 0 to 13; each organ whose place lies within
        the axes has at least one voxel, however coarse the grid.
    """
    place = _place(abdomen, axes)
    voxel = np.array([abs(axis[1] - axis[0]) if len(axis) > 1 else 1.0 for axis in axes])
    torso = np.sqrt((place[0] / HALF_TORSO[0]) ** 2 + (place[1] / HALF_TORSO[1]) ** 2)
    hu, room = _torso(place, torso)
    hu = _bones(hu, place, torso)
    for number, (middle, half) in enumerate(abdomen.bowels):
        level = _ellipsoid(place, np.array(middle), np.array(half))
        hu[(level < 1) & room] = BOWEL
        if number % 2:
            hu[(level < 0.75) & (place[1] > middle[1]) & room] = AIR + 80
    label = np.zeros(torso.shape, np.uint8)
    low, high = LABELLED_Z
    within = (place[2] > low) & (place[2] < high)
    for name in DRAWN:
        inside = _organ(abdomen, name, place, voxel)
        # lungs and the muscles of the abdominal wall stay as they are
        inside = _at_least_one(inside + np.where(room, 0, 10), place[2])
        hu[inside] = abdomen.hu[name]
        label[inside & within] = ORGANS.index(name) + 1
    hu += np.where(hu > FAT - 60, 6 * abdomen.texture.on(axes), 0)
    hu += abdomen.noise * rng.standard_normal(hu.shape, dtype=np.float32)
    return np.rint(np.clip(hu, -1024, 3071)).astype(np.int16), label


def _place(abdomen: Abdomen, axes: Sequence[np.ndarray]) -> Place:
    grid = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij", sparse=True)
    x, y, z = (
        grid[i] / np.float32(abdomen.size[i]) + np.float32(abdomen.warp_size) * abdomen.warp[i].on(axes)
        for i in range(3)
    )
    return x, y, z


def _torso(place: Place, torso: Field) -> tuple[Field, np.ndarray]:
    """HU of air, skin, fat, muscle, lungs and heart, and the room for abdominal organs."""
    x, y, z = place
    hu = np.full(torso.shape, AIR, np.float32)
    hu[torso < 1] = FAT
    hu[(torso < 1) & (torso > 0.975)] = MUSCLE - 20  # skin
    hu[(torso < 0.90) & (torso > 0.83)] = MUSCLE
    # back muscles beside the spine
    hu[_ellipsoid(place, np.array([42, -82, 0]), np.array([34, 24, 1e4])) < 1] = MUSCLE
    hu[_ellipsoid(place, np.array([-42, -82, 0]), np.array([34, 24, 1e4])) < 1] = MUSCLE
    cavity = torso < 0.83
    # the domes of the diaphragm: high in the middle of each side, low along the chest wall
    dome = 168 - 95 * (torso / 0.83) ** 4 - 0.25 * np.maximum(-y, 0)
    mediastinum = (x / 36) ** 2 + ((y + 12) / 48) ** 2 < 1
    lungs = cavity & (z > dome) & ~mediastinum
    hu[lungs] = LUNG
    hu[cavity & (_ellipsoid(place, np.array([-22, 32, 205]), np.array([62, 48, 46])) < 1)] = HEART
    return hu, cavity & ~lungs


def _bones(hu: Field, place: Place, torso: Field) -> Field:
    """Add vertebrae with their discs, and ribs."""
    x, y, z = place
    body = np.sqrt((x / 23) ** 2 + ((y + 58) / 19) ** 2)
    disc = np.mod(z, 36) > 29
    hu = np.where(body < 1, np.where(disc, MUSCLE + 30, np.where(body > 0.85, CORTEX, MARROW)), hu)
    arch = np.sqrt((x / 9) ** 2 + ((y + 88) / 13) ** 2)
    hu = np.where((arch < 1) & ~disc, CORTEX - 120, hu)
    ribs = (torso > 0.85) & (torso < 0.90) & (z > 30) & (np.mod(z + 0.35 * y, 27) < 9)
    return np.where(ribs, np.float32(CORTEX - 60), hu).astype(np.float32)


def _ellipsoid(place: Place, middle: np.ndarray, half: np.ndarray) -> Field:
    """Distance from the middle in half axes: below 1 inside."""
    return np.sqrt(sum(((c - np.float32(m)) / np.float32(h)) ** 2 for c, m, h in zip(place, middle, half, strict=True)))


def _organ(abdomen: Abdomen, name: str, place: Place, voxel: np.ndarray) -> Field:
    """Level of an organ: below 1 inside."""
    shift, scale = abdomen.shifts[name], abdomen.sizes[name]
    if name in ELLIPSOIDS:
        levels = [
            _ellipsoid(place, np.array(middle) + shift, np.maximum(np.array(half) * scale, FINEST * voxel))
            for middle, half in ELLIPSOIDS[name]
        ]
        return np.minimum.reduce(levels)
    points, radius = TUBES[name]
    # a tube is stretched along an axis of coarse voxels, or its slanted parts would break up
    half = np.maximum(radius * scale, FINEST * voxel)
    return _tube(place, (np.array(points) + shift) / half, half)


def _tube(place: Place, points: np.ndarray, half: np.ndarray) -> Field:
    """Distance from a line through the points, all in units of `half`."""
    unit = [c / np.float32(h) for c, h in zip(place, half, strict=True)]
    nearest = np.full(np.broadcast_shapes(*(c.shape for c in unit)), np.inf, np.float32)
    for start, end in zip(points[:-1], points[1:], strict=True):
        along = (end - start).astype(np.float32)
        away = [c - np.float32(s) for c, s in zip(unit, start, strict=True)]
        share = np.clip(sum(a * d for a, d in zip(away, along, strict=True)) / np.dot(along, along), 0, 1)
        square = sum((a - share * d) ** 2 for a, d in zip(away, along, strict=True))
        nearest = np.minimum(nearest, square)
    return np.sqrt(nearest)


def _at_least_one(level: Field, height: Field) -> np.ndarray:
    """Voxels of level below 1, or the one of the lowest level among those that are labelled if there is none."""
    inside = level < 1
    low, high = LABELLED_Z
    within = (height > low) & (height < high)
    if not (inside & within).any() and within.any():
        inside.flat[np.argmin(np.where(within, level, np.inf))] = True
    return inside
