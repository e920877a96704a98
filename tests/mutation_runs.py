# SPDX-License-Identifier: Apache-2.0
"""Run tests of a copy of the tree, each in a fork that has torch and MONAI loaded, but nothing of ours.

``python -m tests.mutation_runs`` in the copy is the server: it reads one request a line, ``{"tests": [...], "limit":
seconds, "compiled": false}``, and answers with one line: how each test ended, and from where ``shared`` was imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Slow to import and not ours.
PRELOADED = (
    *("torch", "monai.bundle", "monai.bundle.scripts", "monai.engines", "monai.handlers", "monai.networks.nets"),
    *("monai.networks.schedulers", "monai.inferers", "monai.losses", "monai.metrics", "monai.transforms"),
    *("ignite.handlers", "nibabel", "numpy.testing", "pydicom", "PIL.Image", "scipy.stats", "scipy.ndimage"),
    *("tokenizers", "ftfy", "transformers", "safetensors.torch", "dipy.reconst.dti", "skimage.metrics"),
    *("hypothesis.strategies", "diffusers", "matplotlib.pyplot", "torchvision.models", "mlflow"),
)


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        test: node id.
        result: ``passed``, ``failed``, ``skipped`` or ``error`` (before the test itself began).
        kind: class of the exception, and those it was raised from.
        says: the statement that failed, or the message of another error; one line.
        raised_in: file of ours, relative to the root, in which the exception came up.
    """

    test: str
    result: str
    kind: tuple[str, ...] = ()
    says: str = ""
    raised_in: str = ""

    @property
    def notices(self) -> bool:
        """Failed by an assertion, an error that did not come, or a ValueError of the product; not by an accident."""
        if self.result != "failed":
            return False
        if self.kind[0] in ("AssertionError", "Failed"):
            return True
        return "ValueError" in self.kind and self.raised_in.startswith(("shared/", "tools/"))


class Server:
    """Runs tests below ``root``, which is a copy of the tree."""

    def __init__(self, root: Path) -> None:
        variables = {
            **os.environ,
            **{"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        }
        self.root = root
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation_runs"],
            cwd=root,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: Sequence[str], limit: float, *, compiled: bool = False) -> list[Outcome]:
        """Outcomes of tests in one process; an empty list where none was found or the limit passed.

        Args:
            tests: node ids.
            limit: seconds.
            compiled: keep the modules compiled, for what runs after; not while there is a fault in one of them.

        Raises:
            RuntimeError: the tests imported ``shared`` from elsewhere, or the server ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        request = {"tests": list(tests), "limit": limit, "compiled": compiled}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"tests.mutation_runs: expected an answer, but the server ended ({self._process.poll()})"
            )
        answer = json.loads(line)
        for name, place in answer["modules"].items():
            if not Path(place).is_relative_to(self.root):
                raise RuntimeError(f"{name}: expected the copy in {self.root}, but it was imported from {place}")
        return [Outcome(**{**known, "kind": tuple(known["kind"])}) for known in answer["outcomes"]]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


class _Recorder:
    """Plugin of pytest that notes how each test ended."""

    def __init__(self, root: Path) -> None:
        self.root, self.outcomes = root, {}  # type: tuple[Path, dict[str, dict[str, Any]]]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        report = (yield).get_result()
        if report.when == "call" or report.outcome != "passed":
            known = {"test": item.nodeid, "result": report.outcome, "kind": (), "says": "", "raised_in": ""}
            if call.excinfo is not None and report.outcome == "failed":
                known |= self._described(call.excinfo)
                known["result"] = "failed" if report.when == "call" else "error"
            self.outcomes.setdefault(item.nodeid, known)

    def _described(self, excinfo: Any) -> dict[str, Any]:
        error, kinds = excinfo.value, []
        chain = [error]
        while (chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 8:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        kinds = [type(link).__name__ for link in chain]
        ours = [entry for entry in excinfo.traceback if self._own(entry.path)]
        # Of an error that MONAI wrapped, the frames of the first one.
        first = chain[-1].__traceback__
        deepest = ""
        while first is not None:
            deepest = self._own(first.tb_frame.f_code.co_filename) or deepest
            first = first.tb_next
        in_tests = [entry for entry in ours if self._own(entry.path).startswith("tests/")]
        says = str(in_tests[-1].statement) if kinds[0] == "AssertionError" and in_tests else f"{kinds[0]}: {error}"
        return {"kind": kinds, "says": " ".join(says.split()), "raised_in": deepest}

    def _own(self, path: Any) -> str:
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else ""


def _serve() -> None:
    # Libraries print; answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # some are not installed everywhere; tests that need them skip
            importlib.import_module(name)
    ours = [name for name in sys.modules if name.split(".")[0] in ("shared", "tools")]
    assert not ours, f"expected nothing of the product in the server, got {ours}"
    gc.freeze()  # what is collected in every fork is what came after it
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="mutation") as folder:
            answer = _forked(request, Path(folder))
        print(json.dumps(answer), file=answers, flush=True)


def _forked(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            sys.dont_write_bytecode = not request["compiled"]
            _run_tests(request["tests"], folder)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    end = time.monotonic() + request["limit"]
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.02)
    file = folder / "answer.json"
    answer = json.loads(file.read_text()) if file.exists() else {"outcomes": [], "modules": {}}
    return {**answer, "output": (folder / "output").read_text(errors="replace")[-2000:]}


def _run_tests(tests: Sequence[str], folder: Path) -> None:
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    root = Path.cwd()
    recorder = _Recorder(root)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", f"--basetemp={folder / 'tests'}"]
    # Plugins of pytest that a preloaded library brought along.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([*options, *tests], plugins=[recorder])
    places = {name: str(getattr(sys.modules.get(name), "__file__", root)) for name in ("shared", "tools", "tests")}
    answer = {"outcomes": list(recorder.outcomes.values()), "modules": places}
    (folder / "part").write_text(json.dumps(answer))
    (folder / "part").rename(folder / "answer.json")


if __name__ == "__main__":
    _serve()
