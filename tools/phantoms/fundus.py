# SPDX-License-Identifier: Apache-2.0
"""Fundus phantom: the optic disc with its cup in the middle of a photograph of the retina; the mask is the cup.

Brightness alone does not give the cup: the rim of a pale disc, atrophy beside the disc, exudates and reflexes are as
bright. The cup is told by its place inside the disc, its paleness and the bend of the vessels at its border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.phantoms.picture_scenes import (
    Camera,
    Field,
    Outline,
    Ripples,
    draw_outline,
    draw_ripples,
    expose,
    pixels,
    ramp,
)

EMPTY_SHARE = 0.04  # of the pictures: beside the disc
LIMITS = (0.02, 0.30)  # of the picture: area of a cup that is shown


@dataclass(frozen=True)
class Vessel:
    """A vessel as a curve over y, from the middle of the disc up (`sense` -1) or down (1)."""

    sense: int
    start: float
    lean: float
    arch: float
    sway: tuple[float, float]
    width: float
    dark: float


@dataclass(frozen=True)
class Sequence:
    """What the photographs of one eye share; the scene's origin is the middle of the disc, `side` is temporal.

    Attributes:
        side: 1 if the temporal side is on the right, -1 on the left.
        disc, cup: outlines. retina, rim, pale: colours (3,) of retina, rim and cup.
        edge: softness of the cup's border. background: choroid. grain: nerve fibres and pigment.
        vessels: from large to small. atrophy: outline of a pale crescent beside the disc, or None.
        spots: bright exudates, (N, 3): x, y, radius. blur, noise: of the camera.
    """

    side: int
    disc: Outline
    cup: Outline
    retina: np.ndarray
    rim: np.ndarray
    pale: np.ndarray
    edge: float
    background: Ripples
    grain: Ripples
    vessels: tuple[Vessel, ...]
    atrophy: Outline | None
    spots: np.ndarray
    blur: float
    noise: float


def draw_sequence(rng: np.random.Generator) -> Sequence:
    """A random eye."""
    side = 1 if rng.random() < 0.5 else -1
    radius = rng.uniform(0.62, 0.82)
    ratio = rng.uniform(0.42, 0.78)  # of cup to disc, along a line
    free = (1 - ratio) * radius
    middle = (float(side * free * rng.uniform(0.0, 0.35)), float(free * rng.uniform(-0.25, 0.25)))
    rim = np.array([0.86, 0.52, 0.28]) * rng.normal(1, (0.04, 0.06, 0.10)).clip(0.8, 1.2)
    retina = np.array([0.66, 0.28, 0.12]) * rng.normal(1, (0.12, 0.15, 0.25)).clip(0.6, 1.4)
    atrophy = None
    if rng.random() < 0.6:
        atrophy = draw_outline(rng, (side * radius * rng.uniform(0.2, 0.35), 0.0), radius * 1.05, rough=0.05)
    vessels: list[Vessel] = []
    for sense in (-1, 1):
        for temporal in (1, 1, -1, -1, int(rng.choice([-1, 1]))):
            vein = len(vessels) % 2
            vessels.append(
                Vessel(
                    sense=sense,
                    start=float(rng.normal(-0.12 * side * radius, 0.08)),
                    lean=float(temporal * side * rng.uniform(0.0, 0.35)),
                    arch=float(temporal * side * rng.uniform(0.1, 0.5)),
                    sway=(float(rng.uniform(4, 8)), float(rng.uniform(0, 2 * np.pi))),
                    width=float(rng.uniform(0.022, 0.034) + 0.012 * vein),
                    dark=float(rng.uniform(0.28, 0.42) + 0.15 * vein),
                )
            )
    away = rng.uniform(0.95, 1.9, size=(rng.integers(0, 14), 1)) * radius
    turn = rng.uniform(0, 2 * np.pi, size=away.shape)
    return Sequence(
        side=side,
        disc=_upright(draw_outline(rng, (0.0, 0.0), radius, squeeze=1.0, rough=0.025), rng.uniform(0.9, 0.98)),
        cup=_upright(draw_outline(rng, middle, ratio * radius, squeeze=1.0, rough=0.05), rng.uniform(0.9, 1.05)),
        retina=retina,
        rim=rim,
        pale=rim * (1 + rng.uniform(0.7, 1.2) * np.array([0.10, 0.36, 0.70])),
        edge=float(rng.uniform(0.03, 0.07)),
        background=draw_ripples(rng, 16, (0.25, 1.2)),
        grain=draw_ripples(rng, 20, (0.06, 0.25)),
        vessels=tuple(vessels),
        atrophy=atrophy,
        spots=np.concatenate(
            [away * np.cos(turn), away * np.sin(turn), rng.uniform(0.02, 0.11, size=away.shape)], axis=1
        ),
        blur=float(rng.uniform(0.5, 1.1)),
        noise=float(rng.uniform(0.006, 0.018)),
    )


def _upright(outline: Outline, aspect: float) -> Outline:
    """The outline as a standing ellipse: discs and cups are a little taller than wide."""
    return Outline(outline.centre, outline.radius, aspect, 0.0, outline.weights, outline.phases)


def render(sequence: Sequence, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One photograph of an eye.

    Args:
        sequence: the eye.
        size: (H, W) in pixels.
        rng: source of gaze, flash and noise.

    Returns:
        uint8 (H, W, 3), and bool (H, W): the visible cup, either nothing or a share of the picture within `LIMITS`.
    """
    place, flash, grain = rng.spawn(3)
    camera, mask = _find_view(sequence, size, place)
    x, y = camera.see(size)
    picture = _paint(sequence, x, y)
    u, v = pixels(size)
    lean = flash.normal(0, 0.12, size=2)
    light = (1 + lean[0] * u + lean[1] * v) * (1.0 - 0.16 * (u**2 + v**2)) * flash.uniform(0.75, 1.05)
    white = flash.normal(1, (0.03, 0.06, 0.14)).clip(0.6, 1.4)
    # a reflex of the inner limiting membrane
    reflex_u, reflex_v = flash.uniform(-1, 1, size=2)
    reflex = 0.22 * flash.random() * np.exp(-(((u - reflex_u) / 0.5) ** 2 + ((v - reflex_v) / 0.35) ** 2))
    picture = picture * white * light[..., None] + reflex[..., None]
    return expose(picture, grain, blur=sequence.blur * min(size) / 128, noise=sequence.noise), mask


