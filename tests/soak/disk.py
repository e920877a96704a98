# SPDX-License-Identifier: Apache-2.0
"""Full disks: a small real file system where that is permitted, else a limit on the size of files."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from shared.files import TEMPORARY_SUFFIX
from shared.handlers.checkpoint import checkpoints_in
from tests import commands
from tests.bundle_runs import curve
from tests.soak.campaign import Campaign, Case
from tests.soak.trainings import BUNDLES, LIMIT, finish, sample_data, training_command, with_earlier_weights

SIZES = 10
_MESSAGE = re.compile(r"(/\S+): the write failed after (\d+) bytes(?: of at least \d+ needed)? with (\d+) bytes free")


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: writing raises OSError (EFBIG), as Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def limited_from(name: str, size: int) -> Iterator[None]:
    """``limited_files`` from the moment at which a file of this name (``fnmatch``) is begun by ``atomic_path``."""
    make, before = tempfile.mkstemp, resource.getrlimit(resource.RLIMIT_FSIZE)

    def made(*args: Any, prefix: str = "", **kwargs: Any) -> tuple[int, str]:
        if fnmatch.fnmatch(prefix.strip("."), name):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return make(*args, prefix=prefix, **kwargs)

    tempfile.mkstemp = made  # type: ignore[assignment]
    try:
        yield
    finally:
        tempfile.mkstemp = make
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def what_a_user_reads(loaded: contextlib.AbstractContextManager[ConfigWorkflow]) -> list[str]:
    """Run a workflow in this process; the lines that its error leaves on standard error, none without an error."""
    ignored, lines = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(ignored), contextlib.redirect_stderr(ignored), loaded as workflow:
        try:
            workflow.run()
        except Exception as error:
            with contextlib.redirect_stderr(lines):
                sys.excepthook(type(error), error, error.__traceback__)
    return lines.getvalue().strip().splitlines()


def complaints(lines: list[str], root: Path) -> list[str]:
    """What is wrong with the end of a workflow on a full disk: the message, and what lies below ``root``."""
    problems = []
    match = _MESSAGE.match(lines[-1]) if lines else None
    if match is None:
        problems.append(f"expected a path, bytes and what is free in the last line, got {lines[-1:]}")
    elif root not in Path(match[1]).parents:
        problems.append(f"expected a path below {root}, got {match[1]}")
    if any(line.startswith("Traceback") for line in lines):
        problems.append("a traceback is shown")
    problems += [f"{path}: left behind" for path in root.rglob(f".*{TEMPORARY_SUFFIX}")]
    for path in root.rglob("*.pt"):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__} {error}")
    return problems


# A real file system


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system in memory at ``place``; False: not permitted, an ordinary folder is there."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        else:
            shutil.rmtree(place)


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def resize(place: Path, size: int) -> None:
    """Give a file system of ``small_disk`` another size in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def _reference(name: str, stage: str, folder: Path) -> tuple[Path, Path]:
    """Folders after the first epoch of a training, and after that was continued to the third."""
    one, three = (folder / "undisturbed" / name / f"{stage}_{epochs}" for epochs in (1, 3))
    if not three.exists():
        data, work = sample_data(name, folder), folder / "undisturbed" / name / f"{stage}_unfinished"
        shutil.rmtree(work, ignore_errors=True)
        with_earlier_weights(name, stage, folder, work)
        for epochs, place in ((1, one), (3, three)):
            finish(name, training_command(name, stage, data, work, max_epochs=epochs))
            shutil.copytree(work, place, dirs_exist_ok=True)
    return one, three


def case(folder: Path, rng: random.Random, number: int) -> Case:
    """Continue a training while there is room for a part of its next checkpoint; then with enough room."""
    name, turn = list(BUNDLES)[number % len(BUNDLES)], number // len(BUNDLES)
    stage = BUNDLES[name].trainings[turn % len(BUNDLES[name].trainings)]
    one, three = _reference(name, stage, folder)
    needed = checkpoints_in(one / f"runs/{stage}/checkpoints")[-1].stat().st_size
    room = int(needed * (turn % SIZES + rng.random()) / SIZES)
    data, root = sample_data(name, folder), folder / f"disk{number}"
    run, cwd = root / "runs" / stage, BUNDLES[name].runs.folder
    with small_disk(root) as real:
        shutil.copytree(one, root, dirs_exist_ok=True)
        words = training_command(name, stage, data, root, max_epochs=3)
        if real:
            resize(root, shutil.disk_usage(root).used + room)
            done = commands.run(*words, cwd=cwd, limit=LIMIT)
            problems = [] if done.code == 1 else [f"expected exit code 1, got {done.code}"]
            # Progress bars and MONAI's own remarks come before.
            problems += complaints(["Traceback"] * ("Traceback" in done.err) + [done.last_line], root)
            resize(root, 1 << 30)
        else:
            with limited_from("checkpoint*", room):
                runs = BUNDLES[name].runs
                options = {**runs.folders(root, stage), "max_epochs": 3}
                lines = what_a_user_reads(runs.small(stage, data, options))
            problems = complaints(lines, root)
        if not checkpoints_in(run / "checkpoints"):
            problems.append("the previous checkpoint is gone")
        done = commands.run(*words, cwd=cwd, limit=LIMIT)
        if done.code or curve(run) != curve(three / "runs" / stage):
            problems.append(f"with enough room: exit code {done.code}, {done.last_line}, or another curve")
    kind = "file system of its own" if real else "file-size limit"
    return Case(
        f"{name} {stage}, {room} of {needed} bytes, {kind}",
        survived=int(not problems),
        problems=tuple(problems),
        counts={f"with a {kind}": 1},
    )


CAMPAIGN = Campaign(
    "disk", 2, "disk full, 10 sizes for each bundle", share=0.25, target=SIZES * len(BUNDLES), case=case
)
