# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, DivisiblePadd, Invertd, Orientationd, SpatialPadd
from PIL import Image

from shared.intensity import robust_range, scale_intensity
from shared.transforms.volume_saving import SaveTranslatedVolumed
from shared.transforms.volumes import LoadVolumed, RobustScaled

SHAPE = (11, 18, 7)
# Left-posterior-superior with the axes exchanged (file axes: S, L, P), anisotropic, slightly oblique.
AFFINE = np.array([[0.1, -1.2, 0.0, 31.5], [0.05, 0.02, -0.9, 17.25], [2.5, 0.03, 0.04, -40.125], [0, 0, 0, 1]])


def brain(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Scanner intensities, int16, zero at the border, brighter towards the end of each axis."""
    random = np.random.default_rng(seed)
    values = np.zeros(shape, dtype=np.int16)
    inner = tuple(slice(1, n - 1) for n in shape)
    ramp = sum(np.indices(shape)[axis] * (axis + 3) for axis in range(len(shape)))
    values[inner] = (100 + 10 * ramp + random.integers(0, 30, shape))[inner]
    return values


def write_volume(path: Path, values: np.ndarray, *, qform: int = 1, sform: int = 4, affine=AFFINE, kind=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (kind or nibabel.Nifti1Image)(values, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=qform)
    image.set_sform(affine, code=sform)
    image.header["descrip"] = "MILLER^JOHN"
    if kind is None:
        image.header["db_name"] = "MILLER"
    nibabel.save(image, path)
    return path


def pred_for(path: Path, channels: int = 1, **changes) -> dict:
    """An item as it stands after `Invertd`: voxels all different."""
    image = nibabel.load(path)
    count = channels * int(np.prod(SHAPE))
    values = torch.linspace(0, 1, count).reshape(channels, *SHAPE)
    return {"pred": MetaTensor(values, affine=image.affine, meta={"filename_or_obj": str(path)}), **changes}


def sidecar(path: Path) -> dict:
    return json.loads(path.read_text())


def test_pipeline_returns_the_grid_orientation_and_values_of_the_input(tmp_path):
    """A translation that copies its input must give back the scaled input, voxel by voxel."""
    flair = write_volume(tmp_path / "sub-01_FLAIR.nii.gz", brain(0))
    preprocessing = Compose(
        [
            LoadVolumed("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            RobustScaled("image"),
            SpatialPadd("image", (24, 20, -1)),
            DivisiblePadd("image", (8, 8, 1)),
        ]
    )
    batch = next(iter(DataLoader(Dataset([{"image": str(flair)}], preprocessing), batch_size=1)))
    assert batch["image"].shape[2:4] == (24, 24)
    batch["pred"] = torch.cat((batch["image"], batch["image"] * 0.1), dim=1)
    postprocessing = Compose(
        [
            Invertd("pred", transform=preprocessing, orig_keys="image"),
            SaveTranslatedVolumed(output_dir=tmp_path / "out"),
        ]
    )
    for item in decollate_batch(batch):
        postprocessing(item)
    expected = scale_intensity(brain(0), *robust_range(brain(0)))
    saved = nibabel.load(tmp_path / "out/sub-01_T1w.nii.gz")
    deviation = nibabel.load(tmp_path / "out/sub-01_T1w_sd.nii.gz")
    np.testing.assert_allclose(saved.get_fdata(), expected, atol=1e-6)
    np.testing.assert_allclose(deviation.get_fdata(), 0.1 * expected, atol=1e-6)
    assert saved.shape == SHAPE
    assert np.array_equal(saved.affine, nibabel.load(flair).affine)
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize(("qform", "sform"), [(1, 4), (1, 0), (0, 2), (0, 0)])
def test_geometry_is_the_inputs_bit_for_bit(tmp_path, qform, sform):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0), qform=qform, sform=sform)
    SaveTranslatedVolumed(output_dir=tmp_path / "out", picture=False)(pred_for(flair))
    source, saved = nibabel.load(flair), nibabel.load(tmp_path / "out/a_T1w.nii.gz")
    assert np.array_equal(saved.affine, source.affine)
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == (qform, sform)
    for field in ("pixdim", "srow_x", "quatern_b", "qoffset_z", "xyzt_units"):
        assert np.array_equal(saved.header[field], source.header[field]), field
    assert saved.get_data_dtype() == np.float32
    np.testing.assert_array_equal(saved.get_fdata(dtype=np.float32), pred_for(flair)["pred"][0].numpy())
    assert "synthetic" in str(saved.header["descrip"])
    assert b"MILLER" not in saved.to_bytes()


def test_double_precision_header_and_flat_volumes_keep_their_form(tmp_path):
    affine = AFFINE.copy()
    affine[0, 3] = 1 / 3
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0), affine=affine, kind=nibabel.Nifti2Image)
    SaveTranslatedVolumed(output_dir=tmp_path, picture=False)(pred_for(flair))
    assert nibabel.load(tmp_path / "a_T1w.nii.gz").affine[0, 3] == 1 / 3

    for name, shape in (("flat", (9, 14)), ("thin", (9, 14, 1))):
        path = write_volume(tmp_path / f"{name}_FLAIR.nii", brain(0, (9, 14)).reshape(shape), affine=np.eye(4))
        SaveTranslatedVolumed(output_dir=tmp_path)(
            {"pred": MetaTensor(torch.rand(1, 9, 14, 1), affine=np.eye(4), meta={"filename_or_obj": str(path)})}
        )
        assert nibabel.load(tmp_path / f"{name}_T1w.nii.gz").shape == shape


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("sub-01_ses-2_FLAIR.nii.gz", "sub-01_ses-2_T1w"), ("flair.nii", "T1w"), ("p7-flair.nii", "p7_T1w"),
        ("a_FLAIR_reg.nii", "a_FLAIR_reg_T1w"), ("a.b.NII.GZ", "a.b_T1w"), ("unflair.nii", "unflair_T1w"),
    ],
)  # fmt: skip
def test_names_come_from_the_input(tmp_path, name, result):
    flair = write_volume(tmp_path / name, brain(0))
    SaveTranslatedVolumed(output_dir=tmp_path / "out", picture=False)(pred_for(flair))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{result}.json", f"{result}.nii.gz"]


def test_sidecar_says_what_made_the_volume(tmp_path):
    flair = write_volume(tmp_path / "sub-01_FLAIR.nii.gz", brain(0))
    (tmp_path / "model.pt").write_bytes(b"abc")
    save = SaveTranslatedVolumed(
        output_dir=tmp_path / "out",
        weights_path=tmp_path / "model.pt",
        num_inference_steps=25,
        guidance_scale=1.0,
        conditioning_scale=[1.0, 0.5],
        seed=7,
        num_samples=4,
        scheduler="dpm",
    )
    save(pred_for(flair, channels=2))
    said = sidecar(tmp_path / "out/sub-01_T1w.json")
    assert said["synthetic"] is True
    assert said["intended_use"] == "research only, not for diagnosis"
    assert said["source"] == "sub-01_FLAIR.nii.gz"
    assert len(said["source_sha256"]) == 64
    assert said["weights_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (said["seed"], said["num_samples"], said["conditioning_scale"]) == (7, 4, [1.0, 0.5])
    assert (said["num_inference_steps"], said["guidance_scale"], said["scheduler"]) == (25, 1.0, "dpm")
    assert said["intensity"] == {"unit": "[0, 1]"}
    assert {"monai_version", "torch_version", "nibabel_version"} <= set(said)
    assert said["panels"] == ["FLAIR", "generated", "standard deviation x 4"]
    assert said["files"] == {
        "image": "sub-01_T1w.nii.gz", "standard_deviation": "sub-01_T1w_sd.nii.gz", "picture": "sub-01_T1w.png",
    }  # fmt: skip
    with Image.open(tmp_path / "out/sub-01_T1w.png") as picture:
        assert picture.text["synthetic"] == "true"
        assert "Synthetic" in picture.text["Comment"]
        assert "sub-01" not in json.dumps(picture.text)


def test_the_same_input_overwrites_and_another_of_the_same_name_does_not(tmp_path):
    first = write_volume(tmp_path / "in/sub-01/flair.nii", brain(0))
    second = write_volume(tmp_path / "in/sub-02/flair.nii", brain(1))
    copy = write_volume(tmp_path / "in/sub-03/flair.nii", brain(1))
    names = ["T1w.json", "T1w.nii.gz", "T1w_1.json", "T1w_1.nii.gz", "T1w_2.json", "T1w_2.nii.gz"]
    for _ in range(2):
        save = SaveTranslatedVolumed(output_dir=tmp_path / "flat", picture=False)
        contents = {}
        for path in (first, second, copy, first):
            save(pred_for(path))
        assert sorted(path.name for path in (tmp_path / "flat").iterdir()) == names
        contents = {path.name: path.read_bytes() for path in (tmp_path / "flat").iterdir()}
    assert (
        sidecar(tmp_path / "flat/T1w.json")["source_sha256"] != sidecar(tmp_path / "flat/T1w_1.json")["source_sha256"]
    )
    SaveTranslatedVolumed(output_dir=tmp_path / "flat", picture=False)(pred_for(first))
    assert {path.name: path.read_bytes() for path in (tmp_path / "flat").iterdir()} == contents, "the same bytes"

    save = SaveTranslatedVolumed(output_dir=tmp_path / "tree", picture=False, source=tmp_path / "in")
    for path in (first, second):
        save(pred_for(path))
    found = sorted(path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.nii.gz"))
    assert found == ["sub-01/T1w.nii.gz", "sub-02/T1w.nii.gz"]
    SaveTranslatedVolumed(output_dir=tmp_path / "one", picture=False, source=first)(pred_for(first))
    assert (tmp_path / "one/T1w.nii.gz").is_file()


def test_a_standard_deviation_of_an_earlier_run_does_not_stay(tmp_path):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    save = SaveTranslatedVolumed(output_dir=tmp_path / "out")
    save(pred_for(flair, channels=2))
    (tmp_path / "out/notes.txt").write_text("mine")
    save(pred_for(flair))
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["a_T1w.json", "a_T1w.nii.gz", "a_T1w.png", "notes.txt"]


@pytest.mark.parametrize("content", [None, "{", '{"Manufacturer": "Siemens"}'])
def test_a_true_scan_is_never_overwritten(tmp_path, content):
    flair = write_volume(tmp_path / "sub-01_FLAIR.nii.gz", brain(0))
    true = write_volume(tmp_path / "sub-01_T1w.nii.gz", brain(1))
    before = true.read_bytes()
    if content is not None:
        (tmp_path / "sub-01_T1w.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{true}: expected no file or a synthetic one"):
        SaveTranslatedVolumed(output_dir=tmp_path)(pred_for(flair))
    assert true.read_bytes() == before
    assert not (tmp_path / "sub-01_T1w.png").exists()


def test_values_become_scanner_intensities_of_a_reference(tmp_path):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    true = write_volume(tmp_path / "a_T1w.nii", brain(1) * 3 - 40)
    low, high = robust_range(brain(1) * 3 - 40)
    values = pred_for(flair, channels=2)["pred"].numpy()
    for name, options, data in (
        ("key", {"reference_key": "t1w"}, {"t1w": str(true)}),
        ("path", {"reference": true}, {}),
    ):
        SaveTranslatedVolumed(output_dir=tmp_path / name, **options)(pred_for(flair, channels=2, **data))
        mean = nibabel.load(tmp_path / name / "a_T1w.nii.gz").get_fdata()
        deviation = nibabel.load(tmp_path / name / "a_T1w_sd.nii.gz").get_fdata()
        np.testing.assert_allclose(mean, low + values[0] * (high - low), rtol=1e-5)
        np.testing.assert_allclose(deviation, values[1] * (high - low), rtol=1e-5, err_msg="the factor alone")
        said = sidecar(tmp_path / name / "a_T1w.json")["intensity"]
        assert said.pop("unit") == "scanner intensities of the reference"
        assert said == {"low": pytest.approx(low), "high": pytest.approx(high)}


def test_prepared_reference_takes_its_stated_intensities(tmp_path):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    true = write_volume(tmp_path / "a_T1w.nii", scale_intensity(brain(1), *robust_range(brain(1))))
    save = SaveTranslatedVolumed(output_dir=tmp_path / "out", reference_key="t1w", picture=False)
    with pytest.raises(ValueError, match=f"^{true}: expected scanner intensities"):
        save(pred_for(flair, t1w=str(true)))
    batch = {"t1w": [torch.tensor(20.0), torch.tensor(420.0)], "flair": [torch.tensor(0.0), torch.tensor(1.0)]}
    save(pred_for(flair, t1w=str(true), intensity=batch))
    saved = nibabel.load(tmp_path / "out/a_T1w.nii.gz").get_fdata()
    np.testing.assert_allclose(saved, 20 + 400 * pred_for(flair)["pred"][0].numpy(), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_slice_from_a_png_becomes_a_png_of_the_same_size(tmp_path, dtype, top):
    path = tmp_path / "s_slice-0_FLAIR.png"
    Image.fromarray((brain(0, (10, 15)).astype(np.int64) * top // 500).astype(dtype)).save(path)
    values = torch.linspace(0, 1, 2 * 150).reshape(2, 10, 15, 1)
    item = {"pred": MetaTensor(values, affine=np.eye(4), meta={"filename_or_obj": str(path)})}
    SaveTranslatedVolumed(output_dir=tmp_path / "out")(item)
    with Image.open(tmp_path / "out/s_slice-0_T1w.png") as picture:
        assert picture.size == (15, 10)
        np.testing.assert_array_equal(np.asarray(picture), (values[0, ..., 0].numpy() * top).round())
        assert picture.text["synthetic"] == "true"
        assert "slice-0" not in json.dumps(picture.text)
    assert sidecar(tmp_path / "out/s_slice-0_T1w.json")["files"] == {
        "image": "s_slice-0_T1w.png", "standard_deviation": "s_slice-0_T1w_sd.png",
        "picture": "s_slice-0_T1w_comparison.png",
    }  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 4
    reference = write_volume(tmp_path / "r.nii", brain(0))
    with pytest.raises(ValueError, match=rf"^{path}: a PNG holds \[0, 1\]"):
        SaveTranslatedVolumed(output_dir=tmp_path / "out", reference=reference)(item)


def panels_of(path: Path, count: int) -> list[np.ndarray]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture).astype(float) / 255
    width = (pixels.shape[1] + 2) // count - 2
    assert (width + 2) * count - 2 == pixels.shape[1]
    return [pixels[:, index * (width + 2) : index * (width + 2) + width] for index in range(count)]


def test_picture_shows_the_brightest_slice_as_radiologists_look_at_it(tmp_path):
    """Marks at right anterior and left posterior of slice 5 (in RAS), in a file whose axes run S, L, P."""
    ras = np.zeros((18, 7, 11))
    ras[2:15, 1:6, 5] = 0.5
    ras[16, 5, 5] = 1.0  # right, anterior
    ras[4, 4, 8] = 1.0  # the brightest voxel of a dark slice
    true = ras * 0.8
    affine = np.array([[0, -1.0, 0, 0], [0, 0, -2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    files = {}
    for name, values in (("FLAIR", ras), ("T1w", true)):
        stored = values.transpose(2, 0, 1)[:, ::-1, ::-1].astype(np.float32)
        files[name] = write_volume(tmp_path / f"a_{name}.nii", stored, affine=affine)
    assert nibabel.aff2axcodes(affine) == ("S", "L", "P")
    stored = np.stack((ras * 0.6, ras * 0.1)).transpose(0, 3, 1, 2)[:, :, ::-1, ::-1].copy()
    pred = MetaTensor(torch.from_numpy(stored), affine=affine, meta={"filename_or_obj": str(files["FLAIR"])})
    SaveTranslatedVolumed(output_dir=tmp_path / "out")({"pred": pred, "t1w": str(files["T1w"])})
    said = sidecar(tmp_path / "out/a_T1w.json")
    assert said["panels"] == ["FLAIR", "generated", "true", "difference x 2", "standard deviation x 4"]
    shown = panels_of(tmp_path / "out/a_T1w.png", 5)
    assert shown[0].shape == (14, 18), "rows of 2 mm are enlarged to square pixels"
    flair = shown[0]
    brightest = np.unravel_index(flair.argmax(), flair.shape)
    assert brightest[0] < 7, "anterior is up"
    assert brightest[1] < 9, "the patient's right is on the left"
    assert brightest[1] == 18 - 1 - 16
    middle = [panel[7, 8] for panel in shown]
    np.testing.assert_allclose(middle, [0.5, 0.3, 0.4, 0.2, 0.2], atol=0.01)


def test_a_true_image_elsewhere_is_left_out_aloud(tmp_path, caplog):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    other = write_volume(tmp_path / "a_T1w.nii", brain(1, (5, 6, 7)))
    with caplog.at_level(logging.WARNING):
        SaveTranslatedVolumed(output_dir=tmp_path / "out")(pred_for(flair, t1w=str(other)))
    assert "t1w: the true image lies on another grid" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert sidecar(tmp_path / "out/a_T1w.json")["panels"] == ["FLAIR", "generated"]
    SaveTranslatedVolumed(output_dir=tmp_path / "none")(pred_for(flair, t1w=""))
    assert sidecar(tmp_path / "none/a_T1w.json")["panels"] == ["FLAIR", "generated"]


def test_input_file_may_be_known_by_the_image_alone(tmp_path):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    plain = pred_for(flair)["pred"].as_tensor()
    SaveTranslatedVolumed(output_dir=tmp_path / "out")({"pred": plain, **LoadVolumed("image")({"image": [str(flair)]})})
    assert (tmp_path / "out/a_T1w.nii.gz").is_file()
    with pytest.raises(ValueError, match="^pred: expected metadata with the input file"):
        SaveTranslatedVolumed(output_dir=tmp_path / "out")({"pred": plain})


@pytest.mark.parametrize(("asked", "end"), [({}, ""), ({"volume": ["t1w", "sd"]}, ""), ({"volume": "sd"}, "_sd")])
def test_monai_label_gets_the_file_that_would_be_saved(tmp_path, monkeypatch, asked, end):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flair = write_volume(tmp_path / "in/a_FLAIR.nii", brain(0))
    reference = write_volume(tmp_path / "in/true.nii.gz", brain(1))
    options: dict[str, Any] = {"reference": reference, "seed": "5", "scheduler": ["dpm", "ddim"]}
    request = pred_for(flair, channels=2, model="brain_controlnet", image_path=str(flair), **asked)
    answer = SaveTranslatedVolumed(output_dir=tmp_path / "none", **options)(request)
    assert not (tmp_path / "none").exists()
    SaveTranslatedVolumed(output_dir=tmp_path / "out", **options)(pred_for(flair, channels=2))
    assert Path(answer["pred"]).read_bytes() == (tmp_path / f"out/a_T1w{end}.nii.gz").read_bytes()
    said = {key: value for key, value in sidecar(tmp_path / "out/a_T1w.json").items() if key in answer["result"]}
    assert said.items() <= answer["result"].items()
    assert said["scheduler"] == "dpm"
    assert answer["result"]["voxel_mm"] == pytest.approx(np.linalg.norm(AFFINE[:3, :3], axis=0), abs=1e-5)


def test_failed_write_leaves_the_earlier_volume(tmp_path, monkeypatch):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    save = SaveTranslatedVolumed(output_dir=tmp_path / "out", picture=False)
    save(pred_for(flair))
    before = (tmp_path / "out/a_T1w.nii.gz").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(5, "broken disk")

    monkeypatch.setattr(gzip.GzipFile, "write", fail)
    with pytest.raises(OSError, match="broken disk"):
        save(pred_for(flair))
    assert (tmp_path / "out/a_T1w.nii.gz").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_T1w.json", "a_T1w.nii.gz"]


def test_errors_start_with_what_to_correct(tmp_path):
    flair = write_volume(tmp_path / "a_FLAIR.nii", brain(0))
    save = SaveTranslatedVolumed(output_dir=tmp_path / "out")
    item = pred_for(flair)
    with pytest.raises(ValueError, match=r"^pred: expected \(1 or 2, 11, 18, 7\).*got \(3, 11, 18, 7\)"):
        save({"pred": item["pred"].repeat(3, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"^pred: expected \(1 or 2, 11, 18, 7\).*put Invertd before"):
        save({"pred": item["pred"].transpose(1, 3)})
    moved = item["pred"].clone()
    moved.affine = moved.affine + torch.tensor([[0, 0, 0, 1.0]] + [[0.0] * 4] * 3)
    with pytest.raises(ValueError, match="^pred: expected the affine of .* up to 1 mm apart"):
        save({"pred": moved})
    broken = item["pred"].clone()
    broken[0, 3, 4, 5] = torch.nan
    with pytest.raises(ValueError, match="^pred: expected finite values"):
        save({"pred": broken})
    with pytest.raises(ValueError, match="^reference: expected it or reference_key, got both"):
        SaveTranslatedVolumed(output_dir=tmp_path, reference=flair, reference_key="t1w")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/absent.nii: expected the reference volume"):
        SaveTranslatedVolumed(output_dir=tmp_path, reference=tmp_path / "absent.nii")
    with pytest.raises(ValueError, match="^t1w: expected a reference volume in each item"):
        SaveTranslatedVolumed(output_dir=tmp_path, reference_key="t1w")(item)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/absent.pt: "):
        SaveTranslatedVolumed(output_dir=tmp_path, weights_path=tmp_path / "absent.pt")(item)
    assert not (tmp_path / "out").exists()
