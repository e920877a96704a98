# SPDX-License-Identifier: Apache-2.0
"""Endoscopy phantom: a polyp on the wall of the bowel, lit by a lamp at the camera.

The wall is a height field over the plane (folds around the lumen, ripples, the polyp's dome) whose slopes are shaded as
a matt surface under a wet film; colours and vessels are painted on it. Neither brightness nor hue alone marks a polyp:
polyps are redder or paler than the wall, the lumen and the shadows of folds are as dark as the shaded side of a polyp,
wet folds are as bright as its top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

LOOKS = ("raised", "flat", "hidden")  # flat: hardly above the wall; hidden: partly behind a fold
LOOK_SHARES = (0.6, 0.22, 0.18)
LIMITS = (0.02, 0.30)  # of the picture: area of a polyp that is shown
EMPTY_SHARE = 0.04  # of the pictures: no polyp in view
LAMP_HEIGHT = 1.7


@dataclass(frozen=True)
class Lip:
    """A fold seen from the side, in front of what lies behind it: all points with `beyond` > 0 belong to it."""

    direction: float  # radians, where its front side faces away from
    offset: float
    bend: float
    sway: tuple[float, float, float]  # size, wave number, phase

    def beyond(self, x: Field, y: Field) -> Field:
        c, s = np.float32(np.cos(self.direction)), np.float32(np.sin(self.direction))
        along, across = c * y - s * x, c * x + s * y
        size, number, phase = self.sway
        return across - self.offset - self.bend * along**2 - size * np.sin(number * along + phase)


@dataclass(frozen=True)
class Sequence:
    """What the pictures of one recording share. The polyp's middle is the scene's origin.

    Attributes:
        look: of `LOOKS`.
        outline: of the polyp. elevation: its height over its radius. tint: its colour relative to the wall (3,).
        surface, pattern: ripples of the polyp's surface and their contrast.
        wall: colour of the wall (3,). blotches, ripples, vessels: fields on it. vessel_contrast: 0 to 1.
        lumen: its middle. lumen_radius: of its dark part. folds: rings per unit of log radius, phase, height and two
            phases of their waviness.
        lips: folds in front; the first one hides a part of a `hidden` polyp.
        corners: distance of the black corners of the picture, larger is less; None shows the full frame.
        gain, blur, noise: of the camera.
    """

    look: str
    outline: Outline
    elevation: float
    tint: np.ndarray
    surface: Ripples
    pattern: float
    wall: np.ndarray
    blotches: Ripples
    ripples: Ripples
    vessels: Ripples
    vessel_contrast: float
    lumen: tuple[float, float]
    lumen_radius: float
    folds: tuple[float, float, float, float, float]
    lips: tuple[Lip, ...]
    corners: float | None
    gain: float
    blur: float
    noise: float


def draw_sequence(rng: np.random.Generator) -> Sequence:
    """A random recording."""
    look = LOOKS[rng.choice(len(LOOKS), p=LOOK_SHARES)]
    radius = float(np.exp(rng.uniform(np.log(0.30), np.log(0.62))))
    if look == "flat":
        tint = np.array([1.0, 0.76, 0.76]) if rng.random() < 0.5 else np.array([1.05, 1.20, 1.17])
    elif rng.random() < 0.6:
        tint = np.array([1.02, 0.72, 0.72]) * rng.uniform(0.9, 1.08)
    else:
        tint = np.array([1.06, 1.20, 1.16]) * rng.uniform(0.92, 1.04)
    lumen_angle, lumen_distance = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.6)
    lips = [_draw_lip(rng, radius * rng.uniform(0.15, 0.55))] if look == "hidden" else []
    if rng.random() < 0.4:
        lips.append(_draw_lip(rng, rng.uniform(1.25, 1.5) * radius + 0.1))
    return Sequence(
        look=look,
        outline=draw_outline(rng, (0.0, 0.0), radius, squeeze=1.7, rough=0.1),
        elevation=float(rng.uniform(0.10, 0.18) if look == "flat" else rng.uniform(0.45, 0.85)),
        tint=tint * rng.normal(1, 0.02, size=3),
        surface=draw_ripples(rng, 22, (0.09, 0.36)),
        pattern=float(rng.uniform(0.05, 0.10) if look == "flat" else rng.uniform(0.03, 0.08)),
        wall=np.array([0.80, 0.43, 0.33]) * rng.normal(1, (0.05, 0.09, 0.13)).clip(0.78, 1.22),
        blotches=draw_ripples(rng, 10, (0.6, 1.8)),
        ripples=draw_ripples(rng, 18, (0.14, 0.7)),
        vessels=draw_ripples(rng, 12, (0.45, 1.0)),
        vessel_contrast=float(rng.uniform(0.0, 1.0)),
        lumen=(float(lumen_distance * np.cos(lumen_angle)), float(lumen_distance * np.sin(lumen_angle))),
        lumen_radius=float(rng.uniform(0.25, 0.5)),
        folds=tuple(rng.uniform((1.2, 0, 0.05, 0, 0), (2.4, 2 * np.pi, 0.12, 2 * np.pi, 2 * np.pi)).tolist()),
        lips=tuple(lips),
        corners=float(rng.uniform(1.55, 1.8)) if rng.random() < 0.5 else None,
        gain=float(rng.uniform(0.9, 1.25)),
        blur=float(rng.uniform(0.4, 1.0)),
        noise=float(rng.uniform(0.006, 0.02)),
    )


def _draw_lip(rng: np.random.Generator, offset: float) -> Lip:
    sway = (float(rng.uniform(0.0, 0.05)), float(rng.uniform(2.0, 5.0)), float(rng.uniform(0, 2 * np.pi)))
    return Lip(float(rng.uniform(0, 2 * np.pi)), float(offset), float(rng.uniform(-0.15, 0.25)), sway)


def render(sequence: Sequence, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture of a recording: the camera has moved, the lamp and the noise have changed.

    Args:
        sequence: the recording.
        size: (H, W) in pixels.
        rng: source of the camera's place, whether the polyp is in view, and the noise.

    Returns:
        uint8 (H, W, 3), and bool (H, W): the visible part of the polyp, either nothing or a share within `LIMITS`.
    """
    place, light, grain = rng.spawn(3)
    with_polyp = place.random() >= EMPTY_SHARE
    camera, mask = _find_view(sequence, size, place)
    if not with_polyp:
        mask = np.zeros_like(mask)
        sequence = replace(sequence, lips=sequence.lips[1:] if sequence.look == "hidden" else sequence.lips)
    picture = _shade(sequence, camera, size, with_polyp, light)
    if sequence.corners is not None:
        picture = picture * (1 - _corners(sequence.corners, size)).clip(0.02)[..., None]
    scale = min(size) / 128  # the optics, not the pixels, limit the sharpness
    return expose(picture, grain, blur=sequence.blur * scale, noise=sequence.noise), mask


