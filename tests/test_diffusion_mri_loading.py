# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from shared.diffusion_features import DirectionFeatures, RotationInvariantFeatures
from shared.diffusion_series import Series
from shared.gradients import GradientTable
from shared.resolution import doubled_affine
from shared.transforms.diffusion_mri import (
    LoadBrainMaskd,
    LoadDiffusionFeaturesd,
    LoadNoddiMapsd,
    load_brain,
    load_features,
    load_maps,
)
from tests.conftest import HANDBOOK

DATA = HANDBOOK / "data" / "dmri2noddi"
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="real diffusion data is not here")
SHAPE = (6, 7, 5)
RAS = np.array([[2.0, 0, 0, -5], [0, 2.5, 0, -7], [0, 0, 3, 4], [0, 0, 0, 1]])
# stored axes: left to right flipped, superior second, anterior third and flipped, tilted
OBLIQUE = np.array([[-2.0, 0.1, 0.2, 9], [0.1, 0.15, -2.5, -7], [0.1, 3, 0.2, 4], [0, 0, 0, 1]])
BVALS = np.array([0, 1000, 1000, 2000, 5, 1000, 2000.0])
FEATURES = DirectionFeatures(num_directions=5)


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> str:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return str(path)


def make_item(folder: Path, affine: np.ndarray = RAS, **replaced: Any) -> dict[str, Any]:
    """A series with a table beside it, maps, and masks on both grids."""
    rng = np.random.default_rng(0)
    signal = rng.uniform(100, 200, (*SHAPE, 7)).astype(np.float32)
    signal[..., BVALS < 50] += 200
    bvecs = rng.normal(size=(7, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    item = {"dwi": save(folder / "dwi.nii.gz", replaced.get("signal", signal), affine)}
    for suffix, values in ((".bval", BVALS[None]), (".bvec", bvecs.T)):
        np.savetxt(folder / f"dwi{suffix}", values)
        item[suffix[1:]] = str(folder / f"dwi{suffix}")
    fine = tuple(2 * size for size in SHAPE)
    for key in ("ndi", "odi", "fwf"):
        values = rng.uniform(0, 1, fine).astype(np.float32)
        item[key] = save(folder / f"{key}.nii.gz", replaced.get(key, values), doubled_affine(affine))
    inside = np.zeros(SHAPE, np.uint8)
    inside[1:5, 2:6, 1:4] = 1
    inside[1, 2, 1] = 0
    item["mask"] = save(folder / "mask.nii.gz", inside, affine)
    save(folder / "fine_mask.nii.gz", inside.repeat(2, 0).repeat(2, 1).repeat(2, 2), doubled_affine(affine))
    return item


def in_ras(values: np.ndarray, affine: np.ndarray) -> MetaTensor:
    """What MONAI's Orientation makes of channels in file order."""
    return Orientation(axcodes="RAS", labels=None)(
        MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine))
    )


@pytest.mark.parametrize("affine", [RAS, OBLIQUE], ids=["ras", "oblique"])
def test_features_come_out_in_ras_with_their_geometry(tmp_path: Path, affine: np.ndarray):
    item = make_item(tmp_path, affine)
    signal = nibabel.load(item["dwi"]).get_fdata(dtype=np.float32)
    mask = nibabel.load(item["mask"]).get_fdata() > 0
    table = GradientTable(BVALS, np.zeros((7, 3)))
    expected = in_ras(FEATURES(signal, table, mask), affine)
    got = load_features(item, FEATURES)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(got.affine, expected.affine, atol=1e-12)
    np.testing.assert_allclose(got.meta["original_affine"], affine, atol=1e-6)
    assert got.meta["original_axcodes"] == {2.0: "RAS", -2.0: "LSP"}[affine[0, 0]]
    assert got.meta["filename_or_obj"] == item["dwi"]
    assert tuple(got.meta["spatial_shape"]) == SHAPE
    assert got.applied_operations == []


