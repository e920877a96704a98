# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from shared.diffusion_features import DirectionFeatures, RotationInvariantFeatures, TensorFit
from shared.gradients import GradientTable, read_gradients
from shared.spherical_harmonics import ShellFit
from tests.conftest import HANDBOOK

DATA = HANDBOOK / "data" / "dmri2noddi"
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="real diffusion data is not here")
D = 1.7e-3  # mm2/s, along a fibre


def sphere(count: int) -> np.ndarray:
    """Even directions (Fibonacci)."""
    index = np.arange(count) + 0.5
    z, phi = 1 - 2 * index / count, np.pi * (1 + 5**0.5) * index
    return np.stack([np.cos(phi) * np.sqrt(1 - z**2), np.sin(phi) * np.sqrt(1 - z**2), z], 1)


def table_of(shells: dict[float, np.ndarray], *, num_b0: int = 2) -> GradientTable:
    bvals = [np.zeros(num_b0), *(np.full(len(vectors), float(b)) for b, vectors in shells.items())]
    return GradientTable(np.concatenate(bvals), np.concatenate([np.zeros((num_b0, 3)), *shells.values()]))


DENSE = table_of({1000: sphere(700), 2000: sphere(700)})


class Tissue:
    """Some voxels of dispersed sticks and tensors around them, beside water: their signal for any table."""

    def __init__(self, count: int = 60, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        main = rng.normal(size=(count, 1, 3))
        main /= np.linalg.norm(main, axis=-1, keepdims=True)
        sticks = main + rng.uniform(0.05, 1, (count, 1, 1)) * rng.normal(size=(count, 30, 3))
        self.sticks = sticks / np.linalg.norm(sticks, axis=-1, keepdims=True)
        self.inside, self.water = rng.uniform(0.2, 0.8, (2, count, 1))
        self.water /= 2

    def signal(self, table: GradientTable, *, rotation: np.ndarray | None = None) -> np.ndarray:
        """(5, count / 10, 2, N), b0 of 100."""
        sticks = self.sticks if rotation is None else self.sticks @ rotation.T
        along = (sticks @ table.bvecs.T) ** 2
        weighting = table.bvals * D
        across = (1 - self.inside)[..., None]
        outside = np.exp(-weighting * (across + (1 - across) * along)).mean(1)
        tissue = self.inside * np.exp(-weighting * along).mean(1) + (1 - self.inside) * outside
        values = (1 - self.water) * tissue + self.water * np.exp(-table.bvals * 3e-3)
        return 100 * values.reshape(5, -1, 2, len(table.bvals))


def test_isotropic_voxels_have_closed_forms():
    diffusivity = 1.2e-3
    signal = np.exp(-DENSE.bvals * diffusivity) * np.full((3, 4, 2, 1), 250.0)
    features = RotationInvariantFeatures()
    values = dict(zip(features.names, features(signal, DENSE), strict=True))
    assert list(values) == [
        "mean_b1000", "power2_b1000", "power4_b1000", "mean_b2000", "power2_b2000", "power4_b2000", "fa", "md",
    ]  # fmt: skip
    np.testing.assert_allclose(values["mean_b1000"], np.exp(-1.2), rtol=1e-6)
    np.testing.assert_allclose(values["mean_b2000"], np.exp(-2.4), rtol=1e-6)
    np.testing.assert_allclose(values["md"], diffusivity / 3e-3, rtol=1e-6)
    for name in ("power2_b1000", "power4_b1000", "power2_b2000", "power4_b2000", "fa"):
        np.testing.assert_allclose(values[name], 0, atol=1e-6)


def test_a_stick_has_its_known_mean_and_power():
    """Spherical mean of a stick: sqrt(pi / 4 bD) erf(sqrt(bD)); its parts by Gauss-Legendre quadrature."""
    signal = np.exp(-DENSE.bvals * D * DENSE.bvecs[:, 0] ** 2).reshape(1, 1, 1, -1)
    features = RotationInvariantFeatures(tensor=False)
    got = dict(zip(features.names, features(signal, DENSE)[:, 0, 0, 0], strict=True))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for b in (1000, 2000):
        values = np.exp(-b * D * nodes**2)
        assert got[f"mean_b{b}"] == pytest.approx((weights * values).sum() / 2, rel=1e-4)
        for order in (2, 4):
            legendre = np.polynomial.legendre.Legendre.basis(order)(nodes)
            part = (2 * order + 1) / 2 * (weights * values * legendre).sum()
            rms = abs(part) / np.sqrt(2 * order + 1)
            assert got[f"power{order}_b{b}"] == pytest.approx(2 * rms, rel=0.05)  # the penalty takes 4 % of order 4


def test_tensor_has_its_known_fa_and_md():
    values = np.array([1.7e-3, 0.4e-3, 0.3e-3])
    rotation = Rotation.from_euler("xyz", [20, 50, 70], degrees=True).as_matrix()
    tensor = rotation @ np.diag(values) @ rotation.T
    table = table_of({1000: sphere(30), 2900: sphere(40)})
    exponent = np.einsum("ni,ij,nj->n", table.bvecs, tensor, table.bvecs)
    signal = np.where(table.bvals > 2000, 0.9, np.exp(-table.bvals * exponent)).reshape(1, 1, 1, -1)
    features = RotationInvariantFeatures(shells=(1000,), orders=(2,))
    *_, fa, md = features(signal, table)[:, 0, 0, 0]  # the absurd upper shell is not looked at
    assert fa == pytest.approx(np.sqrt(1.5 * ((values - values.mean()) ** 2).sum() / (values**2).sum()), rel=1e-5)
    assert md == pytest.approx(values.mean() / 3e-3, rel=1e-5)
    _, main = TensorFit(table).directions(signal[0, 0])
    assert abs(main[0] @ rotation[:, 0]) == pytest.approx(1, abs=1e-6)


def test_turning_everything_changes_nothing():
    tissue, features = Tissue(), RotationInvariantFeatures()
    rotation = Rotation.from_euler("zyx", [35, -50, 110], degrees=True).as_matrix()
    turned = GradientTable(DENSE.bvals, DENSE.bvecs @ rotation.T)
    expected = features(tissue.signal(DENSE), DENSE)
    np.testing.assert_allclose(
        features(tissue.signal(turned, rotation=rotation), turned), expected, rtol=1e-6, atol=1e-7
    )
    # turned fibres under the same directions: equal up to what 700 directions leave open
    np.testing.assert_allclose(features(tissue.signal(DENSE, rotation=rotation), DENSE), expected, atol=2e-3)


def test_mirrored_axes_change_nothing():
    tissue, features = Tissue(), RotationInvariantFeatures()
    mirrored = GradientTable(DENSE.bvals, DENSE.bvecs * [-1, 1, 1])
    signal = tissue.signal(DENSE)
    np.testing.assert_allclose(features(signal, mirrored), features(signal, DENSE), rtol=1e-5, atol=1e-7)


def test_uneven_directions_do_not_bias_the_mean():
    rng = np.random.default_rng(1)
    crowded = sphere(400)
    crowded = crowded[rng.random(400) < 0.04 + 0.5 * np.abs(crowded[:, 2]) ** 4]  # most of them near z
    even, uneven = table_of({1000: sphere(len(crowded))}), table_of({1000: crowded})
    signal = np.exp(-uneven.bvals * D * uneven.bvecs[:, 2] ** 2).reshape(1, 1, 1, -1)  # a fibre along z
    features = RotationInvariantFeatures(shells=(1000,), tensor=False)
    plain = signal[..., ~uneven.b0].mean()
    truth = features(np.exp(-even.bvals * D * even.bvecs[:, 2] ** 2).reshape(1, 1, 1, -1), even)[0].item()
    assert abs(plain - truth) > 0.1
    assert features(signal, uneven)[0].item() == pytest.approx(truth, abs=0.005)


def test_noise_is_taken_off_the_power():
    """The power of noise alone falls with the number of directions; a protocol must not show in the features."""
    features = RotationInvariantFeatures(shells=(1000,), tensor=False)
    medians = {}
    for count in (30, 90):
        table = table_of({1000: sphere(count)}, num_b0=20)
        rng = np.random.default_rng(0)
        signal = np.where(table.b0, 1.0, 0.4) + 0.05 * rng.normal(size=(20, 20, 5, len(table.bvals)))
        medians[count] = np.median(features(signal, table)[1:], axis=(1, 2, 3))
    fit = ShellFit(sphere(30), indices=np.arange(30), order=4)
    raw, _ = fit.fit(0.4 + 0.05 * np.random.default_rng(0).normal(size=(2000, 30)))
    biased = np.median(fit.strengths(raw, (2, 4), variance=np.zeros(2000)), axis=0)
    assert (medians[30] < 0.45 * biased).all()
    assert (medians[90] < 0.3 * biased).all()


def test_wanted_shells_between_measured_ones_are_interpolated():
    """A mono-exponential mean is log-linear in b: exact. Beyond the last shell (13 %) it goes on."""
    table = table_of({700: sphere(40), 1200: sphere(40), 1760: sphere(40)})
    signal = np.exp(-table.bvals * 0.9e-3).reshape(1, 1, 1, -1)
    features = RotationInvariantFeatures(shells=(650, 1000, 2000), tensor=False, orders=())
    np.testing.assert_allclose(features(signal, table)[:, 0, 0, 0], np.exp(-0.9 * np.array([0.65, 1, 2])), rtol=1e-5)


def test_interpolated_features_are_near_those_of_the_measured_shell():
    tissue, features = Tissue(), RotationInvariantFeatures(shells=(1000,), tensor=False)
    between = table_of({700: sphere(64), 1200: sphere(64)})
    np.testing.assert_allclose(
        features(tissue.signal(between), between), features(tissue.signal(DENSE), DENSE), atol=0.015
    )


def test_outside_the_mask_everything_is_zero_and_unseen():
    tissue, features = Tissue(), RotationInvariantFeatures()
    signal = tissue.signal(DENSE)
    mask = np.zeros(signal.shape[:3], bool)
    mask[1:3, :4, 1] = True
    expected = features(signal, DENSE) * mask
    signal[~mask] = np.nan
    np.testing.assert_array_equal(features(signal, DENSE, mask), expected)


def test_memory_order_and_type_do_not_matter():
    tissue, features = Tissue(), RotationInvariantFeatures()
    signal = tissue.signal(DENSE)
    turned = np.asfortranarray(signal.astype(np.float32))[::-1].transpose(2, 0, 1, 3)
    np.testing.assert_allclose(
        features(turned, DENSE), features(signal, DENSE)[:, ::-1].transpose(0, 3, 1, 2), atol=1e-5
    )


def test_many_voxels_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch):
    signal, features = Tissue().signal(DENSE), RotationInvariantFeatures()
    expected = features(signal, DENSE)
    monkeypatch.setattr("shared.diffusion_features._CHUNK", 7)
    np.testing.assert_allclose(features(signal, DENSE), expected, rtol=1e-6)


