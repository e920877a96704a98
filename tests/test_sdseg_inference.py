# SPDX-License-Identifier: Apache-2.0
"""``sdseg`` on pictures and volumes that somebody has, and what it says when it cannot work; with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from shared.datalist import load_datalist
from shared.errors import root_cause
from tests.sdseg_runs import AUTOENCODER, BASELINE, NATIVE, SDSEG, SIZE, UNET, rewritten, save_network
from tools.phantoms.sdseg import make_dataset
from tools.phantoms.sdseg_abdomen import make_patient

VOLUME = (40, 36, 9)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), num_images=18)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def raw_volume(tmp_path_factory) -> Path:
    """A CT volume as a scanner's export: Hounsfield units, LAS."""
    path = tmp_path_factory.mktemp("raw") / "patient.nii.gz"
    nibabel.save(make_patient(2, size=VOLUME)[0], path)
    return path


def segment(models: Path, source: Path, output_dir: Path, **overrides: Any) -> Path:
    SDSEG.execute("inference", source, **{"ckpt_dir": str(models), "output_dir": str(output_dir), **overrides})
    return output_dir


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, phantoms, models) -> Path:
    return segment(models, phantoms, tmp_path_factory.mktemp("segmented"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def found(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


# Pictures


@pytest.mark.reliability(6)
def test_every_picture_gets_a_mask_of_its_own_size(segmented, phantoms, models):
    items = load_datalist(phantoms, "test")
    names = [Path(item["image"]).stem for item in items]
    assert [path.name for path in found(segmented, "_mask.png")] == sorted(f"{name}_mask.png" for name in names)
    for item in items:
        stem = str(segmented / "images" / Path(item["image"]).stem)
        mask, probability = pixels(Path(f"{stem}_mask.png")), pixels(Path(f"{stem}_mask_probability.png"))
        assert mask.shape == probability.shape == NATIVE
        assert set(np.unique(mask)) == {0, 255}
        assert np.array_equal(mask > 0, probability > 32767.5)
        said = json.loads(Path(f"{stem}_mask.json").read_text())
        assert (said["synthetic"], said["seed"], said["num_inference_steps"]) == (True, 0, 1)
    assert not found(segmented, "_agreement.png")


def test_mask_is_what_the_network_finds(segmented, phantoms, models):
    """``network_def(image)`` at the working size: the seed of the sampler's first noise is 0 as well."""
    with SDSEG.small("inference", phantoms, {"ckpt_dir": str(models)}) as workflow:
        content = workflow.parser.get_parsed_content
        model = content("network_def").eval()
        model.load_state_dict(torch.load(models / "model.pt", weights_only=True), strict=True)
        for item in content("dataset"):
            assert item["image"].shape == (3, *SIZE)
            with torch.no_grad():
                scores = model(item["image"].as_tensor()[None])
            expected = torch.nn.functional.interpolate((scores + 1) / 2, NATIVE, mode="bilinear", antialias=True)[0, 0]
            stem = Path(item["image"].meta["filename_or_obj"]).stem
            probability = pixels(segmented / f"images/{stem}_mask_probability.png") / 65535
            assert np.abs(probability - expected.numpy()).max() < 1e-3
            assert probability.std() > 0.01


def test_seed_decides_the_mask(segmented, phantoms, models, tmp_path):
    again = segment(models, phantoms, tmp_path / "again")
    other = segment(models, phantoms, tmp_path / "other", seed=1)
    files = [path.relative_to(segmented) for path in found(segmented, ".png")]
    assert len(files) >= 3
    assert all((again / name).read_bytes() == (segmented / name).read_bytes() for name in files)
    masks = [name for name in files if name.name.endswith("_probability.png")]
    assert all(not np.array_equal(pixels(other / name), pixels(segmented / name)) for name in masks)


def test_several_samples_give_mean_and_agreement(segmented, phantoms, models, tmp_path):
    source = Path(load_datalist(phantoms, "test")[0]["image"])
    single = [segment(models, source, tmp_path / str(seed), seed=seed) for seed in range(3)]
    out = segment(models, source, tmp_path / "three", num_samples=3)
    name = f"{source.stem}_mask"
    samples = np.stack([pixels(folder / f"{name}_probability.png") / 65535 for folder in single])
    assert np.abs(pixels(out / f"{name}_probability.png") / 65535 - samples.mean(0)).max() < 1e-3
    agreement = pixels(out / f"{name}_agreement.png") / 65535
    assert agreement.shape == NATIVE
    assert 0.5 <= agreement.min() < agreement.max() == 1
    assert json.loads((out / f"{name}.json").read_text())["num_samples"] == 3


def test_more_steps_and_another_threshold_are_options(segmented, phantoms, models, tmp_path):
    source = Path(load_datalist(phantoms, "test")[0]["image"])
    name = f"{source.stem}_mask"
    steps = segment(models, source, tmp_path / "steps", num_inference_steps=4)
    first = pixels(segmented / f"images/{name}_probability.png")
    assert not np.array_equal(pixels(steps / f"{name}_probability.png"), first)
    strict = segment(models, source, tmp_path / "strict", threshold=0.55)
    assert np.array_equal(pixels(strict / f"{name}.png") > 0, first / 65535 > 0.55)


def test_kinds_of_pictures_are_read(phantoms, models, tmp_path):
    """A folder of anything: 16-bit grey, JPEG, alpha, palette, a 2-D NIfTI; each mask has its picture's size."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    picture = Image.open(load_datalist(phantoms, "test")[0]["image"]).resize((50, 70))
    picture.save(source / "a.jpg")
    picture.convert("RGBA").save(source / "deep/b.png")
    picture.convert("P").save(source / "c.png")
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(source / "d.tif")
    nibabel.save(nibabel.Nifti1Image(grey.astype(np.float32).T, np.eye(4)), source / "e.nii.gz")
    out = segment(models, source, tmp_path / "out")
    pictures = [path.relative_to(out).as_posix() for path in found(out, "_mask.png")]
    assert pictures == ["a_mask.png", "c_mask.png", "d_mask.png", "deep/b_mask.png"]
    assert {pixels(out / name).shape for name in pictures} == {(70, 50)}
    assert nibabel.load(out / "e_mask.nii.gz").shape == (50, 70)


# Volumes


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_volume_is_segmented_slice_by_slice_in_its_window(raw_volume, models, tmp_path):
    out = segment(models, raw_volume, tmp_path / "out", window=[-175, 250])
    result, source = nibabel.load(out / "patient_mask.nii.gz"), nibabel.load(raw_volume)
    assert result.shape == source.shape == VOLUME
    assert np.array_equal(result.affine, source.affine)
    assert nibabel.aff2axcodes(result.affine) == ("L", "A", "S")
    assert set(np.unique(voxels(out / "patient_mask.nii.gz"))) == {0, 1}
    probability = voxels(out / "patient_mask_probability.nii.gz")
    few = segment(models, raw_volume, tmp_path / "few", window=[-175, 250], slices_per_batch=2)
    assert np.allclose(voxels(few / "patient_mask_probability.nii.gz"), probability, atol=1e-5)
    # All slices start from one noise; without that they do not.
    apart = segment(models, raw_volume, tmp_path / "apart", window=[-175, 250], share_noise=False)
    difference = np.abs(voxels(apart / "patient_mask_probability.nii.gz") - probability).max(axis=(0, 1))
    assert difference[0] < 1e-5 < difference[1:].min()
    # The network sees the window: a picture of a slice that was cut to it by hand has the same mask.
    upright = np.clip((voxels(raw_volume)[..., 4].astype(float) + 175) / 425, 0, 1)[:, ::-1].T
    levels = np.round(upright * 65535).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "slice.png")
    plane = segment(models, tmp_path / "slice.png", tmp_path / "plane")
    turned = probability[..., 4][:, ::-1].T
    assert np.abs(pixels(plane / "slice_mask_probability.png") / 65535 - turned).max() < 2e-3


def test_volume_without_a_window_is_scaled_by_its_range(raw_volume, models, tmp_path):
    out = segment(models, raw_volume, tmp_path / "out")
    other = segment(models, raw_volume, tmp_path / "other", window=[-175, 250])
    name = "patient_mask_probability.nii.gz"
    assert np.abs(voxels(out / name) - voxels(other / name)).max() > 1e-3


@pytest.mark.reliability(6)
def test_volume_of_two_slices_and_its_orientation(raw_volume, models, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    image = nibabel.load(raw_volume)
    nibabel.save(image.slicer[..., 3:5], source / "two.nii.gz")
    nibabel.save(nibabel.as_closest_canonical(image), source / "ras.nii.gz")
    shutil.copyfile(raw_volume, source / "las.nii.gz")
    out = segment(models, source, tmp_path / "out", window=[-175, 250])
    assert voxels(out / "two_mask.nii.gz").shape == (*VOLUME[:2], 2)
    assert np.array_equal(voxels(out / "two_mask.nii.gz"), voxels(out / "las_mask.nii.gz")[..., 3:5])
    turned = nibabel.as_closest_canonical(nibabel.load(out / "las_mask.nii.gz"))
    assert np.array_equal(np.asarray(turned.dataobj), voxels(out / "ras_mask.nii.gz"))


# The documented command


def test_command_line_as_documented(raw_volume, models, tmp_path):
    present = sorted(SDSEG.folder.rglob("*"))
    options = {"ckpt_dir": models, "output_dir": tmp_path / "out", "dataset_dir": raw_volume, "window": "[-175,250]"}
    done = SDSEG.command("inference", **options)
    assert done.code == 0, done.err[-2000:]
    expected = segment(models, raw_volume, tmp_path / "expected", window=[-175, 250])
    name = "patient_mask.nii.gz"
    assert np.array_equal(voxels(tmp_path / "out" / name), voxels(expected / name))
    assert sorted(SDSEG.folder.rglob("*")) == present, "the run wrote outside of the test's folder"


# Bad input


def replaced(phantoms: Path, folder: Path, key: str, change: Callable[[Path], Any]) -> tuple[Path, Path]:
    """A copy of the phantoms in which ``change`` spoils one file of the training; returns it and the file."""
    data = rewritten(phantoms, folder, lambda content: None)
    path = data / json.loads((data / "datalist.json").read_text())["training"][2][key]
    change(path)
    return data, path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def shrink(path: Path) -> None:
    Image.open(path).resize((64, 80), Image.Resampling.NEAREST).save(path)


def grey_values(path: Path) -> None:
    ramp = np.linspace(0, 255, NATIVE[0] * NATIVE[1]).astype(np.uint8).reshape(NATIVE)
    Image.fromarray(ramp).save(path)


def options_for(stage: str, models: Path, root: Path) -> dict[str, Any]:
    """Options that read random weights and write below ``root``."""
    return SDSEG.folders(root, stage) | {"ckpt_dir": str(models)}


@pytest.mark.parametrize("stage", ["train_autoencoder", "train", "train_baseline"])
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("image", truncate, "expected a readable image"),
        ("label", truncate, "expected a readable image"),
        ("label", grey_values, "expected a binary mask"),
        ("label", shrink, "expected the size of its image "),
        ("label", Path.unlink, "expected this file"),
    ],
    ids=["truncated image", "truncated mask", "grey mask", "other size", "missing mask"],
)
def test_bad_pair_is_named(stage, key, change, message, phantoms, models, tmp_path, capsys):
    data, path = replaced(phantoms, tmp_path / "data", key, change)
    if stage == "train_autoencoder" and change is shrink:
        return  # it looks at masks alone
    line = SDSEG.last_line(stage, data, capsys, **options_for(stage, models, tmp_path) | {"flips": "none"})
    assert line.startswith(f"{path}: {message}")


@pytest.mark.parametrize("workers", [0, 1])
def test_mask_of_another_size_is_found_where_latents_are_cached(workers, phantoms, models, tmp_path, capsys):
    """The mask is read for its latents and the image in every step: the two never meet."""
    data, path = replaced(phantoms, tmp_path / "data", "label", shrink)
    options = options_for("train", models, tmp_path) | {"flips": "none", "num_workers": workers}
    line = SDSEG.last_line("train", data, capsys, **options)
    assert line.startswith(f"{path}: expected the size of its image {data}/images/")
    assert "160 x 128 (rows x columns), but got 80 x 64" in line
    line = SDSEG.last_line("train", data, capsys, **options | {"latent_cache_dir": ""})
    assert line.startswith(f"{path}: expected the size of its image")


def test_absent_label_is_named(phantoms, models, tmp_path, capsys):
    def remove(content: dict[str, Any]) -> None:
        del content["training"][1]["label"]

    data = rewritten(phantoms, tmp_path / "data", remove)
    for stage in ("train_autoencoder", "train", "train_baseline"):
        line = SDSEG.last_line(stage, data, capsys, **options_for(stage, models, tmp_path))
        assert line.startswith(f"{data}/datalist.json: training[1]: expected 'label'")


def test_bad_image_to_segment_is_named(raw_volume, phantoms, models, tmp_path, capsys):
    picture = tmp_path / "a.png"
    shutil.copyfile(load_datalist(phantoms, "test")[0]["image"], picture)
    truncate(picture)
    values = voxels(raw_volume).astype(np.float32)
    values[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii.gz")
    options = {"ckpt_dir": str(models), "output_dir": str(tmp_path / "out")}
    for path, message in (
        (picture, "expected a readable image"),
        (tmp_path / "nan.nii.gz", "expected finite voxels, but 1 are NaN or infinite"),
        (tmp_path / "gone.png", "expected a dataset folder, a folder of images or a file, but it does not exist"),
    ):
        assert SDSEG.last_line("inference", path, capsys, **options).startswith(f"{path}: {message}")
    assert not found(tmp_path / "out", "_mask.png")
    line = SDSEG.last_line("inference", phantoms, capsys, **options, window=[-175, 250])
    assert line.startswith(f"{phantoms}/images/")
    assert "a window [-175.0, 250.0] is given, but got a picture" in line


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("train_autoencoder", {"image_size": [50, 64]}, "image_size: expected multiples of 4, .* nearest is [48, 64]"),
        ("train_autoencoder", {"ms_ssim_kernel_size": 7}, "ms_ssim_kernel_size: expected at most 3 for image_size"),
        ("train", {"image_size": [56, 64]}, "image_size: expected multiples of 16, .* nearest is [64, 64]"),
        ("inference", {"image_size": [64, 40]}, "image_size: expected multiples of 16, .* nearest is [64, 32]"),
        (
            "inference",
            {"unet_def": {**UNET, "num_classes": 3}},
            "num_classes: expected a U-Net with no embedded classes, got 3",
        ),
        ("train", {"num_classes": 3}, "{data}/masks/ .* got 0, 255 (0 and 255 are a binary mask: num_classes 1)"),
        ("train", {"condition_mode": "adm"}, "condition_mode: expected concat or crossattn, got 'adm'"),
        ("train", {"flips": "vertical"}, "flips: expected one of none, horizontal, both, but got 'vertical'"),
        ("train", {"max_minutes": -1}, "max_minutes: expected a positive time, got -1"),
        ("inference", {"num_samples": 0}, "num_samples: expected "),
        ("inference", {"num_inference_steps": 1001}, "num_inference_steps: expected "),
        ("inference", {"window": [250, -175]}, "window: expected "),
        ("inference", {"section": "tests"}, "{data}/datalist.json: expected "),
    ],
)
def test_bad_option_is_named(stage, overrides, message, phantoms, models, tmp_path, capsys):
    line = SDSEG.last_line(stage, phantoms, capsys, **options_for(stage, models, tmp_path) | overrides)
    start, *more = message.format(data=phantoms).split(" .* ")
    assert line.startswith(start)
    assert all(piece in line for piece in more)


@pytest.mark.parametrize(
    ("stage", "path", "remedy"),
    [
        ("train", "stages/autoencoder.pt", "configs/train_autoencoder.json"),
        ("inference", "model.pt", "configs/train.json"),
        ("train evaluate", "model.pt", "configs/train.json"),
    ],
)
def test_missing_weights_are_named(stage, path, remedy, phantoms, tmp_path, capsys):
    line = SDSEG.last_line(stage, phantoms, capsys, **SDSEG.folders(tmp_path, stage.split()[0]))
    assert line.startswith(f"{tmp_path}/models/{path}: expected trained weights, found no file. Train ")
    assert remedy in line


@pytest.mark.parametrize(
    ("stage", "path", "overrides"),
    [
        ("train", "stages/autoencoder.pt", {"autoencoder_def": {**AUTOENCODER, "channels": [8, 8, 8]}}),
        ("inference", "model.pt", {"autoencoder_def": {**AUTOENCODER, "channels": [8, 8, 8]}}),
        ("inference", "model.pt", {"num_classes": 3}),
        ("train evaluate", "model.pt", {"num_classes": 3, "baseline_def": BASELINE}),
        ("train", "model.pt", {"model_weights": "{models}/model.pt", "unet_def": {**UNET, "channels": [16, 16, 16]}}),
    ],
)
def test_weights_of_another_configuration_are_named(stage, path, overrides, phantoms, models, tmp_path, capsys):
    filled = {key: value.format(models=models) if isinstance(value, str) else value for key, value in overrides.items()}
    options = options_for(stage.split()[0], models, tmp_path) | filled
    line = SDSEG.last_line(stage, phantoms, capsys, **options)
    assert line.startswith(f"{models}/{path}: expected the weights of this configuration")


def test_mistyped_option_ends_the_command_with_its_name(monkeypatch):
    files = str([str(SDSEG.folder / f"configs/{name}.json") for name in ("inference", "tiny")])
    runner = str(Path("monai/bundle/__main__.py"))
    monkeypatch.setattr("sys.argv", [runner, "run", "--config_file", files, "--num_sample", "3"])
    with pytest.raises(RuntimeError) as caught, SDSEG.loaded("inference", "tiny"):
        pass
    line = str(root_cause(caught.value))
    assert line.startswith("--num_sample: expected an id of the configuration")
    assert "did you mean --num_samples?" in line


# ----------------------------------------------------------------------------------------------------------------------
# speed
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "share"),
    [({"images_per_batch": 5}, 2e-4), ({"amp": True}, 0.05), ({"channels_last": True}, 2e-3)],
    ids=["batch", "bfloat16", "channels-last"],
)
def test_switches_for_speed_keep_the_masks(options, share, segmented, phantoms, models, tmp_path):
    folder = segment(models, phantoms, tmp_path, **options)
    paths = found(folder, "_mask.png")
    assert [path.name for path in paths] == [path.name for path in found(segmented, "_mask.png")]
    pairs = [(pixels(path), pixels(segmented / path.relative_to(folder))) for path in paths]
    assert all(0 < (one > 0).mean() < 1 for one, _ in pairs), "the comparison would be blind"
    assert np.mean([np.mean(one != other) for one, other in pairs]) <= share


def test_compilation_reaches_the_unet(phantoms, models, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    segment(models, phantoms, tmp_path, compile=True)
    assert compiled == ["FiLMUNet"]
