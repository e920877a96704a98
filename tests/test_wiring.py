# SPDX-License-Identifier: Apache-2.0
"""What configurations hand on: options to what they are named after, sections to their use, averages to the release.

A configuration in which one of these is wrong runs all the same, and only its figures are wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bundle_tools import CONFIGS, STANDALONE, TRAINING, components, label, read, strings

EVALUATIONS = [path for path in CONFIGS if path.stem.startswith("evaluate")]
INFERENCES = [path for path in STANDALONE if path.stem.startswith("inference")]
AVERAGED = [path for path in TRAINING if path.stem != "train_classifier"]  # phantoms' findings, learned in a minute
NO_OPTIONS = {"_desc_", "imports", "initialize", "run", "training"}
USE = {"train": "training", "validate": "validation", "preview_dataset": "validation", "training_masks": "training"}


@pytest.mark.parametrize("path", AVERAGED, ids=label)
def test_released_and_validated_are_the_averaged_weights(path: Path):
    config = read(path)
    assert config["ema"]["model"] == config["train"]["trainer"]["network"] == "@network"
    assert re.search(r"[ ,]@ema\]$", config["train"]["trainer"]["train_handlers"])
    assert config["validate"]["evaluator"]["network"] == "$@ema.ema_model"
    assert config["validate"]["best"]["network"] == "$@ema.ema_model"
    saved = next(part for _, part in components(config) if part["_target_"].endswith(".ResumableCheckpoint"))
    assert saved["state"]["ema"] in ("$@ema.ema_model", "$@ema.ema_model.trained")


@pytest.mark.parametrize("path", [*TRAINING, *EVALUATIONS], ids=label)
def test_every_section_has_its_use(path: Path):
    config = read(path)
    found = {place: part["section"] for place, part in components(config) if "section" in part}
    assert len(found) >= (1 if path in EVALUATIONS else 2)
    for place, section in found.items():
        use = re.split("[#:]", place)[0]
        expected = "test" if path in EVALUATIONS and use == "validate" else USE[use]
        assert (config["section"] if section == "@section" else section) == expected, place


@pytest.mark.parametrize("path", [*INFERENCES, *EVALUATIONS], ids=label)
def test_options_reach_the_sampler(path: Path):
    config = read(path)
    of_clients = config.get("displayable_configs", {})
    sampler = config["validate#inferer"] if path in EVALUATIONS else config["inferer"]
    named = [name for name in sampler if name in config and name not in NO_OPTIONS]
    assert "num_inference_steps" in named
    for name in named:
        assert sampler[name] == (f"@displayable_configs#{name}" if name in of_clients else f"@{name}")
        assert of_clients.get(name, f"@{name}") == f"@{name}"


@pytest.mark.parametrize("path", STANDALONE, ids=label)
def test_every_option_is_used(path: Path):
    """By more than ``settings``, which are written down and decide about a resume."""
    config = read(path)
    options = {name for name, value in config.items() if not isinstance(value, dict) and name not in NO_OPTIONS}
    if path in INFERENCES and "dataset" in config and "dataset_dir" not in str(config["dataset"]):
        options.discard("dataset_dir")  # where nothing is read; MONAI wants it all the same
    texts = [text for where, text in strings(config) if "settings" not in where.split("#")]
    unused = [name for name in sorted(options) if not any(re.search(rf"@{name}\b", text) for text in texts)]
    assert unused == []


@pytest.mark.parametrize("path", EVALUATIONS, ids=label)
def test_noise_of_an_evaluation_depends_on_seed_and_item(path: Path):
    prepare = read(path)["validate#prepare_batch"]
    assert prepare["seed"] == "@seed"
    if prepare["_target_"].endswith(".ConditionBatch"):
        assert {"name", "subject"} & set(prepare.get("seed_keys", ["subject"]))
