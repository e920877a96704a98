# SPDX-License-Identifier: Apache-2.0
"""``dmri2noddi`` on series that somebody has, its evaluation, and what it says when it cannot work; random weights."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from shared.datalist import load_datalist
from shared.inferers import seeded_noise
from shared.transforms.diffusion_mri import load_features
from tests.dmri_runs import (
    BASELINE,
    DIRECTIONS,
    DMRI,
    HR_SHAPE,
    MAPS,
    copy_stages,
    make_phantoms,
    network,
    rewritten,
    save_network,
)

# One patch that holds the whole head: nothing is blended, and a few voxels of each side are padding.
WHOLE = {"patch_size": [20, 20, 20]}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def head(phantoms) -> dict[str, Any]:
    return load_datalist(phantoms, "test")[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("root") / "models")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """The cache of whole volumes of the phantoms."""
    return tmp_path_factory.mktemp("volumes")


def estimate(models: Path, source: str | Path, output_dir: Path, stage: str = "inference", **overrides: Any) -> Path:
    # The solver whose steps `maps_by_hand` takes.
    options = {"ckpt_dir": str(models), "output_dir": str(output_dir), "scheduler": "ddim"}
    DMRI.execute(stage, Path(source), **{**options, **overrides})
    return output_dir


@pytest.fixture(scope="module")
def estimated(tmp_path_factory, phantoms, models) -> Path:
    return estimate(models, phantoms, tmp_path_factory.mktemp("estimated"))


def voxels(path: str | Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def maps_in(folder: Path, suffix: str = "") -> np.ndarray:
    """The three maps of the one series in a folder."""
    return np.stack([voxels(next(folder.rglob(f"*_{name}{suffix}.nii.gz"))) for name in MAPS])


# Maps


def test_maps_have_twice_the_resolution_of_the_series(estimated, head):
    series, brain = nibabel.load(head["dwi"]), voxels(head["mask"]) > 0
    folder = estimated / "subjects" / head["subject"]
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted([f"{head['subject']}{end}" for end in (".json", *(f"_{name}.nii.gz" for name in MAPS))])
    for name in MAPS:
        image = nibabel.load(folder / f"{head['subject']}_{name}.nii.gz")
        assert image.shape == HR_SHAPE == tuple(2 * n for n in series.shape[:3])
        assert np.allclose(image.affine, nibabel.load(head[name]).affine, atol=1e-4)
        values = voxels(folder / f"{head['subject']}_{name}.nii.gz")
        assert 0 <= values.min() < values.max() <= 1
        assert not values[~brain].any()
        assert values[brain].std() > 1e-3
    said = json.loads((folder / f"{head['subject']}.json").read_text())
    settings = {"seed": 0, "num_samples": 1, "num_inference_steps": 4, "deterministic": False, "synthetic": True}
    assert settings.items() <= said.items()


def features_of(item: dict[str, Any]) -> torch.Tensor:
    with DMRI.small("inference", Path("unused"), {}) as workflow:
        return load_features(item, workflow.parser.get_parsed_content("features_def")).as_tensor()


@torch.no_grad()
def maps_by_hand(
    state: Path, item: dict[str, Any], *, one_map: bool, seed: int | None, velocity: bool = False, start: float = 1.0
) -> np.ndarray:
    """Sections 4.2, 4.4 and 4.6 of the handbook, with the loop run forwards to the end; ``None``: the encoder alone."""
    model = network(one_map=one_map)
    model.load_state_dict(torch.load(state, weights_only=True))
    mean, std = (buffer.view(-1, 1, 1, 1) for buffer in (model.latent_mean, model.latent_std))
    features = features_of(item)
    padded = pad(features, [n for side in reversed(features.shape[1:]) for n in (0, 20 - side)])[None]
    passes = range(3) if one_map else range(1)
    noise = None if seed is None else seeded_noise([seed], (len(passes) * 8, 20, 20, 20)).split(8, dim=1)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2, 0).tolist()
    codes, maps = model.autoencoder.codebook.embedding.weight, []
    for m in passes:
        marks = [torch.full_like(padded[:, :1], float(m == k)) for k in passes] if one_map else []
        x = condition = (model.encoder(torch.cat([padded, *marks], dim=1)) - mean) / std
        if noise is not None:
            times = [t for t in (999, 749, 499, 249) if t < 1000 * start]
            level = alpha_bar[times[0]] if start < 1 else 0.0  # arXiv:2112.05146: the estimate, noised
            x = level**0.5 * condition + (1 - level) ** 0.5 * noise[m]
            for t in times:
                predicted = model.unet(torch.cat((x, condition), dim=1), torch.tensor([t]))
                signal, sigma = alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5
                if velocity:  # arXiv:2202.00512, appendix D
                    clean, predicted = signal * x - sigma * predicted, sigma * x + signal * predicted
                else:
                    clean = (x - sigma * predicted) / signal
                following = alpha_bar[t - 250] if t > 249 else 1.0
                x = following**0.5 * clean + (1 - following) ** 0.5 * predicted
        latents = (x * std + mean)[0].movedim(0, -1)
        nearest = codes[torch.cdist(latents.flatten(0, 2), codes).argmin(dim=1)].view(latents.shape)
        maps.append(model.autoencoder.decode(nearest.movedim(-1, 0)[None], quantize=False)[0])
    shape = tuple(2 * side for side in features.shape[1:])
    brain = voxels(item["mask"]) > 0
    return torch.cat(maps).clamp(0, 1)[:, : shape[0], : shape[1], : shape[2]].numpy() * brain


EPSILON, VELOCITY = ({"noise_schedule#prediction_type": kind} for kind in ("epsilon", "v_prediction"))


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"deterministic": True, "one_map": True},
        EPSILON,
        {**EPSILON, "one_map": True},
        VELOCITY,
        {**EPSILON, "start": 0.5},
        {**VELOCITY, "start": 0.25, "fusion": "maps", "one_map": True},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_maps_are_those_of_the_method(options, head, tmp_path):
    one_map, seed = options.get("one_map", False), None if options.get("deterministic") else 5
    models = save_network(tmp_path / "models", one_map=one_map)
    out = estimate(models, head["dwi"], tmp_path / "out", seed=5, **WHOLE, **options)
    how = {"one_map": one_map, "velocity": VELOCITY.items() <= options.items(), "start": options.get("start", 1.0)}
    expected = maps_by_hand(models / "model.pt", head, seed=seed, **how)
    found = maps_in(out)
    assert found.shape == expected.shape == (3, *HR_SHAPE)
    # Rounding can change the nearest code of single voxels.
    assert np.mean(np.abs(found - expected) > 1e-3) < 1e-3
    brain = voxels(head["mask"]) > 0
    assert all(np.abs(found[a] - found[b])[brain].mean() > 1e-2 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_seed_decides_the_maps(estimated, head, models, tmp_path):
    again = estimate(models, head["dwi"], tmp_path / "again", patches_per_batch=3)
    other = estimate(models, head["dwi"], tmp_path / "other", seed=1)
    first, second = ([next(folder.rglob(f"*_{name}.nii.gz")) for name in MAPS] for folder in (estimated, again))
    assert np.mean(np.abs(maps_in(again) - maps_in(estimated)) > 1e-3) < 1e-3
    assert np.mean(np.abs(maps_in(other) - maps_in(estimated)) > 1e-3) > 0.1
    repeated = estimate(models, head["dwi"], tmp_path / "repeated", patches_per_batch=3)
    third = [next(repeated.rglob(f"*_{name}.nii.gz")) for name in MAPS]
    assert [path.read_bytes() for path in second] == [path.read_bytes() for path in third]
    assert len({path.read_bytes() for path in first}) == 3


def test_deterministic_maps_need_no_seed_and_no_steps(head, models, estimated, tmp_path):
    options = [{"seed": 0}, {"seed": 1, "num_inference_steps": 2}]
    one, two = (
        estimate(models, head["dwi"], tmp_path / str(i), deterministic=True, **chosen)
        for i, chosen in enumerate(options)
    )
    assert np.array_equal(maps_in(one), maps_in(two))
    assert not np.allclose(maps_in(one), maps_in(estimated), atol=1e-2)


def test_several_samples_give_mean_and_standard_deviation(head, models, tmp_path):
    single = [maps_in(estimate(models, head["dwi"], tmp_path / str(seed), seed=seed)) for seed in range(3)]
    out = estimate(models, head["dwi"], tmp_path / "three", num_samples=3)
    assert len(list(out.rglob("*.nii.gz"))) == 6
    assert np.mean(np.abs(maps_in(out) - np.mean(single, axis=0)) > 1e-3) < 1e-3
    assert np.mean(np.abs(maps_in(out, "_sd") - np.std(single, axis=0, ddof=1)) > 1e-3) < 1e-3
    brain = voxels(head["mask"]) > 0
    assert maps_in(out, "_sd")[:, brain].mean() > 1e-2 > np.abs(maps_in(out, "_sd")[:, ~brain]).max()
    said = json.loads((out / f"{head['subject']}.json").read_text())
    assert said["num_samples"] == 3


@pytest.mark.parametrize("fusion", ["maps", "steps"])
@pytest.mark.parametrize("one_map", [False, True])
def test_samples_of_one_call_are_those_of_their_seeds(fusion, one_map):
    """Each beside the condition of its own, in patches too."""
    model, features = network(one_map=one_map), torch.rand(1, 8, 10, 9, 7)
    overrides = {"one_map": one_map, "fusion": fusion, "num_inference_steps": 2}
    samplers = []
    for number in (1, 2):
        with DMRI.small("inference", Path("unused"), overrides | {"num_samples": number}) as workflow:
            samplers.append(workflow.parser.get_parsed_content("inferer"))
    single = torch.stack([samplers[0](features, model, seeds=[seed]) for seed in (3, 4)])
    both = samplers[1](features, model, seeds=[3])
    # Rounding can change the nearest code of single voxels.
    assert ((both[:, :3] - single.mean(dim=0)).abs() > 1e-3).float().mean() < 1e-2
    assert ((both[:, 3:] - single.std(dim=0)).abs() > 1e-3).float().mean() < 1e-2


def test_overlap_and_fusion_are_options(head, models, estimated, tmp_path):
    for name, chosen in (("overlap", {"overlap": 0.0}), ("fusion", {"fusion": "maps"})):
        out = estimate(models, head["dwi"], tmp_path / name, **chosen)
        assert np.mean(np.abs(maps_in(out) - maps_in(estimated)) > 1e-3) > 0.1


def test_solver_is_an_option_of_commands_and_clients(head, models, estimated, tmp_path):
    out = estimate(models, head["dwi"], tmp_path / "dpm", scheduler="dpm")
    assert np.mean(np.abs(maps_in(out) - maps_in(estimated)) > 1e-3) > 0.1
    said = [
        json.loads(next(folder.rglob(f"{head['subject']}.json")).read_text())["scheduler"]
        for folder in (out, estimated)
    ]
    assert said == ["dpm", "ddim"]
    with DMRI.small("inference", Path("unused"), {}) as workflow:
        check = workflow.parser.get_parsed_content("preprocessing").transforms[0]
    request = {"image": head["dwi"], "image_path": head["dwi"], "model": "dmri2noddi"}
    assert check({**request, "scheduler": "dpm"})["scheduler"] == "dpm"
    # With the web framework installed it is that one's error.
    with pytest.raises(Exception, match="scheduler: expected dpm or ddim, got 'euler'"):
        check({**request, "scheduler": "euler"})


def cropped(item: dict[str, Any], folder: Path, *, shape: Sequence[int] = (7, 6, 5), volumes: int = 64) -> Path:
    """The middle of a series, without a mask, named as people name files; its axes are L, S, A."""
    folder.mkdir(parents=True)
    series = nibabel.load(item["dwi"])
    places = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(series.shape, shape, strict=False)]
    turned = series.slicer[(*places, slice(volumes))].as_reoriented([[0, -1], [2, 1], [1, 1]])
    nibabel.save(turned, folder / "sub-7_dwi.nii.gz")
    for key in ("bval", "bvec"):
        rows = np.atleast_2d(np.loadtxt(item[key]))[:, :volumes]
        np.savetxt(folder / f"sub-7_dwi.{key}", rows, fmt="%.6g")
    return folder / "sub-7_dwi.nii.gz"


@pytest.mark.reliability(6)
def test_series_smaller_than_a_patch_in_another_axis_order(head, models, tmp_path):
    source = cropped(head, tmp_path / "data")
    out = estimate(models, source.parent, tmp_path / "out")
    image = nibabel.load(out / "sub-7_ndi.nii.gz")
    assert image.shape == (14, 10, 12)
    assert nibabel.aff2axcodes(image.affine) == nibabel.aff2axcodes(nibabel.load(source).affine) == ("L", "S", "A")
    assert np.isfinite(maps_in(out)).all()
    # The centre of the field of view stays where it is.
    middle = [np.append(np.array(one.shape[:3]) / 2 - 0.5, 1) for one in (image, nibabel.load(source))]
    assert np.allclose(image.affine @ middle[0], nibabel.load(source).affine @ middle[1], atol=1e-3)
    # In RAS order, as one file of the same voxels.
    turned = nibabel.as_closest_canonical(nibabel.load(source))
    upright = tmp_path / "upright"
    shutil.copytree(source.parent, upright)
    nibabel.save(turned, upright / source.name)
    other = estimate(models, upright, tmp_path / "other")
    found = nibabel.as_closest_canonical(image).dataobj
    assert np.array_equal(np.asarray(found), voxels(other / "sub-7_ndi.nii.gz"))


def test_monai_labels_request_is_answered_by_the_configured_parts(head, models, tmp_path):
    """An item ``image``, gradients beside it; the client's options are text."""
    options = {"ckpt_dir": str(models), "output_dir": str(tmp_path)}
    options |= {"displayable_configs#num_inference_steps": "2", "displayable_configs#deterministic": "False"}
    with DMRI.small("inference", Path("unused"), options) as workflow:
        content = workflow.parser.get_parsed_content
        content("network_def").load_state_dict(torch.load(models / "model.pt", weights_only=True))
        request = {"image": head["dwi"], "image_path": head["dwi"], "model": "dmri2noddi"}
        item = content("preprocessing")(request)
        assert torch.equal(item["image"].as_tensor(), features_of(head)), "with the mask beside it"
        item["pred"] = content("inferer")(item["image"][None], content("network").eval())[0]
        item = content("postprocessing")(item)
    values = voxels(item["pred"]).copy()
    os.remove(item["pred"])
    assert values.shape == (*HR_SHAPE, 3)
    assert not list(tmp_path.rglob("*.nii.gz"))
    # The phantoms lie in RAS order, as the mask does.
    assert not values[item["brain"][0].numpy() == 0].any()


