# SPDX-License-Identifier: Apache-2.0
"""`tools.demo`: the commands it would run, without running them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.bundle
import pytest

from shared.overrides import refuse_unknown
from tools.command_line import check_options
from tools.demo import BUNDLES, PROMPTS, demo
from tools.phantoms.__main__ import BUNDLES as PHANTOMS
from tools.report import main as report

RUNNER = str(Path(monai.bundle.__file__).with_name("__main__.py"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """Commands that were to be run, each with success."""
    seen: list[tuple[list[str], dict[str, Any]]] = []

    def record(command: list[str], **options: Any) -> SimpleNamespace:
        seen.append((command, options))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", record)
    return seen


def test_commands_name_what_exists(calls, tmp_path, monkeypatch, capsys):
    demo("cxr_ldm", str(tmp_path / "demo"), n=50, threads=1)
    modules = [command[2] for command, _ in calls]
    assert modules == ["tools.phantoms", *["monai.bundle"] * 4, "tools.report"]
    used = set()
    for command, options in calls:
        assert command[:2] == [sys.executable, "-m"]
        assert importlib.util.find_spec(command[2]) is not None
        assert Path(options["cwd"]).is_dir()
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        if command[2] == "monai.bundle":
            monkeypatch.chdir(options["cwd"])
            monkeypatch.setattr("sys.argv", [RUNNER, *command[3:]])
            refuse_unknown()  # every override is in the files, and the files are there
            (files,) = [word.split("=")[1] for word in command if word.startswith("--config_file=")]
            used |= {name.strip("[]'") for name in files.split(",")}
            assert files.endswith("'configs/tiny.json']"), "small networks, given last"
    assert used == {f"configs/{name}.json" for name in ["train_autoencoder", "train", "inference", "evaluate", "tiny"]}
    check_options(PHANTOMS[calls[0][0][3]], calls[0][0][4:])
    check_options(report, calls[-1][0][3:])
    assert "Open " in capsys.readouterr().out.splitlines()[-1]


def test_everything_is_written_below_out(calls, tmp_path):
    """The trained weights go elsewhere than the shipped ones, which are sampled and evaluated."""
    demo(out=str(tmp_path))
    bundle = [command for command, _ in calls if command[2] == "monai.bundle"]
    paths = [word.split("=", 1)[1] for command in bundle for word in command if "_dir=" in word or "--prompt=" in word]
    assert paths
    assert all(path.startswith(str(tmp_path)) for path in paths)
    for command in bundle:
        assert any(word.startswith("--ckpt_dir=") for word in command) == ("training" in command)
        assert any(word.startswith(f"--output_dir={tmp_path}") for word in command)


def test_sentences_can_be_edited_and_data_are_made_once(calls, tmp_path):
    demo(out=str(tmp_path))
    assert (tmp_path / "prompts.txt").read_text().splitlines() == list(PROMPTS)
    (tmp_path / "prompts.txt").write_text("Cardiomegaly.\n")
    (tmp_path / "samples").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/datalist.json").write_text("{}")
    calls.clear()
    demo(out=str(tmp_path))
    assert (tmp_path / "prompts.txt").read_text() == "Cardiomegaly.\n"
    assert not (tmp_path / "samples").exists(), "samples of older sentences would be in the report"
    assert "tools.phantoms" not in [command[2] for command, _ in calls]


def test_unknown_bundle(calls, tmp_path):
    with pytest.raises(SystemExit, match="^cxr_lmd: expected one of the bundles .*cxr_ldm"):
        demo("cxr_lmd", str(tmp_path / "demo"))
    assert calls == []
    assert not (tmp_path / "demo").exists()
    assert (BUNDLES / "cxr_ldm/configs/tiny.json").is_file()


def test_failing_step_ends_the_demo(tmp_path, monkeypatch, capsys):
    ran = []

    def fail_at_third(command: list[str], **options: Any) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode=3 if len(ran) == 3 else 0)

    monkeypatch.setattr(subprocess, "run", fail_at_third)
    with pytest.raises(SystemExit, match="the command above ended with exit code 3"):
        demo(out=str(tmp_path))
    assert len(ran) == 3
    assert f"monai.bundle run {ran[-1][4]}" in capsys.readouterr().out.splitlines()[-1]
