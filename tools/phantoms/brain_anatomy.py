# SPDX-License-Identifier: Apache-2.0
"""The subjects of the head phantom: what differs from one person to the next, and the smooth random fields for it.

Frame: millimetres from the middle of the cerebrum, x to the patient's right, y forwards, z up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Field", "Head", "Place", "Waves", "coordinates", "draw_head", "draw_waves"]

Field = np.ndarray  # float32 (X, Y, Z)
Place = tuple[Field, Field, Field]
SULCUS_WAVELENGTH = (13.0, 18.0)  # mm; gyri are a little narrower than half of it times sqrt(3)
RIPPLE = 0.9  # mm, size of the finer warp of what lies inside the skull


@dataclass(frozen=True)
class Waves:
    """Smooth random field of unit variance: a sum of plane waves. Wave vectors (K, 3) in rad/mm, phases (K,)."""

    vectors: np.ndarray
    phases: np.ndarray

    def on(self, axes: Sequence[np.ndarray]) -> Field:
        """Values on the grid of three axes in mm. A plane wave separates, so this is one matrix product."""
        x, y, z = (np.outer(self.vectors[:, i], axis) for i, axis in enumerate(axes))
        plane = np.exp(1j * (x[:, :, None] + y[:, None, :] + self.phases[:, None, None])).astype(np.complex64)
        plane = plane.reshape(len(plane), -1).T
        line = np.exp(1j * z).astype(np.complex64)
        values = plane.real @ line.real - plane.imag @ line.imag
        return (values * np.sqrt(2.0 / len(self.phases))).reshape([len(axis) for axis in axes]).astype(np.float32)


def draw_waves(rng: np.random.Generator, count: int, wavelength: tuple[float, float]) -> Waves:
    """Waves of random direction and phase, with wave lengths in mm drawn evenly from an interval."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = rng.uniform(*wavelength, size=(count, 1))
    return Waves(2 * np.pi / length * direction, rng.uniform(0, 2 * np.pi, size=count))


@dataclass(frozen=True)
class Head:
    """One subject; lengths in mm, pairs are (right, left).

    Attributes:
        half_axes: of the cerebrum. taper: by how much the brain is narrower in front than in the middle.
        shift: of the head in the picture. tilt: degrees about x, y and z.
        ventricles: widths relative to the drawing. nuclei: distances from the midline relative to the drawing.
        cortex: thickness. sulcus_width: half width. sulcus_depth: mean depth below the surface.
        torque: bend of the midline, mm per mm.
        csf, skull, scalp: thickness of the layers around the brain.
        warp, ripple: displacement of everything (`warp_size` mm) and of what lies inside the skull.
        folds: field whose zero set are the sulci. depth: of the sulci. layers: variation of the layers.
    """

    half_axes: tuple[float, float, float]
    taper: float
    shift: tuple[float, float, float]
    tilt: tuple[float, float, float]
    ventricles: tuple[float, float]
    nuclei: tuple[float, float]
    cortex: float
    sulcus_width: float
    sulcus_depth: float
    torque: float
    csf: float
    skull: float
    scalp: float
    warp: tuple[Waves, Waves, Waves]
    warp_size: float
    ripple: tuple[Waves, Waves, Waves]
    folds: Waves
    depth: Waves
    layers: Waves


def draw_head(rng: np.random.Generator) -> Head:
    """A random subject; atrophy widens ventricles and sulci together."""
    atrophy = float(rng.uniform(0, 1))
    size = rng.normal(1.0, 0.02)
    half_axes = (
        float(64.5 * size * np.clip(rng.normal(1, 0.02), 0.96, 1.04)),
        float(82.5 * size * np.clip(rng.normal(1, 0.02), 0.95, 1.05)),
        float(60.0 * size * np.clip(rng.normal(1, 0.02), 0.95, 1.05)),
    )
    ventricles = 0.75 + 0.65 * atrophy + rng.normal(0, 0.06)
    nuclei = rng.normal(1.0, 0.04)

    def pair(value: float, left: float, spread: float) -> tuple[float, float]:
        return float(value * rng.normal(1, spread)), float(value * left * rng.normal(1, spread))

    return Head(
        half_axes=half_axes,
        taper=float(rng.uniform(0.05, 0.12)),
        shift=tuple(rng.normal(0, (0.8, 1.5, 1.5)).tolist()),
        tilt=tuple(np.clip(rng.normal(0, (2.0, 1.2, 1.2)), -4, 4).tolist()),
        # the left ventricle is a little larger in most people
        ventricles=pair(max(ventricles, 0.65), 1.08, 0.04),
        nuclei=pair(nuclei, 1.01, 0.015),
        cortex=float(rng.uniform(2.5, 3.1)),
        sulcus_width=0.35 + 0.65 * atrophy,
        sulcus_depth=float(rng.uniform(13.0, 16.0)),
        # right frontal and left occipital lobes reach further across (Yakovlevian torque)
        torque=float(rng.normal(0.02, 0.006)),
        csf=1.5 + 1.5 * atrophy,
        skull=float(rng.uniform(4.5, 6.5)),
        scalp=float(rng.uniform(4.0, 6.5)),
        warp=(draw_waves(rng, 12, (55, 110)), draw_waves(rng, 12, (55, 110)), draw_waves(rng, 12, (55, 110))),
        warp_size=float(rng.uniform(0.8, 1.6)),
        ripple=(draw_waves(rng, 16, (20, 45)), draw_waves(rng, 16, (20, 45)), draw_waves(rng, 16, (20, 45))),
        folds=draw_waves(rng, 64, SULCUS_WAVELENGTH),
        depth=draw_waves(rng, 16, (25, 50)),
        layers=draw_waves(rng, 16, (25, 60)),
    )


def coordinates(head: Head, axes: Sequence[np.ndarray]) -> tuple[Place, Place]:
    """Anatomical coordinates of the voxels: shift, tilt (degrees about x, y, z), torque and a smooth random warp.

    Returns:
        (x, y, z) for skull and scalp, and the same with a finer warp for what lies inside.
    """
    a, b, c = np.radians(head.tilt)
    turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    rotation = (turn_z @ turn_y @ turn_x).astype(np.float32)
    grid = np.meshgrid(*(axis.astype(np.float32) - m for axis, m in zip(axes, head.shift, strict=True)), indexing="ij")
    x, y, z = (
        sum(rotation[i, j] * grid[j] for j in range(3)) + np.float32(head.warp_size) * head.warp[i].on(axes)
        for i in range(3)
    )
    # the midline bends to the left in front and to the right behind
    x = x + np.float32(head.torque) * y * np.exp(-((x / 25) ** 2))
    inner = [value + np.float32(RIPPLE) * wave.on(axes) for value, wave in zip((x, y, z), head.ripple, strict=True)]
    return (x, y, z), (inner[0], inner[1], inner[2])