@pytest.mark.parametrize("affine", [RAS, OBLIQUE], ids=["ras", "oblique"])
def test_maps_and_brain_lie_on_the_doubled_grid_of_the_features(tmp_path: Path, affine: np.ndarray):
    item = make_item(tmp_path, affine)
    features, maps, brain = load_features(item, FEATURES), load_maps(item), load_brain(item)
    fine = tuple(2 * size for size in features.shape[1:])
    assert maps.shape == (3, *fine)
    assert brain.shape == (1, *fine)
    for tensor in (maps, brain):
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.affine, doubled_affine(features.affine), atol=1e-6)
    stored = np.stack([nibabel.load(item[key]).get_fdata(dtype=np.float32) for key in ("ndi", "odi", "fwf")])
    np.testing.assert_array_equal(maps.numpy(), in_ras(stored, doubled_affine(affine)).numpy())
    inside = (features.sum(0) > 0).numpy()
    np.testing.assert_array_equal(brain[0].numpy(), inside.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert brain.sum() == 8 * (4 * 4 * 3 - 1)


@pytest.mark.parametrize("affine", [RAS, OBLIQUE], ids=["ras", "oblique"])
def test_mask_on_the_doubled_grid_is_the_same(tmp_path: Path, affine: np.ndarray):
    item = make_item(tmp_path, affine)
    fine = item | {"mask": str(tmp_path / "fine_mask.nii.gz")}
    assert torch.equal(load_brain(item), load_brain(fine))
    assert torch.equal(load_features(item, FEATURES), load_features(fine, FEATURES))


def test_mask_stored_in_another_order_of_axes_is_turned(tmp_path: Path):
    item = make_item(tmp_path, OBLIQUE)
    image = nibabel.as_closest_canonical(nibabel.load(item["mask"]))
    turned = item | {"mask": save(tmp_path / "turned.nii.gz", np.asarray(image.dataobj), image.affine)}
    assert torch.equal(load_features(turned, FEATURES), load_features(item, FEATURES))


def test_a_voxel_is_inside_where_any_of_its_eighths_is(tmp_path: Path):
    item = make_item(tmp_path)
    fine = np.zeros([2 * size for size in SHAPE], np.uint8)
    fine[5, 6, 3] = 1
    item["mask"] = save(tmp_path / "one.nii.gz", fine, doubled_affine(RAS))
    assert load_features(item, FEATURES)[0].nonzero().tolist() == [[2, 3, 1]]
    assert load_brain(item)[0].nonzero().tolist() == [[5, 6, 3]]


def test_without_a_mask_the_foreground_of_b0_is_the_brain(tmp_path: Path):
    signal = np.full((*SHAPE, 7), 3, np.float32)
    signal[1:5, 1:6, 1:4] = 500
    signal[3, 3, 2] = 20  # a hole
    signal[0, 0, 0] = 400  # a speck
    item = make_item(tmp_path, signal=signal)
    del item["mask"]
    expected = np.zeros(SHAPE, bool)
    expected[1:5, 1:6, 1:4] = True
    np.testing.assert_array_equal((load_features(item, FEATURES)[0] > 0).numpy(), expected)
    np.testing.assert_array_equal(load_brain(item)[0].numpy(), expected.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    item = make_item(tmp_path, signal=np.zeros((*SHAPE, 7), np.float32))
    del item["mask"]
    with pytest.raises(ValueError, match=r"dwi\.nii\.gz: expected a positive b0"):
        load_brain(item)


@pytest.mark.parametrize("mask", [True, False])
def test_a_series_is_read_once_for_features_and_brain(tmp_path: Path, monkeypatch, mask: bool):
    signal = np.full((*SHAPE, 7), 3, np.float32)
    signal[1:5, 1:6, 1:4] = 500
    item = make_item(tmp_path, signal=signal)
    if not mask:
        del item["mask"]
    expected = load_brain(item)
    reads: list[str] = []
    read = Series.read
    monkeypatch.setattr(Series, "read", lambda self: (reads.append(self.file.path), read(self))[1])
    result = LoadBrainMaskd()(LoadDiffusionFeaturesd(features=FEATURES)(item))
    assert reads == [item["dwi"]]
    assert torch.equal(result["brain"], expected)
    assert expected.sum() in (8 * 4 * 5 * 3, 8 * 47)
    assert set(result) == {*item, "image", "brain"}
    # The mask of another series is not taken for this one's, nor the foreground for a mask.
    (tmp_path / "other").mkdir()
    other = make_item(tmp_path / "other", signal=np.flip(signal, 0).copy())
    if not mask:
        del other["mask"]
    first = LoadDiffusionFeaturesd(features=FEATURES)(item)
    second = LoadDiffusionFeaturesd(features=FEATURES)({**first, **other})
    assert torch.equal(LoadBrainMaskd()(second)["brain"], load_brain(other))


def test_transforms_put_everything_under_its_name(tmp_path: Path):
    item = make_item(tmp_path)
    result = LoadDiffusionFeaturesd(features=FEATURES)(item)
    result = LoadBrainMaskd()(LoadNoddiMapsd()(result))
    assert {key: tuple(result[key].shape) for key in ("image", "maps", "brain")} == {
        "image": (5, *SHAPE), "maps": (3, 12, 14, 10), "brain": (1, 12, 14, 10),
    }  # fmt: skip
    assert result["dwi"] == item["dwi"]
    one = LoadNoddiMapsd("odi", name="target")(item)["target"]
    assert torch.equal(one[0], result["maps"][1])


def test_a_series_under_image_finds_the_table_beside_it(tmp_path: Path):
    """As MONAI Label hands it over."""
    item = make_item(tmp_path)
    expected = load_features(item, FEATURES)
    label = {"image": item["dwi"], "mask": item["mask"]}
    assert torch.equal(LoadDiffusionFeaturesd(features=FEATURES)(label)["image"], expected)
    (tmp_path / "dwi.bval").rename(tmp_path / "bvals")
    with pytest.raises(FileNotFoundError, match=r"dwi\.nii\.gz: expected its gradients beside it, but dwi\.bval"):
        LoadDiffusionFeaturesd(features=FEATURES)(label)
    (tmp_path / "dwi.bvec").rename(tmp_path / "bvecs")  # as HCP has them
    assert torch.equal(LoadDiffusionFeaturesd(features=FEATURES)(label)["image"], expected)


def test_integers_are_scaled_by_the_header(tmp_path: Path):
    item = make_item(tmp_path)
    image = nibabel.load(item["dwi"])
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "short.nii")
    stored = nibabel.load(tmp_path / "short.nii")
    assert stored.dataobj.slope != 1
    np.testing.assert_allclose(
        load_features(item | {"dwi": str(tmp_path / "short.nii")}, FEATURES), load_features(item, FEATURES), atol=1e-4
    )


def test_maps_alone_need_only_one_even_grid(tmp_path: Path):
    item = {key: value for key, value in make_item(tmp_path, OBLIQUE).items() if key in ("ndi", "odi", "fwf")}
    assert load_maps(item).shape == (3, 12, 10, 14)
    item["fwf"] = save(tmp_path / "odd.nii.gz", np.zeros((11, 14, 10), np.float32), RAS)
    with pytest.raises(ValueError, match=r"odd\.nii\.gz: expected even sizes"):
        load_maps(item, keys=("fwf",))


def test_rounding_beyond_the_range_is_cut(tmp_path: Path):
    values = np.full([2 * size for size in SHAPE], 0.5, np.float32)
    values[0, 0, :2] = [-0.0009, 1.0009]
    maps = load_maps(make_item(tmp_path, fwf=values))
    assert maps[2].min() == 0
    assert maps[2].max() == 1


@pytest.mark.parametrize("value", [-0.002, 1.002, 53.0])
def test_maps_outside_the_range_are_named(tmp_path: Path, value: float):
    values = np.full([2 * size for size in SHAPE], 0.5, np.float32)
    values[3, 2, 1] = value
    with pytest.raises(ValueError, match=r"odi\.nii\.gz: expected fractions in \[0, 1\]"):
        load_maps(make_item(tmp_path, odi=values))


def test_maps_with_nan_are_named(tmp_path: Path):
    values = np.full([2 * size for size in SHAPE], np.nan, np.float32)
    with pytest.raises(ValueError, match=r"ndi\.nii\.gz: expected finite voxels"):
        load_maps(make_item(tmp_path, ndi=values))


@pytest.mark.parametrize(
    ("shape", "shift", "message"),
    [
        (SHAPE, 0.0, r"expected the grid of .*dwi\.nii\.gz at half the voxel size \(12, 14, 10\), but got \(6, 7, 5\)"),
        ((12, 14, 10), 0.02, r"expected the origin .*dwi\.nii\.gz at half the voxel size"),
    ],
    ids=["shape", "affine"],
)
def test_maps_off_the_doubled_grid_are_named(tmp_path: Path, shape: tuple, shift: float, message: str):
    item, affine = make_item(tmp_path), doubled_affine(RAS)
    affine[1, 3] += shift
    item["odi"] = save(tmp_path / "odi.nii.gz", np.zeros(shape, np.float32), affine)
    with pytest.raises(ValueError, match=rf"odi\.nii\.gz: {message}"):
        load_maps(item)


def test_maps_whose_affine_is_that_of_the_series_are_named(tmp_path: Path):
    """The usual slip: up-sampled voxels under the old header, or voxel centres doubled without the shift."""
    item = make_item(tmp_path)
    item["odi"] = save(tmp_path / "odi.nii.gz", np.zeros((12, 14, 10), np.float32), RAS)
    with pytest.raises(ValueError, match=r"odi\.nii\.gz: expected the voxel size"):
        load_maps(item)
    unshifted = RAS @ np.diag([0.5, 0.5, 0.5, 1])
    item["odi"] = save(tmp_path / "odi.nii.gz", np.zeros((12, 14, 10), np.float32), unshifted)
    with pytest.raises(ValueError, match=r"odi\.nii\.gz: expected the origin"):
        load_maps(item)


def test_masks_off_both_grids_are_named(tmp_path: Path):
    item = make_item(tmp_path)
    item["mask"] = save(tmp_path / "mask.nii.gz", np.ones((6, 7, 6), np.uint8), RAS)
    for load in (load_brain, lambda item: load_features(item, FEATURES)):
        with pytest.raises(ValueError, match=r"mask\.nii\.gz: expected a mask on the grid of .* or on the doubled one"):
            load(item)
    moved = RAS.copy()
    moved[0, 3] += 1
    item["mask"] = save(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.uint8), moved)
    with pytest.raises(ValueError, match=r"mask\.nii\.gz: expected the origin"):
        load_brain(item)
    item["mask"] = save(tmp_path / "mask.nii.gz", np.ones((12, 14, 10), np.uint8), RAS)
    with pytest.raises(ValueError, match=r"mask\.nii\.gz: expected the voxel size .* at half the voxel size"):
        load_brain(item)
    item["mask"] = save(tmp_path / "mask.nii.gz", np.zeros(SHAPE, np.uint8), RAS)
    with pytest.raises(ValueError, match=r"mask\.nii\.gz: expected a brain mask, but no voxel"):
        load_brain(item)


