# SPDX-License-Identifier: Apache-2.0
"""What the networks see of a diffusion-weighted series: features of each voxel, free of the gradient table or not.

The published method takes the diffusion-weighted volumes themselves as channels (`DirectionFeatures`), which ties a
model to one gradient table. `RotationInvariantFeatures` describes a voxel by what the tissue does to the signal,
however the directions were chosen, so that one model serves several protocols: the spherical mean of a shell (Kaden et
al. 2016), the power of its spherical harmonics per order (Novikov et al. 2018) and the diffusion tensor's FA and MD.

Everything is computed voxel by voxel in the frame of the gradient table; what comes out are scalars, so a volume may be
turned or flipped afterwards, and the voxel axes of a signal may be in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from dipy.core.gradients import gradient_table
from dipy.reconst.dti import TensorModel

from shared.gradients import GradientTable, Shell
from shared.spherical_harmonics import MAX_ORDER, ShellFit, is_determined

_CHUNK = 16_384  # voxels at a time: (16384, 288) float64 is 38 MB
_FLOOR = 1e-3  # of b0; the logarithm of less is noise, and of zero or less does not exist
_DEAD_VOXELS = 0.01  # share of the mask whose b0 may be non-positive: edges that motion correction moved out of view
_BEYOND = 0.15  # how far outside the measured b-values a wanted one may lie
_NEAR = 0.05  # a shell so near to the wanted b-value stands alone, however few directions its neighbours have
_TENSOR_B_MAX = 1500.0  # s/mm2; beyond, the signal's decay is no longer that of a tensor
_MD_SCALE = 3e-3  # mm2/s, free water at body temperature: MD becomes 1


def mean_b0(signal: np.ndarray, table: GradientTable) -> np.ndarray:
    """Mean of the volumes without diffusion weighting, (X, Y, Z) float32, in the units of the signal (X, Y, Z, N)."""
    total = np.zeros(signal.shape[:3], np.float64)
    for index in np.flatnonzero(table.b0):
        total += signal[..., index]
    return (total / table.b0.sum()).astype(np.float32)


def masked_signal(
    signal: np.ndarray, table: GradientTable, mask: np.ndarray | None
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Indices of some voxels and their signal relative to b0, (n, N) float64, until all of the mask were given."""
    if signal.ndim != 4 or signal.shape[3] != len(table.bvals):
        raise ValueError(
            f"signal: expected the shape (X, Y, Z, {len(table.bvals)}), one volume per b-value, but got "
            f"{signal.shape}; take the series and its table from the same acquisition"
        )
    if mask is not None and mask.shape != signal.shape[:3]:
        raise ValueError(
            f"mask: expected the shape {signal.shape[:3]} of the signal, but got {mask.shape}; resample it"
        )
    b0 = mean_b0(signal, table)
    inside = np.ones(b0.shape, bool) if mask is None else np.asarray(mask, bool)
    dead = inside & (b0 <= 0)  # NaN is neither dead nor alive: it is found below
    if dead.sum() > _DEAD_VOXELS * inside.sum() and mask is not None:
        raise ValueError(
            f"signal: expected a positive b0 inside the mask, but the mean of the b0 volumes is zero or negative in "
            f"{int(dead.sum())} of {int(inside.sum())} voxels; check that mask and b-values belong to the series"
        )
    where = np.nonzero(inside & ~dead)
    for start in range(0, len(where[0]), _CHUNK):
        part = tuple(axis[start : start + _CHUNK] for axis in where)
        values = signal[part].astype(np.float64)
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).any(1).sum())
            raise ValueError(
                f"signal: expected finite values in every voxel of the brain, but {count} or more voxels are NaN or "
                "infinite; repair the series or cut these voxels out of the mask"
            )
        yield part, values / b0[part][:, None]


