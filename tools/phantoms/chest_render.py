# SPDX-License-Identifier: Apache-2.0
"""Radiograph of the chest phantom: attenuation integrated along parallel rays through analytic organs.

Beer-Lambert: the detector sees N = N0 exp(-p), p = sum over tissues of (attenuation coefficient x path length). The
film shows log(N0 / N), windowed, hence bright bone and dark lung. One effective energy, parallel rays, no scatter.
"""

from __future__ import annotations

import numpy as np

from tools.phantoms import chest_organs as organs
from tools.phantoms.chest_anatomy import Anatomy, Finding, cardiothoracic_ratio
from tools.phantoms.chest_organs import SIGN, Film, sigmoid

FIELD_OF_VIEW = 36.0  # cm, side of the square film
# 1/cm at about 60 keV: water-like tissue, aerated lung (density 0.3), and what spongy bone adds to soft tissue
MU_SOFT, MU_LUNG, MU_BONE = 0.205, 0.060, 0.26
WINDOW = (0.75, 5.1)  # line integrals shown as black and white
PHOTONS = 1.0e6  # per pixel before the body; sigma of p is exp(p / 2) / sqrt(N0), at most about 1 % of the window
ELECTRONIC_NOISE = 0.003  # standard deviation, fraction of the display range
# centre (cm lateral of the midline, level between apex 0 and dome 1) of an opacity
ZONE_CENTRE = {"upper": (7.2, 0.27), "mid": (8.0, 0.54), "lower": (8.2, 0.80)}
OPACITY_RADIUS = {"small": 2.3, "large": 4.2}


def render(anatomy: Anatomy, finding: Finding, *, size: int = 128, rng: np.random.Generator) -> np.ndarray:
    """Expose one film.

    Two calls with generators in the same state share position, exposure and noise whatever the finding is, so that
    their difference is the finding alone.

    Args:
        anatomy: the patient.
        finding: what the study shows.
        size: side of the film in pixels, at least 32.
        rng: source of position, exposure, the finding's shape, and noise.

    Returns:
        float32 (size, size) in [0, 1], row-major, 0 = air; the patient's right is on the image's left.

    Raises:
        ValueError: size below 32.
    """
    if size < 32:
        raise ValueError(f"size: expected at least 32 pixels, got {size}; the ribs vanish below that")
    position_rng, shape_rng, noise_rng = rng.spawn(3)
    film = _position(anatomy, size, position_rng)
    exposure = position_rng.uniform(-0.12, 0.12), position_rng.uniform(0.97, 1.03)
    p = _blur(line_integral(anatomy, finding, film, shape_rng))

    p = p + noise_rng.standard_normal(p.shape, dtype=np.float32) * np.exp(0.5 * p) / np.sqrt(PHOTONS)
    low, high = WINDOW
    shown = (p + exposure[0] - low) / ((high - low) * exposure[1])
    shown = shown + ELECTRONIC_NOISE * noise_rng.standard_normal(p.shape, dtype=np.float32)
    return np.clip(shown, 0.0, 1.0).astype(np.float32)


def _position(anatomy: Anatomy, size: int, rng: np.random.Generator) -> Film:
    pixel = FIELD_OF_VIEW / size
    axis = ((np.arange(size) + 0.5) * pixel - FIELD_OF_VIEW / 2).astype(np.float32)
    x, y = axis[None, :] - rng.uniform(-0.4, 0.4), axis[:, None] - rng.uniform(-0.5, 0.5)
    angle = anatomy.rotation + np.deg2rad(rng.uniform(-0.7, 0.7))
    c, s = np.float32(np.cos(angle) / anatomy.magnification), np.float32(np.sin(angle) / anatomy.magnification)
    return Film(c * x + s * y, c * y - s * x, pixel / anatomy.magnification)


