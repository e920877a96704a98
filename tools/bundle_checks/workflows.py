# SPDX-License-Identifier: Apache-2.0
"""What can only be seen with the bundle's code: in processes of their own, on a copy, without this repository."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from tools.bundle_checks.bundle import MANIFEST, PUBLISHED, Bundle, is_training
from tools.bundle_checks.commands import combinations
from tools.bundle_checks.configs import wiring_faults
from tools.bundle_checks.fake_data import MAKERS, complete_stages, make_data
from tools.bundle_checks.metadata import SCHEMA
from tools.bundle_checks.reading import ENTRIES, merged, read_json, unreachable_references

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1200
# The Model Zoo exempts generative bundles from `verify_net_in_out`; these two state it in their card.
EXEMPT = ("cxr_ldm", "brain_controlnet")
# Pretrained files of others, which no bundle ships.
EXTERNAL = ("/pretrained/", "/text_encoder")
_PROPERTIES = ("network_def", "inferer", "evaluator", "dataset", "train#trainer", "validate#evaluator")


def combination_faults(bundle: Bundle) -> list[str]:
    """Combinations of files that do not parse, or need an id that none of them defines."""
    faults = []
    for names in combinations(bundle):
        label = " + ".join(names)
        try:
            config = merged([bundle.path(name) for name in names])
            ConfigParser(config).parse()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            faults.append(f"{label}: {type(error).__name__}: {error}")
            continue
        if len(names) > 1:  # alone: another check
            found = unreachable_references(config, (*ENTRIES, *_PROPERTIES))
            found += wiring_faults(config, training=is_training(names[0]))
            faults += [f"{label}: {fault}" for fault in found]
    return faults


def look(bundle: Bundle) -> dict[str, list[str]]:
    """Faults of the worker's `look`: `imports`, `signatures` and `strict`."""
    request = {"package": bundle.package, "combinations": combinations(bundle) if not bundle.unreadable else []}
    with copied(bundle) as copy:
        answer = _ask("look", copy, request)
    return {"imports": [], "signatures": [], "strict": [], **answer}


def build(bundle: Bundle) -> tuple[list[str], str]:
    """Build every workflow that fits the bundle's weights, on made data.

    Returns:
        Faults, and what was built and what was not.
    """
    if bundle.name not in MAKERS:
        return [], f"skipped: there is no made data for {bundle.name}"
    small = (
        read_json(bundle.folder / MANIFEST).get("build") == "demo" if (bundle.folder / MANIFEST).is_file() else False
    )
    chosen = [
        names
        for names in combinations(bundle)
        if not names[0].startswith(PUBLISHED) and (small or "tiny" in names) and "directions" not in names
    ]
    with copied(bundle) as copy:
        for models in (copy / "models", copy / "models/tiny"):
            complete_stages(bundle.name, models)
        data = copy.parent / "data"
        make_data(bundle.name, data)
        request = {"combinations": chosen, "dataset_dir": str(data), "external": EXTERNAL}
        answer = _ask("build", copy, request)
    faults = answer.get("faults", answer.get("worker", []))
    skipped = answer.get("skipped", [])
    note = f"{len(answer.get('built', []))} built"
    return faults, note + (f"; need pretrained files that are not shipped: {', '.join(skipped)}" if skipped else "")


def monai_faults(bundle: Bundle, command: str) -> tuple[list[str], str]:
    """Run `monai.bundle verify_metadata` or `verify_net_in_out` in the bundle's folder.

    Returns:
        Faults, and why the command was left out.
    """
    if command == "verify_net_in_out" and bundle.name in EXEMPT:
        return [], "skipped: the Model Zoo exempts generative bundles"
    words = [command, "--meta_file", "configs/metadata.json"]
    if command == "verify_metadata":
        words += ["--filepath", "eval/schema.json"]
    else:
        words += ["--net_id", "network_def", "--config_file", "configs/inference.json"]
    with copied(bundle) as copy:
        (copy / "eval").mkdir(exist_ok=True)
        # Where it is, MONAI does not download it.
        shutil.copy(SCHEMA, copy / "eval/schema.json")
        done = _run(["-m", "monai.bundle", *words], cwd=copy)
    return ([f"monai.bundle {command}: {_last_line(done)}"] if done.returncode else []), ""


@contextlib.contextmanager
def copied(bundle: Bundle) -> Iterator[Path]:
    """A copy of the bundle in a temporary folder, under its own name: trials leave nothing in the original."""
    with tempfile.TemporaryDirectory(prefix="check_bundle_") as folder:
        copy = Path(folder) / bundle.name
        shutil.copytree(bundle.folder, copy, symlinks=True)
        yield copy


def _ask(task: str, copy: Path, request: dict[str, Any]) -> dict[str, list[str]]:
    question, answer = copy.parent / "request.json", copy.parent / "answer.json"
    question.write_text(json.dumps({"folder": str(copy), **request}))
    words = ["-m", "tools.bundle_checks.worker", task, str(question), str(answer)]
    done = _run(words, cwd=copy.parent, PYTHONPATH=str(ROOT))
    if done.returncode or not answer.is_file():
        return {"worker": [f"the process that imports the bundle failed ({done.returncode}): {_last_line(done)}"]}
    return json.loads(answer.read_text())


def _run(words: list[str], *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", **variables}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a user reads first: the error, else the last line."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception|Exit)\b", line)]
    return [*lines, *errors][-1][:300] if lines else "no message"
