# SPDX-License-Identifier: Apache-2.0
"""Tests of `tools.phantoms.brain_signal`: signal equations against closed forms and a simulation pulse by pulse."""

from __future__ import annotations

import numpy as np
import pytest

from tools.phantoms.brain_signal import TISSUES, Flair, Mprage, Tissue, add_rician_noise, mix, vary


def simulate(sequence: Mprage, tissue: Tissue, cycles: int = 40) -> float:
    """Longitudinal magnetisation followed through every pulse, from equilibrium until it repeats itself."""

    def relax(m: float, time: float) -> float:
        return 1 + (m - 1) * np.exp(-time / tissue.t1)

    m, seen, half = 1.0, 0.0, sequence.flips // 2
    for _ in range(cycles):
        m = relax(-m, sequence.ti - half * sequence.echo_spacing)
        for flip in range(sequence.flips):
            if flip == half:
                seen = m * np.sin(np.radians(sequence.alpha))
            m = relax(m * np.cos(np.radians(sequence.alpha)), sequence.echo_spacing)
        m = relax(m, sequence.tr - sequence.ti - (sequence.flips - half) * sequence.echo_spacing)
    kept = 1.0 - sequence.fat_suppression if tissue.fat else 1.0
    return float(kept * tissue.pd * seen * np.exp(-sequence.te / tissue.t2))


@pytest.mark.parametrize("name", TISSUES)
def test_mprage_equals_the_simulation(name: str) -> None:
    for sequence in (Mprage(), Mprage(tr=2300, ti=900, alpha=9, te=3, echo_spacing=7, flips=129)):
        assert sequence.signal(TISSUES[name]) == pytest.approx(simulate(sequence, TISSUES[name]), abs=1e-9)


@pytest.mark.parametrize("t1", [371.0, 832.0, 1331.0, 4163.0])
def test_mprage_with_one_flip_is_inversion_recovery(t1: float) -> None:
    sequence = Mprage(alpha=0.5, flips=1, te=0.0)
    closed = np.sin(np.radians(0.5)) * (1 - 2 * np.exp(-880 / t1) / (1 + np.exp(-2000 / t1)))
    # the small flip takes away 1 - cos 0.5 degrees = 4e-5 of the magnetisation
    assert sequence.signal(Tissue(t1=t1, t2=100.0, pd=1.0)) == pytest.approx(closed, abs=2e-6)


def test_mprage_names_a_train_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="ti: expected 536.8 to 1463.2 ms, .*got 400; change ti"):
        Mprage(ti=400)
    with pytest.raises(ValueError, match="ti: expected"):
        Mprage(ti=1900)


def test_flair_nulls_csf() -> None:
    csf = TISSUES["csf"]
    assert Flair().signal(csf) == pytest.approx(0, abs=1e-12)
    assert Flair(tr=1e7).null_time(csf.t1) == pytest.approx(csf.t1 * np.log(2), rel=1e-9)
    assert Flair(tr=1e7, ti=csf.t1 * np.log(2)).signal(csf) == pytest.approx(0, abs=1e-9)
    # UK Biobank's inversion time for this repetition time, found by the equation
    assert Flair().null_time(csf.t1) == pytest.approx(1800, rel=0.03)
    assert Flair(ti=1000).signal(csf) < 0 < Flair(ti=2500).signal(csf), "signals are signed"


def test_flair_limits() -> None:
    tissue = Tissue(t1=1000.0, t2=100.0, pd=0.7)
    assert Flair(tr=1e6, ti=5e5, te=0).signal(tissue) == pytest.approx(0.7)
    assert Flair(tr=1e6, ti=0, te=0).signal(tissue) == pytest.approx(-0.7)
    assert Flair(te=200).signal(tissue) / Flair(te=100).signal(tissue) == pytest.approx(np.exp(-1))
    fat = TISSUES["fat"]
    assert Flair(fat_suppression=0.75).signal(fat) == pytest.approx(0.25 * Flair(fat_suppression=0).signal(fat))
    assert Flair(fat_suppression=0.75).signal(tissue) == Flair(fat_suppression=0).signal(tissue)


def test_order_of_the_tissues() -> None:
    t1w = {name: Mprage().signal(tissue) for name, tissue in TISSUES.items()}
    assert t1w["fat"] > t1w["white"] > t1w["deep"] > t1w["grey"] > t1w["csf"] > t1w["bone"] > t1w["air"] == 0
    assert t1w["lesion"] < 0.75 * t1w["white"]
    assert t1w["grey"] < 0.75 * t1w["white"]
    assert abs(t1w["csf"]) < 0.3 * t1w["white"]
    flair = {name: Flair().signal(tissue) for name, tissue in TISSUES.items()}
    assert flair["lesion"] > flair["grey"] > flair["deep"] > flair["white"] > flair["muscle"] > flair["csf"]
    assert flair["lesion"] > 1.5 * flair["white"]
    assert 1.1 < flair["grey"] / flair["white"] < 1.4
    assert flair["fat"] > flair["white"]


def test_mixed_voxels_add_signed_signals() -> None:
    sequence = Flair(ti=1200)
    fractions = np.zeros((len(TISSUES), 2, 3, 1), dtype=np.float32)
    names = list(TISSUES)
    fractions[names.index("csf")], fractions[names.index("grey")] = 0.25, 0.75
    expected = 0.25 * sequence.signal(TISSUES["csf"]) + 0.75 * sequence.signal(TISSUES["grey"])
    assert sequence.signal(TISSUES["csf"]) < 0
    signal = mix(fractions, sequence)
    assert (signal.shape, signal.dtype) == ((2, 3, 1), np.float32)
    assert signal == pytest.approx(expected, rel=1e-5)


def test_rician_noise() -> None:
    background = add_rician_noise(np.zeros((80, 80, 20), np.float32), 2.0, np.random.default_rng(0))
    assert background.dtype == np.float32
    assert background.mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.01)
    assert (background**2).mean() == pytest.approx(2 * 2.0**2, rel=0.01)
    bright = add_rician_noise(np.full((80, 80, 20), 60, np.float32), 2.0, np.random.default_rng(0))
    assert (bright**2).mean() == pytest.approx(60**2 + 2 * 2.0**2, rel=0.001)
    assert bright.std() == pytest.approx(2.0, rel=0.02)
    signal = np.array([0.0, -3.0], np.float32)
    assert add_rician_noise(signal, 0.0, np.random.default_rng(0)).tolist() == [0.0, 3.0]


def test_people_differ_but_their_csf_does_not() -> None:
    one, two = (vary(TISSUES, np.random.default_rng(seed)) for seed in (0, 1))
    assert list(one) == list(TISSUES)
    assert one["csf"] == two["csf"] == TISSUES["csf"]
    for name, tissue in TISSUES.items():
        assert one[name].pd == tissue.pd
        assert one[name].fat == tissue.fat
        assert abs(one[name].t1 / tissue.t1 - 1) < 0.06
    assert one["grey"].t1 != two["grey"].t1
    assert one["grey"].t2 / TISSUES["grey"].t2 != one["grey"].t1 / TISSUES["grey"].t1, "T1 and T2 vary on their own"
