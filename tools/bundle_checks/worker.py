# SPDX-License-Identifier: Apache-2.0
"""Import and build a bundle's code: `python -m tools.bundle_checks.worker look|build REQUEST ANSWER`.

A process of its own for each bundle, so that checks do not clash, and blind for the repository's packages, so that
nothing of them stands in for what the bundle lacks. `look` reads: modules, `_target_`s, weights. `build` makes whole
workflows as a consumer would and asks MONAI for their properties; the bundle's folder is not on the path then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from tools.bundle_checks.reading import merged
from tools.bundle_checks.signatures import signature_faults

_OWN = "tools.bundle_checks"


class RepositoryBlocker(importlib.abc.MetaPathFinder):
    """Refuses the packages of this repository."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        first = fullname.split(".")[0]
        if first in ("shared", "tests", "bundles") or (first == "tools" and not f"{fullname}.".startswith(f"{_OWN}.")):
            raise ModuleNotFoundError(f"{fullname} belongs to the repository and is not part of the bundle")


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; MONAI wraps every error of an expression."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def look(request: dict[str, Any]) -> dict[str, list[str]]:
    """Faults of modules, signatures and weights."""
    folder = Path(request["folder"])
    sys.path.insert(0, str(folder))
    answer: dict[str, list[str]] = {"imports": [], "signatures": [], "strict": []}
    for path in sorted((folder / request["package"]).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            importlib.import_module(name)
        except Exception as error:
            answer["imports"].append(f"{name}: {type(error).__name__}: {error}")
    known: set[str] = set()
    for names in request["combinations"]:
        faults = signature_faults(merged([folder / f"configs/{name}.json" for name in names]))
        # Laid over one another, files repeat the faults that they have alone.
        answer["signatures"] += [f"{' + '.join(names)}: {fault}" for fault in faults if fault not in known]
        known |= set(faults)
    answer["strict"] = _strict(folder)
    return answer


def _strict(folder: Path) -> list[str]:
    """Whether `models/model.pt` is the state dict of `network_def`, no more and no less."""
    weights, config = folder / "models/model.pt", folder / "configs/inference.json"
    if not (weights.is_file() and config.is_file()):
        return []
    parser = ConfigParser(merged([config]))
    parser["bundle_root"] = str(folder)
    try:
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:
        lines = [line.strip() for line in str(root_cause(error)).splitlines() if line.strip()]
        return [f"models/model.pt: does not fit network_def of inference.json: {' '.join(lines[:2])[:300]}"]
    return []


def build(request: dict[str, Any]) -> dict[str, list[str]]:
    """Faults of workflows that were built; beside them those that need a file that is not part of the bundle."""
    folder = Path(request["folder"])
    answer: dict[str, list[str]] = {"built": [], "faults": [], "skipped": []}
    for names in request["combinations"]:
        label = " + ".join(names)
        try:
            problems = _properties(folder, names, request["dataset_dir"])
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, FileNotFoundError) and any(part in str(cause) for part in request["external"]):
                answer["skipped"].append(label)
                continue
            traceback.print_exc()
            answer["faults"].append(f"{label}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
            continue
        answer["built"].append(label)
        answer["faults"] += [f"{label}: check_properties: {problem}" for problem in problems]
    return answer


def _properties(folder: Path, names: Sequence[str], dataset_dir: str) -> list[str]:
    files = [folder / f"configs/{name}.json" for name in names]
    config = merged(files)
    overrides: dict[str, Any] = {"bundle_root": str(folder)}
    # A place such as /workspace/data; what refers to another id stays.
    if not str(config.get("dataset_dir", "")).startswith(("@", "$")):
        overrides["dataset_dir"] = dataset_dir
    small = {"num_workers": 0, "tracking_uri": "", "device": "$torch.device('cpu')"}
    if any(name.startswith("multi_gpu") for name in names):
        small.pop("device")
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    overrides |= {key: value for key, value in small.items() if key in config}
    path, hook = list(sys.path), sys.excepthook
    workflow = ConfigWorkflow(
        config_file=[str(file) for file in files],
        logging_file=str(folder / "configs/logging.conf"),
        meta_file=str(folder / "configs/metadata.json"),
        workflow_type="train" if names[0].split("_")[0] == "train" else "inference",
        **overrides,
    )
    try:
        workflow.initialize()
        return workflow.check_properties() or []
    finally:
        workflow.finalize()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        sys.path[:], sys.excepthook = path, hook


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Answer a request, from file to file: what the bundle prints must not mix with it."""
    task, request, answer = sys.argv[1:]
    sys.meta_path.insert(0, RepositoryBlocker())
    work = {"look": look, "build": build}[task]
    Path(answer).write_text(json.dumps(work(json.loads(Path(request).read_text()))))


if __name__ == "__main__":
    main()
