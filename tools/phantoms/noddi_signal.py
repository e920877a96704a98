# SPDX-License-Identifier: Apache-2.0
"""Signal of the NODDI tissue model (Zhang et al., NeuroImage 2012;61:1000): neurites, space around them, free water.

S / S0 = (1 - FWF) (NDI A_ic + (1 - NDI) A_ec) + FWF exp(-b d_iso)

- A_ic: sticks of diffusivity d_par, their directions n distributed around mu by Watson's exp(kappa (n . mu)^2).
- A_ec: one tensor, the mean of the tortuous tensors along the sticks, d_perp = d_par (1 - NDI). The paper writes the
  mean of diffusivities, not of signals, and the NODDI toolbox computes it so; the maps one trains on mean this model.
- ODI = 2 / pi arctan(1 / kappa).

The sticks' signal is a convolution on the sphere, so by Funk and Hecke each Legendre order of the kernel
exp(-b d_par t^2) is multiplied by w_l(kappa) = <P_l(n . mu)>: exact up to the order at which the kernel has ended, for
any number of voxels at the cost of a few multiplications per order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.polynomial import legendre

__all__ = [
    "D_ISO",
    "D_PAR",
    "equivalent_odi",
    "kappa_of_odi",
    "noddi_signal",
    "odi_of_kappa",
    "stick_coefficients",
    "watson_orders",
]

D_PAR = 1.7e-3  # mm2/s, along neurites, fixed in vivo (Zhang et al. 2012)
D_ISO = 3.0e-3  # mm2/s, free water at body temperature
MAX_ORDER = 32
NODES = 1024  # of the quadrature; Gauss nodes crowd at t = 1, where a narrow Watson distribution lives
TABLE = 4097  # evenly spaced values of ODI
BLOCK = 8192  # voxels at a time


def odi_of_kappa(kappa: np.ndarray | float) -> np.ndarray:
    """Orientation dispersion index in [0, 1] of concentrations kappa >= 0 (infinity allowed)."""
    return 1 - 2 / np.pi * np.arctan(np.asarray(kappa, dtype=float))


def kappa_of_odi(odi: np.ndarray | float) -> np.ndarray:
    """Concentration of Watson's distribution, infinity for ODI 0."""
    with np.errstate(divide="ignore"):
        return 1 / np.tan(np.pi / 2 * np.asarray(odi, dtype=float))


