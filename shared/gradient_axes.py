# SPDX-License-Identifier: Apache-2.0
"""Whether the axes of a gradient table are those of the volumes: flipped or exchanged axes break fibres apart.

Features that do not depend on the rotation never notice, so a data set may carry wrong axes for years; whatever uses
directions (tractography, dispersion along an axis, direction channels next to another scanner's) does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from shared.diffusion_features import TensorFit, masked_signal
from shared.gradients import GradientTable

_FA_RANGE = (0.2, 0.95)  # fibres; above are noise and rims of the mask
_MIN_VOXELS = 200  # with fibres; fewer decide nothing
_STEP = 2.0  # voxels from a voxel along its fibre; a single one hardly leaves a bundle
_MARGIN = 1.15  # how many times more coherent an arrangement must be; a real crop of brain has 1.24 to the second best
_MIN_Z = 4.0  # standard errors over blocks that the difference must be: 24 are compared, and blocks are not independent
_BLOCK = 5  # voxels per axis of a block
# Directions have no sign: flipping all three axes, or two instead of the third, changes nothing.
_SIGNS = ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1))
_ARRANGEMENTS = {
    ", ".join(f"{'-' if sign < 0 else ''}{'xyz'[axis]}" for axis, sign in zip(axes, signs, strict=True)): (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in _SIGNS
}
GIVEN = "x, y, z"


@dataclass(frozen=True)
class AxesCheck:
    """Result of `check_axes`.

    Attributes:
        scores: fibre coherence per arrangement, 24 of them. `"y, -x, z"` means: the new x is the y of the table, the
            new y its x with the sign changed.
        best: the arrangement with the highest score.
        clearly_wrong: another arrangement than the given one is better beyond doubt.
        clearly_right: the given one is better than all others beyond doubt.
        voxels: with fibres, on which this rests.
        reason: why it is undecided; empty where it is clear.
    """

    scores: dict[str, float]
    best: str
    clearly_wrong: bool
    clearly_right: bool
    voxels: int
    reason: str

    @property
    def given_score(self) -> float:
        """Coherence with the table as it is."""
        return self.scores[GIVEN]

    @property
    def best_score(self) -> float:
        """Coherence with the best arrangement."""
        return self.scores[self.best]

    def corrected(self, table: GradientTable) -> GradientTable:
        """The table in the best arrangement."""
        return rearranged(table, self.best)


def rearranged(table: GradientTable, arrangement: str) -> GradientTable:
    """A table with exchanged and flipped axes.

    Args:
        table: as it is.
        arrangement: such as `"y, -x, z"`, a key of `AxesCheck.scores`.
    """
    axes, signs = _ARRANGEMENTS[arrangement]
    return GradientTable(table.bvals, table.bvecs[:, axes] * signs)


def check_axes(signal: np.ndarray, table: GradientTable, mask: np.ndarray, *, affine: np.ndarray) -> AxesCheck:
    """Compare how coherent fibres are with the table as it is and with its axes flipped and exchanged.

    After Schilling et al. (2019): whoever follows the fibre of a voxel should find fibres that point the same way. Two
    voxels ahead and two behind each voxel with fibres (FA of 0.2 to 0.95), the score adds the squared cosine between
    the direction there and here, both weighted by FA. Their index looks at the 26 neighbours instead, whose lattice
    favours some directions, the more so in anisotropic voxels: interpolation does not. A thick straight bundle cannot
    tell arrangements apart, thin and curving ones do. The doubt comes from the scatter between blocks of the volume.

    Args:
        signal: (X, Y, Z, N), voxel axes in the order of the file, to which the table belongs.
        table: of the N volumes, in the convention of FSL.
        mask: (X, Y, Z) bool, brain.
        affine: (4, 4), voxel indices to mm in RAS+, for the voxel size and the convention: FSL mirrors x where the
            determinant is positive.

    Raises:
        ValueError: see `RotationInvariantFeatures`: shapes, NaN or b0 inside the mask, too few directions for a tensor.
    """
    fa = np.zeros(mask.shape)
    fibres = np.zeros((*mask.shape, 3))
    tensor = TensorFit(table)
    for where, values in masked_signal(signal, table, mask):
        fa[where], fibres[where] = tensor.directions(values)
    fa[(fa < _FA_RANGE[0]) | (fa > _FA_RANGE[1])] = 0
    blocks = _scores_per_block(fa, fibres, np.asarray(affine, float)[:3, :3])
    voxels = int((fa > 0).sum())
    total = blocks.sum(1) / max(float((fa**2).sum()), 1e-9)
    scores = dict(zip(_ARRANGEMENTS, total.tolist(), strict=True))
    names = list(scores)
    best, second = sorted(names, key=lambda name: -scores[name])[:2]
    wins = _is_clear(blocks[names.index(best)], blocks[names.index(GIVEN if best != GIVEN else second)])
    reason = ""
    if voxels < _MIN_VOXELS:
        reason = f"too few voxels with fibres: {voxels}, expected at least {_MIN_VOXELS}"
    elif not wins:
        rival = f"the given one has {scores[GIVEN]:.3f}" if best != GIVEN else f"{second} has {scores[second]:.3f}"
        reason = f"no clear winner: {best} has {scores[best]:.3f}, {rival}"
    return AxesCheck(scores, best, best != GIVEN and not reason, best == GIVEN and not reason, voxels, reason)


def _is_clear(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the sum over blocks of the first is larger by the margin, and by more than the blocks scatter."""
    difference = (first - second)[(first != 0) | (second != 0)]
    if len(difference) < 2 or first.sum() < _MARGIN * second.sum():
        return False
    error = float(np.std(difference, ddof=1) * np.sqrt(len(difference)))
    return bool(difference.sum() > _MIN_Z * error)


def _scores_per_block(fa: np.ndarray, fibres: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Coherence of each arrangement, (24, number of blocks), summed over the voxels of a block."""
    size = np.linalg.norm(axes, axis=0)
    mirror = np.array([-1.0 if np.linalg.det(axes) > 0 else 1.0, 1.0, 1.0])  # from the frame of the table, and back
    where = np.nonzero(fa)
    here = fibres[where]
    counts = tuple(-(-n // _BLOCK) for n in fa.shape)
    block = np.asarray(np.ravel_multi_index(tuple(axis // _BLOCK for axis in where), counts))
    # FA times the square of the direction: a line has no sign, so vectors cannot be interpolated
    squares = {(a, b): fa * fibres[..., a] * fibres[..., b] for a in range(3) for b in range(a, 3)}
    result = np.empty((len(_ARRANGEMENTS), int(np.prod(counts))))
    for row, (order, signs) in zip(result, _ARRANGEMENTS.values(), strict=True):
        step = _STEP * size.mean() * mirror * here[:, order] * signs / size
        found = np.zeros(len(here))
        for points in (np.asarray(where) + step.T, np.asarray(where) - step.T):
            for (a, b), square in squares.items():
                there = ndimage.map_coordinates(square, points, order=1)  # zero beyond the edge
                found += (1 if a == b else 2) * there * here[:, a] * here[:, b]
        row[:] = np.bincount(block, weights=fa[where] * found / 2, minlength=result.shape[1])
    return result
