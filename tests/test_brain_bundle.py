# SPDX-License-Identifier: Apache-2.0
"""``brain_controlnet`` as a whole, run small on phantoms."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL
from PIL import Image

from shared.datalist import load_datalist
from shared.errors import root_cause
from shared.intensity import robust_range
from shared.slices import slice_items
from shared.transforms.slices import LoadSlicesd
from tests.bundle_runs import BundleRuns, curve
from tests.bundle_tools import STANDALONE, read
from tests.conftest import ROOT
from tools.phantoms.brain_controlnet import make_dataset, make_subject

TINY = read(ROOT / "bundles/brain_controlnet/configs/tiny.json")
LEVELS = {"channels": [8, 16, 16], "num_head_channels": [0, 8, 8], "norm_num_groups": 8, "cross_attention_dim": 8}
AUTOENCODER = {**TINY["autoencoder_def"], "channels": [4, 4, 8], "norm_num_groups": 4}
UNET = {**TINY["unet_def"], **LEVELS}
CONTROLNET = {**TINY["controlnet_def"], **LEVELS, "conditioning_embedding_num_channels": [4, 4, 8]}
SMALL: dict[str, Any] = {
    "image_size": [48, 64],
    "latent_shape": [3, 12, 16],
    "autoencoder_def": AUTOENCODER,
    "device": "$torch.device('cpu')",
}
DIFFUSION = {**SMALL, "unet_def": UNET}
TRAINING = {"max_epochs": 2, "batch_size": 8, "num_workers": 0, "tracking_uri": ""}
# Few steps that show: no warm-up, large steps, pictures of two denoising steps.
FAST = {**TRAINING, "learning_rate": 0.01, "warmup_steps": 1, "preview_interval": 2}
FAST["preview_sampler#num_inference_steps"] = 2
STAGES: dict[str, dict[str, Any]] = {
    "train_autoencoder": {**SMALL, **TRAINING, "adversarial_start": 2, "ms_ssim_kernel_size": 3},
    "train_diffusion": {**DIFFUSION, **FAST},
    "train": {**DIFFUSION, **FAST, "controlnet_def": CONTROLNET, "learning_rate": 0.03},
    "train_regression": {
        **{key: SMALL[key] for key in ("image_size", "device")},
        **{**TRAINING, "regression_def": {**TINY["regression_def"], "channels": [4, 8], "strides": [2]}},
    },
    "inference": {**DIFFUSION, "controlnet_def": CONTROLNET, "num_inference_steps": 3},
    "inference_unconditional": {**DIFFUSION, "num_inference_steps": 3},
}
BRAIN = BundleRuns("brain_controlnet", STAGES, cached=("train_diffusion", "train"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), n=8, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0), split=(0.5, 0.25, 0.25))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantoms) -> Path:
    """A folder with all stages and the baseline trained for two epochs of two steps."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("train_autoencoder", "train_diffusion", "train", "train_regression"):
        BRAIN.execute(stage, phantoms, **BRAIN.folders(root, stage))
    return root


