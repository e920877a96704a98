# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ignite.engine import Events
from torch import nn

from shared.handlers.manifest import RunManifest
from shared.run_folder import claim_folder, release_folder
from tests.conftest import ROOT
from tests.test_handlers import make_trainer

OTHER = """
import sys
from shared.run_folder import claim_folder, release_folder
claim_folder(sys.argv[1])
print("claimed", flush=True)
sys.stdin.readline()
release_folder(sys.argv[1])
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in the folder until it reads a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    with process:
        yield process
        process.kill()


def test_folder_of_another_training_is_refused(other, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected a folder in .* but process {other.pid} on .* trains"):
        claim_folder(tmp_path)
    claim_folder(tmp_path / "elsewhere")
    release_folder(tmp_path / "elsewhere")


def test_folder_is_free_after_a_training(other, tmp_path):
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "released\n"
    claim_folder(tmp_path)
    claim_folder(tmp_path)
    release_folder(tmp_path)


def test_folder_of_a_killed_training_is_free(other, tmp_path):
    other.kill()
    other.wait()
    claim_folder(tmp_path)
    release_folder(tmp_path)


def manifest(folder: Path) -> RunManifest:
    return RunManifest(folder, task="test")


def test_training_says_so_before_it_writes(other, tmp_path):
    trainer, *_ = make_trainer([manifest(tmp_path)], nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected a folder in which no other training writes"):
        trainer.run()
    assert [path.name for path in tmp_path.iterdir()] == [".training"]


def test_training_holds_its_folder_and_lets_go(tmp_path):
    seen = []
    trainer, *_ = make_trainer([manifest(tmp_path)], nn.Linear(2, 2), epochs=1)
    check = "import sys; from shared.run_folder import claim_folder; claim_folder(sys.argv[1])"

    def ask() -> None:
        done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        seen.append(done.stderr.strip().split("\n")[-1])

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), ask)
    trainer.run()
    ask()
    assert seen[0].startswith(f"ValueError: {tmp_path}: expected a folder in which no other training writes")
    assert seen[1] == ""
