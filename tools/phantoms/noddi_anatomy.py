# SPDX-License-Identifier: Apache-2.0
"""True NODDI maps of a phantom brain: NDI, ODI, FWF, fibre directions and the signal without diffusion weighting.

The head is that of `brain_tissues`. Where the grid is coarser than `FINE` mm of the drawing per voxel, cortex and gyri
grow with the voxels, so that the cortex stays 2 to 3 voxels thick: a small grid shows a simpler brain, not a blurred
one.

NDI and ODI have no meaning in free water. Convention here: both go smoothly to 0 as FWF goes from 0.7 to 1, so that the
three maps agree on where there is no tissue; all maps are 0 outside of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_erosion

from tools.phantoms.brain_anatomy import Field, Head, Waves, coordinates, draw_head, draw_waves
from tools.phantoms.brain_lesions import add_lesions
from tools.phantoms.brain_signal import TISSUES
from tools.phantoms.brain_tissues import tissue_maps
from tools.phantoms.noddi_bundles import draw_fibres
from tools.phantoms.noddi_signal import equivalent_odi

__all__ = ["NoddiMaps", "draw_maps"]

FINE = 1.25  # mm
EXTENT = (141.0, 181.0, 141.0)  # mm of the drawing that a grid shows: cerebrum, cerebellum, upper brain stem
MIDDLE = (0.0, 0.8, -3.5)
GRAIN = 0.01  # deviation of the texture from voxel to voxel
WATER_ONLY = 0.3  # share of tissue below which NDI and ODI fade
# NDI, ODI, FWF of tissues and their signal at b = 0 relative to white matter (T2-weighted; fat is suppressed).
_TISSUE = {
    "grey": (0.40, 0.54, 0.08, 1.15),
    "white": (0.58, 0.0, 0.04, 1.0),  # ODI comes from the bundles
    "deep": (0.46, 0.40, 0.05, 0.9),
    "lesion": (0.34, 0.12, 0.22, 1.35),
}
_OTHER_B0 = {"csf": 2.3, "muscle": 0.25, "fat": 0.08, "bone": 0.03, "air": 0.0}
_NAMES = tuple(TISSUES)


@dataclass(frozen=True)
class NoddiMaps:
    """Truth on the high-resolution grid, float32 (X, Y, Z) unless said otherwise.

    Attributes:
        ndi, odi, fwf: in [0, 1], 0 outside of the mask; `odi` in crossings is `noddi_signal.equivalent_odi`.
        mask: boolean, the brain with the water in its sulci.
        b0: signal without diffusion weighting, 1 in white matter, > 0 also outside of the mask.
        first, second: unit directions (3, X, Y, Z) of the bundles relative to the voxel axes.
        share: of the second bundle, 0 to 0.5. bundle_odi: dispersion of each bundle.
        density: NDI before fading. water: FWF also outside of the mask. lesions: boolean.
    """

    ndi: Field
    odi: Field
    fwf: Field
    mask: np.ndarray
    b0: Field
    first: np.ndarray
    second: np.ndarray
    share: Field
    bundle_odi: Field
    density: Field
    water: Field
    lesions: np.ndarray


def draw_maps(shape: Sequence[int], rng: np.random.Generator, *, lesions: bool = False) -> NoddiMaps:
    """A random brain that fills a grid.

    Args:
        shape: voxels along right, front and up.
        rng: draws everything of the subject.
        lesions: whether some white matter is damaged (NDI lower, FWF higher).
    """
    body, fibre_rng, spots, texture = rng.spawn(4)
    step = max(extent / count for extent, count in zip(EXTENT, shape, strict=True))
    axes = [(np.arange(count) - (count - 1) / 2) * step + m for count, m in zip(shape, MIDDLE, strict=True)]
    head = _coarsen(draw_head(body), max(step / FINE, 1.0))
    tissues = tissue_maps(head, axes)
    damaged = np.zeros(tuple(shape), dtype=bool)
    if lesions:
        tissues, found = add_lesions(tissues, axes, spots)
        damaged = found.astype(bool)
    _, point = coordinates(head, axes)
    fibres = draw_fibres(point, fibre_rng)
    first, second = (_to_voxel_axes(vectors, point) for vectors in (fibres.first, fibres.second))

    fraction = dict(zip(_NAMES, tissues.fractions, strict=True))
    solid = sum(fraction[name] for name in _TISSUE)
    wet = solid + fraction["csf"]
    safe = np.maximum(solid, 1e-3)
    level = {name: texture.normal(1, 0.04, 3) for name in _TISSUE}  # people differ
    slow, quick = ([draw_waves(texture, 24, band).on(axes) for _ in range(3)] for band in ((35, 90), (8, 24)))
    fields = []
    for index, (spread, quick_spread) in enumerate(((0.030, 0.022), (0.035, 0.03), (0.015, 0.012))):
        mean = sum(fraction[name] * np.float32(_TISSUE[name][index] * level[name][index]) for name in _TISSUE) / safe
        field = mean + np.float32(spread) * slow[index] + np.float32(quick_spread) * quick[index]
        fields.append(field + np.float32(GRAIN) * texture.standard_normal(tuple(shape), dtype=np.float32))
    density, dispersion, water = fields
    matter = (fraction["white"] + fraction["lesion"]) / safe
    density = np.clip(density + matter * (fibres.density - 0.02), 0.02, 0.95)
    # dispersion of the voxel's own bundles; they cross in white matter only
    share = np.where(matter > 0.5, fibres.share, 0).astype(np.float32)
    bundle_odi = np.clip(dispersion + matter * fibres.odi, 0.03, 0.95).astype(np.float32)
    # free water within the tissue is never negative: the texture's low side is folded up
    own = np.abs(water)
    water = np.clip((solid * own + fraction["csf"]) / np.maximum(wet, 1e-3), 0, 1).astype(np.float32)

    mask = tissues.brain & (wet > 0.5)
    # the rim of the mask is tissue, as a brain extraction leaves it; the water around the brain is not in it
    mask &= binary_erosion(mask) | (water < 0.5)
    odi = np.zeros(tuple(shape), dtype=np.float32)
    odi[mask] = equivalent_odi(bundle_odi[mask], first[:, mask].T, second[:, mask].T, share[mask])
    fade = np.clip((1 - water) / WATER_ONLY, 0, 1)
    fade = fade * fade * (3 - 2 * fade) * mask
    b0 = sum(fraction[name] * np.float32(values[3]) for name, values in _TISSUE.items())
    b0 = b0 + sum(fraction[name] * np.float32(value) for name, value in _OTHER_B0.items())
    b0 = b0 * np.exp(np.float32(0.08) * np.clip(draw_waves(texture, 6, (150, 350)).on(axes), -2, 2))
    return NoddiMaps(
        ndi=(density * fade).astype(np.float32),
        odi=(odi * fade).astype(np.float32),
        fwf=(water * mask).astype(np.float32),
        mask=mask,
        b0=b0.astype(np.float32),
        first=first,
        second=second,
        share=share,
        bundle_odi=bundle_odi,
        density=density.astype(np.float32),
        water=water,
        lesions=damaged,
    )


def _coarsen(head: Head, factor: float) -> Head:
    """The same person with cortex and gyri larger by a factor >= 1."""
    return replace(
        head,
        cortex=head.cortex * factor**1.15,
        # the room that the thicker cortex needs
        sulcus_width=head.sulcus_width / factor,
        sulcus_depth=head.sulcus_depth * factor**-0.15,
        folds=Waves(head.folds.vectors / factor, head.folds.phases),
        depth=Waves(head.depth.vectors / factor, head.depth.phases),
    )


def _to_voxel_axes(vectors: np.ndarray, point: Sequence[Field]) -> np.ndarray:
    """Directions of the anatomical frame along the axes of the grid: by the inverse Jacobian of tilt, torque, warp."""
    jacobian = np.stack([np.stack(np.gradient(part)) for part in point])  # d point_i / d voxel_j
    turned = np.linalg.solve(np.moveaxis(jacobian, (0, 1), (-2, -1)), np.moveaxis(vectors, 0, -1)[..., None])[..., 0]
    turned /= np.maximum(np.linalg.norm(turned, axis=-1, keepdims=True), 1e-9)
    return np.ascontiguousarray(np.moveaxis(turned, -1, 0).astype(np.float32))