def weights(trained: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(trained / f"models/{name}.pt", weights_only=True)


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def changed(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def copy_of(trained: Path, root: Path, *stages: str) -> Path:
    """The weights of some stages in a models folder of their own."""
    (root / "models/stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        shutil.copyfile(trained / f"models/stages/{stage}.pt", root / f"models/stages/{stage}.pt")
    return root / "models"


# Training


def training_latents(trained: Path) -> list[np.ndarray]:
    """Cached posteriors of the four training subjects of four slices: mean and log-variance."""
    latents = [np.load(path) for path in (trained / "runs/latents").glob("*.npy")]
    return [array for array in latents if len(array) == 16]


def test_stage_1_trains_and_releases_its_best_weights(trained):
    run = trained / "runs/train_autoencoder"
    assert all(torch.isfinite(tensor).all() for tensor in weights(trained, "stages/autoencoder").values())
    names = {row[3] for row in curve(run, "validation")}
    assert names == {"mean_absolute_error", "peak_signal_to_noise_ratio", "ms_ssim"}
    assert {row[0] for row in curve(run, "train", "discriminator")} == {"2"}
    assert {row[0] for row in curve(run, "train", "reconstruction")} == {"1", "2"}
    assert (run / "previews/epoch_0002_reconstruction.png").exists()
    assert json.loads((run / "manifest.json").read_text())["settings"]["image_size"] == [48, 64]


def test_stage_2_measures_the_scale_factor_and_keeps_stage_1(trained):
    model = weights(trained, "stages/diffusion")
    assert changed(part(model, "autoencoder."), weights(trained, "stages/autoencoder")) == []
    means, log_variances = training_latents(trained)[0].astype(np.float64).swapaxes(0, 1)
    expected = (means.var() + np.exp(log_variances).mean()) ** -0.5
    assert model["scale_factor"].item() == pytest.approx(expected, rel=1e-5)
    assert {row[3] for row in curve(trained / "runs/train_diffusion", "validation")} == {"velocity_mse"}
    assert (trained / "runs/train_diffusion/previews/epoch_0002_samples.png").exists()


@pytest.mark.reliability(8)
def test_stage_3_trains_the_controlnet_and_nothing_else(trained):
    model, stage_2 = weights(trained), weights(trained, "stages/diffusion")
    assert changed(part(model, "diffusion."), stage_2) == []
    assert {key.split(".")[0] for key in model} == {"diffusion", "controlnets", "embeddings"}
    # It was started from the U-Net, so the two would be equal without training; zero convolutions would be zero.
    own = part(model, "controlnets.0.")
    started = {key: part(stage_2, "unet.")[key] for key in own if not key.startswith("controlnet_")}
    assert len(started) > 20
    assert set(changed({key: own[key] for key in started}, started)) >= {"conv_in.conv.weight", "conv_in.conv.bias"}
    zero = [key for key in own if key.startswith("controlnet_")]
    assert len(zero) > 10
    assert all(own[key].any() for key in zero)
    assert model["embeddings.0.conv_out.conv.weight"].any()
    run = trained / "runs/train"
    assert {row[3] for row in curve(run, "validation")} == {"velocity_mse"}
    assert (run / "previews/epoch_0002_translation.png").exists()
    checkpoint = torch.load(run / "checkpoints/checkpoint_epoch=2.pt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["network"]} == {"controlnets", "embeddings"}
    assert {key.split(".")[0] for key in checkpoint["ema"]} == {"controlnets", "embeddings"}
    lowest = min(float(row[4]) for row in curve(run, "validation", "velocity_mse"))
    assert checkpoint["best"]["best"] == pytest.approx(lowest, rel=1e-5)


def test_stages_2_and_3_see_latents_of_the_trained_encoder(phantoms, trained):
    """A data set that is built before the weights are loaded would hold random ones."""
    encoder = AutoencoderKL(**{key: value for key, value in AUTOENCODER.items() if not key.startswith("_")}).eval()
    encoder.load_state_dict(weights(trained, "stages/autoencoder"))
    item = LoadSlicesd("t1w")(slice_items(load_datalist(phantoms))[1])
    with torch.no_grad():
        mean, sigma = encoder.encode(item["t1w"][None])
    cached = training_latents(trained)
    assert len(cached) >= 1
    for latents in cached:
        assert np.allclose(latents[1], torch.cat((mean, 2 * sigma.log())).numpy(), atol=1e-4)


def test_baseline_trains(trained):
    run = trained / "runs/train_regression"
    assert {row[3] for row in curve(run, "validation")} == {"mean_absolute_error", "peak_signal_to_noise_ratio"}
    losses = [float(row[4]) for row in curve(run, "train", "loss")]
    assert losses[1] < losses[0]
    assert weights(trained, "stages/regression")


STAND_ALONE = [path.stem for path in STANDALONE if path.parents[1] == BRAIN.folder]


@pytest.mark.parametrize("stage", [*STAND_ALONE, "train evaluate", "train_diffusion evaluate_diffusion"])
def test_monai_finds_its_properties(stage, phantoms, trained, tmp_path):
    options = BRAIN.folders(trained, stage.split()[0]) | {"output_dir": str(tmp_path)}
    with BRAIN.small(stage, phantoms, options) as workflow:
        assert workflow.check_properties() == []


@pytest.mark.reliability(8)
def test_loaded_prompt_stays_as_it_is(phantoms, trained, tmp_path):
    given = {"embeddings": torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))}
    torch.save(given, tmp_path / "prompt.pt")
    options = BRAIN.folders(tmp_path, "train_diffusion") | {"prompt_weights": str(tmp_path / "prompt.pt")}
    copy_of(trained, tmp_path, "autoencoder")
    BRAIN.execute("train_diffusion", phantoms, **options, max_epochs=1)
    assert changed(part(weights(tmp_path, "stages/diffusion"), "prompt."), given) == []


@pytest.mark.reliability(8)
def test_unlocked_unet_is_trained(phantoms, trained, tmp_path):
    copy_of(trained, tmp_path, "diffusion")
    BRAIN.execute("train", phantoms, **BRAIN.folders(tmp_path, "train"), max_epochs=1, unlock_unet=True)
    found = changed(part(weights(tmp_path), "diffusion."), weights(trained, "stages/diffusion"))
    assert len(found) > 20
    assert {key.split(".")[0] for key in found} == {"unet"}


def test_pair_is_augmented_together_where_latents_are_not_cached(phantoms, trained, tmp_path):
    def items(**overrides: Any) -> list[dict[str, torch.Tensor]]:
        options = BRAIN.folders(trained, "train") | {"output_dir": str(tmp_path)} | overrides
        with BRAIN.small("train", phantoms, options) as workflow:
            dataset = workflow.parser.get_parsed_content("train#dataset")
            return [dataset[index] for index in range(3)]

    # Flips and shifts of intensity alone; affine transforms and gamma are left out.
    affine, shift, gamma = (f"train#image_preprocessing#transforms#{index}#prob" for index in (3, 4, 5))
    quiet = {"latent_cache_dir": "", affine: 0.0, gamma: 0.0}
    plain = items(**quiet, **{shift: 0.0})
    random = items(**quiet, **{shift: 1.0}, flip_probability=1.0)
    for one, two in zip(plain, random, strict=True):
        shifts = []
        for key in ("image", "condition"):
            # Away from 0 and 1, where the shift is clipped.
            inside = (one[key] > 0.2) & (one[key] < 0.8)
            difference = (two[key].flip(1) - one[key])[inside]
            assert inside.sum() > 100
            assert difference.std() < 1e-6
            shifts.append(difference.mean().item())
        assert shifts[0] == pytest.approx(shifts[1], abs=1e-6)
        assert 1e-4 < abs(shifts[0]) <= 0.05
    with pytest.raises(Exception, match="check_augmentation") as refusal:
        items(flip_probability=1.0)
    assert str(root_cause(refusal.value)).startswith("flip_probability: expected 0 with a cache of latents")
    cached = items(**{shift: 1.0, affine: 1.0})
    assert [sorted(item) for item in cached] == [["condition", "item_id", "latent_log_variance", "latent_mean"]] * 3
    assert all(torch.equal(a["condition"], b["condition"]) for a, b in zip(plain, cached, strict=True))


def test_latents_can_be_encoded_in_every_step(phantoms, trained, tmp_path):
    copy_of(trained, tmp_path, "diffusion")
    options = BRAIN.folders(tmp_path, "train") | {"latent_cache_dir": "", "flip_probability": 0.5, "num_workers": 2}
    BRAIN.execute("train", phantoms, **options, max_epochs=1)
    assert len(curve(tmp_path / "runs/train", "train", "loss")) == 1
    assert not list(tmp_path.rglob("*.npy"))


# Several conditions


@pytest.fixture(scope="module")
def two_contrasts(tmp_path_factory, phantoms) -> Path:
    """The phantoms with a second contrast: the FLAIR once more."""
    return spoiled(phantoms, tmp_path_factory.mktemp("two") / "data", lambda item: item.update(t2w=item["flair"]))


def spoiled(phantoms: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The phantoms with ``change`` made to every item; images are links."""
    content = json.loads((phantoms / "datalist.json").read_text())
    for section in ("training", "validation", "test"):
        for item in content[section]:
            change(item)
    folder.mkdir(parents=True)
    for subject in phantoms.glob("sub-*"):
        (folder / subject.name).symlink_to(subject)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


ONE_NET: dict[str, Any] = {"condition_keys": ["flair", "t2w"]}
TWO_NETS: dict[str, Any] = {
    **ONE_NET,
    "condition_channels": [[0], [1]],
    "controlnet_def": {**CONTROLNET, "conditioning_embedding_in_channels": 1},
    "controlnet_defs": ["%controlnet_def", "%controlnet_def"],
}


@pytest.mark.parametrize(("choice", "channels"), [(ONE_NET, [2]), (TWO_NETS, [1, 1])], ids=["channels", "networks"])
def test_several_conditions_are_a_choice_of_configuration(choice, channels, two_contrasts, trained, tmp_path):
    copy_of(trained, tmp_path, "diffusion")
    BRAIN.execute("train", two_contrasts, **BRAIN.folders(tmp_path, "train"), **choice, max_epochs=1)
    assert len(curve(tmp_path / "runs/train", "train", "loss")) == 1
    model = weights(tmp_path)
    first = "embeddings.{}.conv_in.conv.weight"
    assert [model[first.format(index)].shape[1] for index in range(len(channels))] == channels
    assert first.format(len(channels)) not in model
    options = {**choice, "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
    if choice is TWO_NETS:
        options["conditioning_scale"] = [1.0, 0.5]
    BRAIN.execute("inference", two_contrasts, **options)
    assert len(list((tmp_path / "eval").rglob("*_T1w.nii.gz"))) == 2


# Resuming


def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(phantoms, trained, tmp_path):
    curves = []
    # Two batches in an epoch: the crash comes in the middle of epoch 2.
    for name, crashes in (("whole", [None]), ("broken", [3, None])):
        copy_of(trained, tmp_path / name, "diffusion")
        options = BRAIN.folders(tmp_path / name, "train") | {"max_epochs": 3}
        runs = [BRAIN.train_and_crash("train", phantoms, crash_at, **options) for crash_at in crashes]
        curves.append(curve(tmp_path / name / "runs/train"))
    assert runs == [[1, 2, 3], [3, 4, 5, 6]]
    assert len(curves[0]) > 10
    assert curves[0] == curves[1]
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "broken")) == []
    # The seed decides the first weights too: two epochs of another run were the same.
    assert curve(trained / "runs/train") == [row for row in curves[0] if row[0] in ("1", "2")]


def test_other_weights_of_stage_2_are_not_resumed_with(phantoms, trained, tmp_path, capsys):
    state = weights(trained, "stages/diffusion")
    state["scale_factor"] += 0.1
    torch.save(state, copy_of(trained, tmp_path) / "stages/diffusion.pt")
    shutil.copytree(trained / "runs/train/checkpoints", tmp_path / "runs/train/checkpoints")
    line = BRAIN.last_line("train", phantoms, capsys, **BRAIN.folders(tmp_path, "train"), max_epochs=3)
    path = tmp_path / "runs/train/checkpoints/checkpoint_epoch=2.pt"
    assert line.startswith(f"{path}: made with other settings (diffusion_weights: ")
    assert line.count("there,") == 1
    assert not (tmp_path / "models/model.pt").exists()


# Inference


def translate(trained: Path, source: Path, output_dir: Path, **overrides: Any) -> Path:
    BRAIN.execute(
        "inference", source, **{"ckpt_dir": str(trained / "models"), "output_dir": str(output_dir)} | overrides
    )
    return output_dir


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture(scope="module")
def raw_flair(tmp_path_factory) -> Path:
    """A volume as a scanner's export: oblique, LPS, in scanner units, of a size that no network takes."""
    image = make_subject(2, size=(75, 101, 5), spacing=(2.1, 2.2, 4.0))["FLAIR"]
    assert "".join(nibabel.aff2axcodes(image.affine)) == "LPS"
    path = tmp_path_factory.mktemp("raw") / "sub-02_FLAIR.nii.gz"
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def translated(trained, raw_flair, tmp_path_factory) -> Path:
    """What the raw volume becomes."""
    return translate(trained, raw_flair, tmp_path_factory.mktemp("translated"))


def assert_same_grid(result: Path, source: Path) -> None:
    one, two = nibabel.load(result), nibabel.load(source)
    assert one.shape == two.shape
    assert one.get_data_dtype() == np.float32
    for form in ("get_sform", "get_qform"):
        (matrix, code), (expected, expected_code) = (getattr(image, form)(coded=True) for image in (one, two))
        assert np.array_equal(matrix, expected)
        assert code == expected_code


@pytest.mark.reliability(6)
def test_raw_volume_keeps_its_grid_and_is_marked_synthetic(translated, raw_flair, trained):
    assert sorted(path.name for path in translated.glob("sub-*")) == [
        "sub-02_T1w.json",
        "sub-02_T1w.nii.gz",
        "sub-02_T1w.png",
    ]
    result = translated / "sub-02_T1w.nii.gz"
    assert_same_grid(result, raw_flair)
    values = voxels(result)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() > 0.01
    said = json.loads((translated / "sub-02_T1w.json").read_text())
    expected = {"synthetic": True, "source": "sub-02_FLAIR.nii.gz", "seed": 0, "num_samples": 1, "scheduler": "dpm"}
    assert {key: said[key] for key in expected} == expected
    assert said["intensity"] == {"unit": "[0, 1]"}
    assert said["weights_sha256"] == json.loads((trained / "models/model.json").read_text())["sha256"]
    assert b"synthetic" in gzip.decompress(result.read_bytes())[:348]


def test_seed_decides_the_volume(translated, raw_flair, trained, tmp_path):
    name = "sub-02_T1w.nii.gz"
    again = translate(trained, raw_flair, tmp_path / "again")
    other = translate(trained, raw_flair, tmp_path / "other", seed=1)
    apart = translate(trained, raw_flair, tmp_path / "apart", slices_per_batch=2)
    assert (again / name).read_bytes() == (translated / name).read_bytes()
    assert np.abs(voxels(other / name) - voxels(translated / name)).max() > 1e-2
    assert np.allclose(voxels(apart / name), voxels(translated / name), atol=1e-5)


@pytest.mark.reliability(6)
def test_folder_of_volumes_whose_orientation_does_not_matter(translated, raw_flair, trained, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    shutil.copyfile(raw_flair, source / "a_FLAIR.nii.gz")
    image = nibabel.load(raw_flair)
    nibabel.save(nibabel.as_closest_canonical(image), source / "deep/b_flair.nii")
    nibabel.save(image, source / "a_T2w.nii.gz")
    out = translate(trained, source, tmp_path / "out")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.nii.gz")) == [
        "a_T1w.nii.gz",
        "deep/b_T1w.nii.gz",
    ]
    assert_same_grid(out / "deep/b_T1w.nii.gz", source / "deep/b_flair.nii")
    lps, ras = nibabel.load(out / "a_T1w.nii.gz"), nibabel.load(out / "deep/b_T1w.nii.gz")
    assert np.array_equal(np.asarray(nibabel.as_closest_canonical(lps).dataobj), np.asarray(ras.dataobj))
    assert (out / "a_T1w.nii.gz").read_bytes() == (translated / "sub-02_T1w.nii.gz").read_bytes()


def test_datalist_is_translated_and_the_flair_decides(phantoms, trained, tmp_path):
    items = load_datalist(phantoms, "test")
    scaled = {
        scale: translate(trained, phantoms, tmp_path / str(scale), conditioning_scale=scale) for scale in (10.0, 0.0)
    }
    found: dict[float, list[np.ndarray]] = {scale: [] for scale in scaled}
    for scale, out in scaled.items():
        for item in items:
            result = out / f"{item['subject']}/anat/{item['subject']}_T1w.nii.gz"
            assert_same_grid(result, Path(item["flair"]))
            found[scale].append(np.asarray(nibabel.as_closest_canonical(nibabel.load(result)).dataobj))
    # Both subjects start from the same noise: what differs comes from their FLAIR, and without it nothing does.
    assert np.array_equal(*found[0.0])
    assert np.abs(found[10.0][0] - found[10.0][1]).max() > 1e-4
    said = json.loads((scaled[10.0] / f"{items[0]['subject']}/anat/{items[0]['subject']}_T1w.json").read_text())
    assert [panel.split(" x ")[0] for panel in said["panels"]] == ["FLAIR", "generated", "true", "difference"]


def test_inference_sees_what_training_saw(phantoms, trained, tmp_path):
    options = {"ckpt_dir": str(trained / "models"), "output_dir": str(tmp_path)}
    with BRAIN.small("train evaluate", phantoms, options) as workflow:
        slices = [item["condition"] for item in workflow.parser.get_parsed_content("validate#dataset")]
    with BRAIN.small("inference", phantoms, options) as workflow:
        volumes = [item["image"].as_tensor() for item in workflow.parser.get_parsed_content("dataset")]
    assert [volume.shape for volume in volumes] == [(1, 48, 64, 4)] * 2
    assert all(volume.min() >= 0 and volume.max() == 1 for volume in volumes)
    assert torch.equal(torch.stack(slices), torch.cat([volume.movedim(-1, 0) for volume in volumes]))


@pytest.mark.reliability(6)
def test_small_slice_is_padded_to_the_size_of_training(raw_flair, tmp_path):
    plane = voxels(raw_flair)[:37, 40:69, 2]
    nibabel.save(nibabel.Nifti1Image(plane, np.eye(4)), tmp_path / "small.nii")
    with BRAIN.small("inference", tmp_path / "small.nii", {}) as workflow:
        assert workflow.parser.get_parsed_content("dataset")[0]["image"].shape == (1, 48, 64, 1)


def test_png_slice_becomes_a_png(raw_flair, trained, tmp_path):
    plane = voxels(raw_flair)[:61, :45, 2].astype(float)
    source = tmp_path / "slice_FLAIR.png"
    Image.fromarray((255 * plane / plane.max()).astype(np.uint8)).save(source)
    out = translate(trained, source, tmp_path / "out")
    with Image.open(out / "slice_T1w.png") as picture:
        assert (picture.height, picture.width) == (61, 45)
        assert np.asarray(picture).std() > 1
    assert json.loads((out / "slice_T1w.json").read_text())["synthetic"] is True
    assert (out / "slice_T1w_comparison.png").exists()


def test_several_samples_give_mean_and_standard_deviation(translated, raw_flair, trained, tmp_path):
    out = translate(trained, raw_flair, tmp_path / "two", num_samples=2)
    other = translate(trained, raw_flair, tmp_path / "second", seed=1)
    samples = np.stack([voxels(folder / "sub-02_T1w.nii.gz") for folder in (translated, other)])
    assert_same_grid(out / "sub-02_T1w_sd.nii.gz", raw_flair)
    assert np.allclose(voxels(out / "sub-02_T1w.nii.gz"), samples.mean(0), atol=1e-5)
    assert np.allclose(voxels(out / "sub-02_T1w_sd.nii.gz"), samples.std(0, ddof=1), atol=1e-5)


def test_reference_gives_scanner_intensities(translated, raw_flair, phantoms, trained, tmp_path):
    reference = load_datalist(phantoms, "training")[0]["t1w"]
    low, high = robust_range(voxels(reference))
    assert high > 50
    out = translate(trained, raw_flair, tmp_path / "one", reference=reference)
    name = "sub-02_T1w.nii.gz"
    assert np.allclose(voxels(out / name), voxels(translated / name) * (high - low) + low, atol=1e-3 * high)
    assert json.loads((out / "sub-02_T1w.json").read_text())["intensity"]["high"] == pytest.approx(high)

    out = translate(trained, phantoms, tmp_path / "own", reference_key="t1w", num_inference_steps=1)
    for item in load_datalist(phantoms, "test"):
        stem = out / f"{item['subject']}/anat/{item['subject']}_T1w"
        low, high = robust_range(voxels(item["t1w"]))
        assert json.loads(stem.with_suffix(".json").read_text())["intensity"]["low"] == pytest.approx(low)
        assert voxels(stem.with_suffix(".nii.gz")).max() == pytest.approx(high, rel=0.5)


def test_options_of_sampling_change_the_volume(translated, raw_flair, trained, tmp_path):
    name = "sub-02_T1w.nii.gz"
    for key, value in {"guidance_scale": 2.0, "scheduler": "ddim", "share_noise": False}.items():
        out = translate(trained, raw_flair, tmp_path / key, **{key: value})
        assert np.abs(voxels(out / name) - voxels(translated / name)).max() > 1e-4, key


def test_command_line_as_documented(raw_flair, translated, trained, tmp_path):
    present = sorted(BRAIN.folder.rglob("*"))
    options = {"ckpt_dir": trained / "models", "output_dir": tmp_path, "dataset_dir": raw_flair}
    done = BRAIN.command("inference", **options)
    assert done.code == 0, done.err[-2000:]
    name = "sub-02_T1w.nii.gz"
    assert (tmp_path / name).read_bytes() == (translated / name).read_bytes()
    assert sorted(BRAIN.folder.rglob("*")) == present, "the run wrote outside of the test's folder"


def test_samples_without_a_flair(trained, tmp_path):
    pictures = []
    for name, seed in (("one", 5), ("two", 6)):
        options = {"output_dir": str(tmp_path / name), "num_samples": 2, "seed": seed, "batch_size": 1}
        BRAIN.execute("inference_unconditional", tmp_path, ckpt_dir=str(trained / "models"), **options)
        pictures.append([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))])
    # Anterior is up: rows are Y.
    assert [picture.shape for picture in pictures[0]] == [(64, 48), (64, 48)]
    assert not np.array_equal(*pictures[0])
    # Sample j has the seed + j.
    assert np.array_equal(pictures[0][1], pictures[1][0])


# Evaluation


def evaluate(stage: str, phantoms: Path, root: Path, **overrides: Any) -> tuple[list[dict[str, Any]], Any]:
    """Rows of the summary, and the sampler that made what they measure."""
    options = {"num_inference_steps": 2, "ms_ssim_kernel_size": 3, "output_dir": str(root)} | overrides
    workflow = BRAIN.execute(stage, phantoms, **options)
    rows = json.loads((root / "evaluation/summary.json").read_text())
    assert all(set(row) >= {"name", "value", "ci_low", "ci_high", "n", "note"} for row in rows)
    return rows, workflow.parser.get_parsed_content("validate#inferer")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_compares_with_baselines_and_a_control(phantoms, trained, tmp_path):
    # Released weights alone: what the stages left behind is not needed.
    models = copy_of(trained, tmp_path, "regression")
    shutil.copyfile(trained / "models/model.pt", models / "model.pt")
    options = {"regression_def": STAGES["train_regression"]["regression_def"], "ckpt_dir": str(models)}
    options |= {"num_samples": 2, "conditioning_scale": 0.5, "guidance_scale": 1.5}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in models.rglob("*.pt")}
    rows, sampler = evaluate("train evaluate", phantoms, tmp_path, **options)
    assert (sampler.num_inference_steps, sampler.num_samples) == (2, 2)
    assert (sampler.conditioning_scale, sampler.guidance_scale) == ([0.5], 1.5)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in models.rglob("*")
            if path.is_file()} == before  # fmt: skip

    methods = ["ControlNet", "FLAIR copied", "histogram-matched FLAIR", "U-Net regression"]
    methods += ["wrong FLAIR (control)", "autoencoder ceiling"]
    values = {(row["measure"], row["method"]): row["value"] for row in rows if "method" in row}
    for measure in ("psnr", "mae", "ms_ssim", "brain_psnr", "brain_mae", "brain_ms_ssim"):
        found = [values[measure, method] for method in methods]
        assert all(value is not None and np.isfinite(value) for value in found)
        # Each method is another set of pictures.
        assert len(set(found)) == len(methods)
    names = " ".join(row["name"] for row in rows)
    for measure in ("MS-SSIM of reconstructions", "MS-SSIM between samples", "MS-SSIM between real images"):
        assert measure in names
    others = [row for row in rows if "method" not in row]
    assert len([row for row in others if row["value"] is not None]) >= 8

    folder = tmp_path / "evaluation"
    assert {row["method"] for row in table(folder / "per_subject.csv")} == set(methods)
    assert len(table(folder / "per_subject.csv")) == 2 * len(methods)
    assert len(table(folder / "per_image.csv")) == 2 * 4
    assert (folder / "translation.png").exists()
    written = "".join(path.read_text() for path in [*folder.glob("*.csv"), *folder.glob("*.json")])
    assert not [item["subject"] for item in load_datalist(phantoms, "test") if item["subject"] in written]


