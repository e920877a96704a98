# SPDX-License-Identifier: Apache-2.0
"""Anatomy and findings of the chest phantom: who is imaged, and what is wrong.

Body frame: centimetres, origin in the middle of the film, x to the image's right (the PATIENT's left, as films are
hung), y downwards. `side` is always the patient's side: "left" lies at x > 0.
Proportions (thoracic width 25-28 cm, cardiothoracic ratio below 0.5, right dome above the left, left hilum above the
right) are textbook values for an adult PA film, rounded; they are not fitted to any data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.transforms.labels import FINDINGS as FINDINGS

SEVERITIES = ("small", "large")
SIDES = ("left", "right")
ZONES = ("upper", "mid", "lower")

# cardiothoracic ratio by severity; 0.5 is the usual limit of normal
NORMAL_RATIO = (0.42, 0.49)
ENLARGED_RATIO = {"small": (0.58, 0.62), "large": (0.65, 0.70)}


@dataclass(frozen=True)
class Finding:
    """What one study shows; text and picture are both made from it, so that they cannot disagree.

    Attributes:
        name: one of `FINDINGS`.
        severity: "small" or "large"; "none" for no_finding.
        side: patient's side "left" | "right"; None for no_finding and cardiomegaly.
        zone: "upper" | "mid" | "lower" for an opacity, else None.

    Raises:
        ValueError: a value that is unknown or does not go with the name.
    """

    name: str
    severity: str
    side: str | None = None
    zone: str | None = None

    def __post_init__(self) -> None:
        severities, sides, zones = _legal(self.name)
        for key, value, legal in (
            ("severity", self.severity, severities),
            ("side", self.side, sides),
            ("zone", self.zone, zones),
        ):
            if value not in legal:
                raise ValueError(f"{key}: expected {' or '.join(map(str, legal))} for {self.name}, got {value!r}")


def _legal(name: str) -> tuple[tuple[str, ...], tuple[str | None, ...], tuple[str | None, ...]]:
    """Severities, sides and zones that a finding can have."""
    if name not in FINDINGS:
        raise ValueError(f"finding: expected one of {', '.join(FINDINGS)}, got {name!r}")
    sides: tuple[str | None, ...] = (name.split("_")[0],) if name.startswith(("left_", "right_")) else (None,)
    if name == "pneumothorax":
        sides = SIDES
    return ("none",) if name == "no_finding" else SEVERITIES, sides, ZONES if name.endswith("opacity") else (None,)


@dataclass(frozen=True)
class Anatomy:
    """One patient; lengths in cm in the body frame, angles in radians. Constant over the patient's studies."""

    rotation: float  # in-plane tilt of the body, positive clockwise on the film
    magnification: float  # size of the whole body on the film
    thickness: float  # front-to-back soft tissue path in the middle of the chest
    body_half_width: float
    shoulder_y: float  # top of the shoulder beside the neck
    thorax_half_width: float  # midline to inner chest wall at the widest level
    apex_y: float
    widest_y: float  # level of the largest inner thoracic width
    dome_y: dict[str, float]  # top of each hemidiaphragm
    dome_drop: float  # from the dome's top to the costophrenic angle
    heart_ratio: float  # cardiothoracic ratio when healthy
    heart_angle: float
    heart_elongation: float
    heart_right_share: float  # part of the cardiac width right of the midline
    aortic_knob_radius: float
    mediastinum_half_width: float
    rib_y: np.ndarray  # (10,) level at which each rib meets the lateral chest wall
    rib_rise: float  # from there up to the spine
    rib_fall: float  # from there down to the anterior end
    rib_radius: float
    bone_density: float  # factor on the attenuation of bone
    clavicle_y: float
    clavicle_tilt: float
    spine_half_width: float
    vertebra_height: float
    trachea_x: float
    stomach_bubble: tuple[float, float]  # half width and half height
    vessels: np.ndarray  # (K, 5): x0, y0, x1, y1, radius
    texture: np.ndarray  # (M, 3): wave vector (rad/cm) and phase


