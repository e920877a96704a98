# SPDX-License-Identifier: Apache-2.0
"""Run documented commands as a user does, each in a process of its own, without the half minute of imports.

A server process imports torch and MONAI once and forks a child for each command (``multiprocessing``'s "forkserver").
The child runs ``python -m ...`` in a folder with an environment of its own, an empty ``HOME`` and no network, and ends
with the exit code that Python would have ended with.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

# What every command imports anyway. No module that is itself run with -m: runpy would warn.
PRELOADED = (
    "monai.bundle.scripts",
    "monai.engines",
    "shared.engines",
    "shared.handlers.checkpoint",
    "mlflow",
    "scipy.stats",
)


@dataclass(frozen=True)
class Finished:
    """What a command left behind.

    Attributes:
        code: exit code; negative: the signal that ended it.
        out: its standard output.
        err: its standard error.
        seconds: wall time without the imports.
        timed_out: it was still running at the limit and was killed.
        network_attempts: addresses it tried to reach.
    """

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool = False
    network_attempts: tuple[str, ...] = ()

    @property
    def last_line(self) -> str:
        """What a user reads last: of standard error, without progress bars that were overwritten."""
        lines = [line.rsplit("\r", 1)[-1] for line in self.err.splitlines()]
        return next((line for line in reversed(lines) if line.strip()), "")


class Running:
    """A command that has been started; ``wait`` for it, or ``kill`` it."""

    def __init__(self, words: tuple[str, ...], cwd: Path, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="command")
        place = Path(self._folder.name)
        (place / "home").mkdir()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(place / "home"), **environment}
        self._process = _context().Process(target=_child, args=(words, str(cwd), variables, str(place)))
        # Returns when the server has imported everything and forked; the imports do not count.
        self._process.start()
        self._start = time.monotonic()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """``kill -9`` for the command and its data loader's workers, no matter what it does."""
        assert self._process.pid is not None
        if self.running:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # has not made its own group yet
                self._process.kill()

    def wait(self, limit: float = 30) -> Finished:
        """Args: limit: seconds after which the command is killed."""
        self._process.join(max(limit - (time.monotonic() - self._start), 0))
        seconds, late = time.monotonic() - self._start, self.running
        if late:
            self.kill()
        self._process.join()
        code, place = self._process.exitcode, Path(self._folder.name)
        assert code is not None
        texts = {
            name: (place / name).read_text(errors="replace") if (place / name).exists() else ""
            for name in ("out", "err", "network")
        }
        self._process.close()
        self._folder.cleanup()
        return Finished(code, texts["out"], texts["err"], seconds, late, tuple(texts["network"].splitlines()))


def start(*words: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> Running:
    """Start ``python -m words...`` in a folder."""
    return Running(tuple(map(str, words)), cwd, environment or {})


def run(
    *words: str | Path, cwd: Path = ROOT, limit: float = 30, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run ``python -m words...`` in a folder and wait for it, at most ``limit`` seconds."""
    return start(*words, cwd=cwd, environment=environment).wait(limit)


def _context() -> ForkServerContext:
    """The context; the server itself starts with the first command, with a ``HOME`` that does not exist."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    from multiprocessing.forkserver import ensure_running

    # Some libraries read these when they are imported.
    given = {name: os.environ.get(name) for name in ("HOME", "OMP_NUM_THREADS", "PYTHONPATH")}
    os.environ.update(HOME="/nonexistent", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    try:
        ensure_running()
    finally:
        for name, value in given.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return context


def _child(words: tuple[str, ...], cwd: str, environment: dict[str, str], place: str) -> None:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # Data loaders start their workers as in any other process, not through another server.
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]
    sys.path.insert(0, cwd)
    sys.argv = ["-m", *words[1:]]
    _refuse_network(f"{place}/network")
    code = 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    # The end of a Python process, which multiprocessing would shorten.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse_network(record: str) -> None:
    """Let local (Unix) sockets through, note and refuse everything else."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:
            connect(self, address)
            return
        with open(record, "a") as file:
            print(address, file=file)
        raise OSError(f"no network, but something connects to {address!r}")

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = lambda *args, **kwargs: refuse(socket.socket(), args[:2])  # type: ignore[assignment]
