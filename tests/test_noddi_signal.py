# SPDX-License-Identifier: Apache-2.0
"""Tests of the NODDI signal model against closed forms and plain quadrature over the sphere."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.polynomial import legendre
from scipy.special import dawsn, erf

from tools.phantoms.noddi_signal import (
    D_ISO,
    D_PAR,
    equivalent_odi,
    kappa_of_odi,
    noddi_signal,
    odi_of_kappa,
    stick_coefficients,
    watson_orders,
)

BVALS = np.repeat([0.0, 700.0, 1000.0, 2000.0, 3000.0, 6000.0], 9)


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


BVECS = unit(np.random.default_rng(7), len(BVALS))


def signal(ndi: float, odi: float, fwf: float, directions: np.ndarray, bvecs: np.ndarray = BVECS) -> np.ndarray:
    full = np.ones(len(directions))
    return noddi_signal(ndi * full, odi * full, fwf * full, directions, BVALS, bvecs)


def by_quadrature(ndi: float, odi: float, fwf: float, direction: np.ndarray) -> np.ndarray:
    """The model's definition as sums over the sphere: Gauss nodes along the pole, even steps around it."""
    t, weight = legendre.leggauss(400)
    phi = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    helper = np.eye(3)[np.argmin(np.abs(direction))]
    one = np.cross(direction, helper)
    one /= np.linalg.norm(one)
    two = np.cross(direction, one)
    ring = np.cos(phi)[:, None] * one + np.sin(phi)[:, None] * two
    nodes = t[:, None, None] * direction + np.sqrt(1 - t**2)[:, None, None] * ring
    density = np.repeat(weight * np.exp(kappa_of_odi(odi) * (t**2 - 1)), len(phi))
    density /= density.sum()
    nodes = nodes.reshape(-1, 3)
    sticks = density @ np.exp(-BVALS * D_PAR * (nodes @ BVECS.T) ** 2)
    across = D_PAR * (1 - ndi)
    tensor = across * np.eye(3) + (D_PAR - across) * (nodes.T * density) @ nodes
    outside = np.exp(-BVALS * np.einsum("ni,ij,nj->n", BVECS, tensor, BVECS))
    return (1 - fwf) * (ndi * sticks + (1 - ndi) * outside) + fwf * np.exp(-BVALS * D_ISO)


@pytest.mark.parametrize("odi", [0.01, 0.03, 0.0501, 0.1, 0.237, 0.5, 0.8, 0.97])
def test_equals_quadrature(odi: float) -> None:
    rng = np.random.default_rng(int(odi * 1000))
    for direction in unit(rng, 3):
        ndi, fwf = rng.uniform(0.1, 0.9, 2)
        expected = by_quadrature(ndi, odi, fwf, direction)
        assert signal(ndi, odi, fwf, direction[None])[0] == pytest.approx(expected, abs=1e-5)


def test_isotropic_neurites_have_the_powder_average() -> None:
    found = signal(1.0, 1.0, 0.0, unit(np.random.default_rng(0), 5))
    x = np.sqrt(BVALS[BVALS > 0] * D_PAR)
    assert found[:, BVALS == 0] == pytest.approx(1)
    assert found[:, BVALS > 0] == pytest.approx(np.tile(np.sqrt(np.pi) / (2 * x) * erf(x), (5, 1)), abs=1e-6)


def test_parallel_neurites_are_sticks() -> None:
    directions = unit(np.random.default_rng(1), 20)
    cosine = directions @ BVECS.T
    assert signal(1.0, 0.0, 0.0, directions) == pytest.approx(np.exp(-BVALS * D_PAR * cosine**2), abs=1e-6)
    across = D_PAR * 0.4
    outside = np.exp(-BVALS * (across + (D_PAR - across) * cosine**2))
    expected = 0.6 * np.exp(-BVALS * D_PAR * cosine**2) + 0.4 * outside
    assert signal(0.6, 0.0, 0.0, directions) == pytest.approx(expected, abs=1e-6)


def test_free_water_and_no_neurites() -> None:
    directions = unit(np.random.default_rng(2), 4)
    assert signal(0.6, 0.2, 1.0, directions) == pytest.approx(np.tile(np.exp(-BVALS * D_ISO), (4, 1)), abs=1e-7)
    # without neurites nothing hinders: isotropic with the parallel diffusivity, whatever ODI
    assert signal(0.0, 0.2, 0.0, directions) == pytest.approx(np.tile(np.exp(-BVALS * D_PAR), (4, 1)), abs=1e-6)