def test_bad_series_are_named(tmp_path: Path):
    item = make_item(tmp_path)
    volume = save(tmp_path / "volume.nii.gz", np.ones(SHAPE, np.float32), RAS)
    with pytest.raises(ValueError, match=r"volume\.nii\.gz: expected a 4-D diffusion-weighted series.*\(6, 7, 5\)"):
        load_features(item | {"dwi": volume}, FEATURES)
    data = Path(item["dwi"]).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.nii\.gz: expected a readable file"):
        load_features(item | {"dwi": str(tmp_path / "cut.nii.gz")}, FEATURES)
    with pytest.raises(FileNotFoundError, match=r"none\.nii: expected a 4-D series"):
        load_features(item | {"dwi": str(tmp_path / "none.nii")}, FEATURES)
    with pytest.raises(ValueError, match=r"dwi\.bval: expected a file \.nii"):
        load_features(item | {"dwi": item["bval"]}, FEATURES)
    with pytest.raises(ValueError, match="dwi: expected the path of a series, but the item has the keys"):
        load_features({"mask": item["mask"]}, FEATURES)
    with pytest.raises(ValueError, match="dwi: expected the path of a file, but got int"):
        load_features(item | {"dwi": 3}, FEATURES)
    np.savetxt(tmp_path / "dwi.bval", BVALS[None, :6])
    with pytest.raises(ValueError, match=r"dwi\.bval: expected one b-value for each of the 7 volumes"):
        load_features(item, FEATURES)


