# SPDX-License-Identifier: Apache-2.0
"""``dmri2noddi`` as a whole, run small on phantoms: its trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.datalist import load_datalist
from shared.files import sha256_of_file
from shared.handlers.time_limit import TimeLimit
from shared.transforms.diffusion_mri import load_features
from tests.bundle_runs import curve
from tests.bundle_tools import STANDALONE
from tests.dmri_runs import (
    DMRI,
    PATCH,
    RELEASED,
    TRAININGS,
    changed,
    check_maps,
    copy_stages,
    make_phantoms,
    network,
    part,
    patch_of,
    patches,
    true_maps,
    weights,
)

stages = pytest.mark.parametrize("stage", TRAININGS)
with_latents = pytest.mark.parametrize("stage", ["train_encoder", "train"])
METRIC = {stage: "denoising_mae" if stage == "train" else "mean_absolute_error" for stage in TRAININGS}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantoms) -> Path:
    """A folder with all stages and the baseline trained for two epochs of a few steps."""
    root = tmp_path_factory.mktemp("trained")
    for stage in TRAININGS:
        DMRI.execute(stage, phantoms, **DMRI.folders(root, stage))
    return root


def options_of(trained: Path, stage: str, tmp_path: Path) -> dict[str, Any]:
    """Options that read what was trained and write nothing into it."""
    return DMRI.folders(trained, stage) | {"output_dir": str(tmp_path)}


def own_folders(trained: Path, root: Path, stage: str) -> dict[str, Any]:
    """Folders of its own with the weights of the stages before; whole volumes are at hand already."""
    before = {"train_encoder": ["vqgan"], "train": ["vqgan", "encoder"]}.get(stage, [])
    return DMRI.folders(copy_stages(trained, root, *before), stage, volumes=trained / "runs/volumes")


def train(stage: str, phantoms: Path, trained: Path, root: Path, /, **overrides: Any) -> Path:
    """One epoch of a stage; latents are at hand already. Returns the run's folder."""
    options = own_folders(trained, root, stage) | {"max_epochs": 1}
    if stage in DMRI.cached:
        options["latent_cache_dir"] = str(trained / "runs/latents")
    DMRI.execute(stage, phantoms, **options | overrides)
    return root / "runs" / stage


def checkpoint(run: Path, epoch: int) -> dict[str, Any]:
    return torch.load(run / f"checkpoints/checkpoint_epoch={epoch}.pt", weights_only=True)


def values(run: Path, phase: str, name: str) -> list[float]:
    return [float(row[4]) for row in curve(run, phase, name)]


