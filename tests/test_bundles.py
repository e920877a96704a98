# SPDX-License-Identifier: Apache-2.0
"""Every configuration of every bundle: read without building anything, then run small on phantoms."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from PIL import Image

from shared.handlers.checkpoint import checkpoints_in
from tests.bundle_tools import (
    CONFIGS,
    OVERLAYS,
    STANDALONE,
    TRAINING,
    WORKFLOWS,
    components,
    expression_faults,
    label,
    read,
    signature_faults,
    strings,
    undefined_references,
)
from tests.conftest import ROOT
from tools.phantoms.cxr_ldm import make_dataset

BUNDLE = ROOT / "bundles/cxr_ldm"
TRAINING_IDS = [
    "dataset_dir",
    "output_dir",
    "max_epochs",
    "val_interval",
    "batch_size",
    "learning_rate",
    "num_workers",
    "seed",
    "resume",
    "amp",
    "compile",
]

# Ids that two stand-alone files of a bundle may define differently. A set limits the licence to comparisons with one of
# these files.
MAY_DIFFER: dict[str, tuple[str, set[str] | None]] = {
    "_desc_": ("each file describes itself", None),
    "output_dir": ("each workflow has its own run folder", None),
    "run": ("training starts a trainer, inference an evaluator", None),
    "train": ("each stage has its own data and engine", None),
    "validate": ("each stage has its own data and engine", None),
    "network_def": ("each stage trains another network", {"train_autoencoder", "train_classifier"}),
    "max_epochs": ("published per stage", None),
    "batch_size": ("published per stage", None),
    "learning_rate": ("published per stage", None),
    "ema_decay": ("stage 2 takes more and smaller steps", None),
    "preview_interval": ("sampling costs more than reconstructing", None),
    "settings": ("the values that decide a resume are those of the stage", None),
    "loss": ("each stage has its own", None),
    "optimizer": ("AdamW or Adam, over the parameters of the stage", None),
    "lr_scheduler": ("warm-up or cosine", {"train_classifier"}),
    "ema": ("only stage 2 must wait for pretrained weights", {"train_autoencoder"}),
    "tracker": ("each stage is an experiment", None),
    "size_check": ("stage 1 has no U-Net", {"train_autoencoder"}),
    "initialize": ("training seeds its first weights", {"inference"}),
    "seed": ("inference counts its seeds from 0", {"inference"}),
    "dataset_dir": ("inference needs no data; the classifier learns phantoms", {"inference", "train_classifier"}),
    "ckpt_dir": ("the classifier judges the tiny model only", {"train_classifier"}),
    "num_workers": ("phantoms load at once", {"train_classifier"}),
    "image_size": ("phantoms have 128 pixels", {"train_classifier"}),
}

# Ids of an overlay that no stand-alone file has.
OVERLAY_IDS = {
    "evaluate": {
        *("max_images", "max_training_images", "xrv_weights", "feature_extractor", "prompt_agreement"),
        *("training_images", "measures"),
    },
    "tiny": {"feature_extractor", "prompt_agreement"},
    "multi_gpu_train": set(),
}

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=label)
standalone = pytest.mark.parametrize("path", STANDALONE, ids=label)
training = pytest.mark.parametrize("path", TRAINING, ids=label)


PAIRS = [(one, two) for one, two in combinations(STANDALONE, 2) if one.parent == two.parent]


# Reading


def test_the_expected_configurations_are_found():
    names = {label(path) for path in CONFIGS}
    stems = ("metadata", "inference", "train", "train_autoencoder", "train_classifier", "tiny", "evaluate")
    assert {f"cxr_ldm/{stem}.json" for stem in stems} <= names
    assert {path.parent.parent.name for path in CONFIGS} == {path.name for path in (ROOT / "bundles").iterdir()}
    assert len(STANDALONE) >= 4
    assert len(TRAINING) >= 3


@workflows
def test_file_says_what_it_is_and_how_to_run_it(path: Path):
    config = read(path)
    assert next(iter(config)) == "_desc_"
    if path.stem in ("tiny", "multi_gpu_train"):
        assert config["_desc_"].startswith("Overlay")
    else:
        assert f"configs/{path.name}" in config["_desc_"].split("Run: python -m monai.bundle run ")[1]


@standalone
def test_standalone_file_has_no_loose_ends(path: Path):
    config = read(path)
    assert undefined_references(config) == []
    # MONAI Label reads inference.json alone, without its metadata and without a folder to resolve files in.
    assert [where for where, text in strings(config) if text.startswith("%") and ".json" in text] == []
    if path.stem == "inference":
        assert [where for where, text in strings(config) if "_meta_" in text or text.startswith("%")] == []


@workflows
def test_every_target_exists_and_takes_its_arguments(path: Path):
    config = read(path)
    assert len(list(components(config))) > 0
    assert signature_faults(config) == []


@workflows
def test_expressions_are_short_needed_and_harmless(path: Path):
    assert expression_faults(read(path)) == []


@standalone
def test_entry_points(path: Path):
    config = read(path)
    assert isinstance(config["run"], list)
    if path in TRAINING:
        assert config["training"] == config["run"]
        assert [name for name in TRAINING_IDS if name not in config] == []


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=label)
def test_id_means_the_same_in_two_files(first: Path, second: Path):
    one, two = read(first), read(second)
    differing = [name for name in one.keys() & two.keys() if one[name] != two[name]]
    unexplained = []
    for name in differing:
        files = MAY_DIFFER.get(name, ("", set()))[1]
        if files is not None and not files & {first.stem, second.stem}:
            unexplained.append(name)
    assert unexplained == []


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem in OVERLAYS], ids=label)
def test_overlay_changes_what_is_there(path: Path):
    known = {name for other in STANDALONE if other.parent == path.parent for name in read(other)}
    own = {name.split("#")[0] for name in read(path)}
    assert own - known == OVERLAY_IDS[path.stem]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem == "metadata"], ids=label)
def test_metadata(path: Path):
    content = read(path)
    schema = json.loads((ROOT / "tests/schemas/meta_schema_20240725.json").read_text())
    jsonschema.validate(content, schema)
    assert content["schema"].endswith("meta_schema_20240725.json")
    assert content["version"] in content["changelog"]
    # Versions are compared as strings by the zoo.
    assert all(len(part) == 1 for part in content["version"].split("."))
    required = {"monai", "torch", "numpy", *content["required_packages_version"]}
    assert [name for name in required if not metadata.version(name)] == []


# The checks themselves


def planted(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    config = copy.deepcopy(read(BUNDLE / "configs/train.json"))
    change(config)
    return config


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c["preview_sampler"].update(num_stepz=3), "preview_sampler: .*unexpected .*'num_stepz'"),
        (lambda c: c["train"]["trainer"].update(max_epoch=3), "train#trainer: .*unexpected .*'max_epoch'"),
        (lambda c: c["noise_scheduler"].update(beta_ende=3), "noise_scheduler: .*unexpected .*'beta_ende'"),
        (lambda c: c["loss"].update(_target_="torch.nn.MSEloss"), "loss: torch.nn.MSEloss does not exist"),
        (lambda c: c["tokenizer"].pop("vocabulary"), "tokenizer: .*missing .*'vocabulary'"),
    ],
)
def test_checker_finds_planted_signature_faults(change, fault):
    (found,) = signature_faults(planted(change))
    assert re.search(fault, found)


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("$@seed", "needs no $"),
        ("$True", "needs no $"),
        ("$None", "needs no $"),
        ("$[x for x in @image_size]", "ListComp is not allowed"),
        ("$(lambda: 1)()", "Lambda is not allowed"),
        ("$os.system('true')", "os.system is not allowed"),
        ("$subprocess.run('true')", "subprocess.run is not allowed"),
        ("$eval('1')", "eval is not allowed"),
        ("$exec('1')", "exec is not allowed"),
        ("$open('x')", "open is not allowed"),
        ("$__import__('os')", "__import__ is not allowed"),
        ("$@network.__class__", "__class__ is not allowed"),
        ("$torch.hub.load('x', 'y')", "torch.hub.load is not allowed"),
        ("$import subprocess", "no expression"),
        ("$@bundle_root + '" + "x" * 80 + "'", "longer than 80"),
    ],
)
def test_checker_finds_planted_expression_faults(expression, fault):
    found = expression_faults(planted(lambda config: config.update(seed=expression)))
    assert any(fault in problem for problem in found), found


def test_checker_finds_undefined_references_and_repeated_keys(tmp_path):
    config = planted(lambda config: config["optimizer"].update(lr="@learning_rat", params="$@networc.parameters()"))
    assert undefined_references(config) == ["optimizer#params: networc", "optimizer#lr: learning_rat"]
    (tmp_path / "x.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ValueError, match=r"x\.json: expected each key once, got \['seed'\] again"):
        read(tmp_path / "x.json")


# Running

AUTOENCODER = {**read(BUNDLE / "configs/tiny.json")["autoencoder_def"], "channels": [4, 4, 8, 8], "norm_num_groups": 4}
UNET = {
    **read(BUNDLE / "configs/tiny.json")["unet_def"],
    "channels": [8, 16, 16],
    "num_head_channels": [0, 8, 8],
    "norm_num_groups": 8,
}
SMALL: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "image_size": [64, 64],
    "latent_shape": [3, 8, 8],
    "autoencoder_def": AUTOENCODER,
    "device": "$torch.device('cpu')",
}
SMALL_TRAINING = {"max_epochs": 2, "batch_size": 4, "num_workers": 0, "tracking_uri": ""}
STAGES: dict[str, dict[str, Any]] = {
    "train_autoencoder": {**SMALL, **SMALL_TRAINING, "adversarial_start": 2, "ms_ssim_kernel_size": 3},
    "train": {**SMALL, **SMALL_TRAINING, "unet_def": UNET, "preview_prompts": ["Cardiomegaly."], "preview_interval": 9},
    "inference": {**SMALL, "unet_def": UNET, "num_inference_steps": 3},
}


@contextlib.contextmanager
def loaded(*names: str, **overrides: Any) -> Iterator[ConfigWorkflow]:
    """The workflow of configuration files, initialized; what MONAI and the bundle change in the process is undone."""
    path, hook = list(sys.path), sys.excepthook
    training = names[0].startswith("train") and "evaluate" not in names
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / f"{name}.json") for name in names],
        logging_file=False,
        run_id="training" if training else "run",
        workflow_type="train" if names[0].startswith("train") else "inference",
        **overrides,
    )
    try:
        workflow.initialize()
        yield workflow
    finally:
        sys.path[:], sys.excepthook = path, hook


def execute(stage: str, dataset_dir: Path, **overrides: Any) -> ConfigWorkflow:
    with loaded(stage, "tiny", **{**STAGES[stage], "dataset_dir": str(dataset_dir), **overrides}) as workflow:
        workflow.run()
    return workflow


def folders(root: Path, stage: str) -> dict[str, str]:
    result = {"ckpt_dir": str(root / "models"), "output_dir": str(root / "runs" / stage)}
    return {**result, "latent_cache_dir": str(root / "runs/latents")} if stage == "train" else result


def curve(run: Path, phase: str | None = None, name: str | None = None) -> list[tuple[str, ...]]:
    """Rows of ``metrics.csv`` without their time."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if phase in (None, row["phase"]) and name in (None, row["name"])]
    return sorted(tuple(value for key, value in row.items() if key != "time") for row in chosen)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_dataset(str(folder), n=28, size=128, split=(0.35, 0.2, 0.45))
    assert len(json.loads((folder / "datalist.json").read_text())["training"]) // 4 == 2
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantoms) -> Path:
    """A folder with both stages trained for two epochs."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("train_autoencoder", "train"):
        execute(stage, phantoms, **folders(root, stage))
    return root


def test_stage_1_trains_and_releases_its_best_weights(trained):
    run = trained / "runs/train_autoencoder"
    state = torch.load(trained / "models/stages/autoencoder.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    names = {row[3] for row in curve(run, "validation")}
    assert names == {"mean_absolute_error", "peak_signal_to_noise_ratio", "ms_ssim"}
    # Rows are (epoch, iteration, phase, name, value): the discriminator joins in epoch 2.
    assert {row[0] for row in curve(run, "train", "discriminator")} == {"2"}
    assert {row[0] for row in curve(run, "train", "reconstruction")} == {"1", "2"}
    assert (run / "previews/epoch_0002_reconstruction.png").exists()
    assert json.loads((run / "config.json").read_text())["adversarial_start"] == 2
    assert json.loads((run / "manifest.json").read_text())["settings"]["image_size"] == [64, 64]


def test_stage_2_trains_and_its_weights_carry_stage_1_and_the_scale_factor(trained):
    model = torch.load(trained / "models/model.pt", weights_only=True)
    stage_1 = torch.load(trained / "models/stages/autoencoder.pt", weights_only=True)
    for name, tensor in stage_1.items():
        assert torch.equal(model[f"autoencoder.{name}"], tensor)
    latents = [np.load(path) for path in (trained / "runs/latents").glob("*.npy")]
    means, log_variances = max(latents, key=len).astype(np.float64).swapaxes(0, 1)
    expected = (means.var() + np.exp(log_variances).mean()) ** -0.5
    assert model["scale_factor"].item() == pytest.approx(expected, rel=1e-5)
    assert {row[3] for row in curve(trained / "runs/train", "validation")} == {"velocity_mse"}
    assert (trained / "runs/train/previews/epoch_0002_samples.png").exists()


@pytest.mark.parametrize("stage", [path.stem for path in STANDALONE if path.parent.parent == BUNDLE])
def test_monai_finds_its_properties(stage, phantoms, trained, tmp_path):
    overrides = {**STAGES.get(stage, SMALL_TRAINING), "bundle_root": str(BUNDLE), "dataset_dir": str(phantoms)}
    overrides |= folders(trained, stage) | {"output_dir": str(tmp_path)}
    with loaded(stage, "tiny", **overrides) as workflow:
        assert workflow.check_properties() == []


def test_inference_writes_a_picture_for_each_prompt(trained, tmp_path):
    prompts = ["Cardiomegaly.", "Normal chest radiograph."]
    output_dir = str(tmp_path / "eval")
    with loaded("inference", "tiny", **STAGES["inference"], ckpt_dir=str(trained / "models"), prompt=prompts,
                output_dir=output_dir) as workflow:  # fmt: skip
        workflow.run()
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "eval").glob("*.png"))]
    assert [picture.shape for picture in pictures] == [(64, 64), (64, 64)]
    assert all(picture.dtype == np.uint8 and picture.std() > 0 for picture in pictures)
    assert not np.array_equal(*pictures)


def test_latents_can_be_encoded_in_every_step(phantoms, trained, tmp_path):
    options = folders(trained, "train") | {"output_dir": str(tmp_path), "max_epochs": 1}
    options |= {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path)), "latent_cache_dir": ""}
    execute("train", phantoms, **options)
    assert len(curve(tmp_path, "train", "loss")) == 1


def test_evaluation_writes_measures(phantoms, trained, tmp_path):
    execute_classifier(phantoms, tmp_path)
    overrides = {**STAGES["train"], **folders(trained, "train"), "dataset_dir": str(phantoms)}
    overrides |= {"output_dir": str(tmp_path), "num_inference_steps": 2, "ms_ssim_kernel_size": 3}
    overrides |= {"feature_extractor#weights_path": str(tmp_path / "models/stages/classifier.pt")}
    before = (trained / "models/model.pt").read_bytes()
    with loaded("train", "evaluate", "tiny", **overrides) as workflow:
        workflow.run()
    rows = json.loads((tmp_path / "evaluation/summary.json").read_text())
    names = " ".join(row["name"] for row in rows)
    for measure in ("MS-SSIM of reconstructions", "MS-SSIM between samples", "MS-SSIM between real images"):
        assert measure in names
    assert all(set(row) >= {"name", "value", "ci_low", "ci_high", "n", "note"} for row in rows)
    with (tmp_path / "evaluation/per_image.csv").open(newline="") as file:
        tests = json.loads((phantoms / "datalist.json").read_text())["test"]
        assert len(list(csv.DictReader(file))) == len(tests)
    assert (trained / "models/model.pt").read_bytes() == before


def execute_classifier(phantoms: Path, root: Path) -> None:
    overrides = {**SMALL_TRAINING, "bundle_root": str(BUNDLE), "max_epochs": 1, "dataset_dir": str(phantoms)}
    overrides |= {"ckpt_dir": str(root / "models"), "output_dir": str(root / "classifier"), "device": "cpu"}
    with loaded("train_classifier", **overrides) as workflow:
        workflow.run()
    assert len(curve(root / "classifier", "validation", "accuracy")) == 1


# Resuming


class Interruption(Exception):
    """Stands for a crash."""


def copy_of_stage_1(trained: Path, root: Path) -> Path:
    folder = root / "models"
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    (folder / "stages/autoencoder.pt").write_bytes((trained / "models/stages/autoencoder.pt").read_bytes())
    return folder


def train_and_crash(stage: str, phantoms: Path, crash_at: int | None, **overrides: Any) -> list[int]:
    """Run a training until an iteration, and return the iterations that were done."""
    done: list[int] = []

    def step(engine: Any) -> None:
        done.append(engine.state.iteration)
        if engine.state.iteration == crash_at:
            raise Interruption

    with loaded(stage, "tiny", **{**STAGES[stage], "dataset_dir": str(phantoms), **overrides}) as workflow:
        workflow.parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_COMPLETED, step)
        # MONAI wraps every error of an expression.
        with pytest.raises(RuntimeError) if crash_at else contextlib.nullcontext():
            workflow.run()
    return done


@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_seed_decides_the_whole_run(stage, phantoms, trained, tmp_path):
    """First weights included, whatever was drawn before, and whether latents were cached or not."""
    options = folders(tmp_path, stage) | {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path)), "max_epochs": 1}
    if stage == "train":
        options["latent_cache_dir"] = str(tmp_path / "new")
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    execute(stage, phantoms, **options)
    expected = [row for row in curve(trained / "runs" / stage) if row[0] == "1"]
    assert curve(tmp_path / "runs" / stage) == expected
    other = options | {"output_dir": str(tmp_path / "other"), "seed": 43}
    execute(stage, phantoms, **other)
    assert curve(tmp_path / "other", "train", "loss") != curve(tmp_path / "runs" / stage, "train", "loss")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_resumed_training_repeats_the_uninterrupted_one_bit_for_bit(stage, workers, phantoms, trained, tmp_path):
    curves = []
    # Two batches of 4 in an epoch: the crashes come in the middle of epochs 2 and 3.
    crashing = [3, None] if workers else [3, 5, None]
    for name, crashes in (("whole", [None]), ("broken", crashing)):
        options = folders(tmp_path / name, stage) | {"num_workers": workers, "max_epochs": 3}
        copy_of_stage_1(trained, tmp_path / name)
        runs = [train_and_crash(stage, phantoms, crash_at, **options) for crash_at in crashes]
        curves.append(curve(tmp_path / name / "runs" / stage))
    assert runs == ([[1, 2, 3], [3, 4, 5, 6]] if workers else [[1, 2, 3], [3, 4, 5], [5, 6]])
    assert len(curves[0]) > 10
    assert curves[0] == curves[1]


def test_killed_process_resumes_bit_for_bit(phantoms, tmp_path):
    """The one slow test: the documented command, killed with SIGKILL a moment after a checkpoint appears."""
    stage, epochs = "train_autoencoder", 12
    options = folders(tmp_path / "killed", stage) | {"max_epochs": epochs, "dataset_dir": str(phantoms)}
    present = sorted((BUNDLE / "runs").rglob("*"))
    kill_after, delay = random.SystemRandom().choice([(1, 0.0), (2, 0.03), (4, 0.1)])
    arguments = [f"--{key}={value}" for key, value in {**STAGES[stage], **options}.items()]
    files = "['configs/train_autoencoder.json','configs/tiny.json']"
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", files, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=BUNDLE, env=environment, stdout=log, stderr=subprocess.STDOUT)
        checkpoints = Path(options["output_dir"]) / "checkpoints"
        deadline = time.monotonic() + 120
        while not (checkpoints / f"checkpoint_epoch={kill_after}.pt").exists():
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = train_and_crash(stage, phantoms, None, **options)
    assert done[0] > 2 * kill_after, f"started anew after a kill at {kill_after, delay}"
    assert done[-1] == 2 * epochs
    train_and_crash(stage, phantoms, None, **options | folders(tmp_path / "whole", stage))
    killed, whole = (curve(tmp_path / name / "runs" / stage) for name in ("killed", "whole"))
    assert killed == whole, f"killed {delay} s after the checkpoint of epoch {kill_after}"
    assert list(checkpoints.glob(".*")) == []
    assert sorted((BUNDLE / "runs").rglob("*")) == present, "the run wrote outside of the test's folder"
    assert len(checkpoints_in(checkpoints)) == 2


# Bad input


def last_line(stage: str, dataset_dir: Path, capsys: pytest.CaptureFixture[str], **overrides: Any) -> str:
    """What a user reads last when the workflow fails."""
    with loaded(stage, "tiny", **{**STAGES[stage], "dataset_dir": str(dataset_dir), **overrides}) as workflow:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the message is what is tested
            workflow.run()
        capsys.readouterr()
        sys.excepthook(caught.type, caught.value, caught.tb)
    return capsys.readouterr().err.strip().splitlines()[-1]


def spoiled(phantoms: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The phantoms with ``change`` made to every training item; pictures are links."""
    content = json.loads((phantoms / "datalist.json").read_text())
    for item in content["training"]:
        change(item)
    folder.mkdir()
    (folder / "images").symlink_to(phantoms / "images")
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["train_autoencoder", "train"])
def test_truncated_film_is_named(stage, workers, phantoms, trained, tmp_path, capsys):
    content = json.loads((phantoms / "datalist.json").read_text())
    name = Path(content["training"][0]["image"]).name
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (phantoms / "images").iterdir():
        written = path.read_bytes()
        (data / "images" / path.name).write_bytes(written[:300] if path.name == name else written)
    (data / "datalist.json").write_text(json.dumps(content))
    options = folders(tmp_path, stage) | {"num_workers": workers, "ckpt_dir": str(copy_of_stage_1(trained, tmp_path))}
    assert last_line(stage, data, capsys, **options).startswith(f"{data}/images/{name}: expected a readable image")