def line_integral(anatomy: Anatomy, finding: Finding, film: Film, rng: np.random.Generator) -> np.ndarray:
    """Attenuation along each ray, dimensionless, float32 (H, W)."""
    ratio = cardiothoracic_ratio(anatomy, finding, rng)
    body = organs.body(anatomy, film)
    solid = organs.heart(anatomy, film, ratio) + organs.mediastinum(anatomy, film)
    p = MU_SOFT * body
    texture, vessels = organs.texture(anatomy, film), organs.vessels(anatomy, film)
    for side in ("right", "left"):
        cavity = np.clip(
            organs.cavity(anatomy, film, side)[0] * organs.above_diaphragm(anatomy, film, side) - solid, 0.0, None
        )
        lung, line, mu_lung = cavity, np.zeros_like(cavity), MU_LUNG
        if finding.side == side and finding.name == "pneumothorax":
            lung, line = _collapse(anatomy, film, finding, cavity, rng)
            mu_lung *= {"small": 1.2, "large": 1.4}[finding.severity]
        elif finding.side == side:
            lung = cavity * (1.0 - _consolidation(anatomy, film, finding, rng))
            cavity = lung
        aerated = np.clip(lung / 8.0, 0.0, 1.0) * (film.x * SIGN[side] > 0)  # vessels are seen against air only
        p = p - MU_SOFT * cavity + mu_lung * lung * (1.0 + texture)
        p = p + (MU_SOFT - MU_LUNG) * vessels * aerated + line
    p = p + MU_BONE * anatomy.bone_density * organs.bones(anatomy, film, body > 0)
    return (p - MU_SOFT * (organs.airways(anatomy, film) + organs.stomach_bubble(anatomy, film))).clip(0.0, None)


def _collapse(
    anatomy: Anatomy, film: Film, finding: Finding, cavity: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Lung that has come off the chest wall: its path, and the attenuation of the pleural line along its border."""
    side = str(finding.side)
    top, lateral = {"small": (4.0, 2.8), "large": (5.8, 5.2)}[finding.severity]
    scale = rng.uniform(0.92, 1.08)
    depth, outline = organs.cavity(anatomy, film, side, top_gap=top * scale, side_gap=lateral * scale)
    slope = np.maximum(np.hypot(*np.gradient(outline)) / film.pixel, 1e-3)
    distance = (outline - 1.0) / slope
    width = max(0.13, 0.7 * film.pixel)
    lateral_border = sigmoid(film.x * SIGN[side] - 4.2, 0.4)
    inside = np.clip(cavity / 2.0, 0.0, 1.0) * lateral_border
    line = 0.42 * np.exp(-((distance / width) ** 2)) * inside
    return np.minimum(cavity, depth + cavity * (1.0 - lateral_border)), line


def _consolidation(anatomy: Anatomy, film: Film, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    """Share of the lung's air replaced by fluid, in [0, 1]: pleural effusion or opacity."""
    side = str(finding.side)
    xs = film.x * SIGN[side]
    if finding.name.endswith("pleural_effusion"):
        wall = anatomy.dome_y[side] + anatomy.dome_drop - rng.uniform(6.0, 6.8)
        if finding.severity == "large":
            wall = rng.uniform(-2.4, -0.8)
        fall = {"small": 6.5, "large": 4.0}[finding.severity]
        # the meniscus: low in the middle, climbing steeply along the chest wall
        meniscus = wall + fall * (1.0 - np.clip(xs / anatomy.thorax_half_width, 0.0, 1.0) ** 3)
        return 0.95 * sigmoid(film.y - meniscus, 0.28)
    lateral, level = ZONE_CENTRE[str(finding.zone)]
    y = anatomy.apex_y + level * (anatomy.dome_y[side] - anatomy.apex_y) + rng.uniform(-0.6, 0.6)
    lateral += rng.uniform(-0.6, 0.6)
    radius = OPACITY_RADIUS[finding.severity] * rng.uniform(0.92, 1.08)
    total = np.zeros_like(xs)
    for turn in rng.uniform(0, 2 * np.pi) + 2 * np.pi / 4 * np.arange(4):  # four overlapping patches: ragged outline
        r = radius * rng.uniform(0.62, 0.85)
        dx, dy = 0.42 * radius * np.cos(turn), 0.42 * radius * np.sin(turn)
        total = total + np.exp(-(((xs - lateral - dx) ** 2 + (film.y - y - dy) ** 2) / r**2))
    return 0.85 * (1.0 - np.exp(-1.3 * total)) * sigmoid(xs - 2.0, 0.2)


def _blur(image: np.ndarray) -> np.ndarray:
    """Detector unsharpness: 1-2-1 along both axes, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if axis == a else (0, 0) for a in (0, 1)], mode="edge")
        n = image.shape[axis]
        before, after = padded.take(range(n), axis), padded.take(range(2, n + 2), axis)
        image = 0.25 * before + 0.5 * image + 0.25 * after
    return image
