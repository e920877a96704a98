# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.check_bundle DIR`: one line per check of an exported bundle; exit code 1 if one fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.bundle_checks import code, configs, files, metadata, readme, requirements, weights, workflows
from tools.bundle_checks.bundle import Bundle, open_bundle
from tools.command_line import run

# What is found by reading files; nothing of the bundle runs.
READING: dict[str, Callable[[Bundle], list[str]]] = {
    "manifest": files.manifest_faults,
    "no links, safe zip": files.link_faults,
    "required files": files.required_faults,
    "sizes of files": files.large_file_faults,
    "text": files.text_faults,
    "licence text": readme.licence_faults,
    "name": metadata.name_faults,
    "metadata: schema": metadata.schema_faults,
    "metadata: versions": metadata.version_faults,
    "metadata: entries": metadata.content_faults,
    "pins": requirements.pin_faults,
    "packages": requirements.missing_pins,
    "JSON format": configs.format_faults,
    "logging.conf": configs.logging_faults,
    "ids": configs.id_faults,
    "references": configs.reference_faults,
    "paths and addresses": configs.place_faults,
    "expressions": configs.expression_and_consumer_faults,
    "own components": configs.own_component_faults,
    "code": code.code_faults,
    "README: sections": readme.section_faults,
    "README: commands": readme.command_faults,
    "combinations": workflows.combination_faults,
    "weights: places": weights.place_faults,
    "weights: tensors": weights.tensor_faults,
}
LOOKING = {"imports": "imports", "signatures": "targets and arguments", "strict": "weights: fit network_def"}


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        name: of the check.
        faults: what is wrong; empty: passed.
        note: what a reader should know of a check that passed.
    """

    name: str
    faults: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        if not self.faults:
            return f"pass  {self.name}" + (f" ({self.note})" if self.note else "")
        return f"FAIL  {self.name}: " + "\n      ".join(self.faults)


def checked(bundle: Bundle, *, fast: bool = False) -> Iterator[Result]:
    """Results of all checks, each as soon as it is there.

    Args:
        bundle: what `tools.bundle_checks.bundle.open_bundle` gave.
        fast: build no workflow and run no command of MONAI.
    """
    for name, check in READING.items():
        note = ""
        if name == "packages":
            optional = requirements.optional_packages(bundle)
            note = f"without a pin, for functions alone: {', '.join(optional)}" if optional else ""
        yield Result(name, tuple(check(bundle)), note)
    if "configs/inference.json" not in bundle.files:
        return  # a fault above, and nothing to build
    answer = workflows.look(bundle)
    if "worker" in answer:
        yield Result("imports", tuple(answer["worker"]))
        return
    for key, name in LOOKING.items():
        yield Result(name, tuple(answer[key]))
    if fast:
        return
    faults, note = workflows.build(bundle)
    yield Result("workflows and their properties", tuple(faults), note)
    for command in ("verify_metadata", "verify_net_in_out"):
        faults, note = workflows.monai_faults(bundle, command)
        yield Result(f"monai.bundle {command}", tuple(faults), note)


def check_bundle(path: str, *, fast: bool = False) -> None:
    """Check the folder or the zip of an exported bundle, of this repository or of another.

    Args:
        path: folder (`DIST/sdseg`) or zip (`DIST/sdseg_v0.1.0.zip`).
        fast: build no workflow and run no command of MONAI: seconds instead of minutes.
    """
    start, failed, number = time.monotonic(), 0, 0
    with open_bundle(Path(str(path))) as bundle:
        for result in checked(bundle, fast=fast):
            print(result, flush=True)
            number += 1
            failed += bool(result.faults)
        print(f"{bundle.name}: {number - failed} of {number} checks passed in {time.monotonic() - start:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(check_bundle, name="tools.check_bundle")
