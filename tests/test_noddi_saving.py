# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, MaskIntensityd, SaveImage
from monai.utils import convert_to_dst_type
from nibabel import orientations
from scipy.spatial.transform import Rotation

from shared.files import save_tensors, sha256_of_file
from shared.gradients import GradientTable
from shared.noddi_items import inference_items
from shared.resolution import doubled_affine, upsample
from shared.transforms.diffusion_mri import LoadBrainMaskd, LoadDiffusionFeaturesd
from shared.transforms.noddi_saving import SaveNoddiMapsd

SHAPE = (7, 5, 6)
MAPS = ("ndi", "odi", "fwf")
SPACING = np.array([1.5, 2.25, 3.0])


def affine_of(axcodes: str, *, angles: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Anisotropic grid with the given axes, turned by some degrees, far from the origin."""
    codes = orientations.axcodes2ornt(tuple(axcodes))
    axes = np.zeros((3, 3))
    for axis, (to, flip) in enumerate(codes):
        axes[int(to), axis] = flip * SPACING[axis]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes
    affine[:3, 3] = (31.5, -17.25, 40.125)
    return affine


def random_affines() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    found = []
    for number in range(6):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.random(random_state=number).as_matrix() * generator.uniform(0.7, 3.5, 3)
        affine[:3, number % 3] *= -1 if number % 2 else 1
        affine[:3, 3] = generator.uniform(-90, 90, 3)
        found.append(affine)
    return found


SHEARED = affine_of("RAS") @ np.array([[1, 0.2, 0, 0], [0, 1, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
AFFINES = {
    **{code: affine_of(code) for code in ("RAS", "LPS", "LAS", "PIR", "SAL", "IPR", "ASR")},
    "oblique": affine_of("LPS", angles=(12, -7, 25)),
    "oblique PIR": affine_of("PIR", angles=(-15, 9, 31)),
    **{f"random {number}": affine for number, affine in enumerate(random_affines())},
}


def write_dwi(path: Path, affine: np.ndarray, values: np.ndarray | None = None, *, sform: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.ones(SHAPE, np.float32) if values is None else values
    image = nibabel.Nifti1Image(np.stack([values] * 4, axis=-1).astype(np.float32), affine)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = "MILLER^JOHN"
    nibabel.save(image, path)
    return path


def features_of(path: Path) -> MetaTensor:
    """What the loader makes of a DWI: RAS, with the file and its grid in the metadata."""
    source = nibabel.load(path)
    turned = nibabel.as_closest_canonical(source)
    meta = {
        "filename_or_obj": str(path),
        "original_affine": source.affine,
        "original_axcodes": "".join(nibabel.aff2axcodes(source.affine)),
    }
    values = torch.from_numpy(np.ascontiguousarray(turned.dataobj)[..., :1]).movedim(-1, 0).float()
    return MetaTensor(values, affine=torch.from_numpy(turned.affine), meta=meta)


def pred_of(features: MetaTensor, channels: int = 3) -> torch.Tensor:
    values = torch.linspace(0.1, 0.9, channels)[:, None, None, None]
    return values.expand(channels, *(2 * n for n in features.shape[1:])).clone()


def saved(path: Path, output_dir: Path, *, pred: torch.Tensor | None = None, **options) -> dict:
    features = features_of(path)
    item = {"image": features, "pred": pred_of(features) if pred is None else pred}
    return SaveNoddiMapsd(output_dir=output_dir, **options)(item)


def sidecar(path: Path) -> dict:
    return json.loads(path.read_text())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_a_world_coordinate_ramp_keeps_its_coordinates(tmp_path, affine):
    """Each voxel of the network's RAS grid holds its own place in mm; read from the file it still does."""
    path = write_dwi(tmp_path / "a_dwi.nii.gz", affine)
    features = features_of(path)
    # The file's affine is what nibabel reads back (float32); its doubled grid is built here without shared.resolution.
    grid = np.stack(np.meshgrid(*(np.arange(2 * n) for n in features.shape[1:]), indexing="ij"))
    low = (grid + 0.5) / 2 - 0.5  # centre of each half voxel in voxels of the low-resolution grid
    matrix = features.affine.numpy()
    world = np.tensordot(matrix[:3, :3], low, axes=1) + matrix[:3, 3, None, None, None]
    saved(path, tmp_path / "out", pred=torch.from_numpy(world / 400 + 0.5))
    images = [nibabel.load(tmp_path / "out" / f"a_{name}.nii.gz") for name in MAPS]
    assert nibabel.aff2axcodes(images[0].affine) == nibabel.aff2axcodes(nibabel.load(path).affine)
    assert images[0].shape == tuple(2 * n for n in SHAPE)
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in images[0].shape), indexing="ij"), axis=-1)
    expected = nibabel.affines.apply_affine(images[0].affine, indices)
    found = np.stack([(image.get_fdata() - 0.5) * 400 for image in images], axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_a_bright_voxel_keeps_its_place(tmp_path, affine):
    values = np.zeros(SHAPE, np.float32)
    values[5, 1, 2] = 1.0
    path = write_dwi(tmp_path / "a_dwi.nii.gz", affine, values)
    place = nibabel.load(path).affine @ [5, 1, 2, 1]
    pred = features_of(path).as_tensor()
    for axis in (1, 2, 3):
        pred = pred.repeat_interleave(2, dim=axis)
    smooth = upsample(features_of(path).as_tensor())
    saved(path, tmp_path / "out", pred=torch.cat((pred, smooth, 1 - pred)))
    for name, weight in (("ndi", 1.0), ("odi", 1.0)):
        image = nibabel.load(tmp_path / "out" / f"a_{name}.nii.gz")
        voxels = image.get_fdata()
        assert np.unravel_index(voxels.argmax(), voxels.shape)[0] in (10, 11)
        indices = np.argwhere(voxels > 0)
        centre = np.average(indices, axis=0, weights=voxels[tuple(indices.T)] * weight)
        np.testing.assert_allclose((image.affine @ [*centre, 1])[:3], place[:3], atol=1e-3)


@pytest.mark.parametrize("name", AFFINES)
def test_headers(tmp_path, name):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES[name], sform=4 if name == "PIR" else 1)
    saved(path, tmp_path / "out")
    image = nibabel.load(tmp_path / "out" / "a_ndi.nii.gz")
    header = image.header
    np.testing.assert_allclose(header.get_sform(), doubled_affine(nibabel.load(path).affine), atol=1e-4)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-3)
    assert int(header["sform_code"]) == int(header["qform_code"]) == (4 if name == "PIR" else 1)
    np.testing.assert_allclose(header.get_zooms(), nibabel.affines.voxel_sizes(AFFINES[name]) / 2, rtol=1e-5)
    assert image.get_data_dtype() == np.float32
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert b"MILLER" not in (tmp_path / "out" / "a_ndi.nii.gz").read_bytes()
    assert b"synthetic" in header["descrip"].item()