def _compute(
    signal: np.ndarray,
    table: GradientTable,
    mask: np.ndarray | None,
    num_channels: int,
    describe: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """`describe` (n, N) -> (n, F) for all voxels of the mask; zero elsewhere."""
    features = np.zeros((num_channels, *signal.shape[:3]), np.float32)
    for where, values in masked_signal(signal, table, mask):
        features[:, where[0], where[1], where[2]] = np.clip(describe(values), 0, 1).T
    return features


@dataclass(frozen=True, kw_only=True)
class RotationInvariantFeatures:
    """Features that do not depend on how the directions of a gradient table were chosen.

    Per wanted b-value: the spherical mean of the b0-normalised signal and, for each wanted order l, twice the root mean
    square over the sphere of the signal's part of that order. Both come from a regularised fit of spherical harmonics
    (Descoteaux et al. 2007), as a plain mean over directions is biased where they are uneven; what noise adds to the
    power is estimated from the residuals and taken off, as it depends on the number of directions. Between measured
    shells the mean is interpolated log-linearly in b, the others linearly. FA and MD come from a weighted least squares
    fit of the diffusion tensor (dipy) to the volumes of at most 1500 s/mm2.

    dipy has the parts (harmonics, tensor) but no such features; MONAI has nothing for diffusion MRI.

    Args:
        shells: wanted b-values, s/mm2, whatever the measured ones are.
        orders: even orders of the harmonics, at least 2.
        tensor: also FA, and MD divided by 3e-3 mm2/s (free water).

    Raises:
        ValueError: empty or non-positive `shells`, or odd `orders`. The message starts with the argument.
    """

    shells: tuple[float, ...] = (1000, 2000)
    orders: tuple[int, ...] = (2, 4)
    tensor: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shells", tuple(float(b) for b in self.shells))  # a config holds lists
        object.__setattr__(self, "orders", tuple(int(order) for order in self.orders))
        if not self.shells or min(self.shells) <= 0 or list(self.shells) != sorted(set(self.shells)):
            raise ValueError(
                f"shells: expected rising b-values above 0 in s/mm2, but got {list(self.shells)}; correct the config"
            )
        if any(order % 2 or not 2 <= order <= MAX_ORDER for order in self.orders):
            raise ValueError(
                f"orders: expected even numbers from 2 to {MAX_ORDER}, but got {list(self.orders)}; odd orders "
                "vanish, as the signal is the same along a direction and its opposite"
            )

    @property
    def names(self) -> list[str]:
        """One name per channel, such as `mean_b1000`, `power2_b1000`, `fa`, `md`."""
        names = [f"{what}_b{b:g}" for b in self.shells for what in ("mean", *(f"power{o}" for o in self.orders))]
        return names + ["fa", "md"] * self.tensor

    @property
    def num_channels(self) -> int:
        """F, the number of channels."""
        return len(self.names)

    def __call__(self, signal: np.ndarray, table: GradientTable, mask: np.ndarray | None = None) -> np.ndarray:
        """Compute the features.

        Args:
            signal: (X, Y, Z, N), any real type and unit, any memory order; only voxels of the mask are looked at.
            table: of the N volumes.
            mask: (X, Y, Z) bool, the brain; None takes every voxel with a positive b0.

        Returns:
            (F, X, Y, Z) float32 in [0, 1], channels as in `names`; zero outside the mask, and where b0 is not positive
            (up to 1 % of the mask).

        Raises:
            ValueError: missing shell, too few directions, shapes that do not belong together, NaN inside the mask, or
                a b0 that is not positive. The message starts with `gradient table`, `signal` or `mask`.
        """
        mixtures = [self._mixture(b, table) for b in self.shells]
        fits = {
            shell.b: ShellFit(table.bvecs[shell.indices], indices=shell.indices, order=self._order)
            for mixture in mixtures
            for shell, _ in mixture
        }
        freedom = sum(fit.freedom for fit in fits.values())
        tensor = TensorFit(table) if self.tensor else None

        def describe(values: np.ndarray) -> np.ndarray:
            fitted = {b: fit.fit(values) for b, fit in fits.items()}
            variance = sum((rest for _, rest in fitted.values()), np.zeros(len(values))) / max(freedom, 1)
            means = {b: ShellFit.mean(harmonics) for b, (harmonics, _) in fitted.items()}
            strengths = {b: fits[b].strengths(h, self.orders, variance=variance) for b, (h, _) in fitted.items()}
            columns = []
            for mixture in mixtures:
                columns.append(np.exp(sum(w * np.log(np.maximum(means[s.b], _FLOOR)) for s, w in mixture))[:, None])
                # beyond the last shell the mean goes on to fall (w > 1), but the strength has levelled off
                columns.append(np.asarray(sum(min(w, 1.0) * strengths[s.b] for s, w in mixture)))
            return np.concatenate([*columns, tensor.scalars(values)] if tensor else columns, 1)

        return _compute(signal, table, mask, self.num_channels, describe)

    @property
    def _order(self) -> int:
        return max(self.orders, default=0)

    def _mixture(self, wanted: float, table: GradientTable) -> list[tuple[Shell, float]]:
        """Measured shells and their weights; a rest to 1 belongs to b = 0, where mean and power are 1 and 0."""
        shells = table.shells()
        listed = ", ".join(f"{shell.b:.0f} ({len(shell.indices)})" for shell in shells)
        if not shells or not shells[0].b * (1 - _BEYOND) <= wanted <= shells[-1].b * (1 + _BEYOND):
            raise ValueError(
                f"gradient table: missing shell: expected b-values around {wanted:g} s/mm2, but the table has the "
                f"shells (volumes) {listed}; use a series with such a shell, or train with other 'shells'"
            )
        nearest = min(shells, key=lambda shell: abs(shell.b - wanted))
        if abs(nearest.b - wanted) <= _NEAR * wanted or wanted < shells[0].b or wanted > shells[-1].b:
            mixture = [(nearest, wanted / nearest.b)]
        else:
            upper = next(i for i, shell in enumerate(shells) if shell.b > wanted)
            share = (wanted - shells[upper - 1].b) / (shells[upper].b - shells[upper - 1].b)
            mixture = [(shells[upper - 1], 1 - share), (shells[upper], share)]
        for shell, _ in mixture:
            if not is_determined(table.bvecs[shell.indices], self._order):
                needed = (self._order + 1) * (self._order + 2) // 2
                raise ValueError(
                    f"gradient table: too few directions: expected at least {needed} well spread ones for harmonics of "
                    f"order {self._order}, but the shell b = {shell.b:.0f} has {len(shell.indices)} volumes, and the "
                    f"shells (volumes) are {listed}; use a series with full shells (not DSI), or train with lower "
                    "'orders'"
                )
        return mixture


class TensorFit:
    """Diffusion tensor (dipy, weighted least squares) of b0-normalised signals, from the volumes up to 1500 s/mm2.

    Raises:
        ValueError: these directions do not determine a tensor. The message starts with `gradient table`.
    """

    def __init__(self, table: GradientTable) -> None:
        self._used = table.bvals <= _TENSOR_B_MAX
        directions = table.bvecs[self._used & ~table.b0]
        if len(directions) < 6 or not is_determined(directions, 2):
            raise ValueError(
                f"gradient table: too few directions: expected at least 6 well spread ones with b-values up to "
                f"{_TENSOR_B_MAX:g} s/mm2 for the diffusion tensor, but got {len(directions)}; add a shell, or train "
                "with 'tensor' false"
            )
        # b0 counts as exactly 0: the features are relative to it
        bvals = np.where(table.b0, 0.0, table.bvals)[self._used]
        gradients = gradient_table(bvals, bvecs=table.bvecs[self._used], b0_threshold=0)
        self._model = TensorModel(gradients, fit_method="WLS", min_signal=_FLOOR)

    def scalars(self, values: np.ndarray) -> np.ndarray:
        """FA and MD / 3e-3 mm2/s, (v, 2), of the signal (v, N)."""
        fit = self._model.fit(values[:, self._used])
        return np.stack([fit.fa, fit.md / _MD_SCALE], 1)

    def directions(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """FA (v,) and the direction of fastest diffusion (v, 3), in the frame of the table, of the signal (v, N)."""
        fit = self._model.fit(values[:, self._used])
        return fit.fa, fit.evecs[..., :, 0]


@dataclass(frozen=True, kw_only=True)
class DirectionFeatures:
    """The published direction channels: each diffusion-weighted volume relative to the mean b0.

    Sorted by shell, within a shell as in the file. A model on them serves series of one gradient table only.

    Args:
        num_directions: diffusion-weighted volumes that a series must have.

    Raises:
        ValueError: not positive. The message starts with the argument.
    """

    num_directions: int

    def __post_init__(self) -> None:
        if self.num_directions < 1:
            raise ValueError(f"num_directions: expected at least 1, but got {self.num_directions}; correct the config")

    @property
    def names(self) -> list[str]:
        """One name per channel: `direction_0`, ..."""
        return [f"direction_{index}" for index in range(self.num_directions)]

    @property
    def num_channels(self) -> int:
        """F, the number of channels."""
        return self.num_directions

    def __call__(self, signal: np.ndarray, table: GradientTable, mask: np.ndarray | None = None) -> np.ndarray:
        """Compute the channels; arguments, result and errors as for `RotationInvariantFeatures`.

        Raises:
            ValueError: also where the table has another number of diffusion-weighted volumes.
        """
        order = np.concatenate([shell.indices for shell in table.shells()])
        if len(order) != self.num_directions:
            raise ValueError(
                f"gradient table: expected {self.num_directions} diffusion-weighted volumes, but got {len(order)}; use "
                "a series of the protocol the model was trained for, or features that do not depend on it"
            )
        return _compute(signal, table, mask, self.num_channels, lambda values: values[:, order])