def test_values_stay_in_range_with_noise():
    table = table_of({1000: sphere(30), 2000: sphere(60)})
    signal = np.abs(np.random.default_rng(0).normal(1, 2, size=(6, 5, 4, len(table.bvals)))) + 0.01
    for features in (RotationInvariantFeatures(), DirectionFeatures(num_directions=90)):
        values = features(signal, table)
        assert values.dtype == np.float32
        assert values.shape == (features.num_channels, 6, 5, 4)
        assert len(features.names) == features.num_channels
        assert np.isfinite(values).all()
        assert 0 <= values.min() <= values.max() <= 1


def test_direction_channels_are_sorted_by_shell():
    bvals = np.array([2000, 0, 1000, 2010, 990, 0.0])
    table = GradientTable(bvals, np.where(bvals[:, None] > 50, sphere(6), 0))
    signal = np.array([0.2, 9.0, 0.5, 0.21, 0.51, 11.0]) * np.array([10, 1, 10, 10, 10, 1.0])
    features = DirectionFeatures(num_directions=4)
    np.testing.assert_allclose(
        features(signal.reshape(1, 1, 1, -1), table)[:, 0, 0, 0], [0.5, 0.51, 0.2, 0.21], rtol=1e-6
    )
    with pytest.raises(ValueError, match="gradient table: expected 3 diffusion-weighted volumes, but got 4"):
        DirectionFeatures(num_directions=3)(signal.reshape(1, 1, 1, -1), table)