def test_shear_is_in_the_sform_alone(tmp_path):
    path = tmp_path / "a_dwi.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((*SHAPE, 4), np.float32), SHEARED), path)
    saved(path, tmp_path / "out")
    image = nibabel.load(tmp_path / "out" / "a_ndi.nii.gz")
    np.testing.assert_allclose(image.affine, doubled_affine(nibabel.load(path).affine), atol=1e-4)
    assert int(image.header["qform_code"]) == 0
    assert int(image.header["sform_code"]) == 2


def test_qform_alone_is_enough(tmp_path):
    affine = AFFINES["oblique"]
    path = tmp_path / "a_dwi.nii.gz"
    image = nibabel.Nifti1Image(np.ones((*SHAPE, 4), np.float32), None)
    image.set_qform(affine, code=3)
    nibabel.save(image, path)
    saved(path, tmp_path / "out")
    result = nibabel.load(tmp_path / "out" / "a_fwf.nii.gz")
    np.testing.assert_allclose(result.affine, doubled_affine(affine), atol=1e-3)
    assert int(result.header["sform_code"]) == 3


def test_maps_and_standard_deviations_are_clipped_and_described(tmp_path):
    path = write_dwi(tmp_path / "in" / "sub-01_dwi.nii.gz", AFFINES["LPS"])
    save_tensors({}, tmp_path / "model.pt")
    pred = torch.empty(6, *(2 * n for n in SHAPE))
    pred[:] = torch.tensor([-0.2, 0.5, 1.4, -0.1, 0.25, 1.5])[:, None, None, None]
    result = saved(
        path,
        tmp_path / "out",
        pred=pred,
        weights_path=tmp_path / "model.pt",
        seed=[7, 8],
        num_samples=4,
        deterministic=False,
    )
    expected = {"ndi": 0.0, "odi": 0.5, "fwf": 1.0, "ndi_sd": 0.0, "odi_sd": 0.25, "fwf_sd": 1.5}
    assert files(tmp_path / "out") == sorted(["sub-01.json", *(f"sub-01_{name}.nii.gz" for name in expected)])
    for name, value in expected.items():
        assert (nibabel.load(tmp_path / "out" / f"sub-01_{name}.nii.gz").get_fdata() == value).all()
    stated = sidecar(tmp_path / "out" / "sub-01.json")
    assert stated["synthetic"] is True
    assert stated["source"] == "sub-01_dwi.nii.gz"
    assert stated["source_sha256"] == sha256_of_file(path)
    assert stated["weights_sha256"] == sha256_of_file(tmp_path / "model.pt")
    assert stated["seed"] == 7  # MONAI Label's form: the chosen one first
    assert stated["num_samples"] == 4
    assert stated["deterministic"] is False
    assert stated["files"] == {name: f"sub-01_{name}.nii.gz" for name in expected}
    np.testing.assert_allclose(stated["voxel_mm"], SPACING / 2, rtol=1e-5)
    assert result["pred"].max() == 1.5
    assert result["pred"].min() == 0.0


