# SPDX-License-Identifier: Apache-2.0
"""Every test runs without network and with the same few threads everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported: one thread makes sums bit-equal from run to run on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import torch

from tests.reliability import as_json, tallies

ROOT = Path(__file__).resolve().parent.parent
HANDBOOK = ROOT.parent / "shared"


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class NetworkUseError(RuntimeError):
    """A test tried to reach the network."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let local (Unix) sockets through, which data loader workers use, and refuse every other connection."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:
            connect(self, address)
            return
        raise NetworkUseError(f"tests run without network, but one connected to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse(socket.socket(), args[:2]))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# The figures of the reliability tests (tests/reliability.py)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write the figures of the reliability tests to a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reliability(row): belongs to this row of tests/reliability.py")
    config.addinivalue_line("markers", "soak: slow; runs only where asked for with -m soak, as `make soak` does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless an expression of markers names them."""
    if "soak" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("soak")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("reliability"):
        item.user_properties.append(("reliability", marker.args[0]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [
        report for kind in ("passed", "failed", "skipped", "error") for report in terminalreporter.getreports(kind)
    ]
    rows = tallies(reports)
    if rows:
        terminalreporter.section("reliability")
        for row in rows:
            terminalreporter.line(str(row))
    if path := config.getoption("--reliability"):
        Path(path).write_text(json.dumps(as_json(rows), indent=2) + "\n")