def remove_text(item: dict[str, Any]) -> None:
    del item["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.update(text="  "), "the text under 'text' is empty"),
        (remove_text, "expected 'text' (the text) or 'report' (path of a text file)"),
    ],
    ids=["empty", "absent"],
)
def test_film_without_text_is_named(change, message, phantoms, trained, tmp_path, capsys):
    data = spoiled(phantoms, tmp_path / "data", change)
    options = folders(tmp_path, "train") | {"ckpt_dir": str(copy_of_stage_1(trained, tmp_path))}
    line = last_line("train", data, capsys, **options)
    assert line.startswith(f"{data}/images/p")
    assert message in line


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("train_autoencoder", {"image_size": [60, 60]}, "image_size: expected multiples of 8, .* nearest is [64, 64]"),
        ("train_autoencoder", {"ms_ssim_kernel_size": 7}, "ms_ssim_kernel_size: expected at most 3 for image_size"),
        ("train", {"image_size": [72, 72], "latent_shape": [3, 9, 9]}, "image_size: expected multiples of 32"),
        ("train", {"latent_shape": [3, 16, 16]}, "latent_shape: expected [3, 8, 8] for image_size [64, 64]"),
        ("inference", {"latent_shape": [3, 9, 9]}, "latent_shape: expected [3, 8, 8] for image_size [64, 64]"),
    ],
)
def test_size_that_networks_cannot_halve_is_named(stage, overrides, message, phantoms, trained, tmp_path, capsys):
    options = folders(trained, stage) | {"output_dir": str(tmp_path)} | overrides
    line = last_line(stage, phantoms, capsys, **options)
    for part in message.split(" .* "):
        assert part in line
    assert line.startswith(message[:10])