@pytest.mark.parametrize("deterministic", [True, "true", [True, False]])
def test_what_decides_nothing_is_not_stated_of_a_deterministic_result(tmp_path, deterministic):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    settings = {"seed": 7, "num_inference_steps": 100, "num_samples": 1, "overlap": 0.25}
    saved(path, tmp_path / "out", deterministic=deterministic, **settings)
    saved(path, tmp_path / "drawn", deterministic="false", **settings)
    stated = sidecar(tmp_path / "out" / "a.json")
    assert [stated[name] for name in settings] == [None, None, None, 0.25]
    assert sidecar(tmp_path / "drawn" / "a.json").items() >= settings.items()


def test_pred_stays_usable(tmp_path):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["oblique PIR"])
    features = features_of(path)
    pred = torch.rand(3, *(2 * n for n in features.shape[1:]))
    result = SaveNoddiMapsd(output_dir=tmp_path / "out")({"image": features, "pred": pred})
    assert isinstance(result["pred"], MetaTensor)
    torch.testing.assert_close(result["pred"].as_tensor(), pred)
    np.testing.assert_allclose(result["pred"].affine.numpy(), doubled_affine(features.affine), atol=1e-6)
    assert result["pred"].meta["filename_or_obj"] == str(path)
    assert tuple(result["pred"].meta["spatial_shape"]) == tuple(2 * n for n in SHAPE)
    # so that saving twice, or measuring afterwards, sees one grid; the features are as they were
    again = SaveNoddiMapsd(output_dir=tmp_path / "again")(result)
    torch.testing.assert_close(again["pred"].as_tensor(), pred)
    np.testing.assert_allclose(features.affine.numpy(), nibabel.as_closest_canonical(nibabel.load(path)).affine)


@pytest.mark.parametrize("name", ["LPS", "oblique PIR", "sheared"])
@pytest.mark.parametrize("channels", [3, 6])
def test_monai_label_gets_the_maps_that_would_be_saved(tmp_path, monkeypatch, name, channels):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_dwi(tmp_path / "a_dwi.nii.gz", SHEARED if name == "sheared" else AFFINES[name])
    features = features_of(path)
    pred = torch.rand(channels, *(2 * n for n in features.shape[1:])) * 2
    brain = (torch.rand(1, *pred.shape[1:]) > 0.5).float()
    request = {"image": features, "pred": pred, "brain": brain, "model": "dmri2noddi", "image_path": str(path)}
    answers = {
        asked: SaveNoddiMapsd(output_dir=tmp_path / "none", seed="4")({**request, "map": asked})
        for asked in ("all", "odi")
    }
    assert not (tmp_path / "none").exists()
    saved(path, tmp_path / "out", pred=pred, seed="4")
    whole = nibabel.load(answers["all"]["pred"])
    kinds = [*MAPS, *(f"{kind}_sd" for kind in MAPS)][:channels]
    for index, kind in enumerate(kinds):
        one = nibabel.load(tmp_path / f"out/a_{kind}.nii.gz")
        assert np.array_equal(np.asarray(whole.dataobj)[..., index], np.asarray(one.dataobj))
        assert np.array_equal(whole.affine, one.affine)
    assert whole.get_data_dtype() == np.float32
    assert Path(answers["odi"]["pred"]).read_bytes() == (tmp_path / "out/a_odi.nii.gz").read_bytes()
    result = answers["all"]["result"]
    said = sidecar(tmp_path / "out/a.json")
    assert {key: result[key] for key in said if key in result} == {key: said[key] for key in said if key in result}
    assert (result["maps"], result["shape"], result["seed"]) == (kinds, list(whole.shape), "4")
    means = pred[:3].clamp(0, 1)[:, brain[0] > 0].mean(dim=1).tolist()
    assert list(result["mean_in_brain"].values()) == pytest.approx(means, abs=1e-5)
    del request["brain"]
    assert SaveNoddiMapsd(output_dir=tmp_path / "none")(request)["result"]["mean_in_brain"] is None
    with pytest.raises(ValueError, match="^map: expected all or ndi or odi or fwf, got 'odi_sd'"):
        SaveNoddiMapsd(output_dir=tmp_path / "none")({**request, "map": "odi_sd"})