@pytest.mark.parametrize(
    ("shells", "message"),
    [
        ({1000: sphere(30)}, r"missing shell: expected b-values around 2000 .* 1000 \(30\)"),
        ({2000: sphere(30)}, r"missing shell: expected b-values around 1000 .* 2000 \(30\)"),
        ({1000: sphere(30), 1700: sphere(30)}, "missing shell: expected b-values around 2000"),
        ({1000: sphere(14), 2000: sphere(30)}, r"too few directions: expected at least 15 .* b = 1000 has 14"),
        (
            {1000: sphere(30), 2000: np.repeat(sphere(10), 3, axis=0)},
            r"too few directions: expected at least 15 .* b = 2000 has 30",
        ),
    ],
    ids=["single", "no low", "too far", "few", "repeated"],
)
def test_unfit_tables_are_named(shells: dict[float, np.ndarray], message: str):
    table = table_of(shells)
    with pytest.raises(ValueError, match=f"^gradient table: {message}"):
        RotationInvariantFeatures()(np.ones((2, 3, 4, len(table.bvals))), table)


def test_a_table_without_a_tensor_shell_is_named():
    table = table_of({1800: sphere(30), 3000: sphere(30)})
    signal = np.ones((2, 3, 4, len(table.bvals)))
    with pytest.raises(ValueError, match="^gradient table: too few directions: expected at least 6 .*but got 0"):
        RotationInvariantFeatures(shells=(2000,))(signal, table)
    assert RotationInvariantFeatures(shells=(2000,), tensor=False)(signal, table).shape == (3, 2, 3, 4)