def test_a_header_without_geometry_is_named(tmp_path: Path):
    item = make_item(tmp_path)
    header = nibabel.load(item["dwi"]).header
    header["srow_x"] = 0
    header["sform_code"], header["qform_code"] = 1, 0
    flat = nibabel.Nifti1Image(np.ones((*SHAPE, 7), np.float32), None, header)
    item["dwi"] = str(tmp_path / "flat.nii")
    nibabel.save(flat, item["dwi"])
    with pytest.raises(ValueError, match=r"flat\.nii: affine: expected a finite, invertible"):
        load_features(item, FEATURES)


def test_nan_inside_the_brain_is_named_with_the_file(tmp_path: Path):
    item = make_item(tmp_path)
    image = nibabel.load(item["dwi"])
    values = image.get_fdata(dtype=np.float32)
    values[0, 0, 0, 3] = np.nan  # outside the mask
    save(tmp_path / "dwi.nii.gz", values, RAS)
    assert torch.isfinite(load_features(item, FEATURES)).all()
    values[2, 3, 2, 3] = np.nan
    save(tmp_path / "dwi.nii.gz", values, RAS)
    with pytest.raises(ValueError, match=r"dwi\.nii\.gz: signal: expected finite values in every voxel of the brain"):
        load_features(item, FEATURES)