def draw_finding(name: str, *, severity: str, rng: np.random.Generator) -> Finding:
    """Complete a finding: the side of a pneumothorax and the zone of an opacity are drawn at random.

    Args:
        name: one of `FINDINGS`.
        severity: "small" or "large"; ignored for no_finding.
        rng: draws side and zone.

    Raises:
        ValueError: unknown name or severity.
    """
    _, sides, zones = _legal(name)
    side, zone = sides[int(rng.integers(len(sides)))], zones[int(rng.integers(len(zones)))]
    return Finding(name, "none" if name == "no_finding" else severity, side, zone)


def draw_patient(rng: np.random.Generator) -> Anatomy:
    """Draw one patient's anatomy.

    Args:
        rng: source of all randomness.
    """
    u = rng.uniform
    right_dome = u(6.4, 8.0)
    apex_y, spacing = u(-14.4, -13.2), u(2.25, 2.5)
    return Anatomy(
        rotation=np.deg2rad(u(-2.5, 2.5)),
        magnification=u(0.95, 1.05),
        thickness=u(19.0, 22.5),
        body_half_width=u(15.9, 17.0),
        shoulder_y=u(-17.3, -16.3),
        thorax_half_width=u(12.3, 14.1),
        apex_y=apex_y,
        widest_y=u(4.0, 5.5),
        dome_y={"right": right_dome, "left": right_dome + u(0.8, 1.8)},
        dome_drop=u(3.4, 4.4),
        heart_ratio=u(*NORMAL_RATIO),
        heart_angle=np.deg2rad(u(20, 32)),
        heart_elongation=u(1.25, 1.45),
        heart_right_share=u(0.29, 0.34),
        aortic_knob_radius=u(1.5, 2.0),
        mediastinum_half_width=u(2.2, 2.8),
        rib_y=apex_y + 3.4 + spacing * np.arange(10),
        rib_rise=u(2.8, 3.6),
        rib_fall=u(3.6, 4.6),
        rib_radius=u(0.48, 0.60),
        bone_density=u(0.85, 1.15),
        clavicle_y=u(-10.8, -9.6),
        clavicle_tilt=u(0.16, 0.30),
        spine_half_width=u(1.6, 1.9),
        vertebra_height=u(2.2, 2.6),
        trachea_x=u(-0.5, 0.1),
        stomach_bubble=(u(2.0, 3.2), u(0.9, 1.4)),
        vessels=np.concatenate([_vessel_tree(side, rng) for side in (-1, 1)]),
        texture=np.stack([rng.normal(0, 2.0, 10), rng.normal(0, 2.0, 10), u(0, 2 * np.pi, 10)], axis=1),
    )


def _vessel_tree(sign: int, rng: np.random.Generator) -> np.ndarray:
    """Pulmonary vessels of one lung: six branches fan out from the hilum, each dividing twice. (42, 5)."""
    hilum = (sign * 3.4, -1.9 if sign > 0 else -0.9)
    segments: list[tuple[float, ...]] = []

    def grow(start: tuple[float, float], angle: float, length: float, radius: float, generation: int) -> None:
        end = (start[0] + sign * length * np.cos(angle), start[1] + length * np.sin(angle))
        segments.append((*start, *end, radius))
        if generation < 2:
            for turn in (-1, 1):
                fork = angle + turn * rng.uniform(0.2, 0.5)
                grow(end, fork, length * rng.uniform(0.65, 0.9), radius * 0.68, generation + 1)

    for direction in np.deg2rad([-75, -42, -8, 22, 48, 72]):
        grow(hilum, direction + rng.normal(0, 0.08), rng.uniform(3.2, 4.6), rng.uniform(0.36, 0.48), 0)
    return np.array(segments)


def cardiothoracic_ratio(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> float:
    """Cardiac width over the largest inner thoracic width: the patient's own, or enlarged by cardiomegaly."""
    if finding.name != "cardiomegaly":
        return anatomy.heart_ratio
    return float(rng.uniform(*ENLARGED_RATIO[finding.severity]))