@NEEDS_DATA
def test_a_real_grid_scheme_is_refused_with_its_shells():
    name = DATA / "gradient_tables" / "nifreeze_ds004737_dsi"
    table = read_gradients(f"{name}.bval", f"{name}.bvec")
    with pytest.raises(ValueError, match=r"too few directions.*b = 996 has 7 volumes.*not DSI"):
        RotationInvariantFeatures()(np.ones((2, 3, 4, len(table.bvals))), table)


def test_bad_signals_are_named():
    features, signal = RotationInvariantFeatures(), Tissue().signal(DENSE)
    mask = np.ones(signal.shape[:3], bool)
    with pytest.raises(ValueError, match=r"^signal: expected the shape \(X, Y, Z, 1402\).*got \(5, 6, 2, 9\)"):
        features(signal[..., :9], DENSE, mask)
    with pytest.raises(ValueError, match=r"^mask: expected the shape \(5, 6, 2\)"):
        features(signal, DENSE, mask[:, :, :1])
    for value in (np.nan, np.inf):
        bad = signal.copy()
        bad[2, 3, 1, 700] = value
        with pytest.raises(ValueError, match="^signal: expected finite values in every voxel of the brain, but 1"):
            features(bad, DENSE, mask)
    bad = signal.copy()
    bad[2, 3, 1, 0] = np.nan
    with pytest.raises(ValueError, match="^signal: expected finite values"):
        features(bad, DENSE, mask)
    bad = signal.copy()
    bad[0, 0, :, :2] = [0, -1]
    with pytest.raises(ValueError, match="^signal: expected a positive b0 inside the mask.* in 2 of 60 voxels"):
        features(bad, DENSE, mask)


def test_a_few_dead_voxels_at_the_rim_are_left_out():
    table = table_of({1000: sphere(20), 2000: sphere(20)})
    signal = np.ones((10, 11, 2, len(table.bvals)))
    signal[3, 4, 1] = 0
    values = RotationInvariantFeatures()(signal, table, np.ones((10, 11, 2), bool))
    assert not values[:, 3, 4, 1].any()
    assert (values[0] > 0).sum() == 219


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="^shells: expected rising b-values"):
        RotationInvariantFeatures(shells=(2000, 1000))
    with pytest.raises(ValueError, match="^orders: expected even numbers"):
        RotationInvariantFeatures(orders=(1, 2))
    with pytest.raises(ValueError, match="^num_directions: expected at least 1"):
        DirectionFeatures(num_directions=0)
    assert repr(RotationInvariantFeatures(shells=[1000])) == repr(RotationInvariantFeatures(shells=(1000.0,)))


@NEEDS_DATA
def test_two_real_protocols_give_the_same_features():
    tables = DATA / "gradient_tables"
    features, tissue = RotationInvariantFeatures(), Tissue(200)
    hcp, mdt = (
        features(tissue.signal(table), table)
        for table in (
            read_gradients(tables / f"{name}.bval", tables / f"{name}.bvec") for name in ("hcp_wu_minn", "mdt_b1k_b2k")
        )
    )
    np.testing.assert_allclose(hcp, mdt, atol=3e-3)
    assert (hcp.std(axis=(1, 2, 3)) > 0.01).all()


@NEEDS_DATA
def test_features_of_a_real_crop_are_plausible():
    import nibabel

    folder = DATA / "mrtrix_msmt"
    signal = nibabel.load(Path(folder / "dwi.nii.gz")).get_fdata(dtype=np.float32)
    mask = nibabel.load(Path(folder / "mask.nii.gz")).get_fdata() > 0
    table = read_gradients(folder / "dwi.bval", folder / "dwi.bvec", num_volumes=signal.shape[3])
    features = RotationInvariantFeatures()
    values = dict(zip(features.names, features(signal, table, mask)[:, mask], strict=True))
    assert 0.1 < np.median(values["fa"]) < 0.5
    assert 0.5e-3 < 3e-3 * np.median(values["md"]) < 1.2e-3
    assert np.median(values["mean_b1000"]) > np.median(values["mean_b2000"]) > 0.1
    assert np.corrcoef(values["fa"], values["power2_b1000"])[0, 1] > 0.4
