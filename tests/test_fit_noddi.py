# SPDX-License-Identifier: Apache-2.0
"""Tests of the reference fit: the truth without noise, maps on disk, and a real multi-shell crop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from shared.gradients import read_gradients
from shared.resolution import block_average
from tests.conftest import HANDBOOK
from tools.fit_noddi import NoddiFit, fit_noddi, fit_signal
from tools.phantoms.dmri2noddi import make_subject
from tools.phantoms.noddi_acquisition import default_table
from tools.phantoms.noddi_signal import noddi_signal

REAL = HANDBOOK / "data" / "dmri2noddi" / "mrtrix_msmt"
MAPS = ("ndi", "odi", "fwf")


def draw(count: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """True values, directions and signals without noise."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ranges = {"ndi": (0.2, 0.8), "odi": (0.03, 0.7), "fwf": (0.0, 0.5)}
    truth = {name: rng.uniform(*ends, count) for name, ends in ranges.items()}
    table = default_table()
    return truth, directions, noddi_signal(*truth.values(), directions, table.bvals, table.bvecs)


def test_recovers_the_truth_without_noise() -> None:
    truth, directions, signal = draw(200)
    fit = fit_signal(1234 * signal, default_table())
    for name in MAPS:
        assert getattr(fit, name) == pytest.approx(truth[name], abs=1e-3)
    assert np.abs((fit.directions * directions).sum(axis=1)) == pytest.approx(1, abs=1e-4)
    assert fit.residual.max() < 1e-4


def test_residual_is_the_noise() -> None:
    _, _, signal = draw(300)
    noisy = signal + 0.02 * np.random.default_rng(1).standard_normal(signal.shape, dtype=np.float32)
    # five of 60 degrees of freedom are fitted; the mean of four b = 0 volumes adds its own error
    assert np.median(fit_signal(noisy, default_table()).residual) == pytest.approx(0.02, rel=0.08)


def test_values_stay_in_range_on_noise() -> None:
    signal = np.abs(np.random.default_rng(2).normal(100, 60, size=(50, len(default_table().bvals))))
    fit = fit_signal(signal, default_table())
    for name in MAPS:
        values = getattr(fit, name)
        assert np.isfinite(values).all()
        assert values.min() >= 0
        assert values.max() <= 1


@pytest.fixture(scope="module")
def phantom() -> SimpleNamespace:
    """A phantom without noise: fit and truth in the low-resolution voxels of tissue."""
    maps, volumes, _ = make_subject(1, shape=(36, 40, 38), snr=None)
    truth = {name: block_average(getattr(maps, name)) for name in MAPS}
    inside = (block_average(maps.mask) == 1) & (truth["fwf"] < 0.5)
    crossing = block_average(maps.share)[inside]
    return SimpleNamespace(
        fit=fit_signal(volumes[inside], default_table()),
        truth={name: values[inside] for name, values in truth.items()},
        crossing=crossing,
    )


def test_finds_the_maps_of_a_phantom(phantom: SimpleNamespace) -> None:
    """Low-resolution voxels mix directions and tissues and weigh water by its brightness: close, not equal."""
    for name, error, correlation in (("ndi", 0.01, 0.95), ("odi", 0.06, 0.85), ("fwf", 0.03, 0.95)):
        found, true = getattr(phantom.fit, name), phantom.truth[name]
        assert np.abs(found - true).mean() < error, name
        assert np.corrcoef(found, true)[0, 1] > correlation, name


def test_equivalent_odi_is_what_a_fit_of_one_bundle_finds_in_crossings(phantom: SimpleNamespace) -> None:
    crossing = phantom.crossing > 0.3
    assert crossing.sum() > 30
    assert (phantom.fit.odi - phantom.truth["odi"])[crossing].mean() == pytest.approx(0, abs=0.03)