def _find_view(sequence: Sequence, size: tuple[int, int], rng: np.random.Generator) -> tuple[Camera, np.ndarray]:
    turn = float(rng.uniform(-0.12, 0.12))
    if rng.random() < EMPTY_SHARE:
        beside = (float(-sequence.side * rng.uniform(2.3, 2.7)), float(rng.uniform(-0.4, 0.4)))
        return Camera(beside, 1.0, turn), np.zeros(size, bool)
    reach = np.array([size[1], size[0]]) / min(size)
    for attempt in range(40):
        spread = 0.35 * 0.95**attempt
        centre = rng.uniform(-spread, spread, size=2) * reach
        camera = Camera((float(centre[0]), float(centre[1])), float(rng.uniform(0.85, 1.15)), turn)
        mask = sequence.cup.level(*camera.see(size)) < 1
        if LIMITS[0] < mask.mean() < LIMITS[1]:
            return camera, mask
    raise RuntimeError(f"fundus: no view of a cup of radius {sequence.cup.radius:.2f} within {LIMITS}")


def _paint(sequence: Sequence, x: Field, y: Field) -> np.ndarray:
    """Colour of the fundus, float (H, W, 3)."""
    background, grain = sequence.background.at(x, y), sequence.grain.at(x, y)
    colour = sequence.retina * (1 + (0.10 * background + 0.04 * grain)[..., None])
    for spot_x, spot_y, radius in sequence.spots:
        spot = ramp(radius - np.hypot(x - spot_x, y - spot_y), 0.012)
        colour = colour + 0.9 * spot[..., None] * (np.array([0.98, 0.88, 0.62]) - colour)
    disc, cup = sequence.disc.level(x, y), sequence.cup.level(x, y)
    if sequence.atrophy is not None:
        around = ramp(1 - sequence.atrophy.level(x, y), 0.03)
        patchy = (0.75 + 0.15 * grain) * around
        colour = colour + patchy[..., None] * (0.97 * sequence.pale - colour)
    # the rim is pink and darkens towards its border
    rim = sequence.rim * (1 + 0.03 * grain - 0.10 * ramp(disc - 0.85, 0.08))[..., None]
    colour = colour + ramp(1 - disc, 0.03)[..., None] * (rim - colour)
    inside = ramp(1 - cup, sequence.edge)
    pale = sequence.pale * (1 + 0.02 * grain)[..., None]
    colour = colour + inside[..., None] * (pale - colour)
    for vessel in sequence.vessels:
        colour = colour * (1 - _cover(sequence, vessel, x, y, inside)[..., None] * np.array([0.45, 1.0, 0.9]))
    return colour


def _cover(sequence: Sequence, vessel: Vessel, x: Field, y: Field, in_cup: Field) -> Field:
    """Darkening by a vessel, 0 to 1. In the cup it lies deep: displaced, fainter and thinner."""
    along = np.maximum(vessel.sense * y, 0)
    number, phase = vessel.sway
    middle = vessel.start + vessel.lean * along + vessel.arch * along**2
    middle = middle + 0.03 * np.sin(number * along + phase) - 0.07 * sequence.side * in_cup
    steep = np.sqrt(1 + (vessel.lean + 2 * vessel.arch * along) ** 2)
    width = vessel.width * (1 - 0.25 * np.minimum(along / 1.5, 1)) * (1 - 0.3 * in_cup)
    across = (x - middle) / (steep * width)
    beyond_start = ramp(vessel.sense * y, 0.03)
    return vessel.dark * np.exp(-(across**4)) * beyond_start * (1 - 0.45 * in_cup)