def test_turns_with_the_tissue() -> None:
    rng = np.random.default_rng(3)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    directions = unit(rng, 30)
    still = signal(0.6, 0.12, 0.1, directions)
    assert signal(0.6, 0.12, 0.1, directions @ rotation.T, BVECS @ rotation.T) == pytest.approx(still, abs=1e-6)
    assert signal(0.6, 0.12, 0.1, -directions) == pytest.approx(still, abs=1e-7)
    assert np.abs(signal(0.6, 0.12, 0.1, directions @ rotation.T) - still).max() > 0.05


def test_many_voxels_are_done_in_blocks() -> None:
    rng = np.random.default_rng(4)
    count = 20_000
    maps = rng.random((3, count))
    directions = unit(rng, count)
    every = noddi_signal(*maps, directions, BVALS, BVECS)
    assert every.dtype == np.float32
    assert every.min() > 0
    assert every.max() <= 1 + 1e-6
    some = [0, 8191, 8192, 16_384, count - 1]
    assert np.array_equal(every[some], noddi_signal(*maps[:, some], directions[some], BVALS, BVECS))


def test_dispersion_index() -> None:
    assert odi_of_kappa(np.array([0.0, 1.0, np.inf])) == pytest.approx([1, 0.5, 0])
    assert odi_of_kappa(kappa_of_odi(np.linspace(0, 1, 11))) == pytest.approx(np.linspace(0, 1, 11))


def test_orders_of_watsons_distribution() -> None:
    odi = np.array([0.0, 0.0311, 0.2, 0.77, 1.0])
    orders = watson_orders(odi)
    assert orders.shape == (5, 17)
    assert orders[:, 0] == pytest.approx(1)
    assert orders[0] == pytest.approx(1)
    assert orders[-1, 1:] == pytest.approx(0, abs=1e-12)
    assert (np.diff(orders, axis=1) <= 1e-12).all(), "finer detail is blurred more"
    # <cos^2> in closed form by Dawson's function (Zhang et al. 2011)
    kappa = kappa_of_odi(odi[1:4])
    closed = -1 / (2 * kappa) + 1 / (2 * np.sqrt(kappa) * dawsn(np.sqrt(kappa)))
    assert (1 + 2 * orders[1:4, 1]) / 3 == pytest.approx(closed, abs=1e-6)


def test_coefficients_of_a_stick() -> None:
    t = np.linspace(-1, 1, 41)
    for b_d in (0.0, 1.7, 5.1, 20.0):
        series = np.zeros(33)
        kernel = stick_coefficients(b_d)
        series[: 2 * len(kernel) : 2] = kernel
        assert legendre.legval(t, series) == pytest.approx(np.exp(-b_d * t**2), abs=1e-5)
    assert len(stick_coefficients(0.0)) == 1
    with pytest.raises(ValueError, match="b: expected b d_par between 0 and 25"):
        stick_coefficients(26.0)


def test_odi_of_a_crossing() -> None:
    x, y = np.tile([1.0, 0, 0], (4, 1)), np.tile([0, 1.0, 0], (4, 1))
    odi = np.full(4, 0.1)
    assert equivalent_odi(odi, x, y, np.zeros(4)) == pytest.approx(0.1, abs=1e-4)
    assert equivalent_odi(odi, x, x, np.full(4, 0.5)) == pytest.approx(0.1, abs=1e-4), "parallel bundles"
    found = equivalent_odi(odi, x, y, np.array([0.0, 0.15, 0.3, 0.5]))
    assert (np.diff(found) > 0.05).all()
    # two parallel sets at right angles in equal parts: <(n . mu)^2> = 1/2 at best
    half = equivalent_odi(np.zeros(1), x[:1], y[:1], np.array([0.5]))
    kappa = kappa_of_odi(half)
    assert -1 / (2 * kappa) + 1 / (2 * np.sqrt(kappa) * dawsn(np.sqrt(kappa))) == pytest.approx(0.5, abs=1e-4)


def test_shapes_that_do_not_fit() -> None:
    one = np.ones(3)
    with pytest.raises(ValueError, match=r"directions: expected \(3, 3\) and as many values .*got \(2, 3\), 3 and 3"):
        noddi_signal(one, one, one, np.ones((2, 3)), BVALS, BVECS)
    with pytest.raises(ValueError, match=r"bvecs: expected \(54, 3\), one row per b-value, got \(3, 54\)"):
        noddi_signal(one, one, one, np.ones((3, 3)), BVALS, BVECS.T)