def test_another_gradient_table_than_that_of_the_weights_is_named(head, tmp_path, capsys):
    models = save_network(tmp_path / "models", features_def=directions())
    options = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(models), "num_directions": DIRECTIONS}
    source = cropped(head, tmp_path / "data", volumes=64)
    estimate(models, source, tmp_path / "out", "inference directions", num_directions=DIRECTIONS)
    assert maps_in(tmp_path / "out").shape == (3, 14, 10, 12)
    short = cropped(head, tmp_path / "short", volumes=63)
    line = DMRI.last_line("inference directions", short, capsys, **options)
    assert line.startswith(f"{short}: gradient table: expected 60 diffusion-weighted volumes, but got 59; use a series")


def directions(count: int = DIRECTIONS) -> dict[str, Any]:
    return {"_target_": "shared.diffusion_features.DirectionFeatures", "num_directions": count}


def test_command_line_as_documented(head, models, tmp_path):
    present = sorted(DMRI.folder.rglob("*"))
    done = DMRI.command("inference", ckpt_dir=models, output_dir=tmp_path / "out", dataset_dir=head["dwi"])
    assert done.code == 0, done.err[-2000:]
    assert maps_in(tmp_path / "out").shape == (3, *HR_SHAPE)
    assert sorted(DMRI.folder.rglob("*")) == present, "the run wrote outside of the test's folder"