def start_of(item: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    return item["dwi"], tuple(item["patch"])


def test_every_section_has_its_use(phantoms, trained, tmp_path):
    expected = {
        section: [start_of(item) for item in patches(phantoms, section)] for section in ("training", "validation")
    }
    assert len(expected["training"]) > len(expected["validation"]) > 5
    for stage in TRAININGS:
        with DMRI.small(stage, phantoms, options_of(trained, stage, tmp_path)) as workflow:
            content = workflow.parser.get_parsed_content
            for name, section in (("train", "training"), ("validate", "validation")):
                assert [start_of(item) for item in content(f"{name}#dataset").data] == expected[section]
            if stage == "train":
                assert [start_of(item) for item in content("preview_dataset").data] == expected["validation"]
    with DMRI.small("train evaluate", phantoms, options_of(trained, "train", tmp_path)) as workflow:
        items = workflow.parser.get_parsed_content("validate#dataset").data
    assert [item["dwi"] for item in items] == [item["dwi"] for item in load_datalist(phantoms, "test")]


# Trainings


def test_stage_1_trains_network_codes_and_late_discriminators(trained):
    run = trained / "runs/train_vqgan"
    assert {row[3] for row in curve(run, "validation")} == {"mean_absolute_error", "peak_signal_to_noise_ratio"}
    always = {"loss", "reconstruction", "commitment", "perplexity", "usage", "learning_rate", "gradient_norm"}
    late = {"generator", "discriminator", "adversarial_factor"}
    assert [{row[3] for row in curve(run, "train") if row[0] == epoch} - always for epoch in ("1", "2")] == [
        set(),
        late,
    ]
    assert {row[3] for row in curve(run, "train")} == always | late
    first, second = values(run, "train", "reconstruction")
    assert second < first
    assert all(0 < value <= 1 for value in values(run, "train", "usage"))
    assert all(1 < value <= 32 for value in values(run, "train", "perplexity"))
    assert all(value > 0 for value in values(run, "train", "adversarial_factor"))
    assert (run / "previews/epoch_0002_reconstruction.png").exists()
    one, two = checkpoint(run, 1), checkpoint(run, 2)
    moved = {key.split(".")[0] for key in changed(one["network"], two["network"])}
    assert moved == {"encoder", "decoder", "codebook", "pre_quantization", "post_quantization"}
    assert not one["discriminator_optimizer"]["state"]
    judges = {key.split(".")[0] for key in changed(one["discriminator"], two["discriminator"])}
    assert judges == {"slice_discriminator", "volume_discriminator"}


@stages
def test_released_are_the_averaged_weights_of_the_best_epoch(stage, trained):
    said = json.loads((trained / f"models/{RELEASED[stage]}.json").read_text())
    run, name = trained / f"runs/{stage}", METRIC[stage]
    measured = values(run, "validation", name)
    assert said["metric"][name] == pytest.approx(measured[said["epoch"] - 1], rel=1e-5) == min(measured)
    for state in ("best", "early_stopping"):
        assert checkpoint(run, 2)[state]["best"] == pytest.approx(min(measured), rel=1e-5)
    assert values(run, "train", "loss")[1] < values(run, "train", "loss")[0]
    saved = checkpoint(run, said["epoch"])
    released = weights(trained, RELEASED[stage])
    assert all(torch.isfinite(tensor).all() for tensor in released.values())
    assert changed({key: released[key] for key in saved["ema"]}, saved["ema"]) == []
    if stage != "train":
        assert released.keys() == saved["ema"].keys()
    different = changed(saved["ema"], saved["network"])
    assert len(different) > 5
    # The average moves; codes are those of training, which average already.
    assert len(changed(checkpoint(run, 1)["ema"], checkpoint(run, 2)["ema"])) > 5
    assert not any(key.startswith("codebook.") for key in different)


@stages
def test_released_files_are_strict_state_dicts_of_the_network(stage, phantoms, trained, tmp_path):
    with DMRI.small(stage, phantoms, options_of(trained, stage, tmp_path)) as workflow:
        net = workflow.parser.get_parsed_content("network_def")
    net.load_state_dict(weights(trained, RELEASED[stage]), strict=True)


@pytest.mark.reliability(8)
def test_main_stage_trains_the_unet_alone(phantoms, trained, tmp_path):
    model, run = weights(trained), trained / "runs/train"
    assert {key.split(".")[0] for key in model} == {"autoencoder", "encoder", "unet", "latent_mean", "latent_std"}
    assert changed(part(model, "autoencoder."), weights(trained, "stages/vqgan")) == []
    assert changed(part(model, "encoder."), weights(trained, "stages/encoder")) == []
    saved = checkpoint(run, 2)
    assert {key.split(".")[0] for key in saved["network"]} == {"unet"}
    assert len(changed(checkpoint(run, 1)["network"], saved["network"])) == len(saved["network"])
    (group,) = saved["optimizer"]["param_groups"]
    assert len(group["params"]) == len(saved["network"])
    assert {row[3] for row in curve(run, "train")} == {"loss", "learning_rate", "gradient_norm"}
    # After 9 of the 12 steps of the warm-up, and after all of them.
    assert values(run, "train", "learning_rate") == pytest.approx([0.01 * 9 / 12, 0.01], rel=1e-3)
    assert (run / "previews/epoch_0002_maps.png").exists()
    said = json.loads((trained / "models/model.json").read_text())["settings"]
    for name, path in (("autoencoder_weights", "vqgan"), ("encoder_weights", "encoder")):
        assert said[name] == sha256_of_file(trained / f"models/stages/{path}.pt")


@pytest.mark.reliability(8)
def test_encoder_stage_trains_the_encoder_alone(trained):
    one, two = (checkpoint(trained / "runs/train_encoder", epoch) for epoch in (1, 2))
    assert {key.split(".")[0] for key in two["network"]} == {"kernels", "encoder", "shortcut", "head"}
    assert len(changed(one["network"], two["network"])) == len(two["network"])


def stage_networks(trained: Path) -> tuple[Any, Any]:
    """Released autoencoder and encoder."""
    model = network()
    model.autoencoder.load_state_dict(weights(trained, "stages/vqgan"))
    model.encoder.load_state_dict(weights(trained, "stages/encoder"))
    return model.autoencoder.eval(), model.encoder.eval()


@torch.no_grad()
def test_latent_statistics_are_those_of_the_training_latents(phantoms, trained):
    autoencoder, _ = stage_networks(trained)
    latents = torch.stack([autoencoder.encode(true_maps(item)[None])[0] for item in patches(phantoms, "training")])
    model = weights(trained)
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3, 4), correction=0)
    torch.testing.assert_close(model["latent_mean"], mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model["latent_std"], std.float(), rtol=1e-4, atol=1e-6)
    whole = network()
    whole.load_state_dict(model)
    std, mean = torch.std_mean(whole.normalize(latents), dim=(0, 2, 3, 4), correction=0)
    torch.testing.assert_close(mean, torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.ones(8), rtol=0, atol=1e-3)


