# SPDX-License-Identifier: Apache-2.0
"""Plain least-squares fit of the phantoms' own signal model (`phantoms.noddi_signal`) to diffusion MRI.

    python -m tools.fit_noddi --dwi F.nii.gz --out DIR [--bval F.bval] [--bvec F.bvec] [--mask M.nii.gz]

A reference for tests and for judging how well the model describes a scan. It is not AMICO and not the NODDI toolbox,
whose maps are what one trains on: there is no regularisation, no model of Rician noise and no fading in free water,
where NDI and ODI are arbitrary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dipy.core.gradients import gradient_table
from dipy.reconst.dti import TensorModel

from shared.diffusion_series import gradient_files_of
from shared.gradients import GradientTable, read_gradients
from shared.nifti_files import grid_image, save_image, space_of
from tools.command_line import run
from tools.phantoms.noddi_signal import D_ISO, noddi_signal

__all__ = ["NoddiFit", "fit_noddi", "fit_signal"]

GRID = {"ndi": np.linspace(0.05, 0.95, 13), "odi": np.linspace(0.03, 0.95, 13)}
STEPS = 25
TENSOR_B = 1500.0  # s/mm2, up to which the tensor describes the signal
_DELTA = 1e-3


@dataclass(frozen=True)
class NoddiFit:
    """Maps (V,) in [0, 1], unit `directions` (V, 3) in the frame of the vectors, and `residual` (V,): root mean square
    of measured minus fitted signal over the weighted volumes, as a share of the mean b = 0 signal."""

    ndi: np.ndarray
    odi: np.ndarray
    fwf: np.ndarray
    directions: np.ndarray
    residual: np.ndarray


def fit_noddi(dwi: str, out: str, bval: str = "", bvec: str = "", mask: str = "") -> str:
    """Fit NDI, ODI and FWF in every voxel and write `ndi`, `odi`, `fwf` and `residual` as `.nii.gz` into a folder.

    Args:
        dwi: 4-D NIfTI.
        out: folder to write into; made if absent.
        bval, bvec: gradients in FSL layout; empty takes the files beside the images.
        mask: 3-D NIfTI on the grid of `dwi`; empty takes voxels whose mean b = 0 signal is above a tenth of its 99th
            percentile.

    Returns:
        A line with the number of voxels and the median residual.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: images that are not 4-D, a mask of another shape, or gradients that do not fit.
    """
    for path in filter(None, (dwi, mask)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a NIfTI file, but it does not exist")
    image: Any = nib.load(dwi)
    if len(image.shape) != 4:
        raise ValueError(f"{dwi}: expected 4 dimensions (X, Y, Z, volumes), got shape {image.shape}")
    table = read_gradients(*gradient_files_of({"bval": bval, "bvec": bvec}, dwi), num_volumes=image.shape[3])
    signal = np.asarray(image.dataobj, dtype=np.float32)
    b0 = signal[..., table.b0].mean(axis=-1)
    brain: Any = nib.load(mask) if mask else None
    inside = np.asarray(brain.dataobj) > 0 if mask else b0 > 0.1 * np.percentile(b0, 99)
    if inside.shape != b0.shape:
        raise ValueError(f"{mask}: expected the grid of the images {b0.shape}, got {inside.shape}")
    inside &= b0 > 0
    fit = fit_signal(signal[inside], table)
    for name in ("ndi", "odi", "fwf", "residual"):
        volume = np.zeros(b0.shape, dtype=np.float32)
        volume[inside] = getattr(fit, name)
        save_image(grid_image(volume, image.affine, code=space_of(image)), Path(out) / f"{name}.nii.gz")
    return f"{out}: {int(inside.sum())} voxels, median residual {np.median(fit.residual):.4f} of the b = 0 signal"


def fit_signal(signal: np.ndarray, table: GradientTable, *, steps: int = STEPS) -> NoddiFit:
    """Fit voxels: direction from the tensor, best of a grid of NDI and ODI (FWF in closed form), then
    Levenberg and Marquardt's method on NDI, ODI, FWF and direction within their bounds.

    Args:
        signal: (V, N) in any unit, b = 0 volumes included.
        table: N gradients.
        steps: of the refinement; 0 leaves the grid's answer.
    """
    weighted = ~table.b0
    bvals, bvecs = np.asarray(table.bvals, dtype=float)[weighted], np.asarray(table.bvecs, dtype=float)[weighted]
    # nearly equal b-values as one: the model is evaluated for each
    bvals = 5 * np.round(bvals / 5)
    b0 = np.maximum(signal[:, table.b0].mean(axis=1, keepdims=True), 1e-6)
    measured = (signal[:, weighted] / b0).astype(np.float64)
    directions = _tensor_directions(signal, table)
    best = np.full(len(signal), np.inf)
    found = np.zeros((len(signal), 3))
    water = np.exp(-bvals * D_ISO)
    zeros = np.zeros(len(signal))
    for ndi in GRID["ndi"]:
        for odi in GRID["odi"]:
            tissue = noddi_signal(zeros + ndi, zeros + odi, zeros, directions, bvals, bvecs).astype(np.float64)
            towards = water - tissue
            share = np.clip(((measured - tissue) * towards).sum(axis=1) / (towards**2).sum(axis=1), 0, 0.99)
            cost = ((measured - tissue - share[:, None] * towards) ** 2).sum(axis=1)
            better = cost < best
            best[better] = cost[better]
            found[better] = np.stack([zeros + ndi, zeros + odi, share], axis=1)[better]
    found, directions, best = _refine(found, directions, best, (measured, bvals, bvecs), steps)
    ndi, odi, fwf = found.T.astype(np.float32)
    return NoddiFit(ndi, odi, fwf, directions, np.sqrt(best / len(bvals)))


def _tensor_directions(signal: np.ndarray, table: GradientTable) -> np.ndarray:
    """Principal directions (V, 3) of the diffusion tensor."""
    bvals = np.asarray(table.bvals, dtype=float)
    low = (bvals <= TENSOR_B) if (bvals[~table.b0] <= TENSOR_B).sum() >= 6 else np.ones(len(bvals), dtype=bool)
    gradients = gradient_table(np.where(table.b0, 0.0, bvals)[low], bvecs=np.asarray(table.bvecs)[low], atol=0.05)
    evecs = TensorModel(gradients).fit(np.maximum(signal[:, low], 1e-6)).evecs[..., 0]
    return evecs / np.maximum(np.linalg.norm(evecs, axis=1, keepdims=True), 1e-9)


def _tangents(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors across each direction and each other."""
    helper = np.where(np.abs(directions[:, :1]) < 0.7, [[1.0, 0, 0]], [[0, 1.0, 0]])
    one = np.cross(directions, helper)
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    return one, np.cross(directions, one)