# Evaluation


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_compares_with_all_methods_and_repeats_itself(phantoms, head, models, tmp_path):
    with DMRI.small("train_baseline", phantoms, {}) as workflow:
        baseline = workflow.parser.get_parsed_content("network_def").eval()
    folder = copy_stages(models, tmp_path) / "models"
    shutil.copyfile(models / "model.pt", folder / "model.pt")
    options = {"ckpt_dir": str(folder), "baseline_def": BASELINE, "num_samples": 4, "num_inference_steps": 2}
    methods = ["diffusion, one sample", "diffusion, mean of 4 samples", "trilinear", "cubic", "encoder only", "U-Net"]
    methods.append("autoencoder's ceiling")
    lines = []
    for index, seed in enumerate((42, 42, 7)):
        if index:
            torch.save(baseline.state_dict(), folder / "stages/baseline.pt")
        DMRI.execute("train evaluate", phantoms, output_dir=str(tmp_path / str(index)), seed=seed, **options)
        lines.append(table(tmp_path / f"{index}/evaluation/per_subject.csv"))
    # The first time there were no weights of the baseline: the others are found.
    assert [line["method"] for line in lines[0]] == [name for name in methods if name != "U-Net"]
    assert [line["method"] for line in lines[1]] == methods
    assert {line["subject"] for line in lines[1]} == {head["subject"]}
    scores = [{line["method"]: [v for k, v in line.items() if "psnr" in k.lower()] for line in one} for one in lines]
    assert all(scores[1].values())
    assert scores[0].items() <= scores[1].items()
    different = {name for name in methods if scores[1][name] != scores[2][name]}
    assert different == set(methods[:2])
    summary = json.loads((tmp_path / "1/evaluation/summary.json").read_text())
    assert {row.get("method") for row in summary} >= set(methods)
    assert (tmp_path / "1/evaluation/calibration.csv").exists()
    assert (tmp_path / "1/evaluation/median_ndi.png").exists()


