# SPDX-License-Identifier: Apache-2.0
"""Signal equations of the two contrasts, and the noise of the scanner.

Times are in milliseconds, angles in degrees, signals in units of the equilibrium magnetisation of water. UK Biobank's
timings are those of table 1 of Alfaro-Almagro et al., NeuroImage 2018;166:400.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["TISSUES", "Flair", "Mprage", "Tissue", "add_rician_noise", "mix", "vary"]


@dataclass(frozen=True)
class Tissue:
    """What the equations need to know of a tissue at 3 T: T1 and T2 in ms, proton density relative to water, and
    whether fat suppression acts on it."""

    t1: float
    t2: float
    pd: float
    fat: bool = False


# Values as others quote these sources; the originals were not at hand.
# grey, white: Wansapura et al., JMRI 1999;9:531. Fat, muscle: Gold et al., AJR 2004;183:343. T1 of CSF: Lin et al.,
# Proc. ISMRM 9 (2001). Water: Ernst et al., J Magn Reson B 1993;102:1. Our choices: deep grey between grey and white
# (iron, myelin); lesions with both times long; fat at 0.65 (connective tissue, vessels); bone and air almost nothing.
TISSUES = {
    "air": Tissue(t1=1000.0, t2=1.0, pd=0.0),
    "bone": Tissue(t1=1000.0, t2=5.0, pd=0.06),
    "fat": Tissue(t1=371.0, t2=133.0, pd=0.65, fat=True),
    "muscle": Tissue(t1=1420.0, t2=32.0, pd=0.8),
    "csf": Tissue(t1=4163.0, t2=2000.0, pd=0.97),
    "grey": Tissue(t1=1331.0, t2=110.0, pd=0.78),
    "white": Tissue(t1=832.0, t2=79.2, pd=0.65),
    "deep": Tissue(t1=1100.0, t2=88.0, pd=0.73),
    "lesion": Tissue(t1=1450.0, t2=160.0, pd=0.82),
}


def vary(tissues: Mapping[str, Tissue], rng: np.random.Generator) -> dict[str, Tissue]:
    """Tissues of one person: T1 and T2 vary on their own by 2 % and 2.5 %; water in CSF is the same in everyone."""
    varied = {}
    for name, tissue in tissues.items():
        t1, t2 = np.exp(np.clip(rng.normal(0, (0.02, 0.025)), -0.05, 0.05))
        varied[name] = tissue if name == "csf" else replace(tissue, t1=float(tissue.t1 * t1), t2=float(tissue.t2 * t2))
    return varied


@dataclass(frozen=True)
class Mprage:
    """T1w: inversion, wait, a train of small flips, wait.

    TR and TI as in UK Biobank (Alfaro-Almagro et al., NeuroImage 2018;166:400, table 1); TE, flip angle and echo
    spacing are usual values at 3 T, not looked up.

    Attributes:
        tr: from one inversion to the next. ti: from the inversion to the middle of the train (centre of k-space).
        te: echo time. alpha: flip angle. echo_spacing: between two flips. flips: flips of one train.
        fat_suppression: share of the fat signal that is taken away (water excitation), without which the scalp would
            set the range of grey values.
    """

    tr: float = 2000.0
    ti: float = 880.0
    te: float = 2.0
    alpha: float = 8.0
    echo_spacing: float = 6.1
    flips: int = 176
    fat_suppression: float = 0.45

    def __post_init__(self) -> None:
        half = self.flips * self.echo_spacing / 2
        if not half <= self.ti <= self.tr - half:
            raise ValueError(
                f"ti: expected {half:g} to {self.tr - half:g} ms, so that the train fits before and after, "
                f"got {self.ti:g}; change ti, tr, flips or echo_spacing"
            )

    def signal(self, tissue: Tissue) -> float:
        """Signed signal at the centre of k-space in the steady state (Deichmann et al., NeuroImage 2000;12:112).

        Each part of the cycle maps the longitudinal magnetisation m to a m + b; the steady state is the fixed point.
        """
        cosine = np.cos(np.radians(self.alpha))
        half = self.flips // 2

        def wait(time: float) -> tuple[float, float]:
            decay = float(np.exp(-time / tissue.t1))
            return decay, 1.0 - decay

        def train(flips: int) -> tuple[float, float]:
            decay, recovered = wait(self.echo_spacing)
            a = cosine * decay
            return a**flips, recovered * (1.0 - a**flips) / (1.0 - a)

        def chain(*steps: tuple[float, float]) -> tuple[float, float]:
            a, b = 1.0, 0.0
            for factor, offset in steps:
                a, b = factor * a, factor * b + offset
            return a, b

        before = (-1.0, 0.0), wait(self.ti - half * self.echo_spacing), train(half)
        after = train(self.flips - half), wait(self.tr - self.ti - (self.flips - half) * self.echo_spacing)
        a, b = chain(*before, *after)
        factor, offset = chain(*before)
        centre = factor * b / (1.0 - a) + offset
        seen = 1.0 - self.fat_suppression if tissue.fat else 1.0
        return float(seen * tissue.pd * centre * np.sin(np.radians(self.alpha)) * np.exp(-self.te / tissue.t2))


@dataclass(frozen=True)
class Flair:
    """FLAIR: inversion, wait until CSF passes zero, spin-echo train (UK Biobank: TI 1800, TR 5000 ms).

    The echo time and the share of suppressed fat are our choices.

    Attributes:
        tr: from one inversion to the next. te: contrast-equivalent echo time of the train.
        ti: inversion time; None nulls CSF.
        fat_suppression: share of the fat signal that is taken away.
    """

    tr: float = 5000.0
    te: float = 140.0
    ti: float | None = None
    fat_suppression: float = 0.5

    def null_time(self, t1: float) -> float:
        """Inversion time in ms at which a tissue of this T1 has no signal; T1 ln 2 for TR much longer than T1."""
        return float(t1 * np.log(2.0 / (1.0 + np.exp(-self.tr / t1))))

    def signal(self, tissue: Tissue) -> float:
        """Signed signal PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2) (Hajnal et al., JCAT 1992;16:841)."""
        ti = self.null_time(TISSUES["csf"].t1) if self.ti is None else self.ti
        recovery = 1.0 - 2.0 * np.exp(-ti / tissue.t1) + np.exp(-self.tr / tissue.t1)
        seen = 1.0 - self.fat_suppression if tissue.fat else 1.0
        return float(seen * tissue.pd * recovery * np.exp(-self.te / tissue.t2))


def mix(
    fractions: np.ndarray, sequence: Mprage | Flair, tissues: Sequence[Tissue] = tuple(TISSUES.values())
) -> np.ndarray:
    """Signal of voxels that hold several tissues: the sum of fraction times signed signal.

    Args:
        fractions: (tissues, X, Y, Z), each voxel summing to 1.
        sequence: the contrast.
        tissues: one per fraction, by default `TISSUES` in their order.

    Returns:
        (X, Y, Z) float32, signed.
    """
    signals = np.array([sequence.signal(tissue) for tissue in tissues], dtype=np.float32)
    return np.tensordot(signals, fractions, axes=1)


def add_rician_noise(signal: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal after complex Gaussian noise of deviation `sigma` in both channels; float32, >= 0."""
    real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.hypot(real, sigma * rng.standard_normal(signal.shape, dtype=np.float32))