def _turn(directions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    one, two = _tangents(directions)
    turned = directions + angles[:, :1] * one + angles[:, 1:] * two
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


def _refine(
    values: np.ndarray,
    directions: np.ndarray,
    cost: np.ndarray,
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
    steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levenberg and Marquardt for all voxels at once, with a damping each; `values` (V, 3) stay in [0, 1]."""
    measured, bvals, bvecs = data

    def model(three: np.ndarray, along: np.ndarray) -> np.ndarray:
        return noddi_signal(three[:, 0], three[:, 1], three[:, 2], along, bvals, bvecs).astype(np.float64)

    damping = np.full(len(values), 1e-2)
    for _ in range(steps):
        centre = model(values, directions)
        columns = []
        for index in range(3):
            # inwards at the upper bound
            delta = np.where(values[:, index] > 0.5, -_DELTA, _DELTA)
            moved = values.copy()
            moved[:, index] += delta
            columns.append((model(moved, directions) - centre) / delta[:, None])
        for axis in np.eye(2):
            angles = np.broadcast_to(axis * 10 * _DELTA, (len(values), 2))
            columns.append((model(values, _turn(directions, angles)) - centre) / (10 * _DELTA))
        jacobian = np.stack(columns, axis=2)
        slope = np.einsum("vnp,vn->vp", jacobian, measured - centre)
        # a value at its bound that wants out stays there
        stuck = ((values <= 0) & (slope[:, :3] < 0)) | ((values >= 1) & (slope[:, :3] > 0))
        jacobian[:, :, :3] *= ~stuck[:, None]
        slope[:, :3] *= ~stuck
        curvature = np.einsum("vnp,vnq->vpq", jacobian, jacobian)
        scale = np.einsum("vpp->vp", curvature)
        curvature += (damping[:, None] * scale + 1e-9)[:, :, None] * np.eye(5)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        tried = np.clip(values + step[:, :3], 0, 1)
        turned = _turn(directions, np.clip(step[:, 3:], -0.3, 0.3))
        new = ((measured - model(tried, turned)) ** 2).sum(axis=1)
        better = new < cost
        values = np.where(better[:, None], tried, values)
        directions = np.where(better[:, None], turned, directions)
        cost = np.where(better, new, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-7, 1e4)
    return values, directions, cost


def main() -> None:
    """Command line."""
    run(fit_noddi, name="python -m tools.fit_noddi")


if __name__ == "__main__":
    main()
