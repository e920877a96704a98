# SPDX-License-Identifier: Apache-2.0
"""Every configuration of every bundle, read without building anything."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.bundle_tools import (
    CONFIGS,
    MULTI_GPU,
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

EVERY_BUNDLE = {"metadata", "inference", "train", "evaluate", "tiny", *MULTI_GPU}
ONE_BUNDLE = {
    "cxr_ldm": {"train_autoencoder", "train_classifier"},
    "brain_controlnet": {
        *("train_autoencoder", "train_diffusion", "train_regression"),
        *("inference_unconditional", "evaluate_diffusion"),
    },
    "sdseg": {"train_autoencoder", "train_baseline"},
    "dmri2noddi": {"train_vqgan", "train_encoder", "train_baseline", "directions"},
}
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
Licences = dict[str, tuple[str, set[str] | None]]
NO_DIFFUSION = {
    *("train_autoencoder", "train_classifier", "train_regression", "train_baseline"),
    *("train_vqgan", "train_encoder"),
}
INFERENCE = {"inference", "inference_unconditional"}
MAY_DIFFER: Licences = {
    "_desc_": ("each file describes itself", None),
    "output_dir": ("each workflow has its own run folder", None),
    "train": ("each stage has its own data and engine", None),
    "validate": ("each stage has its own data and engine", None),
    "settings": ("the values that decide a resume are those of the stage", None),
    "tracker": ("each stage is an experiment", None),
    "network_def": ("each stage trains another network", NO_DIFFUSION),
    "max_epochs": ("published per stage", NO_DIFFUSION),
    "batch_size": ("published per stage; sampling takes less memory", NO_DIFFUSION | INFERENCE),
    "learning_rate": ("published per stage", NO_DIFFUSION),
    "ema_decay": ("diffusion takes more and smaller steps", NO_DIFFUSION),
    "preview_interval": ("sampling costs more than reconstructing", NO_DIFFUSION),
    "loss": ("each kind of network has its own", NO_DIFFUSION),
    "optimizer": ("AdamW or Adam, over the parameters of the stage", NO_DIFFUSION),
    "size_check": ("stage 1 has no U-Net", {"train_autoencoder"}),
    "run": ("training starts a trainer, inference an evaluator", INFERENCE),
    "initialize": ("training seeds its first weights", INFERENCE),
    "seed": ("inference counts its seeds from 0", INFERENCE),
}
MAY_DIFFER_IN: dict[str, Licences] = {
    "cxr_ldm": {
        "lr_scheduler": ("warm-up or cosine", {"train_classifier"}),
        "dataset_dir": ("inference needs no data; the classifier learns phantoms", {"inference", "train_classifier"}),
        "ckpt_dir": ("the classifier judges the tiny model only", {"train_classifier"}),
        "num_workers": ("phantoms load at once", {"train_classifier"}),
        "image_size": ("phantoms have 128 pixels", {"train_classifier"}),
    },
    "brain_controlnet": {
        "network_def": ("samples come from the model of stage 2", {"train_diffusion", "inference_unconditional"}),
        "preview_sampler": ("stage 2 has no condition", {"train_diffusion"}),
        "batch_size": ("stage 3 has half a U-Net more to hold", {"train_diffusion"}),
        **dict.fromkeys(
            (
                "dataset_dir",
                "preprocessing",
                "dataset",
                "dataloader",
                "inferer",
                "postprocessing",
                "handlers",
                "evaluator",
            ),
            ("samples are drawn from nothing, translations from a FLAIR", {"inference_unconditional"}),
        ),
    },
    "sdseg": {},
    "dmri2noddi": {
        "loss": ("mean absolute error, or that of the VQ-GAN", {"train_vqgan"}),
        "optimizer": (
            "published per stage; the baseline's is ours",
            {"train_vqgan", "train_encoder", "train_baseline"},
        ),
        "patch_check": ("only the diffusion stage has a U-Net", {"train"}),
        "patience": ("the diffusion model's loss falls more slowly", {"train"}),
        "preview_interval": ("sampling costs more than reconstructing", {"train"}),
    },
}
# Arguments that only some files give to a component that is otherwise the same in all.
ARGUMENTS_MAY_DIFFER = {
    "ema": {"_requires_": "each stage waits for the weights that it starts from"},
    "autoencoder_digest": {"_requires_": "each stage loads by a component of its own"},
    "network_def": {"unlock_unet": "of training alone", "train_vision_encoder": "of training alone"},
    "prompt_def": {"learned": "of stage 2 alone; afterwards it is loaded and frozen"},
}

# Ids of files of the same name that agree in every bundle that has them: the architectures that bundles share, and what
# makes one habit serve all bundles.
AGREE = {
    *("unet_def", "size_check", "noise_schedule", "noise_scheduler", "noise_schedulers", "lr_scheduler", "optimizer"),
    *("loss", "null_prompt_probability", "clip_norm", "non_finite_policy", "bundle_root", "ckpt_dir", "device", "amp"),
    *("compile", "seed", "resume", "val_interval", "tracking_uri", "initialize", "run", "training"),
}
# Exceptions of a bundle, in the file named.
GENERATES = "the image is generated there, and a condition of the mask here"
MAY_DISAGREE: dict[str, Licences] = {
    "sdseg": {
        "unet_def": (f"published with scale-shift conditioning and another size; {GENERATES}", {"train", "inference"}),
        "size_check": (
            "the latent's shape is no option: images have the size of the configuration",
            {"train", "inference"},
        ),
        "noise_schedule": ("published: epsilon, a smaller last beta", {"train", "inference"}),
        "noise_scheduler": ("one scheduler trains and samples: one step is a choice of DDIM", {"train"}),
        "lr_scheduler": ("published: from a millionth", {"train"}),
        "optimizer": ("published: the class embedding learns faster", {"train"}),
        "loss": (
            "published: noise and latent estimate; the autoencoder's with weights of kl-f8",
            {"train", "train_autoencoder"},
        ),
    },
    "dmri2noddi": {
        "unet_def": ("three dimensions; published with other channels", {"train", "inference"}),
        "noise_schedule": ("published: epsilon, betas from 1e-4 to 0.02", {"train", "inference"}),
        "noise_scheduler": ("one scheduler trains and samples", {"train"}),
        "noise_schedulers": ("published with 100 steps", {"inference"}),
        "optimizer": ("published: Adam with weight decay", {"train"}),
        "loss": ("published: mean absolute error", {"train", "train_baseline"}),
    },
}

# Ids of an overlay that no stand-alone file has.
OVERLAY_IDS = {
    "cxr_ldm/evaluate.json": {
        *("max_images", "max_training_images", "xrv_weights", "feature_extractor", "prompt_agreement"),
        *("training_images", "measures"),
    },
    "brain_controlnet/evaluate.json": {
        *("max_volumes", "max_training_images", "max_diversity_images", "radimagenet_weights", "feature_extractor"),
        *("training_images", "measures"),
    },
    "brain_controlnet/evaluate_diffusion.json": {
        *("max_volumes", "max_training_images", "max_diversity_images", "radimagenet_weights", "feature_extractor"),
        *("training_images", "measures"),
    },
    "sdseg/evaluate.json": {"training_masks"},
    "dmri2noddi/evaluate.json": set(),
    "dmri2noddi/directions.json": {"num_directions"},
    "cxr_ldm/tiny.json": {"feature_extractor", "prompt_agreement"},
    "brain_controlnet/tiny.json": set(),
    "sdseg/tiny.json": set(),
    "dmri2noddi/tiny.json": set(),
    **{f"{bundle}/{name}.json": {"finalize"} for bundle in ONE_BUNDLE for name in MULTI_GPU},
}

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=label)
standalone = pytest.mark.parametrize("path", STANDALONE, ids=label)


PAIRS = [(one, two) for one, two in combinations(STANDALONE, 2) if one.parent == two.parent]
NAMESAKES = [(one, two) for one, two in combinations(STANDALONE, 2) if one.name == two.name]


# Reading


def test_the_expected_configurations_are_found():
    expected = {f"{bundle}/{stem}.json" for bundle, own in ONE_BUNDLE.items() for stem in EVERY_BUNDLE | own}
    assert {label(path) for path in CONFIGS} == expected
    assert {path.name for path in (ROOT / "bundles").iterdir()} == set(ONE_BUNDLE)


@workflows
def test_file_says_what_it_is_and_how_to_run_it(path: Path):
    config = read(path)
    assert next(iter(config)) == "_desc_"
    if path.stem in ("tiny", *MULTI_GPU):
        assert config["_desc_"].startswith("Overlay")
        assert path.stem == "tiny" or f"'configs/{path.name}'" in config["_desc_"].split("Run: torchrun ")[1]
    else:
        assert f"configs/{path.name}" in config["_desc_"].split("Run: python -m monai.bundle run ")[1]


@standalone
def test_standalone_file_has_no_loose_ends(path: Path):
    config = read(path)
    assert undefined_references(config) == []
    # MONAI Label reads inference.json alone, without its metadata and without a folder to resolve files in.
    assert [where for where, text in strings(config) if text.startswith("%") and ".json" in text] == []
    if path.stem.startswith("inference"):
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


def comparable(name: str, value: Any) -> Any:
    """A definition without the arguments that files may give it or not."""
    if not isinstance(value, dict):
        return value
    return {key: content for key, content in value.items() if key not in ARGUMENTS_MAY_DIFFER.get(name, ())}


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=label)
def test_id_means_the_same_in_two_files(first: Path, second: Path):
    one, two = read(first), read(second)
    own = MAY_DIFFER_IN[first.parent.parent.name]
    unexplained = []
    for name in sorted(one.keys() & two.keys()):
        licences = [table[name][1] for table in (MAY_DIFFER, own) if name in table]
        licensed = any(files is None or files & {first.stem, second.stem} for files in licences)
        if not licensed and comparable(name, one[name]) != comparable(name, two[name]):
            unexplained.append(name)
    assert unexplained == []


def test_every_licence_to_differ_is_used():
    used, arguments = set(), set()
    for first, second in PAIRS:
        one, two = read(first), read(second)
        for name in one.keys() & two.keys():
            if comparable(name, one[name]) != comparable(name, two[name]):
                used.add((first.parent.parent.name, name))
            elif one[name] != two[name]:
                arguments.add(name)
    assert MAY_DIFFER.keys() <= {name for _, name in used}
    assert {(bundle, name) for bundle, table in MAY_DIFFER_IN.items() for name in table} <= used
    assert arguments == ARGUMENTS_MAY_DIFFER.keys()


@pytest.mark.parametrize(("first", "second"), NAMESAKES, ids=label)
def test_bundles_agree_where_they_share(first: Path, second: Path):
    found = disagreements(first, second)
    unexplained = []
    for name in found:
        licences = [table[name][1] for table in tables_of(first, second) if name in table]
        if not any(files is None or first.stem in files for files in licences):
            unexplained.append(name)
    assert unexplained == []


def disagreements(first: Path, second: Path) -> list[str]:
    one, two = read(first), read(second)
    return [name for name in sorted(AGREE & one.keys() & two.keys()) if one[name] != two[name]]


def tables_of(*paths: Path) -> list[Licences]:
    return [MAY_DISAGREE[bundle] for path in paths if (bundle := path.parent.parent.name) in MAY_DISAGREE]


def test_every_licence_to_disagree_is_used():
    """In each of its files, with every other bundle that has the id and no licence of its own: two exceptions may be
    alike."""
    for bundle, table in MAY_DISAGREE.items():
        pairs = [pair for pair in NAMESAKES if bundle in {path.parent.parent.name for path in pair}]
        for name, (_, files) in table.items():
            named = [pair for pair in pairs if all(name in read(path) for path in pair)]
            rules = [
                pair
                for pair in named
                if not any(is_exception(path, name) for path in pair if path.parent.parent.name != bundle)
            ]
            used = {pair[0].stem for pair in rules if name in disagreements(*pair)}
            assert used == (files if files is not None else {pair[0].stem for pair in rules}), name
            assert all(name in disagreements(*pair) for pair in rules if pair[0].stem in used), name


def is_exception(path: Path, name: str) -> bool:
    _, files = MAY_DISAGREE.get(path.parent.parent.name, {}).get(name, ("", set()))
    return files is None or path.stem in files


@pytest.mark.parametrize("name", MULTI_GPU)
def test_overlay_for_several_gpus_is_the_same_in_every_bundle(name):
    assert len({path.read_text() for path in WORKFLOWS if path.stem == name}) == 1


def test_what_bundles_share_is_found_in_them():
    assert {first.name for first, _ in NAMESAKES} == {
        *("inference.json", "train.json"),
        *("train_autoencoder.json", "train_baseline.json"),
    }
    assert {name for pair in NAMESAKES for name in read(pair[0]).keys() & read(pair[1]).keys()} >= AGREE


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem in OVERLAYS], ids=label)
def test_overlay_changes_what_is_there(path: Path):
    known = {name for other in STANDALONE if other.parent == path.parent for name in read(other)}
    own = {name.removeprefix("+").split("#")[0] for name in read(path)}
    assert own - known == OVERLAY_IDS[label(path)]


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem == "tiny"], ids=label)
def test_tiny_networks_take_from_the_configuration_what_the_shipped_ones_take(path: Path):
    """A network that tests replace must not be the only one that is wired up."""
    tiny = {name: value for name, value in read(path).items() if name.endswith("_def")}
    assert tiny
    faults = []
    for other in (other for other in STANDALONE if other.parent == path.parent):
        content = read(other)
        for name in (name for name in tiny if name in content and tiny[name]["_target_"] == content[name]["_target_"]):
            wired = {key: text for key, text in content[name].items() if str(text).startswith(("@", "$"))}
            faults += [f"{other.name}: {name}#{key}" for key in wired if tiny[name].get(key) != wired[key]]
            wired = {key: text for key, text in tiny[name].items() if str(text).startswith(("@", "$"))}
            faults += [f"{other.name}: {name}#{key}" for key in wired if content[name].get(key) != wired[key]]
    assert faults == []


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path.stem.startswith("evaluate")], ids=label)
def test_overlay_compares_with_the_network_that_was_trained(path: Path):
    """A definition in an overlay that its own configuration lacks comes from another stage."""
    overlay, base = read(path), read(path.with_name(path.name.replace("evaluate", "train")))
    for other in (other for other in STANDALONE if other.parent == path.parent):
        content = read(other)
        shared = [name for name in overlay if name.endswith("_def") and name not in base and name in content]
        assert [name for name in shared if overlay[name] != content[name]] == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem == "metadata"], ids=label)
def test_metadata(path: Path):
    content = read(path)
    schema = json.loads((ROOT / "tools/schemas/meta_schema_20240725.json").read_text())
    jsonschema.validate(content, schema)
    assert content["schema"].endswith("meta_schema_20240725.json")
    assert content["version"] in content["changelog"]
    # Versions are compared as strings by the zoo.
    assert all(len(part) == 1 for part in content["version"].split("."))
    required = {"monai", "torch", "numpy", *content["required_packages_version"]}
    assert [name for name in required if not metadata.version(name)] == []


# The checks themselves


def planted(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    config = copy.deepcopy(read(ROOT / "bundles/cxr_ldm/configs/train.json"))
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
    assert undefined_references(config) == [
        f"{place} is not defined" for place in ("optimizer#params: networc", "optimizer#lr: learning_rat")
    ]
    (tmp_path / "x.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ValueError, match=r"x\.json: expected each key once, got \['seed'\] again"):
        read(tmp_path / "x.json")