def _corners(distance: float, size: tuple[int, int]) -> Field:
    """1 in the black corners of the frame, which the housing of the lens cuts off."""
    x, y = pixels(size)
    reach = max(size) / min(size) - 1
    return ramp(np.abs(x) + np.abs(y) - np.float32(distance + reach), 0.01)


def _find_view(sequence: Sequence, size: tuple[int, int], rng: np.random.Generator) -> tuple[Camera, np.ndarray]:
    """A camera that shows a polyp of a size within `LIMITS`, and the polyp's visible part."""
    turn, far = float(rng.uniform(-0.5, 0.5)), rng.random() < 0.15
    reach = np.array([size[1], size[0]]) / min(size)
    for attempt in range(40):
        # later tries look more and more at the middle, so that one succeeds
        spread = (0.95 if far else 0.62) * 0.95**attempt
        place = rng.uniform(-spread, spread, size=2) * reach
        camera = Camera((float(place[0]), float(place[1])), float(rng.uniform(0.72, 1.35)), turn)
        mask = _visible(sequence, *camera.see(size))
        if sequence.corners is not None:
            mask &= _corners(sequence.corners, size) < 0.5
        if LIMITS[0] < mask.mean() < LIMITS[1]:
            return camera, mask
    raise RuntimeError(f"polyps: no view of an outline of radius {sequence.outline.radius:.2f} within {LIMITS}")


def _visible(sequence: Sequence, x: Field, y: Field) -> np.ndarray:
    mask = sequence.outline.level(x, y) < 1
    for lip in sequence.lips:
        mask &= lip.beyond(x, y) <= 0
    return mask


