# SPDX-License-Identifier: Apache-2.0
"""What coloured sample pictures share: a camera over a plane scene, smooth random fields on it, and the sensor.

Frame of a scene: x to the right, y down; seen at zoom 1, half of the picture's shorter side is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

Field = np.ndarray  # float32 (H, W)


@dataclass(frozen=True)
class Camera:
    """Where a picture looks: `centre` is where the scene's origin falls in the picture; `turn` is in radians."""

    centre: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    turn: float = 0.0

    def see(self, size: tuple[int, int]) -> tuple[Field, Field]:
        """Scene coordinates (x, y) of the pixel centres, each float32 (H, W)."""
        x, y = pixels(size)
        x, y = (x - np.float32(self.centre[0])) / self.zoom, (y - np.float32(self.centre[1])) / self.zoom
        c, s = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        return c * x - s * y, s * x + c * y


def pixels(size: tuple[int, int]) -> tuple[Field, Field]:
    """Picture coordinates (x, y) of the pixel centres: (1, W) and (H, 1), 0 in the middle, shorter side -1 to 1."""
    rows, columns = size
    half = np.float32(min(size) / 2)
    x = (np.arange(columns, dtype=np.float32) - (columns - 1) / 2) / half
    y = (np.arange(rows, dtype=np.float32) - (rows - 1) / 2) / half
    return x[None, :], y[:, None]


@dataclass(frozen=True)
class Ripples:
    """Smooth random field of unit variance on the plane: a sum of plane waves. Vectors (K, 2), phases (K,)."""

    vectors: np.ndarray
    phases: np.ndarray

    def at(self, x: Field, y: Field) -> Field:
        """Values at the points, float32 of their shape."""
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
        for (a, b), phase in zip(self.vectors.astype(np.float32), self.phases.astype(np.float32), strict=True):
            total += np.cos(a * x + b * y + phase)
        return total * np.float32(np.sqrt(2.0 / len(self.phases)))


def draw_ripples(rng: np.random.Generator, count: int, wavelength: tuple[float, float]) -> Ripples:
    """Waves of random direction and phase, with wave lengths drawn evenly from an interval."""
    angle = rng.uniform(0, 2 * np.pi, size=count)
    number = 2 * np.pi / rng.uniform(*wavelength, size=count)
    vectors = number[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Ripples(vectors, rng.uniform(0, 2 * np.pi, size=count))


@dataclass(frozen=True)
class Outline:
    """Closed smooth curve around `centre`: radius x (1 + harmonics 2, 3, ... of the angle), squeezed by `aspect`."""

    centre: tuple[float, float]
    radius: float
    aspect: float
    turn: float
    weights: tuple[float, ...]
    phases: tuple[float, ...]

    def level(self, x: Field, y: Field) -> Field:
        """Distance from the centre over the curve's distance in that direction: below 1 inside, 1 on the curve."""
        c, s = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        dx, dy = x - np.float32(self.centre[0]), y - np.float32(self.centre[1])
        u, v = (c * dx + s * dy) / self.aspect, (c * dy - s * dx) * self.aspect
        angle = np.arctan2(v, u)
        waves: Sequence[Field] = [
            w * np.cos(k * angle + phase)
            for k, (w, phase) in enumerate(zip(self.weights, self.phases, strict=True), start=2)
        ]
        return (np.hypot(u, v) / (self.radius * (1 + sum(waves)))).astype(np.float32)


def draw_outline(
    rng: np.random.Generator,
    centre: tuple[float, float],
    radius: float,
    *,
    squeeze: float = 1.25,
    rough: float = 0.07,
) -> Outline:
    """Random outline: aspect between 1/`squeeze` and `squeeze`, harmonics 2 to 5 of falling size `rough` * 2 / k."""
    orders = np.arange(2, 6)
    return Outline(
        centre=centre,
        radius=radius,
        aspect=float(np.exp(rng.uniform(-1, 1) * np.log(squeeze) / 2)),
        turn=float(rng.uniform(0, np.pi)),
        weights=tuple((rng.normal(0, rough, size=len(orders)).clip(-2 * rough, 2 * rough) * 2 / orders).tolist()),
        phases=tuple(rng.uniform(0, 2 * np.pi, size=len(orders)).tolist()),
    )


def ramp(values: Field, width: float) -> Field:
    """Smooth step from 0 (values well below 0) to 1, `width` being the distance from the middle to about 3/4."""
    return (1 / (1 + np.exp(np.clip(-values / np.float32(width), -30, 30)))).astype(np.float32)


def expose(picture: np.ndarray, rng: np.random.Generator, *, blur: float, noise: float) -> np.ndarray:
    """The sensor: unsharpness (`blur`, pixels), correlated and pixel noise (`noise`, share of the range), 8 bit.

    Args:
        picture: float (H, W, 3), 0 to 1 shown, clipped above.
        rng: source of the noise.
        blur: standard deviation in pixels.
        noise: standard deviation.

    Returns:
        uint8 (H, W, 3).
    """
    sharp = np.clip(picture, 0, 1).astype(np.float32)
    soft = gaussian_filter(sharp, (blur, blur, 0), mode="nearest")
    grain = rng.standard_normal(picture.shape, dtype=np.float32)
    grain = 0.6 * grain + 0.8 * 2 * gaussian_filter(grain, (0.8, 0.8, 0), mode="nearest")
    return np.rint(np.clip(soft + noise * grain, 0, 1) * 255).astype(np.uint8)