def test_evaluated_maps_are_those_of_the_inference(phantoms, head, models, tmp_path):
    """The encoder alone, which has no seed; its PSNR in the brain by hand."""
    options = {"baseline_def": BASELINE, "num_samples": 1, "num_inference_steps": 2, "ckpt_dir": str(models)}
    DMRI.execute("train evaluate", phantoms, output_dir=str(tmp_path), **options)
    found = maps_in(estimate(models, head["dwi"], tmp_path / "maps", deterministic=True))
    brain = voxels(head["mask"]) > 0
    (line,) = (one for one in table(tmp_path / "evaluation/per_subject.csv") if one["method"] == "encoder only")
    for row, name in enumerate(MAPS):
        error = np.mean((found[row] - voxels(head[name]).astype(np.float64))[brain] ** 2)
        assert float(line[f"{name}_psnr_brain"]) == pytest.approx(-10 * np.log10(error), abs=0.02)


# Bad input


def set_last_shell(path: Path) -> None:
    bvals = np.loadtxt(path)
    np.savetxt(path, np.where(bvals > 1500, 1000.0, bvals)[None], fmt="%g")


def lengthen(path: Path) -> None:
    np.savetxt(path, np.loadtxt(path) * 1.3, fmt="%g")


def crop_mask(path: Path) -> None:
    nibabel.save(nibabel.load(path).slicer[2:], path)


