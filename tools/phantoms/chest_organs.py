# SPDX-License-Identifier: Apache-2.0
"""Organs of the chest phantom: path length of each along parallel rays, in closed form.

Ellipsoids, tubes and superellipsoids, evaluated on the pixel grid; nothing is supersampled, edges are softened over
about one pixel instead. All functions return float arrays (H, W) in cm unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.phantoms.chest_anatomy import Anatomy

SIGN = {"left": 1.0, "right": -1.0}  # patient's side -> x


@dataclass(frozen=True)
class Film:
    """Pixel grid seen from the body frame: x, y in cm, (H, W) float32; `pixel` is the pixel size in cm."""

    x: np.ndarray
    y: np.ndarray
    pixel: float


def sigmoid(distance: np.ndarray, width: float) -> np.ndarray:
    """Soft step from 0 to 1 over a few `width` around distance 0 (cm); tanh form, which cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * distance / width))


def ellipsoid(film: Film, x: float, y: float, a: float, b: float, depth: float, angle: float = 0.0) -> np.ndarray:
    """Path through an ellipsoid with semi-axes a, b in the film plane and `depth` cm through its middle."""
    c, s = np.cos(angle), np.sin(angle)
    dx, dy = film.x - x, film.y - y
    q = ((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2
    return depth * np.sqrt(np.clip(1.0 - q, 0.0, None))


def body(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Soft tissue path of trunk, neck and shoulders, cm."""
    ax = np.abs(film.x)
    half_width = anatomy.body_half_width + 8.0 * sigmoid(-(film.y + 6.5), 1.1)
    trunk = np.sqrt(np.clip(1.0 - (ax / half_width) ** 4, 0.0, None))
    slope = np.clip(ax - 5.0, 0.0, None)
    shoulder = anatomy.shoulder_y + 0.12 * slope + 0.018 * slope**2 - 8.0 * sigmoid(5.0 - ax, 0.5)
    top = np.sqrt(np.clip((film.y - shoulder) / 4.0, 0.0, 1.0))
    taper = 0.68 + 0.32 * sigmoid(film.y + 11.0, 1.6)
    return anatomy.thickness * trunk * top * taper


def cavity(
    anatomy: Anatomy, film: Film, side: str, *, top_gap: float = 0.0, side_gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """One half of the thoracic cavity, before the diaphragm cuts it.

    Returns:
        Path in cm, and the implicit outline (1 on the outline, smaller inside), both (H, W). The gaps (cm) move
        apex and lateral wall inwards: the outline of a collapsed lung.
    """
    xs = film.x * SIGN[side] - 5.0
    lateral = np.clip(xs, 0.0, None) / (anatomy.thorax_half_width - side_gap - 5.0)
    medial = np.clip(-xs, 0.0, None) / (5.0 - anatomy.mediastinum_half_width)
    above = np.clip(anatomy.widest_y - film.y, 0.0, None) / (anatomy.widest_y - anatomy.apex_y - top_gap)
    outline = lateral**2 * (1.0 + 0.2 * lateral**2) / 1.2 + medial**4 + above**1.8
    depth = 0.80 * anatomy.thickness * np.sqrt(np.clip(1.0 - outline, 0.0, None))
    return depth, outline


def dome(anatomy: Anatomy, film: Film, side: str) -> np.ndarray:
    """Level of the hemidiaphragm at each x, cm."""
    xs = film.x * SIGN[side]
    lateral = np.clip(xs - 6.0, 0.0, None) / (anatomy.thorax_half_width - 6.0)
    medial = np.clip(6.0 - xs, 0.0, None) / 4.0
    return anatomy.dome_y[side] + anatomy.dome_drop * lateral**2.4 + 0.8 * medial**2


def above_diaphragm(anatomy: Anatomy, film: Film, side: str) -> np.ndarray:
    """Share of the cavity that is lung: 1 above the dome, a fading rest (posterior recess) below it."""
    below = film.y - dome(anatomy, film, side)
    recess = 0.16 * np.exp(-np.clip(below, 0.0, None) / 1.6)
    return recess + (1.0 - recess) * sigmoid(-below, max(0.10, 0.4 * film.pixel))


def heart(anatomy: Anatomy, film: Film, ratio: float) -> np.ndarray:
    """Tilted ellipsoid on the left dome whose horizontal extent is exactly `ratio` x the inner thoracic width."""
    half_width = ratio * anatomy.thorax_half_width
    c, s, e = np.cos(anatomy.heart_angle), np.sin(anatomy.heart_angle), anatomy.heart_elongation
    short = half_width / np.hypot(e * c, s)
    # an enlarged heart widens more than it grows upwards; stretching y leaves the width as it is
    stretch = (anatomy.heart_ratio / ratio) ** 0.8
    half_height = short * np.hypot(e * s, c) * stretch
    # an enlarged heart also bulges to the right, else its apex would leave the chest
    share = anatomy.heart_right_share + 0.25 * (ratio - anatomy.heart_ratio)
    x = half_width * (1.0 - 2.0 * share)
    y = anatomy.dome_y["left"] + 1.2 - half_height
    flat = Film(film.x, (film.y - y) / stretch, film.pixel)
    return ellipsoid(flat, x, 0.0, e * short, short, 12.5, anatomy.heart_angle)


def mediastinum(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Aortic knob and descending aorta, pulmonary trunk, superior vena cava, hila: soft tissue in the lung."""
    w, knob = anatomy.mediastinum_half_width, anatomy.aortic_knob_radius
    parts = (
        (w + 0.2, -6.2, knob, knob, 9.0),
        (w - 0.6, 0.0, 1.3, 8.5, 4.0),
        (w + 0.1, -2.6, 1.9, 2.3, 8.0),
        (-w + 0.2, -5.0, 0.9, 7.0, 7.0),
        (3.8, -1.9, 1.5, 2.3, 4.0),
        (-3.7, -0.9, 1.6, 2.6, 4.5),
    )
    return sum((ellipsoid(film, *part) for part in parts), np.zeros_like(film.x))


def bones(anatomy: Anatomy, film: Film, inside: np.ndarray) -> np.ndarray:
    """Path through ribs, clavicles, scapulae and spine, cm of bone."""
    x, y, ax = film.x, film.y, np.abs(film.x)
    radius = max(anatomy.rib_radius, 0.9 * film.pixel)
    bones = np.zeros_like(x)
    for level in anatomy.rib_y:
        above = max(anatomy.widest_y - level, 0.0) / (anatomy.widest_y - anatomy.apex_y)
        reach = 5.3 + (anatomy.thorax_half_width - 5.0) * np.sqrt(1.0 - above**1.8)
        dy = y - level
        for height, gain, end in ((anatomy.rib_rise, 1.0, 1.6), (anatomy.rib_fall, 0.75, 0.5 * reach)):
            half = dy <= 0 if gain == 1.0 else dy > 0
            r = np.sqrt((ax / reach) ** 2 + (dy / height) ** 2) + 1e-6
            slope = np.hypot(ax / reach**2, dy / height**2) / r + 1e-6
            distance = (r - 1.0) / slope
            tube = np.sqrt(np.clip(radius**2 - distance**2, 0.0, None))
            bones += 2.0 * gain * tube * half * sigmoid(ax - end, 0.5)
    lateral = np.clip(ax - 1.5, 0.0, None)
    axis = anatomy.clavicle_y - anatomy.clavicle_tilt * lateral + 0.45 * np.sin(lateral * 2 * np.pi / 12.5)
    collar = np.sqrt(np.clip(0.62**2 - (y - axis) ** 2, 0.0, None))
    bones += 2.2 * collar * sigmoid(ax - 1.5, 0.2) * sigmoid(14.0 - ax, 0.2)
    for sign in (-1.0, 1.0):
        bones += ellipsoid(film, sign * 14.2, -8.6, 2.3, 6.0, 0.7, sign * 0.28)
        bones += ellipsoid(film, sign * 17.2, -12.6, 2.4, 2.4, 1.6)
    column = np.sqrt(np.clip(1.0 - (x / anatomy.spine_half_width) ** 4, 0.0, None))
    disc = np.cos(2 * np.pi * y / anatomy.vertebra_height)
    bones += 1.7 * column * (1.0 - 0.28 * np.clip(disc, 0.0, None) ** 2)
    return bones * inside


def airways(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Air path in trachea and main bronchi, cm."""
    x, carina = anatomy.trachea_x, -4.6
    trachea = tube(film, (x, -20.0, x, carina), 0.85)
    bronchi = [tube(film, (x, carina, x + dx, carina + 2.6), 0.6) for dx in (-2.2, 2.6)]
    return np.maximum(trachea, np.maximum(*bronchi))


def stomach_bubble(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Air path in the stomach, under the left dome."""
    a, b = anatomy.stomach_bubble
    return ellipsoid(film, 6.4, anatomy.dome_y["left"] + 1.0 + b, a, b, 5.0)


def tube(film: Film, ends: tuple[float, float, float, float], radius: float) -> np.ndarray:
    """Path through a round tube between two points; a tube thinner than a pixel keeps its area, not its width."""
    x0, y0, x1, y1 = ends
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((film.x - x0) * dx + (film.y - y0) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    squared = (film.x - x0 - along * dx) ** 2 + (film.y - y0 - along * dy) ** 2
    drawn = max(radius, 0.75 * film.pixel)
    return 2.0 * (radius / drawn) ** 2 * np.sqrt(np.clip(drawn**2 - squared, 0.0, None))


def vessels(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Path through the pulmonary vessels, cm; each tube is drawn only in the window of the film that it can touch."""
    total = np.zeros_like(film.x)
    size = len(total)
    corner = np.array([film.x[0, 0], film.y[0, 0]])
    right = np.array([film.x[0, -1] - corner[0], film.y[0, -1] - corner[1]])
    right, norm = right / np.linalg.norm(right), np.linalg.norm(right) / (size - 1)
    down = np.array([-right[1], right[0]])
    for x0, y0, x1, y1, radius in anatomy.vessels:
        ends = np.array([[x0, y0], [x1, y1]]) - corner
        columns, rows, margin = ends @ right / norm, ends @ down / norm, radius / norm + 2
        window = tuple(slice(max(int(v.min() - margin), 0), max(int(v.max() + margin) + 1, 0)) for v in (rows, columns))
        part = Film(film.x[window], film.y[window], film.pixel)
        np.maximum(total[window], tube(part, (x0, y0, x1, y1), radius), out=total[window])
    return total


def texture(anatomy: Anatomy, film: Film) -> np.ndarray:
    """Faint interstitial pattern, relative change of the lung's density; mean 0, about 4 %."""
    waves = [np.cos(np.float32(kx) * film.x + np.float32(ky) * film.y + phase) for kx, ky, phase in anatomy.texture]
    return np.asarray(0.04 * np.sum(waves, axis=0) / np.sqrt(len(waves)))