def test_the_affine_of_the_features_that_a_sampler_leaves_is_understood(tmp_path):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    features = features_of(path)
    for number, affine in enumerate((features.affine, torch.from_numpy(doubled_affine(features.affine)))):
        saved(path, tmp_path / str(number), pred=MetaTensor(pred_of(features), affine=affine))
        image = nibabel.load(tmp_path / str(number) / "a_ndi.nii.gz")
        np.testing.assert_allclose(image.affine, doubled_affine(AFFINES["LPS"]), atol=1e-4)


class MeanB0:
    """Features of one channel, as simple as they come."""

    names = ("b0",)
    num_channels = 1

    def __call__(self, signal: np.ndarray, table: GradientTable, mask: np.ndarray | None = None) -> np.ndarray:
        return signal[..., table.b0].mean(axis=-1)[None].astype(np.float32)


@pytest.mark.parametrize("name", ["LPS", "PIR", "oblique PIR", "random 1"])
def test_pipeline_from_files_to_files(tmp_path, name):
    """Loader, batch, something in the place of the sampler, and files: each voxel keeps value and place."""
    values = np.random.default_rng(0).uniform(0.2, 0.9, SHAPE).astype(np.float32)
    for subject in ("s1", "s2"):
        path = write_dwi(tmp_path / "in" / subject / "dwi.nii.gz", AFFINES[name], values)
        path.with_name("dwi.bval").write_text("0 1000 1000 1000\n")
        path.with_name("dwi.bvec").write_text("0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    load = Compose([LoadDiffusionFeaturesd("dwi", features=MeanB0(), name="image"), LoadBrainMaskd(name="brain")])
    save = Compose([
        MaskIntensityd("pred", mask_key="brain"),
        SaveNoddiMapsd(output_dir=tmp_path / "out", source=tmp_path / "in"),
    ])  # fmt: skip
    for batch in DataLoader(Dataset(inference_items(tmp_path / "in"), load), batch_size=1):
        maps = batch["image"].as_tensor().expand(-1, 3, -1, -1, -1)
        for axis in (2, 3, 4):
            maps = maps.repeat_interleave(2, dim=axis)
        batch["pred"] = convert_to_dst_type(maps, batch["image"])[0]  # as the sampler does
        for item in decollate_batch(batch):
            result = save(item)["pred"]
    for subject in ("s1", "s2"):
        image = nibabel.load(tmp_path / "out" / subject / f"{subject}_ndi.nii.gz")
        np.testing.assert_allclose(image.affine, doubled_affine(nibabel.load(path).affine), atol=1e-3)
        blocks = values.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        found = image.get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(found[found > 0], blocks[found > 0])
        assert (found > 0).mean() > 0.2
    # MONAI's own writer finds the way to the file's axes from the metadata that were left with pred. One map at a time:
    # of several channels MONAI 1.6 takes the channels, which it moved last, for an axis of space when it resamples.
    writer = SaveImage(tmp_path / "monai", separate_folder=False, resample=True, mode="nearest", print_log=False)
    writer(result[:1])
    other = nibabel.load(next((tmp_path / "monai").iterdir()))
    np.testing.assert_allclose(other.affine, image.affine, atol=1e-3)
    np.testing.assert_allclose(other.get_fdata(), found, atol=1e-6)


def test_names_of_items_and_subfolders_of_the_input(tmp_path):
    for subject in ("s1", "s2"):
        path = write_dwi(tmp_path / "in" / subject / "dwi.nii.gz", AFFINES["LPS"])
        for end in ("bval", "bvec"):
            path.with_name(f"dwi.{end}").write_text("0 0 0 0\n")
    save = SaveNoddiMapsd(output_dir=tmp_path / "out", source=tmp_path / "in", map_names=["ndi"])
    for item in inference_items(tmp_path / "in"):
        features = features_of(Path(item["dwi"]))
        save({**item, "image": features, "pred": pred_of(features, 1)})
    assert files(tmp_path / "out") == ["s1/s1.json", "s1/s1_ndi.nii.gz", "s2/s2.json", "s2/s2_ndi.nii.gz"]


def test_the_same_input_replaces_its_results_and_no_other_ones(tmp_path):
    first = write_dwi(tmp_path / "x" / "a_dwi.nii.gz", AFFINES["LPS"])
    second = write_dwi(tmp_path / "y" / "a_dwi.nii.gz", AFFINES["RAS"])
    out = tmp_path / "out"
    saved(first, out, pred=pred_of(features_of(first), 6))
    before = (out / "a_odi.nii.gz").read_bytes()
    saved(second, out)
    saved(first, out)  # without standard deviations: those of the run before are gone
    assert (out / "a_odi.nii.gz").read_bytes() != before
    expected = [f"{stem}_{name}.nii.gz" for stem in ("a", "a_1") for name in MAPS] + ["a.json", "a_1.json"]
    assert files(out) == sorted(expected)
    kept = (out / "a_ndi.nii.gz").read_bytes()
    saved(first, out)
    assert (out / "a_ndi.nii.gz").read_bytes() == kept  # the same input, the same bytes


@pytest.mark.parametrize("name", ["a_ndi.nii.gz", "a_fwf.nii.gz", "a_fwf_sd.nii.gz", "a.json"])
def test_a_file_that_no_run_wrote_is_kept(tmp_path, name):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="found one that this program did not write; choose another output_dir"):
        saved(path, tmp_path, pred=pred_of(features_of(path), 6))
    assert (tmp_path / name).read_text() == "{}"
    assert files(tmp_path) == sorted([name, "a_dwi.nii.gz"])