def put_nan(path: Path) -> None:
    image = nibabel.load(path)
    values = np.asarray(image.dataobj).astype(np.float32)
    values[tuple(n // 2 for n in values.shape[:3])] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)


def shift(path: Path) -> None:
    image = nibabel.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 3
    moved = nibabel.Nifti1Image(np.asarray(image.dataobj), affine)
    path.unlink()
    nibabel.save(moved, path)


def percent(path: Path) -> None:
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(100 * np.asarray(image.dataobj), image.affine), path)


FAULTS = {
    "missing shell": ("bval", set_last_shell, "dwi", "gradient table: missing shell: expected b-values around 2000"),
    "bad directions": ("bvec", lengthen, "bvec", "expected unit vectors"),
    "other mask": ("mask", crop_mask, "mask", "expected a mask on the grid of "),
    "NaN": ("dwi", put_nan, "dwi", "signal: expected finite values in every voxel of the brain"),
    "shifted map": ("odi", shift, "odi", "expected the origin "),
    "percentages": ("fwf", percent, "fwf", "expected fractions in [0, 1]"),
}


def spoiled(phantoms: Path, folder: Path, section: str, fault: str) -> tuple[Path, str]:
    """A copy of the phantoms in which one file of a section is at fault; returns it and the line to expect."""
    key, change, blamed, message = FAULTS[fault]
    data = rewritten(phantoms, folder, lambda content: None)
    item = json.loads((data / "datalist.json").read_text())[section][0]
    change(data / item[key])
    return data, f"{data / item[blamed]}: {message}"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["train_vqgan", "train_encoder", "train", "train_baseline"])