@stages
@torch.no_grad()
def test_training_sees_maps_features_and_latents_of_the_patch(stage, phantoms, trained, tmp_path):
    """Latents are of the trained autoencoder: a data set that is built before the weights are loaded has others."""
    keys = {"train_vqgan": {"maps"}, "train_baseline": {"image", "maps"}}
    autoencoder, encoder = stage_networks(trained)
    with DMRI.small(stage, phantoms, options_of(trained, stage, tmp_path)) as workflow:
        content = workflow.parser.get_parsed_content
        for name in ("train", "validate"):
            latents = stage == "train" or (stage, name) == ("train_encoder", "train")
            expected = keys.get(stage, {"image", "maps"})
            if stage in keys:
                expected = expected | {"dwi"}  # for messages
            if latents:
                expected = {"latent_mean", "item_id", "condition_latent" if stage == "train" else "image"}
            for index in (0, 7):
                item, source = content(f"{name}#dataset")[index], content(f"{name}#dataset").data[index]
                assert set(item) == expected
                if "maps" in item:
                    assert torch.equal(torch.as_tensor(item["maps"]), true_maps(source))
                if latents:
                    encoded = autoencoder.encode(true_maps(source)[None])[0]
                    torch.testing.assert_close(item["latent_mean"], encoded, rtol=0, atol=1e-4)
                if {"image", "condition_latent"} & item.keys():
                    features = patch_of(load_features(source, content("features_def")).numpy(), source)
                if "image" in item:
                    assert torch.equal(torch.as_tensor(item["image"]), features)
                if "condition_latent" in item:
                    estimate = encoder(features[None])[0]
                    torch.testing.assert_close(item["condition_latent"], estimate, rtol=0, atol=1e-5)


def by_hand(name: str, phantoms: Path, trained: Path) -> torch.Tensor:
    """Maps of all patches of the validation from the released weights."""
    autoencoder, encoder = stage_networks(trained)
    with DMRI.small("train_baseline", phantoms, {}) as workflow:
        features, baseline = (workflow.parser.get_parsed_content(key) for key in ("features_def", "network_def"))
    baseline.load_state_dict(weights(trained, "stages/baseline"))
    results = []
    for item in patches(phantoms, "validation"):
        image = patch_of(load_features(item, features).numpy(), item)[None]
        latents = autoencoder.encode(true_maps(item)[None]) if name == "train_vqgan" else encoder(image)
        codes = autoencoder.codebook.embedding.weight
        nearest = torch.cdist(latents.movedim(1, -1).flatten(0, 3), codes).argmin(dim=1)
        quantised = codes[nearest].view(1, PATCH, PATCH, PATCH, -1).movedim(-1, 1)
        maps = baseline.eval()(image) if name == "train_baseline" else autoencoder.decode(quantised, quantize=False)
        results.append(maps[0])
    return torch.stack(results)


