# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import commands


@pytest.fixture
def module(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "task.py").write_text(textwrap.dedent(text))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("text", "code", "out", "last"),
    [
        ("print('fine')", 0, "fine\n", ""),
        ("import sys\nsys.exit('file.png: broken')", 1, "", "file.png: broken"),
        ("import sys\nsys.exit(3)", 3, "", ""),
        ("raise ValueError('no')", 1, "", "ValueError: no"),
        ("import atexit\natexit.register(print, 'late')", 0, "late\n", ""),
        ("import sys\nprint('10%\\r20%\\rmessage', file=sys.stderr)", 0, "", "message"),
    ],
)
def test_ends_as_python_would(text, code, out, last, module):
    done = commands.run("task", cwd=module(text))
    assert (done.code, done.out, done.last_line, done.timed_out) == (code, out, last, False)


def test_words_folder_environment_and_empty_home(module):
    text = "import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['COLOUR'], os.listdir(os.environ['HOME']))"
    folder = module(text)
    done = commands.run("task", "--a", folder, cwd=folder, environment={"COLOUR": "blue"})
    assert done.out == f"['--a', '{folder}'] {folder} blue []\n"


def test_what_is_imported_is_not_imported_again(module):
    text = "import sys\nprint('torch' in sys.modules, 'monai.bundle.scripts' in sys.modules)"
    assert commands.run("task", cwd=module(text)).out == "True True\n"


def test_network_is_refused_and_noted(module):
    done = commands.run("task", cwd=module("import socket\nsocket.create_connection(('example.org', 80))"))
    assert done.code == 1
    assert done.network_attempts == ("('example.org', 80)",)


def test_a_command_that_hangs_is_killed_with_its_workers(module):
    text = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
    """
    done = commands.run("task", cwd=module(text), limit=3)
    assert done.timed_out
    assert done.code == -9
    assert 3 <= done.seconds < 20
    # A killed process may wait as a zombie for whoever collects it.
    status = Path(f"/proc/{int(done.out)}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker is still alive")


def test_kill_from_outside(module):
    running = commands.start("task", cwd=module("import time\ntime.sleep(60)"))
    assert running.running
    running.kill()
    assert running.wait().code == -9


def test_the_tests_themselves_keep_their_modules(module):
    commands.run("task", cwd=module("raise SystemExit"))
    assert "task" not in sys.modules