def write_scan(folder: Path, signal: np.ndarray) -> Path:
    table = default_table()
    nib.save(nib.Nifti1Image(signal.astype(np.float32), np.diag([2.0, 2.5, 3.0, 1.0])), folder / "scan.nii.gz")
    np.savetxt(folder / "scan.bval", table.bvals[None], fmt="%g")
    np.savetxt(folder / "scan.bvec", table.bvecs.T, fmt="%.6f")
    return folder / "scan.nii.gz"


def test_maps_on_disk(tmp_path: Path) -> None:
    truth, _, signal = draw(2 * 3 * 4)
    volume = 500 * signal.reshape(2, 3, 4, -1)
    volume[0, 0, 0] = 0
    scan = write_scan(tmp_path, volume)
    line = fit_noddi(str(scan), str(tmp_path / "out"))
    assert line.startswith(f"{tmp_path / 'out'}: 23 voxels, median residual 0.0000")
    for name in MAPS:
        image = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert image.get_data_dtype() == np.float32
        assert np.array_equal(image.affine, np.diag([2.0, 2.5, 3.0, 1.0]))
        values = image.get_fdata()
        assert values[0, 0, 0] == 0
        assert values.ravel()[1:] == pytest.approx(truth[name][1:], abs=1e-3)
    assert (tmp_path / "out" / "residual.nii.gz").is_file()

    mask = np.zeros((2, 3, 4), np.uint8)
    mask[1, 2] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    assert ": 4 voxels" in fit_noddi(str(scan), str(tmp_path / "few"), mask=str(tmp_path / "mask.nii.gz"))


def test_bad_files_are_named(tmp_path: Path) -> None:
    scan = write_scan(tmp_path, np.ones((2, 3, 4, len(default_table().bvals))))
    nib.save(nib.Nifti1Image(np.ones((4, 3, 2), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask.nii.gz: expected the grid of the images \(2, 3, 4\), got \(4, 3, 2\)"):
        fit_noddi(str(scan), str(tmp_path / "out"), mask=str(tmp_path / "mask.nii.gz"))
    with pytest.raises(ValueError, match=r"mask.nii.gz: expected 4 dimensions .* got shape \(4, 3, 2\)"):
        fit_noddi(str(tmp_path / "mask.nii.gz"), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"absent.nii.gz: expected a NIfTI file, but it does not exist"):
        fit_noddi(str(tmp_path / "absent.nii.gz"), str(tmp_path / "out"))
    (tmp_path / "scan.bvec").unlink()
    with pytest.raises(FileNotFoundError, match="scan.nii.gz: expected its gradients beside it, but scan.bvec"):
        fit_noddi(str(scan), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="no real diffusion MRI here")
def test_model_describes_a_real_scan_as_well_as_its_noise_allows() -> None:
    def load(name: str) -> np.ndarray:
        return nib.load(REAL / f"{name}.nii.gz").get_fdata(dtype=np.float32)

    inside = load("mask") > 0
    # every fourth voxel is enough and fast
    inside[np.indices(inside.shape).sum(axis=0) % 4 > 0] = False
    signal = load("dwi")[inside]
    table = read_gradients(REAL / "dwi.bval", REAL / "dwi.bvec")
    b0 = signal[:, table.b0]
    noise = np.median(b0.std(axis=1, ddof=1) / b0.mean(axis=1))
    fit: NoddiFit = fit_signal(signal, table)
    assert noise == pytest.approx(0.031, abs=0.002)
    assert np.median(fit.residual) < noise
    assert np.median(fit.residual) > 0.5 * noise
    tissue = load("noddi_ISOVF")[inside] < 0.5
    for name, amico, correlation, difference in (
        ("ndi", "ICVF", 0.94, 0.025), ("odi", "OD", 0.97, 0.025), ("fwf", "ISOVF", 0.99, 0.01),
    ):  # fmt: skip
        found, theirs = getattr(fit, name)[tissue], load(f"noddi_{amico}")[inside][tissue]
        assert np.corrcoef(found, theirs)[0, 1] > correlation, name
        assert (found - theirs).mean() == pytest.approx(0, abs=difference), name
