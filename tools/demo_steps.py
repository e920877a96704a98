# SPDX-License-Identifier: Apache-2.0
"""Steps of a demo: commands, shown as a person would type them, run once and not repeated when finished."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.files import save_json, sha256_of_file
from shared.provenance import sha256_of_json

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD = "steps.json"


@dataclass(frozen=True)
class Step:
    """One command of a demo.

    Attributes:
        title: what it does, unique within a demo.
        words: what follows ``python -m``.
        makes: the folder that it writes; ``None``: it is run every time.
        reads: files on whose content the result depends; when one has changed, the step is made anew.
        folder: where it runs.
        resumes: given again after an interruption, the command goes on by itself.
    """

    title: str
    words: tuple[str, ...]
    makes: Path | None = None
    reads: tuple[Path, ...] = ()
    folder: Path = REPOSITORY
    resumes: bool = False

    def fingerprint(self) -> str:
        """Digest of the command and of what it reads now."""
        return sha256_of_json([self.words, [sha256_of_file(path) if path.is_file() else None for path in self.reads]])

    def shown(self) -> str:
        """The command line, to be pasted into a shell in the current folder; the parentheses keep that folder."""
        # Beside a virtual environment that is not activated, "python" is another one.
        python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
        line = " ".join([python, "-m", *(_quoted(word) for word in self.words)])
        folder = os.path.relpath(self.folder)
        return line if folder == "." else f"(cd {shlex.quote(folder)} && {line})"


def bundle_step(
    title: str,
    folder: Path,
    run_id: str,
    configs: Sequence[str],
    options: Mapping[str, object],
    *,
    reads: Sequence[Path] = (),
) -> Step:
    """A command of a bundle with its small networks.

    Args:
        title: see ``Step``.
        folder: the bundle's folder, in which the command runs.
        run_id: ``run``, or ``training``, which goes on after an interruption.
        configs: names of the configs; ``tiny`` is added as the last one.
        options: ids to override; ``output_dir`` is the folder that the step makes.
        reads: see ``Step``; the configs are added.
    """
    names = [f"configs/{name}.json" for name in (*configs, "tiny")]
    files = ",".join(f"'{name}'" for name in names)
    return Step(
        title,
        ("monai.bundle", "run", run_id, f"--config_file=[{files}]", *(f"--{k}={v}" for k, v in options.items())),
        makes=Path(str(options["output_dir"])),
        reads=(*(folder / name for name in names), *reads),
        folder=folder,
        resumes=run_id == "training",
    )


def run_steps(steps: Sequence[Step], *, name: str, root: Path, threads: int = 0) -> None:
    """Run what is not finished, one after the other.

    ``ROOT/steps.json`` records what was begun and finished. A step is made anew, after its folder was removed, when its
    command or a file that it reads has changed since, or when it was interrupted and does not resume.

    Args:
        steps: in this order.
        name: of the demo, in front of the titles.
        root: folder of the record.
        threads: CPU threads of the commands, 0 for all cores.

    Raises:
        SystemExit: a command failed, whose own last line says why.
        ValueError: the record is damaged, or a folder to be made is there but not in the record, so that it may be
            anybody's; the message starts with the path.
    """
    record = _read_record(root / RECORD)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
    for number, step in enumerate(steps, start=1):
        heading = f"{name}, step {number} of {len(steps)}: {step.title}"
        before, now = record.get(step.title, {}), step.fingerprint()
        is_same = before.get("fingerprint") == now
        if step.makes is not None:
            if is_same and before.get("finished") and step.makes.exists():
                print(f"\n=== {heading}: was finished before", flush=True)
                continue
            if not before and step.makes.exists():
                raise ValueError(
                    f"{step.makes}: expected no such folder, as the demo makes and removes it, found one that is not "
                    f"in {root / RECORD}; move it away or choose another --out"
                )
            if step.makes.exists() and not (is_same and step.resumes):
                shutil.rmtree(step.makes)
            record[step.title] = {"fingerprint": now, "finished": False}
            save_json(record, root / RECORD)
        _run(step, heading, environment)
        if step.makes is not None:
            record[step.title]["finished"] = True
            save_json(record, root / RECORD)


def _run(step: Step, heading: str, environment: dict[str, str]) -> None:
    print(f"\n=== {heading}\n$ {step.shown()}", flush=True)
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-m", *step.words], cwd=step.folder, env=environment)
    if result.returncode != 0:
        raise SystemExit(
            f"{heading}: the command above ended with exit code {result.returncode}; its last line says why."
        )
    print(f"=== {heading}: {time.monotonic() - started:.0f} s", flush=True)


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error}); delete it") from error
    if not isinstance(record, dict) or not all(isinstance(entry, dict) for entry in record.values()):
        raise ValueError(f"{path}: expected an object with an object per step, got something else; delete it")
    return record


def _quoted(word: str) -> str:
    """A word as a person would type it: lists of files hold single quotes, so double ones go around."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