def test_evaluation_of_samples(phantoms, trained, tmp_path):
    before = (trained / "models/stages/diffusion.pt").read_bytes()
    options = {"ckpt_dir": str(trained / "models"), "latent_cache_dir": str(trained / "runs/latents")}
    rows, sampler = evaluate("train_diffusion evaluate_diffusion", phantoms, tmp_path, **options)
    assert sampler.num_inference_steps == 2
    names = " ".join(row["name"] for row in rows)
    for measure in ("MS-SSIM of reconstructions", "MS-SSIM between samples", "MS-SSIM between real images"):
        assert measure in names
    assert len(table(tmp_path / "evaluation/per_image.csv")) == 2 * 4
    assert (trained / "models/stages/diffusion.pt").read_bytes() == before


# Bad input


def rewritten(item: dict[str, Any], folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Give an item an image of its own, in the folder of the dataset."""
    image = change(nibabel.load(item[key]))
    path = folder / f"bad_{key}.nii.gz"
    nibabel.save(image, path)
    item[key] = str(path)


def with_nan(image: Any) -> Any:
    values = image.get_fdata(dtype=np.float32)
    values[20, 30, 1] = np.nan
    return nibabel.Nifti1Image(values, image.affine)


def flipped_header(image: Any) -> Any:
    return nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([-1.0, 1, 1, 1]))


def fewer_slices(image: Any) -> Any:
    return nibabel.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine)


def four_dimensions(image: Any) -> Any:
    return nibabel.Nifti1Image(np.stack([np.asarray(image.dataobj)] * 2, axis=-1), image.affine)


BAD_VOLUMES = [
    (with_nan, "expected finite voxels, but 1 are NaN or infinite"),
    (flipped_header, "expected the orientation "),
    (fewer_slices, "expected the grid of "),
    (four_dimensions, "expected a 3-D volume, but got the shape (48, 64, 4, 2)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VOLUMES)
def test_bad_flair_of_a_pair_is_named(change, message, phantoms, trained, tmp_path, capsys):
    content = json.loads((phantoms / "datalist.json").read_text())
    data = spoiled(phantoms, tmp_path / "data", lambda item: None)
    item = content["training"][1]
    item["flair"] = str(phantoms / item["flair"])
    rewritten(item, data, "flair", change)
    item["flair"] = "bad_flair.nii.gz"
    (data / "datalist.json").write_text(json.dumps(content))
    copy_of(trained, tmp_path, "diffusion")
    line = BRAIN.last_line("train", data, capsys, **BRAIN.folders(tmp_path, "train"))
    assert line.startswith(f"{data}/bad_flair.nii.gz: {message}")


def truncated(image: Path, folder: Path) -> Path:
    path = folder / image.name
    path.write_bytes(image.read_bytes()[:3000])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [BAD_VOLUMES[0], (four_dimensions, "expected a 3-D volume, but got the shape (75, 101, 5, 2)")],
)
def test_bad_volume_to_translate_is_named(change, message, raw_flair, trained, tmp_path, capsys):
    path = tmp_path / "bad.nii.gz"
    nibabel.save(change(nibabel.load(raw_flair)), path)
    options = {"ckpt_dir": str(trained / "models"), "output_dir": str(tmp_path / "out")}
    assert BRAIN.last_line("inference", path, capsys, **options).startswith(f"{path}: {message}")


def test_truncated_volume_is_named(raw_flair, trained, tmp_path, capsys):
    path = truncated(raw_flair, tmp_path)
    options = {"ckpt_dir": str(trained / "models"), "output_dir": str(tmp_path / "out")}
    assert BRAIN.last_line("inference", path, capsys, **options).startswith(f"{path}: expected a readable file, but")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def remove_flair(item: dict[str, Any]) -> None:
    del item["flair"]


@pytest.mark.parametrize("stage", ["train", "train_regression", "inference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_flair, "{data}/datalist.json: {section}[0]: expected 'flair'"),
        (lambda item: item.update(flair="sub-000.nii"), "{data}/sub-000.nii: expected this file ('flair' of "),
    ],
    ids=["absent", "missing"],
)
def test_absent_flair_is_named(stage, change, message, phantoms, trained, tmp_path, capsys):
    data = spoiled(phantoms, tmp_path / "data", change)
    options = BRAIN.folders(trained, stage) | {"output_dir": str(tmp_path)}
    section = "test" if stage == "inference" else "training"
    assert BRAIN.last_line(stage, data, capsys, **options).startswith(message.format(data=data, section=section))


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("train_autoencoder", {"image_size": [50, 64]}, "image_size: expected multiples of 4, .* nearest is [48, 64]"),
        ("train_autoencoder", {"ms_ssim_kernel_size": 7}, "ms_ssim_kernel_size: expected at most 3 for image_size"),
        (
            "train_diffusion",
            {"latent_shape": [3, 16, 12]},
            "latent_shape: expected [3, 12, 16] for image_size [48, 64]",
        ),
        ("train", {"image_size": [56, 64], "latent_shape": [3, 14, 16]}, "image_size: expected multiples of 16"),
        ("inference", {"latent_shape": [3, 16, 12]}, "latent_shape: expected [3, 12, 16] for image_size [48, 64]"),
        ("inference", {"size_divisor": 4}, "image: expected sides that are multiples of 16, got (76, 104)"),
    ],
)
@pytest.mark.reliability(6)
def test_size_that_networks_cannot_halve_is_named(stage, overrides, message, phantoms, trained, raw_flair, tmp_path,
                                                  capsys):  # fmt: skip
    options = BRAIN.folders(trained, stage) | {"output_dir": str(tmp_path)} | overrides
    line = BRAIN.last_line(stage, raw_flair if stage == "inference" else phantoms, capsys, **options)
    for piece in message.split(" .* "):
        assert piece in line
    assert line.startswith(message[:10])


@pytest.mark.parametrize(
    ("stage", "path", "remedy"),
    [
        ("train_diffusion", "stages/autoencoder.pt", "configs/train_autoencoder.json"),
        ("train", "stages/diffusion.pt", "configs/train_diffusion.json"),
        ("inference", "model.pt", "configs/train.json"),
        ("inference_unconditional", "stages/diffusion.pt", "configs/train_diffusion.json"),
        ("train evaluate", "model.pt", "configs/train.json"),
        ("train_diffusion evaluate_diffusion", "stages/diffusion.pt", "configs/train_diffusion.json"),
    ],
)
def test_missing_weights_are_named(stage, path, remedy, phantoms, tmp_path, capsys):
    line = BRAIN.last_line(stage, phantoms, capsys, **BRAIN.folders(tmp_path, stage.split()[0]))
    assert line.startswith(f"{tmp_path}/models/{path}: expected trained weights, found no file. Train ")
    assert remedy in line


@pytest.mark.parametrize(("stage", "path"), [("train", "stages/diffusion.pt"), ("inference", "model.pt")])
def test_weights_of_another_configuration_are_named(stage, path, phantoms, trained, tmp_path, capsys):
    options = BRAIN.folders(trained, stage) | {"output_dir": str(tmp_path)}
    options["autoencoder_def"] = {**AUTOENCODER, "channels": [8, 8, 8]}
    line = BRAIN.last_line(stage, phantoms, capsys, **options)
    assert line.startswith(f"{trained}/models/{path}: expected the weights of this configuration")


def test_controlnet_unlike_the_unet_is_named(phantoms, trained, tmp_path, capsys):
    options = BRAIN.folders(trained, "train") | {"output_dir": str(tmp_path)}
    options["controlnet_def"] = {**CONTROLNET, "num_head_channels": [0, 16, 16]}
    assert BRAIN.last_line("train", phantoms, capsys, **options).startswith("controlnet_def: expected the channels")


def test_mistyped_option_is_named(monkeypatch):
    files = str([str(BRAIN.folder / f"configs/{name}.json") for name in ("inference", "tiny")])
    runner = str(Path("monai/bundle/__main__.py"))
    monkeypatch.setattr("sys.argv", [runner, "run", "--config_file", files, "--conditioning_scales", "0.5"])
    with pytest.raises(RuntimeError) as caught, BRAIN.loaded("inference", "tiny"):
        pass
    line = str(root_cause(caught.value))
    assert line.startswith("--conditioning_scales: expected an id of the configuration")
    assert "did you mean --conditioning_scale?" in line
