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
_BLOCK = 5  # voxels per axis of a block
# Every condition below has to hold before an arrangement is said to be better than another.
_MARGIN = 1.15  # how many times more coherent; a real crop of brain has 1.24 to the second best
_MIN_Z = 4.0  # standard errors over blocks that the difference must be: 24 are compared, and blocks are not independent
_MIN_LINES = (
    3.5  # of 13, among which the difference is spread: a plane of fibres has 4 at most, a curving bundle 4 to 6
)
_MIN_AGREEMENT = 0.99  # of the rival's: right axes gain in real brain (1.03) and lose 0.8 % at most by a bundle's bends
# Directions have no sign: flipping all three axes, or two instead of the third, changes nothing.
_SIGNS = ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1))
_ARRANGEMENTS = {
    ", ".join(f"{'-' if sign < 0 else ''}{'xyz'[axis]}" for axis, sign in zip(axes, signs, strict=True)): (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in _SIGNS
}
GIVEN = "x, y, z"
# Lines to the 26 neighbours of a voxel. Flips and exchanges of the axes turn them into each other.
_LINES = np.array([line for line in itertools.product((1, 0, -1), repeat=3) if line > (0, 0, 0)], float)
_LINES /= np.linalg.norm(_LINES, axis=1, keepdims=True)


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


@dataclass(frozen=True)
class _Coherence:
    """What speaks for each of the 24 arrangements.

    Attributes:
        blocks: (24, number of blocks), the score summed over the voxels of a block.
        lines: (24, 13), the score summed over the voxels whose fibre is nearest to one of `_LINES`.
        agreement: (24,), mean squared cosine with the fibres found; steps that leave the fibres do not count.
    """

    blocks: np.ndarray
    lines: np.ndarray
    agreement: np.ndarray

    def significance(self, first: int, second: int) -> float:
        """Difference of two scores, in standard errors over the blocks that have fibres."""
        difference = (self.blocks[first] - self.blocks[second])[(self.blocks[first] + self.blocks[second]) != 0]
        if len(difference) < 2:
            return 0.0
        error = float(np.std(difference, ddof=1) * np.sqrt(len(difference)))
        return float(difference.sum()) / max(error, 1e-9)

    def doubt(self, first: int, second: int) -> str:
        """Why the first is not beyond doubt better than the second; empty if it is."""
        ratio = self.blocks[first].sum() / max(float(self.blocks[second].sum()), 1e-9)
        if ratio < _MARGIN:
            return f"less than {_MARGIN} times as much"
        if (z := self.significance(first, second)) < _MIN_Z:
            return f"a difference of {z:.1f} standard errors, expected at least {_MIN_Z:g}"
        difference = self.lines[first] - self.lines[second]
        spread = float(difference.sum() ** 2 / max(float((difference**2).sum()), 1e-9))
        if spread < _MIN_LINES:
            return f"the fibres that tell them apart run along {spread:.1f} of 13 lines, expected {_MIN_LINES} or more"
        if (agreement := self.agreement[first] / self.agreement[second]) < _MIN_AGREEMENT:
            return f"its fibres agree {1 - agreement:.1%} less"
        return ""


def check_axes(signal: np.ndarray, table: GradientTable, mask: np.ndarray, *, affine: np.ndarray) -> AxesCheck:
    """Compare how coherent fibres are with the table as it is and with its axes flipped and exchanged.

    After Schilling et al. (2019): whoever follows the fibre of a voxel should find fibres that point the same way. Two
    voxels ahead and two behind each voxel with fibres (FA of 0.2 to 0.95), the score adds the squared cosine between
    the direction there and here, both weighted by FA. Their index looks at the 26 neighbours instead, whose lattice
    favours some directions, the more so in anisotropic voxels: interpolation does not.

    Both are sums: besides agreement they count whether there are fibres at all where one arrives. Nearly all that they
    know comes from there (the agreement alone is about 1 for every arrangement of a smooth field, and lowest for the
    right one of rings): bundles are long and thin, so right directions stay inside. Where fibres end at a border that
    runs across them (slabs, fans, the phantoms' white matter below the cortex), the same is an error of geometry, not
    of the table. So a table is called wrong only if another arrangement is better by a margin, by more than the scatter
    between blocks of the volume, for fibres of many directions (one border speaks for those that cross it), and without
    losing agreement; and if that arrangement is significantly better than all others, so that the remedy is known. A
    good data set that is refused costs more than a flip that is missed.

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
    coherence = _measure(fa, fibres, np.asarray(affine, float)[:3, :3])
    voxels = int((fa > 0).sum())
    total = coherence.blocks.sum(1) / max(float((fa**2).sum()), 1e-9)
    names = list(_ARRANGEMENTS)
    scores = dict(zip(names, total.tolist(), strict=True))
    best, second = sorted(names, key=lambda name: (-scores[name], name != GIVEN))[:2]
    rival = GIVEN if best != GIVEN else second
    doubt = coherence.doubt(names.index(best), names.index(rival))
    if not doubt and (z := coherence.significance(names.index(best), names.index(second))) < _MIN_Z:
        doubt = f"{second} is as good: a difference of {z:.1f} standard errors, expected at least {_MIN_Z:g}"
    reason = ""
    if voxels < _MIN_VOXELS:
        reason = f"too few voxels with fibres: {voxels}, expected at least {_MIN_VOXELS}"
    elif doubt:
        other = "the given one" if best != GIVEN else second
        reason = f"no clear winner: {best} has {scores[best]:.3f}, {other} has {scores[rival]:.3f} ({doubt})"
    return AxesCheck(scores, best, best != GIVEN and not reason, best == GIVEN and not reason, voxels, reason)


def _measure(fa: np.ndarray, fibres: np.ndarray, axes: np.ndarray) -> _Coherence:
    """Coherence of each arrangement; FA (X, Y, Z) is zero where there are no fibres, `axes` (3, 3) are mm per voxel."""
    size = np.linalg.norm(axes, axis=0)
    mirror = np.array([-1.0 if np.linalg.det(axes) > 0 else 1.0, 1.0, 1.0])  # from the frame of the table, and back
    where = np.nonzero(fa)
    here, weight = fibres[where], fa[where]
    counts = tuple(-(-n // _BLOCK) for n in fa.shape)
    block = np.asarray(np.ravel_multi_index(tuple(axis // _BLOCK for axis in where), counts))
    line = np.abs(here @ _LINES.T).argmax(1)
    # FA times the square of the direction: a line has no sign, so vectors cannot be interpolated
    squares = {(a, b): fa * fibres[..., a] * fibres[..., b] for a in range(3) for b in range(a, 3)}
    blocks = np.empty((len(_ARRANGEMENTS), int(np.prod(counts))))
    lines = np.empty((len(_ARRANGEMENTS), len(_LINES)))
    agreement = np.empty(len(_ARRANGEMENTS))
    for row, (order, signs) in enumerate(_ARRANGEMENTS.values()):
        step = _STEP * size.mean() * mirror * here[:, order] * signs / size
        found, present = np.zeros(len(here)), np.zeros(len(here))
        for points in (np.asarray(where) + step.T, np.asarray(where) - step.T):
            for (a, b), square in squares.items():
                there = ndimage.map_coordinates(square, points, order=1)  # zero beyond the edge
                found += (1 if a == b else 2) * there * here[:, a] * here[:, b]
                if a == b:  # the three squares of a direction sum to its FA
                    present += there
        blocks[row] = np.bincount(block, weights=weight * found / 2, minlength=blocks.shape[1])
        lines[row] = np.bincount(line, weights=weight * found / 2, minlength=len(_LINES))
        agreement[row] = (weight * found).sum() / max(float((weight * present).sum()), 1e-9)
    return _Coherence(blocks, lines, agreement)
