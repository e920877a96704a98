# SPDX-License-Identifier: Apache-2.0
"""`tools.demo`: the commands it would run, without running them."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.bundle
import pytest

from shared.overrides import refuse_unknown
from tools import demo_steps
from tools.command_line import check_options
from tools.demo import BUNDLES, DEMOS, demo
from tools.demo_steps import RECORD, Step, run_steps
from tools.demos import brain_controlnet
from tools.demos.cxr_ldm import PROMPTS
from tools.phantoms.__main__ import BUNDLES as PHANTOMS
from tools.prepare.__main__ import COMMANDS as PREPARATIONS
from tools.report import main as report

RUNNER = str(Path(monai.bundle.__file__).with_name("__main__.py"))
STAGES = {
    "cxr_ldm": ["train_autoencoder", "train"],
    "brain_controlnet": ["train_autoencoder", "train_diffusion", "train"],
    "sdseg": ["train_autoencoder", "train"],
    "dmri2noddi": ["train_vqgan", "train_encoder", "train"],
}
INFERENCES = {"dmri2noddi": 2}  # without and with diffusion
COUNTS = {"cxr_ldm": "n", "brain_controlnet": "n", "sdseg": "num_images", "dmri2noddi": "num_subjects"}
TOOLS: dict[str, Callable[[list[str]], tuple[Callable[..., Any], list[str]]]] = {
    "tools.phantoms": lambda words: (PHANTOMS[words[0]], words[1:]),
    "tools.prepare": lambda words: (PREPARATIONS[words[0]], words[1:]),
    "tools.report": lambda words: (report, words),
}


class Calls(list[SimpleNamespace]):
    """Commands that were to be run, in order; each makes its folder and succeeds, unless `fails` names it."""

    fails: str | None = None

    def modules(self) -> list[str]:
        return [call.words[0] for call in self]

    def bundle(self) -> list[SimpleNamespace]:
        return [call for call in self if call.words[0] == "monai.bundle"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def record(command: list[str], *, cwd: Path, env: dict[str, str]) -> SimpleNamespace:
        assert command[:2] == [sys.executable, "-m"]
        words = command[2:]
        seen.append(SimpleNamespace(words=words, cwd=Path(cwd), env=env))
        for name in ("output_dir", "out"):
            made = option(words, name)
            if made and not made.endswith(".html"):
                Path(made).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=3 if seen.fails is not None and seen.fails in " ".join(words) else 0)

    monkeypatch.setattr(subprocess, "run", record)
    return seen


def option(words: list[str], name: str) -> str | None:
    return next((word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")), None)


def configs(words: list[str]) -> list[str]:
    files = option(words, "config_file")
    assert files is not None
    return [name.strip("'").removeprefix("configs/").removesuffix(".json") for name in files.strip("[]").split(",")]


def folders(words: list[str]) -> Iterator[str]:
    """Values of options that are paths."""
    for word in words:
        name, _, value = word.partition("=")
        if name.endswith("_dir") or name in ("--out", "--source", "--prompt"):
            yield value
        elif name == "--tracking_uri":
            yield value.removeprefix("sqlite:///")


@pytest.mark.parametrize("bundle", DEMOS)
def test_commands_name_what_exists(bundle, calls, tmp_path, monkeypatch, capsys):
    demo(bundle, str(tmp_path / "demo"), n=50, threads=1)
    for call in calls:
        assert importlib.util.find_spec(call.words[0]) is not None
        assert call.cwd.is_dir()
        assert call.env["OMP_NUM_THREADS"] == "1"
        if call.words[0] == "monai.bundle":
            assert call.cwd == BUNDLES / bundle
            assert configs(call.words)[-1] == "tiny", "small networks, given last"
            monkeypatch.chdir(call.cwd)
            monkeypatch.setattr("sys.argv", [RUNNER, *call.words[1:]])
            refuse_unknown()  # every override is in the files, and the files are there
        else:
            check_options(*TOOLS[call.words[0]](call.words[1:]))
    assert option(calls[0].words, COUNTS[bundle]) == "50"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"Open {tmp_path}/demo/report.html")


@pytest.mark.parametrize("bundle", DEMOS)
def test_shipped_weights_come_before_trainings(bundle, calls, tmp_path):
    """The page is in this order. What is trained goes elsewhere than the shipped weights, which the others use."""
    demo(bundle, str(tmp_path))
    assert calls.modules()[0] == "tools.phantoms"
    assert calls.modules()[-1] == "tools.report"
    used = [configs(call.words)[:-1] for call in calls.bundle()]
    maps = [["inference"]] * INFERENCES.get(bundle, 1)
    assert used == [*maps, ["train", "evaluate"], *([stage] for stage in STAGES[bundle])]
    for call in calls:
        assert all(path.startswith(str(tmp_path)) for path in folders(call.words))
    for call in calls.bundle():
        assert Path(option(call.words, "output_dir") or "").parent == tmp_path / bundle
        trained = tmp_path / bundle / "models"
        assert option(call.words, "ckpt_dir") == (str(trained) if "training" in call.words else None)


def test_brain_volumes_are_translated_as_a_user_has_them(calls, tmp_path):
    """Raw volumes go in; the same subjects are measured, because raw and prepared data are split alike."""
    demo("brain_controlnet", str(tmp_path))
    phantoms, prepare, inference, evaluation = (call.words for call in calls[:4])
    assert option(prepare, "source") == option(inference, "dataset_dir") == option(phantoms, "out")
    assert option(evaluation, "dataset_dir") == option(prepare, "out") != option(phantoms, "out")
    assert (option(phantoms, "split"), option(phantoms, "seed")) == (
        option(prepare, "fractions"),
        option(prepare, "seed"),
    )
    assert int(option(inference, "num_samples") or 0) > 1, "an uncertainty map needs several samples"
    assert option(prepare, "mask") == brain_controlnet.MASK


def test_pictures_are_segmented_and_measured_that_the_demo_weights_never_saw(calls, tmp_path):
    demo("sdseg", str(tmp_path))
    phantoms, inference, evaluation = (call.words for call in calls[:3])
    assert option(inference, "dataset_dir") == option(evaluation, "dataset_dir") == option(phantoms, "out")
    assert option(phantoms, "seed") not in (None, "0"), "the demo weights were trained on phantoms of seed 0"
    assert int(option(inference, "num_samples") or 0) > 1, "a map of agreement needs several samples"


def test_noddi_maps_come_without_and_with_diffusion(calls, tmp_path):
    demo("dmri2noddi", str(tmp_path))
    phantoms, fast, sampled, evaluation = (call.words for call in calls[:4])
    places = {option(words, "dataset_dir") for words in (fast, sampled, evaluation)}
    assert places == {option(phantoms, "out")}
    assert option(phantoms, "seed") not in (None, "0"), "the demo weights were trained on phantoms of seed 0"
    assert (option(fast, "deterministic"), option(fast, "num_samples")) == ("True", None)
    assert option(sampled, "deterministic") is None
    for words in (sampled, evaluation):
        assert int(option(words, "num_samples") or 0) > 1, "a standard deviation needs several samples"
    assert option(fast, "output_dir") != option(sampled, "output_dir")


def test_all_bundles_share_one_page(calls, tmp_path):
    demo(out=str(tmp_path))
    assert [option(call.words, "out") for call in calls if call.words[0] == "tools.phantoms"] == [
        str(tmp_path / "cxr_ldm/data"),
        str(tmp_path / "brain_controlnet/raw"),
        str(tmp_path / "sdseg/data"),
        str(tmp_path / "dmri2noddi/data"),
    ]
    assert calls.modules().count("tools.report") == 1
    assert calls[-1].words[1:3] == [str(tmp_path), f"--out={tmp_path}/report.html"]


def test_commands_can_be_repeated(calls, tmp_path, monkeypatch, capsys):
    """What is printed is, to a shell in the current folder, what was run."""
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_steps.shutil, "which", lambda name: sys.executable)
    demo(out=str(tmp_path / "a folder"))
    lines = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(lines) == len(calls)
    for line, call in zip(lines, calls, strict=True):
        assert line[0] + line[-1] == "()", "the shell stays where it is"
        change, folder, then, *command = shlex.split(line[1:-1])
        assert (change, then, *command) == ("cd", "&&", "python", "-m", *call.words)
        assert Path(folder).resolve() == call.cwd
    assert "--config_file=['configs/inference.json','configs/tiny.json']" in shlex.split(lines[1])


def test_interpreter_is_named_where_python_is_another_one(monkeypatch):
    monkeypatch.chdir(demo_steps.REPOSITORY)
    step = Step("x", ("tools.report", "--title=a b", "--mask={subject}!'"))
    monkeypatch.setattr(demo_steps.shutil, "which", lambda name: "/usr/bin/python")
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    assert step.shown().startswith("'/my env/bin/python' -m tools.report '--title=a b' ")
    assert shlex.split(step.shown())[2:] == list(step.words)


def test_finished_steps_are_not_repeated(calls, tmp_path, capsys):
    demo(out=str(tmp_path))
    first = len(calls)
    calls.clear()
    capsys.readouterr()
    demo(out=str(tmp_path))
    assert calls.modules() == ["tools.report"]
    assert capsys.readouterr().out.count("was finished before") == first - 1
    (tmp_path / "brain_controlnet/volumes").rmdir()
    calls.clear()
    demo(out=str(tmp_path))
    assert [configs(call.words)[0] for call in calls.bundle()] == ["inference"], "its folder was deleted"


def test_edited_sentences_are_drawn(calls, tmp_path):
    demo("cxr_ldm", str(tmp_path))
    prompts, samples = tmp_path / "cxr_ldm/prompts.txt", tmp_path / "cxr_ldm/samples"
    assert prompts.read_text().splitlines() == list(PROMPTS)
    prompts.write_text("Cardiomegaly.\n")
    (samples / "old.png").touch()
    calls.clear()
    demo("cxr_ldm", str(tmp_path))
    assert prompts.read_text() == "Cardiomegaly.\n"
    assert [configs(call.words)[0] for call in calls.bundle()] == ["inference"]
    assert not (samples / "old.png").exists(), "samples of older sentences would be in the report"


def test_interrupted_training_goes_on_and_a_changed_one_begins_anew(calls, tmp_path):
    data, run = tmp_path / "datalist.json", tmp_path / "run"
    training = Step("training", ("monai.bundle", f"--output_dir={run}"), makes=run, reads=(data,), resumes=True)
    data.touch()
    calls.fails = "monai.bundle"
    with pytest.raises(SystemExit, match="exit code 3"):
        run_steps([training], name="x", root=tmp_path)
    (run / "checkpoint.pt").touch()
    calls.fails = None
    run_steps([training], name="x", root=tmp_path)
    assert (run / "checkpoint.pt").exists(), "it resumes from there"
    assert len(calls) == 2
    run_steps([training], name="x", root=tmp_path)
    assert len(calls) == 2
    data.write_text("other data")
    run_steps([training], name="x", root=tmp_path)
    assert len(calls) == 3
    assert not (run / "checkpoint.pt").exists()


def test_folder_of_somebody_else_is_left_alone(calls, tmp_path):
    """A tool would refuse or fill it, and the demo remove it the next time."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.nii").touch()
    step = Step("sample data", ("tools.phantoms", "x"), makes=tmp_path / "data")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{tmp_path}/data: expected no such folder, .* move it away"):
            run_steps([step], name="x", root=tmp_path)
    assert calls == []
    assert (tmp_path / "data/mine.nii").exists()


def test_damaged_record(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path / RECORD}: expected JSON"):
        run_steps([], name="x", root=tmp_path)
    (tmp_path / RECORD).write_text("[]")
    with pytest.raises(ValueError, match=f"^{tmp_path / RECORD}: expected an object"):
        run_steps([], name="x", root=tmp_path)


def test_unknown_bundle(calls, tmp_path):
    with pytest.raises(
        SystemExit, match="^cxr_lmd: expected one of the bundles cxr_ldm, brain_controlnet, sdseg, dmri2noddi, or all"
    ):
        demo("cxr_lmd", str(tmp_path / "demo"))
    assert calls == []
    assert not (tmp_path / "demo").exists()


def test_every_small_bundle_has_a_demo():
    assert set(DEMOS) == {path.parent.parent.name for path in BUNDLES.glob("*/configs/tiny.json")}


def test_failing_step_ends_the_demo(calls, tmp_path, capsys):
    calls.fails = "evaluate"
    with pytest.raises(SystemExit, match="^cxr_ldm, step 3 of 5: .* ended with exit code 3"):
        demo(out=str(tmp_path))
    assert len(calls) == 3
    assert "monai.bundle run run" in capsys.readouterr().out.splitlines()[-1]