@pytest.mark.parametrize("shape", [(3, *SHAPE), (4, 14, 10, 12), (3, 10, 14, 12), (14, 10, 12), (9, 14, 10, 12)])
def test_another_shape_is_refused(tmp_path, shape):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    with pytest.raises(ValueError, match=r"pred: expected \(3 or 6, 14, 10, 12\), twice the resolution .*a_dwi.nii.gz"):
        saved(path, tmp_path / "out", pred=torch.zeros(shape))
    assert not (tmp_path / "out").exists()


def test_missing_metadata_are_named(tmp_path):
    features = features_of(write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"]))
    save = SaveNoddiMapsd(output_dir=tmp_path / "out")
    pred = pred_of(features)
    for image in (None, features.as_tensor()):
        with pytest.raises(ValueError, match=r"image: expected features with .*without filename_or_obj and original_"):
            save({"pred": pred, "image": image})
    for name in ("original_affine", "filename_or_obj"):
        lacking = features_of(tmp_path / "a_dwi.nii.gz")
        del lacking.meta[name]
        with pytest.raises(ValueError, match=rf"without {name}; load with LoadDiffusionFeaturesd"):
            save({"pred": pred, "image": lacking})


def test_values_that_are_not_finite_are_refused(tmp_path):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    pred = pred_of(features_of(path))
    pred[1, 3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"pred: expected finite values for .*a_dwi.nii.gz"):
        saved(path, tmp_path / "out", pred=pred)


def test_maps_and_features_on_another_grid_are_refused(tmp_path):
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    features = features_of(path)
    moved = features.affine.clone()
    moved[0, 3] += 0.5
    with pytest.raises(ValueError, match=r"pred: expected the affine of the doubled grid .*got one that .* 0.5"):
        saved(path, tmp_path / "out", pred=MetaTensor(pred_of(features), affine=moved))
    cropped = MetaTensor(
        features.as_tensor()[:, 1:],
        affine=features.affine.clone(),
        meta={k: v for k, v in features.meta.items() if k != "affine"},
    )
    cropped.affine = features.affine @ torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    with pytest.raises(ValueError, match=r"a_dwi.nii.gz: expected features on the grid of the file"):
        SaveNoddiMapsd(output_dir=tmp_path / "out")({"image": cropped, "pred": pred_of(cropped)})


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="map_names: expected one different name per map"):
        SaveNoddiMapsd(output_dir=tmp_path, map_names=["ndi", "ndi"])
    path = write_dwi(tmp_path / "a_dwi.nii.gz", AFFINES["LPS"])
    with pytest.raises(FileNotFoundError, match=r"model.pt: expected the weights"):
        saved(path, tmp_path / "out", weights_path=tmp_path / "model.pt")