@pytest.mark.parametrize("stage", ["train_vqgan", "train_encoder", "train_baseline"])
@torch.no_grad()
def test_validation_measures_what_the_released_weights_give(stage, phantoms, trained):
    truth = torch.stack([true_maps(item) for item in patches(phantoms, "validation")])
    said = json.loads((trained / f"models/{RELEASED[stage]}.json").read_text())["metric"]["mean_absolute_error"]
    assert (by_hand(stage, phantoms, trained) - truth).abs().mean().item() == pytest.approx(said, rel=1e-4)


@torch.no_grad()
def test_validation_of_the_noise_is_fixed(phantoms, trained, tmp_path):
    with DMRI.small("train", phantoms, options_of(trained, "train", tmp_path)) as workflow:
        content = workflow.parser.get_parsed_content
        model = content("network_def").eval()
        model.load_state_dict(weights(trained))
        errors, device = [], torch.device("cpu")
        for batch in content("validate#dataloader"):
            one, two = (content("validate#prepare_batch")(batch, device) for _ in range(2))
            assert torch.equal(one[3]["noisy"], two[3]["noisy"])
            assert torch.equal(one[1], two[1])
            errors.append((model(one[0], **one[3]) - one[1]).abs().flatten(1).mean(dim=1))
            one, two = (content("train#prepare_batch")(batch, device) for _ in range(2))
            assert not torch.equal(one[1], two[1])
    said = json.loads((trained / "models/model.json").read_text())["metric"]["denoising_mae"]
    assert torch.cat(errors).mean().item() == pytest.approx(said, rel=1e-4)


# Options


@with_latents
def test_latents_need_not_be_cached(stage, phantoms, trained, tmp_path):
    """Nor the encoder's estimate: the losses are the same."""
    run = train(stage, phantoms, trained, tmp_path, latent_cache_dir="")
    for phase, name in (("train", "loss"), ("validation", METRIC[stage])):
        first = [values(folder, phase, name)[0] for folder in (run, trained / f"runs/{stage}")]
        assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert not (tmp_path / "runs/latents").exists()


@with_latents
def test_flips_with_cached_latents_are_refused(stage, phantoms, trained, tmp_path, capsys):
    options = options_of(trained, stage, tmp_path) | {"flip_probability": 0.5}
    line = DMRI.last_line(stage, phantoms, capsys, **options)
    assert line.startswith("flip_probability: expected 0 with a cache of latents")
    assert '--latent_cache_dir ""' in line


@stages
def test_features_and_maps_are_flipped_together(stage, phantoms, trained, tmp_path):
    options = options_of(trained, stage, tmp_path) | ({"latent_cache_dir": ""} if stage in DMRI.cached else {})
    items = []
    for probability in (0.0, 1.0):
        with DMRI.small(stage, phantoms, options | {"flip_probability": probability}) as workflow:
            content = workflow.parser.get_parsed_content
            items.append({name: content(f"{name}#dataset")[3] for name in ("train", "validate")})
    for name, axes in (("train", [1]), ("validate", [])):
        one, two = (item[name] for item in items)
        assert one.keys() == two.keys()
        for key in {"image", "maps"} & one.keys():
            first, second = (torch.as_tensor(item[key]).as_subclass(torch.Tensor) for item in (one, two))
            assert torch.equal(first.flip(axes), second)
            assert not torch.equal(first, first.flip(1))


@pytest.mark.parametrize("stage", ["train_encoder", "train", "train_baseline"])
def test_training_ends_when_nothing_improves(stage, phantoms, trained, tmp_path):
    """Without a learning rate the second validation is as good as the first."""
    run = train(stage, phantoms, trained, tmp_path, max_epochs=4, patience=1, learning_rate=0.0)
    assert {row[0] for row in curve(run)} == {"1", "2"}
    assert checkpoint(run, 2)["early_stopping"]["count"] == 1


