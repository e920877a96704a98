# SPDX-License-Identifier: Apache-2.0
"""`tools.command_line`: wrong options are refused before anything runs."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import ROOT
from tools.command_line import check_options, run


def prepare(source: str, *, views: str = "PA", keep_text: bool = False) -> None:
    """Stands for a tool; every call is recorded."""
    if source == "bad":
        raise ValueError("bad: expected another source")
    CALLS.append((source, views, keep_text))


CALLS: list[tuple[str, str, bool]] = []


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


@pytest.mark.parametrize("words", [["x", "--views", "AP"], ["--source=x", "--keep-text"], ["x", "--nokeep_text"],
                                   ["--help"], ["x", "--", "--trace"]])  # fmt: skip
def test_known_options_pass(words):
    check_options(prepare, words)


def test_unknown_option_is_refused_before_the_call(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool", "prepare", "x", "--viewz", "AP"])
    with pytest.raises(SystemExit, match=r"^--viewz: expected an option.*did you mean --views\?"):
        run({"prepare": prepare}, name="tool")
    assert CALLS == []


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("assets", ["fetch", "--folders", "x"], r"^--folders: .*did you mean --folder\?"),
        ("assets", ["check", "--names", "x"], "^--names: .*Options: --folder$"),
        ("assets", ["fetch", "nope"], "^nope: unknown asset"),
        ("convert_checkpoint", ["xrv", "--src=a", "--out=b"], r"^--src: expected an option"),
        ("convert_checkpoint", ["xrv", "--source=a", "--out=b", "--sha256=12345678"], "^a: this file is a pickled"),
        ("report", ["nowhere", "--output=x"], r"^--output: .*did you mean --out\?"),
        ("report", ["/nowhere"], "^/nowhere: expected a run folder"),
        ("shrink_weights", ["nowhere.pt", "--out=x.pt"], "^nowhere.pt: No such file or directory$"),
        ("phantoms", ["sdseg", "--n=20", "--out=x"], r"^--n: expected an option.*--num_images"),
        ("phantoms", ["sdseg", "--out=x", "--num_images=12"], "^num_images: expected at least 18, .* got 12"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_tools_refuse_unknown_options_and_end_in_one_line(module, words, message, monkeypatch):
    monkeypatch.setattr("sys.argv", [module, *words])
    with pytest.raises(SystemExit, match=message) as stopped:
        runpy.run_module(f"tools.{module}", run_name="__main__")
    assert "\n" not in str(stopped.value)


def test_no_tool_goes_round_it():
    written = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").rglob("*.py") if "fire.Fire(" in path.read_text()
    }
    assert written == {"tools/command_line.py"}


def test_run_and_its_errors(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool", "prepare", "x", "--views", "AP", "--keep-text"])
    run({"prepare": prepare}, name="tool")
    assert CALLS == [("x", "AP", True)]
    monkeypatch.setattr("sys.argv", ["tool", "bad"])
    with pytest.raises(SystemExit, match="^bad: expected another source"):
        run(prepare, name="tool")
