# SPDX-License-Identifier: Apache-2.0
"""Commands of the README and the guides that are not run: what they name exists, and nothing is left unlooked at."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from shared.overrides import is_defined
from tests.conftest import ROOT
from tests.readme_blocks import README, Command, blocks
from tests.test_readme_runs import AS_WRITTEN, BUNDLES, WHOLE_WAY
from tools import command_line
from tools.bundle_checks.commands import parse
from tools.bundle_checks.readme import RUNNER

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
GUIDES = sorted((ROOT / "docs").glob("*.md"))
# Blocks of the README that no test runs as they are: heading and start of the first command, and why.
NOT_RUN = {
    ("Generative imaging bundles", "make demo"): "minutes; tests/test_demo.py runs its steps small",
    ("Installing", "make demo"): "the same",
    ("Installing", "pip install"): "installs packages",
    ("Inference", "python -m tools.phantoms brain_controlnet"): "minutes of CPU; the whole way asks the same, smaller",
    ("Inference", "python -m tools.phantoms dmri2noddi"): "the same",
    ("Training on your own data", "python -m tools.prepare"): "the reader's own data; tests/test_prepare*.py",
    ("Training on your own data", "cd bundles/"): "full size; the whole way runs the same files small",
    ("Training on your own data", "python -m monai.bundle run"): "the same",
    ("Speed", "OMP_NUM_THREADS=1 python -m tools.benchmark"): "up to an hour; tests/test_benchmark*.py",
    (
        "Publishing and serving",
        "python -m tools.export_bundle",
    ): "minutes; tests/test_zoo_unit_tests.py",
}
# Programs that are not ours, whose words are not looked at.
OTHERS = {"cd", "mkdir", "cp", "make", "pip"}


def test_every_block_of_the_readme_is_run_or_has_a_reason():
    run = {block.number for block in (*WHOLE_WAY.values(), *AS_WRITTEN.values())}
    excused = set()
    for block in blocks():
        reasons = {key for key in NOT_RUN if block.heading == key[0] and block.commands[0].text.startswith(key[1])}
        assert (block.number in run) != bool(reasons), f"{block}: expected to be run, or to be listed in NOT_RUN"
        excused |= reasons
    assert excused == set(NOT_RUN), "listed, but not in the README any more"


def test_no_program_of_the_readme_is_overlooked():
    programs = {command.words[0] for block in blocks() for command in block.commands}
    assert programs == {*OTHERS, "python"}


def written(document: Path) -> Iterator[Command]:
    """What is run as a module, in blocks and in the text between backticks, where `...` may stand for words.

    The guides' blocks are less plain than the README's: variables that hold options, pipes, files in between. A
    command is cut where the shell would.
    """
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [(document.stem, line) for line in re.findall(r"`((?:python|torchrun) [^`\n]*-m [^`\n]+)`", prose)]
    for block in blocks(document):
        lines = re.sub(r"\\\n\s*", " ", block.text)
        for name, value in re.findall(r'^(?:export )?([A-Z]\w*)="(.*?)"', lines, re.MULTILINE):
            lines = re.sub(rf"\${name}\b", value.replace("\\", ""), lines)
        folder = document.stem
        for line in lines.splitlines():
            folder = (re.findall(r"\bcd (\S+)", line) or [folder])[-1]
            commands = re.findall(r"\b(?:python|torchrun .*?) -m .*?(?=\s(?:&&|\|\||[|>#&])|\s\d>|\)?\s*$)", line)
            found += [(folder, command) for command in commands]
    for folder, line in found:
        # <64 digits> stands for one word.
        words = shlex.split(re.sub(r"<[^>]*>", "VALUE", line))
        words = [word for word in words[words.index("-m") + 1 :] if word != "..."]
        yield Command(("python", "-m", *words), folder, line)


@cache
def parsers(bundle: str, files: tuple[str, ...]) -> ConfigParser:
    folder = ROOT / "bundles" / bundle
    return ConfigParser(ConfigParser.load_config_files([str(folder / file) for file in files]))


def bundle_faults(command: Command) -> list[str]:
    """Configuration files and options that a ``monai.bundle`` command names and no bundle that is meant has."""
    # `parse` takes a # within a word for a comment.
    words = parse(shlex.join(command.words).replace("#", "::"))
    if words is None or words.verb != "run":
        return []
    # Overlays that the reader writes, as the guide says, lie elsewhere.
    files = tuple(file[file.index("configs/") :] for file in words.files if "configs/" in file)
    faults = []
    for bundle in [bundle for bundle in BUNDLES if bundle in f"{command.folder} {command.text}"][:1] or BUNDLES:
        missing = [file for file in files if not (ROOT / "bundles" / bundle / file).is_file()]
        faults += [f"{bundle}: {file} does not exist" for file in missing]
        if missing or not files:
            continue
        parser = parsers(bundle, files)
        faults += [f"{bundle}: {words.run_id} is not defined"] if words.run_id not in parser else []
        faults += [
            f"{bundle}: --{option} is not defined in {', '.join(files)}"
            for option in words.options
            if option not in RUNNER and not is_defined(option, parser, words.options)
        ]
    return faults


class Called(Exception):
    """Stands for the work of a tool."""


def tool_faults(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the tool says to its words before it starts to work."""
    if importlib.util.find_spec(command.module[0]) is None:
        return [f"no module {command.module[0]}"]
    calls: list[tuple[Any, Sequence[str]]] = []

    def stop(component: Callable[..., Any] | Mapping[str, Any], command: Sequence[str], name: str) -> None:
        calls.append((component, command))
        raise Called

    monkeypatch.setattr(command_line.fire, "Fire", stop)
    monkeypatch.setattr(sys, "argv", list(command.module))
    try:
        runpy.run_module(command.module[0], run_name="__main__")
    except Called:
        component, words = calls[0]
        if isinstance(component, Mapping) and words and words[0].replace("-", "_") not in component:
            return [f"{words[0]}: expected one of {', '.join(component)}"]
        return []
    except SystemExit as error:
        return [str(error.code)]
    return ["it does not start through tools.command_line"]


@pytest.mark.parametrize("document", [README, *GUIDES], ids=lambda path: path.name)
def test_commands_name_what_exists(document, monkeypatch):
    faults = {}
    commands = list(written(document))
    assert commands or "-m " not in document.read_text()
    for command in commands:
        if command.module[0] == "monai.bundle":
            found = bundle_faults(command)
        elif command.module[0].startswith("tools."):
            found = tool_faults(command, monkeypatch)
        else:
            continue
        if found:
            faults[command.text] = found
    assert faults == {}


def test_a_command_that_names_nothing_is_found(monkeypatch):
    def faults(text: str) -> list[str]:
        command = Command(tuple(shlex.split(text)), "bundles/sdseg", text)
        return bundle_faults(command) if "monai.bundle" in text else tool_faults(command, monkeypatch)

    run = "python -m monai.bundle run --config_file"
    assert faults(f"{run} configs/train.json --dataset_dir x --unet_def#num_heads 2") == []
    assert faults(f"{run} configs/train.json --epochs 2") == ["sdseg: --epochs is not defined in configs/train.json"]
    assert faults(f"{run} configs/trian.json") == ["sdseg: configs/trian.json does not exist"]
    assert "--num" in faults("python -m tools.phantoms sdseg --out x --num 3")[0]
    assert faults("python -m tools.phantoms sdsegg --out x")[0].startswith("sdsegg: expected one of cxr_ldm")
    assert faults("python -m tools.nothing x") == ["no module tools.nothing"]