def test_errors_of_features_start_with_the_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dwi\.nii\.gz: gradient table: expected 9 diffusion-weighted volumes"):
        load_features(make_item(tmp_path), DirectionFeatures(num_directions=9))


@NEEDS_DATA
@pytest.mark.parametrize("mask", [True, False])
def test_real_crop_with_several_shells(mask: bool):
    folder = DATA / "mrtrix_msmt"
    item = {"dwi": str(folder / "dwi.nii.gz")} | ({"mask": str(folder / "mask.nii.gz")} if mask else {})
    values = load_features(item, RotationInvariantFeatures())
    assert values.shape == (8, 15, 15, 11)
    assert torch.isfinite(values).all()
    assert 0 <= values.min() <= values.max() <= 1
    assert values.meta["original_axcodes"] == "RAS"


@NEEDS_DATA
def test_real_crop_with_one_shell():
    item = {"image": str(DATA / "small_64D" / "dwi.nii.gz"), "mask": str(DATA / "small_64D" / "mask.nii.gz")}
    with pytest.raises(ValueError, match=r"small_64D.dwi\.nii\.gz: gradient table: missing shell: .* 994 \(64\)"):
        load_features(item, RotationInvariantFeatures())
    values = load_features(item, RotationInvariantFeatures(shells=(1000,)))
    assert values.shape == (5, 10, 10, 10)
    assert values.meta["original_axcodes"] == "PLS"
