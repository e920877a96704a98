# SPDX-License-Identifier: Apache-2.0
"""How near estimated NODDI maps are to the true ones, map by map: PSNR, MAE, 3-D SSIM and correlation.

All maps are fractions, so the data range is 1 by definition, whatever the largest value of a subject is.

The article reports one PSNR and one SSIM of all maps together (:func:`flattened_scores`). That SSIM is
**one-dimensional**: it slides a window of 7 along the voxels in their order in memory. It is comparable neither with a
3-D SSIM nor with that of other work; it stands here for comparison with the article alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.regression import compute_ssim_and_cs
from scipy.ndimage import uniform_filter1d

from shared.metrics.translation import errors_within

MAPS = {"ndi": "NDI", "odi": "ODI", "fwf": "FWF"}
# Key -> heading. Those of a map have its key in front: ndi_psnr_brain.
MEASURES = {
    "psnr_brain": "PSNR (dB) in the brain",
    "ssim_brain": "SSIM in the brain",
    "mae_brain": "MAE in the brain",
    "correlation_brain": "Correlation in the brain",
    "psnr": "PSNR (dB), whole volume",
    "ssim": "SSIM, whole volume",
    "mae": "MAE, whole volume",
}
FLATTENED = {
    "flattened_psnr": "PSNR (dB), all maps together",
    "flattened_ssim": "flattened SSIM (as published)",
}
CONVENTIONS = {
    "data range": "1 for all measures of a map: fractions in [0, 1]",
    "brain": "measures in the brain are over the voxels of the brain mask; the others over the whole volume, "
    "background included, which raises PSNR and SSIM",
    "PSNR": "-10 lg(mean squared error); an error below 1e-10 counts as 1e-10 (100 dB)",
    "SSIM": "three-dimensional, k1 0.01, k2 0.03; over the places where the whole window lies inside the volume; in "
    "the brain, over those of them whose central voxel is in the mask",
    "correlation": "Pearson's, over the voxels of the mask; none where a map is constant there",
    "flattened SSIM and PSNR": "as published: maps to (D H W, 3), window of 7 along the voxel order, so that the SSIM "
    "is one-dimensional; data range largest minus smallest true value of all maps; background counts; not comparable "
    "with a 3-D SSIM",
}
_WINDOW = 7  # of the flattened SSIM; scikit-image's default


@dataclass(frozen=True)
class SSIMWindow:
    """The window over which SSIM compares local means, variances and the covariance.

    Attributes:
        kind: "gaussian" (Wang et al. 2004: 11, sigma 1.5) or "uniform" (scikit-image: 7).
        size: side in voxels, odd.
        sigma: standard deviation of the Gaussian, voxels.
    """

    kind: str = "gaussian"
    size: int = 11
    sigma: float = 1.5

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "uniform"):
            raise ValueError(f"kind: expected gaussian or uniform, got {self.kind!r}")
        if self.size < 3 or self.size % 2 == 0:
            raise ValueError(f"size: expected an odd number of at least 3, got {self.size}")

    @property
    def note(self) -> str:
        """In words, for a report."""
        sigma = f", sigma {self.sigma:g}" if self.kind == "gaussian" else ""
        return f"3-D SSIM, {self.kind} window of {self.size}{sigma}, data range 1"

    def local_map(self, pred: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """SSIM of each place where the whole window lies inside: MONAI's.

        Args:
            pred, true: (C, X, Y, Z) float in [0, 1].

        Returns:
            (C, X - size + 1, Y - size + 1, Z - size + 1); entry i belongs to voxel i + size // 2.

        Raises:
            ValueError: the volume is smaller than the window.
        """
        if min(true.shape[1:]) < self.size:
            raise ValueError(
                f"maps: expected at least {self.size} voxels along each axis for the SSIM, got "
                f"{tuple(true.shape[1:])}; use a smaller window, or evaluate larger volumes"
            )
        # Channel by channel: MONAI keeps some ten volumes at a time.
        maps = [
            compute_ssim_and_cs(
                one[None, None],
                two[None, None],
                spatial_dims=3,
                kernel_size=[self.size] * 3,
                kernel_sigma=[self.sigma] * 3,
                data_range=1.0,
                kernel_type=self.kind,
            )[0][0, 0]
            for one, two in zip(pred, true, strict=True)
        ]
        return torch.stack(maps)


_DEFAULT_WINDOW = SSIMWindow()


@torch.no_grad()
def map_scores(
    pred: torch.Tensor, true: torch.Tensor, brain: torch.Tensor, *, window: SSIMWindow = _DEFAULT_WINDOW
) -> dict[str, float]:
    """All ``MEASURES`` of each map and the ``FLATTENED`` ones of all together; see ``CONVENTIONS``.

    Args:
        pred, true: (3, X, Y, Z) NDI, ODI, FWF in [0, 1], on one device.
        brain: (1, X, Y, Z), inside where > 0.5.
        window: of the 3-D SSIM.

    Returns:
        ``ndi_psnr_brain``, ... -> value; NaN for a correlation of a constant, and for the SSIM in a brain that lies
        nowhere but at the border of the volume.

    Raises:
        ValueError: other shapes, an empty mask, or a volume smaller than the window.
    """
    pred, true, brain = (part.detach().as_subclass(torch.Tensor).float() for part in (pred, true, brain))
    if true.ndim != 4 or len(true) != len(MAPS) or pred.shape != true.shape or brain.shape != (1, *true.shape[1:]):
        raise ValueError(
            f"maps: expected truth and estimate (3, X, Y, Z) and a mask (1, X, Y, Z), got {tuple(true.shape)}, "
            f"{tuple(pred.shape)} and {tuple(brain.shape)}"
        )
    inside = brain[0] > 0.5
    if not inside.any():
        raise ValueError("brain: expected voxels inside the mask (above 0.5), got none; check the mask")
    error = pred.double() - true.double()
    found = errors_within(error, torch.ones_like(error))
    found |= {f"{name}_brain": v for name, v in errors_within(error, inside.double().expand_as(error)).items()}
    local = window.local_map(pred, true).double()
    margin = window.size // 2
    kept = inside[tuple(slice(margin, length - margin) for length in inside.shape)]
    found["ssim"] = local.flatten(1).mean(1)
    found["ssim_brain"] = local[:, kept].mean(1)  # of nothing: NaN
    found["correlation_brain"] = _correlation(pred[:, inside].double(), true[:, inside].double())
    columns = {f"{key}_{name}": float(found[name][row]) for row, key in enumerate(MAPS) for name in MEASURES}
    return columns | flattened_scores(pred, true)


def _correlation(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """(C, V), (C, V) -> (C,)."""
    one, two = (part - part.mean(1, keepdim=True) for part in (one, two))
    return (one * two).sum(1) / (one.square().sum(1) * two.square().sum(1)).sqrt()


def flattened_scores(pred: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """PSNR and SSIM as the article computes them: ``FLATTENED``.

    Both volumes are transposed to (D, H, W, 3) and flattened to (D H W, 3); then
    ``skimage.metrics.structural_similarity(..., channel_axis=1, data_range=max - min of the truth)``. What that does to
    a line of voxels is written out here, since scikit-image is no dependency of the bundles; a test holds both equal.
    **One-dimensional, and not comparable with a 3-D SSIM.**

    Args:
        pred, true: (3, D, H, W).

    Returns:
        NaN where the truth is constant over all maps.
    """
    x, y = (part.detach().as_subclass(torch.Tensor).cpu().double().numpy() for part in (pred, true))
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    span = float(y.max() - y.min())
    if span == 0:
        return dict.fromkeys(FLATTENED, math.nan)
    mse = max(float(((x - y) ** 2).mean()), 1e-10 * span**2)
    ssim = [_line_ssim(one, two, span) for one, two in zip(x, y, strict=True)]
    return {"flattened_psnr": 10 * math.log10(span**2 / mse), "flattened_ssim": float(np.mean(ssim))}


def _line_ssim(x: np.ndarray, y: np.ndarray, span: float) -> float:
    """Mean SSIM of two lines (V,), uniform window, sample covariance."""

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter1d(values, _WINDOW)[_WINDOW // 2 : -(_WINDOW // 2)]

    mean_x, mean_y = mean(x), mean(y)
    unbiased = _WINDOW / (_WINDOW - 1)
    var_x, var_y = unbiased * (mean(x * x) - mean_x**2), unbiased * (mean(y * y) - mean_y**2)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
