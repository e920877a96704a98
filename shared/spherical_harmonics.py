# SPDX-License-Identifier: Apache-2.0
"""Real symmetric spherical harmonics (dipy's) fitted to one shell of a diffusion-weighted series."""

from __future__ import annotations

import numpy as np
from dipy.core.geometry import cart2sphere
from dipy.reconst.shm import real_sh_descoteaux

MAX_ORDER = 8  # of a fit; at b = 3000 the power of order 10 is below 1e-3 of b0
_SMOOTHNESS = 1e-4  # weight of the Laplace-Beltrami penalty per direction; holds what uneven directions leave open
_SMALLEST_MODE = 1e-2  # of a basis, relative to the largest: below it, the directions do not determine the order


def _basis(directions: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Real symmetric spherical harmonics at the directions, (n, K), and the order l of each, (K,)."""
    _, theta, phi = cart2sphere(*directions.T)
    basis, _, orders = real_sh_descoteaux(order, theta, phi, legacy=False)
    return basis, np.asarray(orders)


def is_determined(directions: np.ndarray, order: int) -> bool:
    """Whether the directions suffice for all harmonics up to an order: enough of them, and not in one plane or so."""
    basis, _ = _basis(directions, order)
    if len(basis) < basis.shape[1]:
        return False
    modes = np.linalg.svd(basis, compute_uv=False)
    return bool(modes[-1] > _SMALLEST_MODE * modes[0])


class ShellFit:
    """Least squares fit of the harmonics of even order to one shell.

    The order of the fit grows with the number of directions, so that what lies beyond the wanted order does not fold
    into it. The penalty is relative to the number of directions: tables of different length shrink alike.

    Args:
        directions: (n, 3) unit vectors of the shell.
        indices: (n,) positions of its volumes in the series of N.
        order: the largest that is wanted.

    Attributes:
        freedom: degrees of freedom that the fit leaves, n minus the number of harmonics.
    """

    def __init__(self, directions: np.ndarray, *, indices: np.ndarray, order: int) -> None:
        for higher in range(order + 2, MAX_ORDER + 1, 2):
            if len(directions) >= 0.75 * (higher + 1) * (higher + 2) and is_determined(directions, higher):
                order = higher
        self._basis, self._orders = _basis(directions, order)
        weight = _SMOOTHNESS * len(directions) / (4 * np.pi)
        penalty = weight * np.diag((self._orders * (self._orders + 1.0)) ** 2)
        self._projection = np.linalg.solve(self._basis.T @ self._basis + penalty, self._basis.T).T
        self._indices = indices
        self.freedom = len(directions) - len(self._orders)

    def fit(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Harmonics (v, K) of the signal (v, N), and the sum of squares (v,) that they leave."""
        shell = values[:, self._indices]
        harmonics = shell @ self._projection
        return harmonics, ((shell - harmonics @ self._basis.T) ** 2).sum(1)

    @staticmethod
    def mean(harmonics: np.ndarray) -> np.ndarray:
        """Spherical mean (v,)."""
        return harmonics[:, 0] / np.sqrt(4 * np.pi)

    def strengths(self, harmonics: np.ndarray, orders: tuple[int, ...], *, variance: np.ndarray) -> np.ndarray:
        """Twice the root mean square over the sphere of the part of each order, (v, len(orders)).

        Parallel sticks reach 0.7. Noise adds to the power of an order what it adds to that of its harmonics, the more
        the fewer directions there are; that expectation is taken off.

        Args:
            harmonics: from `fit`.
            orders: up to the order of the fit.
            variance: (v,) of the noise of one volume; 0 takes nothing off.
        """
        columns = np.empty((len(harmonics), len(orders)))
        for column, order in zip(columns.T, orders, strict=True):
            of_order = self._orders == order
            noise = variance * (self._projection[:, of_order] ** 2).sum()
            column[:] = np.sqrt(np.maximum((harmonics[:, of_order] ** 2).sum(1) - noise, 0) / np.pi)
        return columns