@lru_cache(maxsize=1)
def _nodes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gauss nodes and weights on [0, 1] and the even Legendre polynomials there (orders, nodes)."""
    t, weights = legendre.leggauss(NODES)
    t, weights = (t + 1) / 2, weights / 2
    return t, weights, legendre.legvander(t, MAX_ORDER)[:, ::2].T


@lru_cache(maxsize=1)
def _watson_table() -> np.ndarray:
    """w_l for the evenly spaced ODI: (TABLE, MAX_ORDER / 2 + 1)."""
    t, weights, polynomials = _nodes()
    kappa = kappa_of_odi(np.linspace(0, 1, TABLE))[1:]
    density = weights * np.exp(kappa[:, None] * (t**2 - 1))
    inner = density @ polynomials.T / density.sum(axis=1, keepdims=True)
    return np.concatenate([np.ones((1, polynomials.shape[0])), inner])


def watson_orders(odi: np.ndarray, num_orders: int = MAX_ORDER // 2 + 1) -> np.ndarray:
    """w_l = <P_l(n . mu)> of Watson's distribution for l = 0, 2, 4, ...

    Args:
        odi: any shape, in [0, 1].
        num_orders: number of even orders, at most 17.

    Returns:
        (*odi.shape, num_orders): 1 for ODI 0 (parallel), 0 beyond order 0 for ODI 1 (isotropic). Interpolated linearly
        in a table over ODI; the signal is off by less than 1e-5 (tested against quadrature).
    """
    table = _watson_table()[:, :num_orders]
    place = np.clip(np.asarray(odi, dtype=float), 0, 1) * (TABLE - 1)
    low = np.minimum(place.astype(np.int64), TABLE - 2)
    share = (place - low)[..., None]
    return table[low] * (1 - share) + table[low + 1] * share


def stick_coefficients(b_d: float) -> np.ndarray:
    """Legendre coefficients a_l of exp(-b d t^2) for l = 0, 2, ..., up to the last one above 1e-7.

    Raises:
        ValueError: b d above 25, where `MAX_ORDER` does not suffice.
    """
    if not 0 <= b_d <= 25:
        raise ValueError(f"b: expected b d_par between 0 and 25 (b up to 14700 s/mm2), got {b_d:.1f}")
    t, weights, polynomials = _nodes()
    orders = np.arange(0, MAX_ORDER + 1, 2)
    coefficients = (2 * orders + 1) * (polynomials @ (weights * np.exp(-b_d * t**2)))
    return coefficients[: 1 + int(np.flatnonzero(np.abs(coefficients) > 1e-7)[-1])]


def noddi_signal(
    ndi: np.ndarray,
    odi: np.ndarray,
    fwf: np.ndarray,
    directions: np.ndarray,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    *,
    d_par: float = D_PAR,
    d_iso: float = D_ISO,
) -> np.ndarray:
    """Normalised signal S / S0 of voxels with one bundle each.

    Args:
        ndi: neurite density index (V,) in [0, 1].
        odi: orientation dispersion index (V,) in [0, 1].
        fwf: free-water fraction (V,) in [0, 1].
        directions: unit mean directions mu (V, 3), sign immaterial, in the frame of `bvecs`.
        bvals: (N,) s/mm2.
        bvecs: (N, 3) unit vectors; rows of b 0 may be anything.
        d_par: diffusivity along neurites in mm2/s. d_iso: of free water.

    Returns:
        (V, N) float32 in (0, 1].

    Raises:
        ValueError: shapes that do not fit.
    """
    count = len(ndi)
    if directions.shape != (count, 3) or len(odi) != count or len(fwf) != count:
        raise ValueError(
            f"directions: expected ({count}, 3) and as many values of odi and fwf, got {directions.shape}, "
            f"{len(odi)} and {len(fwf)}"
        )
    if bvecs.shape != (len(bvals), 3):
        raise ValueError(f"bvecs: expected ({len(bvals)}, 3), one row per b-value, got {bvecs.shape}")
    signal = np.empty((count, len(bvals)), dtype=np.float32)
    for b in np.unique(bvals):
        columns = np.flatnonzero(bvals == b)
        kernel = stick_coefficients(float(b) * d_par)
        for start in range(0, count, BLOCK):
            rows = slice(start, start + BLOCK)
            density = ndi[rows, None].astype(float)
            orders = watson_orders(odi[rows], max(len(kernel), 2))
            cosine2 = (directions[rows].astype(float) @ bvecs[columns].T.astype(float)) ** 2
            inside = _even_legendre_sum(kernel * orders[:, : len(kernel)], cosine2)
            # mean of cos^2 between gradient and neurite: <n n^T> of Watson's distribution is uniaxial about mu
            spread = (1 + orders[:, 1:2] * (3 * cosine2 - 1)) / 3
            outside = np.exp(-b * d_par * ((1 - density) + density * spread))
            water = fwf[rows, None].astype(float)
            tissue = density * inside + (1 - density) * outside
            signal[rows, columns] = (1 - water) * tissue + water * np.exp(-b * d_iso)
    return signal


def _even_legendre_sum(coefficients: np.ndarray, x2: np.ndarray) -> np.ndarray:
    """sum_l c_l P_l(x) over l = 0, 2, ... by recurrence; coefficients (V, L), x2 = x^2 (V, N)."""
    total = np.broadcast_to(coefficients[:, :1], x2.shape).copy()
    before, now = np.ones_like(x2), 1.5 * x2 - 0.5
    for index in range(1, coefficients.shape[1]):
        total += coefficients[:, index : index + 1] * now
        n = 2 * index
        # P_{l+2} from P_l and P_{l-2}: the usual recurrence applied twice
        c = (n + 1) * (n + 2) / ((2 * n + 1) * (2 * n + 3))
        a = (n + 1) ** 2 / ((2 * n + 1) * (2 * n + 3)) + n**2 / ((2 * n + 1) * (2 * n - 1))
        e = n * (n - 1) / ((2 * n + 1) * (2 * n - 1))
        before, now = now, ((x2 - a) * now - e * before) / c
    return total


def equivalent_odi(odi: np.ndarray, directions: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """ODI of the single Watson distribution that is as concentrated as two crossing ones.

    NODDI has one bundle per voxel and reports a crossing as dispersion. The two distributions together have the
    orientation tensor T = <n n^T>; the answer has the same largest eigenvalue <(n . mu)^2>.

    Args:
        odi: of both bundles (V,). directions, second: their unit directions (V, 3).
        share: of the second bundle (V,) in [0, 1].

    Returns:
        (V,) in [0, 1], at least `odi`.
    """
    w2 = watson_orders(odi, 2)[:, 1]
    # T has the largest eigenvalue (1 - w2) / 3 + w2 * that of the mixed outer products (a 2x2 problem in closed form)
    cosine2 = np.clip((directions * second).sum(axis=1) ** 2, 0, 1)
    largest = 0.5 + np.sqrt(np.maximum(0.25 - share * (1 - share) * (1 - cosine2), 0))
    tau = (1 - w2) / 3 + w2 * largest
    table = (1 + 2 * _watson_table()[:, 1]) / 3
    return np.interp(-tau, -table, np.linspace(0, 1, TABLE))