@stages
def test_stages_end_early_and_in_time_as_asked(stage, phantoms, trained, tmp_path):
    for minutes, patience in (("", 7), (3.5, "")):
        options = options_of(trained, stage, tmp_path) | {"max_minutes": minutes, "patience": patience}
        with DMRI.small(stage, phantoms, options) as workflow:
            handlers, early = (
                workflow.parser.get_parsed_content(f"train#{key}") for key in ("handlers", "early_stopping")
            )
        assert [one.minutes for one in handlers if isinstance(one, TimeLimit)] == ([minutes] if minutes else [])
        assert (early.patience, early.metric, early.lower_is_better) == (patience or 0, METRIC[stage], True)


@pytest.mark.parametrize("wanted", [True, False])
def test_adaptive_weight_is_an_option(wanted, phantoms, trained, tmp_path):
    options = options_of(trained, "train_vqgan", tmp_path) | {"adaptive_weight": wanted}
    with DMRI.small("train_vqgan", phantoms, options) as workflow:
        trainer, net = (workflow.parser.get_parsed_content(key) for key in ("train#trainer", "network_def"))
    assert trainer.adaptive_weight_of is (net.last_layer if wanted else None)


@with_latents
def test_gradients_of_several_batches_are_summed_up_as_asked(stage, phantoms, trained, tmp_path):
    with DMRI.small(stage, phantoms, options_of(trained, stage, tmp_path) | {"accumulation_steps": 3}) as workflow:
        assert workflow.parser.get_parsed_content("train#trainer").accumulation_steps == 3


@stages
def test_training_goes_on_from_released_weights(stage, phantoms, trained, tmp_path):
    given = str(trained / f"models/{RELEASED[stage]}.pt")
    with DMRI.small(stage, phantoms, options_of(trained, stage, tmp_path) | {"model_weights": given}) as workflow:
        average, net = (workflow.parser.get_parsed_content(name) for name in ("ema", "network"))
    for one in (average.ema_model, net):
        assert changed(one.state_dict(), weights(trained, RELEASED[stage])) == []


# Resuming


@stages
def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(stage, phantoms, trained, tmp_path):
    """The seed decides the first weights; codes and the count of early stopping go on; latents need not be at hand."""
    options = own_folders(trained, tmp_path, stage)
    steps = int(curve(trained / f"runs/{stage}", "train", "loss")[0][1])
    assert steps > 4
    # The crash comes in the middle of epoch 2.
    runs = [DMRI.train_and_crash(stage, phantoms, crash_at, **options) for crash_at in (steps + 2, None)]
    assert runs == [list(range(1, steps + 3)), list(range(steps + 1, 2 * steps + 1))]
    assert curve(tmp_path / f"runs/{stage}") == curve(trained / f"runs/{stage}")
    assert changed(weights(tmp_path, RELEASED[stage]), weights(trained, RELEASED[stage])) == []
    one, two = (checkpoint(root / f"runs/{stage}", 2) for root in (tmp_path, trained))
    assert one["early_stopping"] == two["early_stopping"]
    for name in ("network", "ema"):
        assert changed(one[name], two[name]) == []


def test_other_stages_are_not_resumed_with(phantoms, trained, tmp_path, capsys):
    run = train("train", phantoms, trained, tmp_path)
    path = tmp_path / "models/stages/encoder.pt"
    torch.save({name: tensor * 1.01 for name, tensor in weights(trained, "stages/encoder").items()}, path)
    options = DMRI.folders(tmp_path, "train", volumes=trained / "runs/volumes")
    line = DMRI.last_line("train", phantoms, capsys, **options)
    assert line.startswith(f"{run}/checkpoints/checkpoint_epoch=1.pt: made with other settings (encoder_weights: ")
    assert line.count("there,") == 1


def test_trained_model_gives_maps(phantoms, trained, tmp_path):
    check_maps(phantoms, trained, tmp_path)


STAND_ALONE = [path.stem for path in STANDALONE if path.parents[1] == DMRI.folder]


@pytest.mark.parametrize("stage", [*STAND_ALONE, "train evaluate"])
def test_monai_finds_its_properties(stage, phantoms, trained, tmp_path):
    with DMRI.small(stage, phantoms, options_of(trained, stage.split()[0], tmp_path)) as workflow:
        assert workflow.check_properties() == []