def test_weights_of_another_configuration_and_missing_weights_are_named(phantoms, trained, tmp_path, capsys):
    options: dict[str, Any] = folders(trained, "inference") | {"output_dir": str(tmp_path)}
    wide = {**AUTOENCODER, "channels": [8, 8, 8, 8]}
    line = last_line("inference", phantoms, capsys, **options, autoencoder_def=wide)
    assert line.startswith(f"{trained}/models/model.pt: expected the weights of this configuration")
    line = last_line("inference", phantoms, capsys, **options | {"ckpt_dir": str(tmp_path)})
    assert line.startswith(f"{tmp_path}/model.pt: expected trained weights, found no file. Train the model")
    line = last_line("train", phantoms, capsys, **folders(tmp_path, "train"))
    assert line.startswith(
        f"{tmp_path}/models/stages/autoencoder.pt: expected trained weights, found no file. Train it"
    )
    assert "configs/train_autoencoder.json" in line


def test_batch_larger_than_the_data_still_trains(phantoms, tmp_path):
    """With drop_last alone MONAI would skip the whole run and end without an error."""
    options = folders(tmp_path, "train_autoencoder") | {"batch_size": 64, "max_epochs": 1}
    execute("train_autoencoder", phantoms, **options)
    assert len(curve(tmp_path / "runs/train_autoencoder", "train", "loss")) == 1