def _shade(
    sequence: Sequence, camera: Camera, size: tuple[int, int], with_polyp: bool, rng: np.random.Generator
) -> np.ndarray:
    """Light that reaches the camera, float (H, W, 3)."""
    x, y = camera.see(size)
    step = np.float32(2 / (min(size) * camera.zoom))
    height, ring = _wall_height(sequence, x, y)
    ripples = sequence.ripples.at(x, y)
    height = height + 0.006 * ripples
    blotches = sequence.blotches.at(x, y)
    hue = np.stack([0.02 * blotches, -0.06 * blotches, -0.05 * blotches], axis=-1)
    wall = sequence.wall * (1 + hue)
    lines = np.exp(-((sequence.vessels.at(x, y) / 0.07) ** 2)) * ramp(blotches, 0.5) * sequence.vessel_contrast
    colour = wall * (1 - lines[..., None] * np.array([0.12, 0.34, 0.30]))
    shadow = np.ones_like(height)
    if with_polyp:
        level = sequence.outline.level(x, y)
        edge = max(0.7 * float(step) / sequence.outline.radius, 0.02)
        inside = ramp(1 - level, edge)
        surface = sequence.surface.at(x, y)
        skin = wall * sequence.tint * (1 + sequence.pattern * surface[..., None])
        colour = colour + inside[..., None] * (skin - colour)
        tall = sequence.elevation * sequence.outline.radius
        dome = (np.clip(1 - level**2, 0, None) + 0.02) ** 0.7 - 0.02**0.7
        height = height + inside * (tall * dome + 0.04 * sequence.pattern * surface)
        # a groove around the base, deeper for a taller polyp
        shadow *= 1 - min(0.6 * sequence.elevation, 0.3) * np.exp(-(((level - 1.04) / 0.08) ** 2))
    for lip in sequence.lips:
        beyond = lip.beyond(x, y)
        front = ramp(beyond, float(step) * 0.6)
        # what lies behind is in the lip's shadow; the lip itself is bare wall that rounds off at its edge
        shadow = shadow * (1 - front) * (1 - 0.5 * np.exp(np.minimum(beyond, 0) / 0.10)) + front
        colour = colour + front[..., None] * (wall - colour)
        over = 0.18 * (1 - np.exp(-np.maximum(beyond, 0) / 0.12)) + 0.006 * ripples
        height = height + front * (over - height)
    return _light(sequence, colour, height, ripples, shadow * ring, step, rng)


def _wall_height(sequence: Sequence, x: Field, y: Field) -> tuple[Field, Field]:
    """Height of the bare wall, and the light left by the depth of the lumen and the creases behind its folds."""
    rings, phase, tall, wave_a, wave_b = sequence.folds
    dx, dy = x - np.float32(sequence.lumen[0]), y - np.float32(sequence.lumen[1])
    away, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    waviness = 0.13 * np.sin(2 * angle + wave_a) + 0.10 * np.sin(3 * angle + wave_b)
    turns = 2 * np.pi * rings * (np.log(away + 0.3) + waviness) + phase
    ridge = (0.5 + 0.5 * np.cos(turns + 0.5 * np.sin(turns))) ** 3
    crease = (0.5 + 0.5 * np.cos(turns + 1.3)) ** 6
    depth = ramp(away - np.float32(sequence.lumen_radius), 0.12)
    height = tall * ridge * away / (away + 0.4)
    return height.astype(np.float32), ((0.08 + 0.92 * depth) * (1 - 0.38 * crease)).astype(np.float32)


def _light(
    sequence: Sequence,
    colour: np.ndarray,
    height: Field,
    ripples: Field,
    open_to_light: Field,
    step: np.float32,
    rng: np.random.Generator,
) -> np.ndarray:
    """Matt shading by the lamp, its fall-off, and reflexes of the wet film, which ripples more than the wall."""
    u, v = pixels((height.shape[0], height.shape[1]))
    # the lamp sits beside the lens, hence near the middle of the picture
    lamp_u, lamp_v = rng.normal(0, 0.35, size=2)
    to_lamp = np.broadcast_arrays(lamp_u - u, lamp_v - v, np.float32(LAMP_HEIGHT) - height)
    length = np.sqrt(sum(part**2 for part in to_lamp))

    def facing(field: Field, towards: list[Field]) -> Field:
        down, right = np.gradient(field, step)
        size_of = np.sqrt(right**2 + down**2 + 1)
        return (towards[2] - right * towards[0] - down * towards[1]) / size_of

    lamp = [part / length for part in to_lamp]
    matt = np.clip(facing(height, lamp), 0, None)
    # halfway between the directions to the lamp and to the lens, which stands above the middle of the picture
    half = [towards + part for towards, part in zip(lamp, _to_lens(u, v), strict=True)]
    half_length = np.sqrt(sum(part**2 for part in half))
    wet = np.clip(facing(height + 0.004 * ripples, [part / half_length for part in half]), 0, None)
    reflex = ramp(wet ** rng.uniform(40, 90) - np.float32(0.86), 0.03) * rng.uniform(0.6, 1.0)
    fall = (LAMP_HEIGHT / length) ** 2.4
    white = np.array([1.0, 1.0, 1.0]) * rng.normal(1, (0.01, 0.02, 0.03))
    gain = sequence.gain * rng.uniform(0.92, 1.08)
    lit = gain * white * colour * ((0.15 + 0.9 * matt) * fall * open_to_light)[..., None]
    return lit + 0.75 * (reflex * open_to_light)[..., None]


def _to_lens(u: Field, v: Field) -> list[Field]:
    """Unit vectors from the plane to the lens."""
    length = np.sqrt(u**2 + v**2 + LAMP_HEIGHT**2)
    return [-u / length, -v / length, LAMP_HEIGHT / length]
