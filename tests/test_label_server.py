# SPDX-License-Identifier: Apache-2.0
"""The real MONAI Label server with the four exported bundles; skipped where its environment (`make label`) is absent.

`LABEL_PYTHON` names another one's interpreter. All requests come from processes of their own: tests have no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.exports import TASKS, exported
from tools.phantoms.brain_controlnet import make_dataset as make_brains
from tools.phantoms.dmri2noddi import make_dataset as make_series
from tools.phantoms.sdseg import make_dataset as make_pictures
from tools.phantoms.sdseg_abdomen import make_dataset as make_abdomens

PYTHON = os.environ.get("LABEL_PYTHON", str(ROOT / ".label/bin/python"))

pytestmark = [
    pytest.mark.skipif(not shutil.which(PYTHON), reason=f"no MONAI Label at {PYTHON}: make label, or set LABEL_PYTHON"),
    # Starts, and `monai.bundle run` for every request of the comparison.
    pytest.mark.timeout(3000),
]


def serve_label(*words: str, timeout: float = 2400) -> subprocess.CompletedProcess[str]:
    """The tool in MONAI Label's environment, where this project is not installed."""
    command = [PYTHON, "-m", "tools.serve_label", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A started server; ends with the test."""

    def __init__(self, out: Path, *options: str) -> None:
        port = free_port()
        self.url, self.out, self.log = f"http://127.0.0.1:{port}", out, out / "server.log"
        with self.log.open("w") as log:
            command = [PYTHON, "-m", "tools.serve_label", "start", str(out), "--port", str(port), *options]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        # In a process of its own, as tests have no network.
        waiting = f"from tools.label_requests import wait_until_ready; wait_until_ready({self.url!r}, timeout=300)"
        done = subprocess.run([PYTHON, "-c", waiting], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            self.stop()
            pytest.fail(f"the server did not start: {done.stderr[-500:]}\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, model: str, image: str, params: str = "") -> subprocess.CompletedProcess[str]:
        out = str(self.out / "answers")
        return serve_label("ask", self.url, model, "--image", image, "--params", params, "--out", out)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_pictures(str(folder / "pictures"), num_images=24, size=(200, 152))
    make_abdomens(str(folder / "abdomens"), num_volumes=1, size=(52, 44, 9))
    make_brains(str(folder / "brains"), n=3, size=(44, 60, 5), spacing=3.5)
    make_series(str(folder / "series"), num_subjects=3, shape=(36, 40, 32))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, data) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("served")
    bundles = ",".join(str(exported(task)) for task in TASKS)
    only = "*/images/*,*/img/*,*_FLAIR*,*/dwi*"
    studies = ",".join(str(folder) for folder in sorted(data.iterdir()))
    done = serve_label("prepare", bundles, str(out), "--studies", studies, "--only", only)
    assert done.returncode == 0, done.stderr
    running = Server(out)
    yield running
    running.stop()


def test_answers_are_repeatable_equal_a_run_and_wrong_options_are_named(server):
    """Every case and every refusal of `tools.label_check`, whose faults end in exit code 1."""
    done = serve_label("check", server.url, str(server.out), "--pythons", f"{PYTHON},{sys.executable}",
                       "--out", str(server.out / "answers"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for task in TASKS:
        assert f"| {task} |" in done.stdout


def test_options_change_the_answer_and_only_this_one(server):
    def sha256(params: str) -> str:
        done = server.ask("sdseg", "g0001_1", params)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("sha256: "))

    first = sha256("")
    assert sha256('{"seed": 5}') != first
    assert sha256("") == first


def test_client_code_is_not_run(server, tmp_path):
    spy = tmp_path / "spy"
    code = f"$__import__('pathlib').Path({str(spy)!r}).touch()"
    for model, image in (("sdseg", "g0001_1"), ("brain_controlnet", "sub-001_FLAIR"), ("cxr_ldm", "none")):
        done = server.ask(model, image, json.dumps({"seed": code}))
        assert done.returncode == 1
        assert "seed: expected" in done.stderr
        assert not spy.exists(), model


def test_sdseg_trains_on_masks_of_the_studies(tmp_path, data):
    out = tmp_path / "served"
    pictures = data / "pictures"
    done = serve_label("prepare", str(exported("sdseg")), str(out), "--studies", str(pictures), "--only", "*/images/*",
                       "--labels", "training", "--training", '{"learning_rate": 0.0001, "flips": "none"}')  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = out / "app/model/sdseg/models/model.pt"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    server = Server(out, "--train")
    try:
        done = serve_label("train", server.url, "--params", '{"max_epochs": 1, "val_split": 0.3}')
        assert done.returncode == 0, done.stderr
        assert hashlib.sha256(weights.read_bytes()).hexdigest() != before
        items = json.loads((pictures / "datalist.json").read_text())["test"]
        overlaps = []
        for item in items:
            name = Path(item["image"]).stem
            assert server.ask("sdseg", name).returncode == 0
            mask = np.asarray(Image.open(out / f"answers/sdseg_{name}.png")) > 0
            truth = np.asarray(Image.open(pictures / item["label"])) > 0
            overlaps.append(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1))
        # Random weights give a Dice of about 0.1.
        assert np.mean(overlaps) > 0.8
        # The latest training of the next one begins with these weights; nothing to compare with is named.
        done = serve_label("train", server.url, "--params", '{"max_epochs": 1, "val_split": 0}')
        assert done.returncode == 1
        assert "validate#dataset#data: expected at least one image" in done.stderr
    finally:
        server.stop()