def test_bad_file_of_the_training_is_named(stage, fault, phantoms, models, tmp_path, capsys):
    if stage == "train_vqgan" and fault in ("missing shell", "bad directions", "NaN"):
        return  # it reads the maps alone
    data, message = spoiled(phantoms, tmp_path / "data", "training", fault)
    options = DMRI.folders(tmp_path, stage) | {"ckpt_dir": str(models)}
    assert DMRI.last_line(stage, data, capsys, **options).startswith(message)


@pytest.mark.parametrize("fault", [name for name, (key, *_) in FAULTS.items() if key not in MAPS])
def test_bad_file_to_estimate_from_is_named(fault, phantoms, models, tmp_path, capsys):
    data, message = spoiled(phantoms, tmp_path / "data", "test", fault)
    options = {"ckpt_dir": str(models), "output_dir": str(tmp_path / "out")}
    assert DMRI.last_line("inference", data, capsys, **options).startswith(message)
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


@pytest.mark.parametrize("fault", ["shifted map", "missing shell"])
def test_bad_file_to_evaluate_is_named(fault, phantoms, models, tmp_path, capsys):
    data, message = spoiled(phantoms, tmp_path / "data", "test", fault)
    options = {"ckpt_dir": str(models), "output_dir": str(tmp_path / "out"), "baseline_def": BASELINE}
    assert DMRI.last_line("train evaluate", data, capsys, **options).startswith(message)


@pytest.mark.parametrize(
    ("stage", "present", "missing", "remedy"),
    [
        ("train_encoder", [], "stages/vqgan.pt", "--config_file configs/train_vqgan.json"),
        ("train", [], "stages/vqgan.pt", "configs/train_vqgan.json, then configs/train_encoder.json"),
        ("train", ["vqgan"], "stages/encoder.pt", "configs/train_vqgan.json, then configs/train_encoder.json"),
        ("train evaluate", ["vqgan", "encoder"], "model.pt", "configs/train.json, or give --ckpt_dir"),
        ("inference", [], "model.pt", "(configs/train.json) or give --ckpt_dir"),
    ],
)
def test_missing_weights_are_named_with_the_remedy(
    stage, present, missing, remedy, head, phantoms, models, tmp_path, capsys
):
    copy_stages(models.parent, tmp_path, *present)
    options = DMRI.folders(tmp_path, stage.split()[0]) | {"output_dir": str(tmp_path / "out")}
    line = DMRI.last_line(stage, phantoms, capsys, **options)
    assert line.startswith(f"{tmp_path}/models/{missing}: expected trained weights, found no file.")
    assert remedy in line


def test_absent_file_of_the_list_is_named(phantoms, models, tmp_path, capsys):
    def remove(content: dict[str, Any]) -> None:
        del content["training"][1]["fwf"]

    data = rewritten(phantoms, tmp_path / "data", remove)
    for stage in ("train_vqgan", "train_encoder", "train", "train_baseline"):
        options = DMRI.folders(tmp_path, stage) | {"ckpt_dir": str(models)}
        line = DMRI.last_line(stage, data, capsys, **options)
        assert line.startswith(f"{data}/datalist.json: training[1]: expected 'fwf'")


@pytest.mark.parametrize("stage", ["train_vqgan", "train_encoder", "train", "train_baseline"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"patch_size": [8, 7, 8], "patch_stride": [7, 7, 7]},
            "patch_size: expected three multiples of 2, because the U-Net halves the patch 1",
        ),
        (
            {"patch_stride": [8, 9, 8]},
            "patch_stride: expected three numbers from 1 to the side of the patch [8, 8, 8], got [8, 9, 8]",
        ),
    ],
    ids=["size", "stride"],
)
@pytest.mark.reliability(6)
def test_patches_that_do_not_fit_are_refused(stage, option, message, phantoms, models, volumes, tmp_path, capsys):
    if stage != "train" and "patch_size" in option:
        return  # the other networks take any size
    options = DMRI.folders(tmp_path, stage, volumes=volumes) | {"ckpt_dir": str(models)} | option
    assert DMRI.last_line(stage, phantoms, capsys, **options).startswith(message)
