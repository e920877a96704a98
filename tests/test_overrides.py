# SPDX-License-Identifier: Apache-2.0
"""`shared.overrides`: command lines as typed, and what comes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import fire
import monai.bundle
import pytest

from shared.overrides import _options, refuse_unknown
from tests.bundle_tools import STANDALONE, label, read
from tests.conftest import ROOT

RUNNER = str(Path(monai.bundle.__file__).with_name("__main__.py"))
CONFIG = {
    "max_epochs": 2,
    "amp": False,
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1},
    "validate": {"handlers": [{"_target_": "StatsHandler"}], "batch_size": 1},
    "initialize": [{"_target_": "shared.errors.show_cause_last"}, {"_target_": "shared.overrides.refuse_unknown"}],
    "run": ["$print('epochs', @max_epochs)"],
}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Pretend that this process was started with these words after ``python -m monai.bundle``."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(CONFIG))
    Path("b.json").write_text(json.dumps({"num_samples": 3, "validate#interval": 5}))
    return lambda *words: monkeypatch.setattr("sys.argv", [RUNNER, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], r"--epoch: expected .* in a\.json; did you mean --max_epochs\?"),
        (["--epoch=3"], r"--epoch: .*did you mean --max_epochs\?"),
        (["-epoch", "3"], r"--epoch: .*did you mean --max_epochs\?"),
        (["--epoch"], r"--epoch: .*did you mean --max_epochs\?"),
        (["--max-epoch", "3"], r"--max_epoch: .*did you mean --max_epochs\?"),
        (["--num_samples", "3"], r"--num_samples: .*a\.json"),
        (["--+epoch", "3"], r"--epoch: .*did you mean --max_epochs\?"),
        (["--validate#batch_sizes=2"], r"--validate#batch_sizes: .*did you mean --validate#batch_size\?"),
        (["--validate::batch_sizes", "2"], r"--validate::batch_sizes: .*did you mean --validate#batch_size\?"),
        (["--zzz", "1", "--yyy=2"], "--zzz: .*look it up there. Unknown as well: --yyy"),
        (["--workflow_typ", "train"], r"--workflow_typ: .*did you mean --workflow_type\?"),
        (["--experiment_name", "x"], "--experiment_name: expected"),
    ],
)
def test_unknown_ids_are_refused(command, words, message):
    command("run", "--config_file", "a.json", *words)
    with pytest.raises(ValueError, match=f"^{message}"):
        refuse_unknown()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--max_epochs", "3", "--amp=True"],
        ["--max-epochs=-3"],
        ["--+max_epochs", "3"],
        ["--noamp"],
        ["--optimizer#lr", "0.2", "--validate::batch_size=2", "--validate#handlers#0", "{}"],
        ["--optimizer#weight_decay", "0.1"],
        ["--optimizer", "{}", "--optimizer#betas=1"],
        ["--run_id", "run", "--meta_file=None", "--logging_file", "x.conf", "--workflow_type", "train"],
        ["--init_id=initialize", "--final_id=finalize", "--properties_path=x", "--_meta_#version=1"],
        ["--tracking", "mlflow", "--experiment_name", "x", "--run_name=y"],
        ["--", "--epoch"],
    ],
)
def test_known_ids_and_the_runners_arguments_pass(command, words):
    command("run", "training", "--config_file", "a.json", *words)
    refuse_unknown()


@pytest.mark.parametrize(
    "files",
    [["--config_file", "['a.json','b.json']"], ["--config_file=('a.json', 'b.json')"], ["--config_file=a.json,b.json"]],
)
def test_all_files_count(command, files):
    command("run", *files, "--num_samples=3", "--validate#interval", "9")
    refuse_unknown()
    command("run", "--num_sample=3", *files)
    with pytest.raises(ValueError, match=r"^--num_sample: .* in a\.json, b\.json; did you mean --num_samples\?"):
        refuse_unknown()


def test_file_may_be_given_by_position_or_in_an_arguments_file(command):
    command("run", "run", "initialize", "finalize", "meta.json", "a.json", "--epoch=3")
    with pytest.raises(ValueError, match="^--epoch: "):
        refuse_unknown()
    Path("args.json").write_text(json.dumps({"config_file": "a.json", "max_epochs": 3}))
    command("run", "--args_file", "args.json", "--amp", "True")
    refuse_unknown()
    Path("args.json").write_text(json.dumps({"config_file": "a.json", "epoch": 3}))
    with pytest.raises(ValueError, match="^--epoch: "):
        refuse_unknown()


def test_other_processes_are_left_alone(command, monkeypatch):
    for argv in (["pytest", "run", "--epoch=3"], [RUNNER], [RUNNER, "verify_metadata", "--epoch=3"], ["-c"], [""]):
        monkeypatch.setattr("sys.argv", argv)
        refuse_unknown()


WORDS = [
    ["training", "--max_epochs", "3", "--amp"],
    ["--a=1", "x", "--b-c", "2", "-d", "--nof", "--g", "-1", "--h#i=j=k"],
    ["--noamp", "--tracking", "-e=5", "run"],
    ["x", "y", "--run_id=z"],
    [],
]


@pytest.mark.parametrize("words", WORDS)
def test_words_are_read_as_the_runner_reads_them(words, monkeypatch):
    create_workflow = Mock()
    monkeypatch.setattr("monai.bundle.scripts.create_workflow", create_workflow)
    fire.Fire(monai.bundle.run, command=words)
    theirs = {name: value for name, value in create_workflow.call_args.kwargs.items() if value is not None}
    assert {name: fire.parser.DefaultParseValue(value) for name, value in _options(words)} == theirs


@pytest.mark.parametrize("path", STANDALONE, ids=label)
def test_every_configuration_calls_it_when_errors_are_shown_well(path):
    targets = [step["_target_"] for step in read(path)["initialize"]]
    assert targets[:2] == ["shared.errors.show_cause_last", "shared.overrides.refuse_unknown"]


def test_real_run_ends_before_it_begins(command):
    line = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "a.json", "--epoch=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("--epoch: expected an id of the configuration")
    assert "epochs" not in result.stdout
