# SPDX-License-Identifier: Apache-2.0
"""Results of benchmarks in files: a JSON file, Markdown beside it, the table of the README."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shared.files import atomic_path, save_json
from shared.provenance import git_commit, software_versions
from tools.benchmarks.markdown import markdown, performance_table
from tools.benchmarks.measuring import Measurement

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def processor() -> str:
    """Model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # Only Linux has the file.
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe_run(*, device: torch.device, size: str, command: str) -> dict[str, Any]:
    """What all rows of a run share: date, commit, command, size, versions, device, CPU and threads."""
    versions = software_versions()
    # An optional extra: without it the ways that need it are left out, and say so.
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["diffusers"] = metadata.version("diffusers")
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(Path(__file__).parent),
        "command": command,
        "size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def row_of(measurement: Measurement, *, bundle: str, kind: str, builder: str) -> dict[str, Any]:
    """A measurement as JSON, and where it belongs."""
    content = dataclasses.asdict(measurement)
    work = content.pop("workload")
    return {
        **{"bundle": bundle, "kind": str(kind), "work": work, "builder": builder},
        **{**content, "ways": list(content["ways"]), "reached": measurement.reached},
    }


class Results:
    """Rows and failures of one or several runs, kept in a JSON file and a Markdown file beside it.

    Args:
        stem: path of both files without their suffixes.
        update: keep what the JSON file holds and replace the rows that are measured again.

    Raises:
        ValueError: when the JSON file exists and ``update`` is false; the message starts with the file.
    """

    def __init__(self, stem: str | Path, *, update: bool = False) -> None:
        stem = Path(stem)
        self.json, self.markdown = (stem.with_name(stem.name + suffix) for suffix in (".json", ".md"))
        self.content: dict[str, list[dict[str, Any]]] = {"runs": [], "rows": [], "failed": []}
        if self.json.exists():
            if not update:
                raise ValueError(
                    f"{self.json}: expected a new file, got one that exists; "
                    "replace only the rows that are measured again with --update, or choose another --out."
                )
            self.content = load(self.json)

    def add(self, run: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Take a row of :func:`row_of` in, in place of one with the same bundle, kind and work, and save."""
        self._put("rows", ("bundle", "kind", "work"), run, row)
        self._drop("failed", ("bundle", "kind", "builder"), row)
        self.save()

    def fail(self, run: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Take a failure in (bundle, kind, builder, error), and save; an earlier result of the work stays."""
        self._put("failed", ("bundle", "kind", "builder"), run, row)
        self.save()

    def save(self) -> None:
        """Write both files; runs to which nothing belongs any more are forgotten."""
        used = sorted({row["run"] for row in self._all()})
        number = {old: new for new, old in enumerate(used)}
        self.content["runs"] = [self.content["runs"][old] for old in used]
        for row in self._all():
            row["run"] = number[row["run"]]
        save_json(self.content, self.json)
        with atomic_path(self.markdown) as part:
            part.write_text(markdown(self.content, title=self.markdown.stem), encoding="utf-8")

    def _all(self) -> Iterator[dict[str, Any]]:
        yield from (*self.content["rows"], *self.content["failed"])

    def _drop(self, section: str, names: Sequence[str], row: Mapping[str, Any]) -> int | None:
        key = [row[name] for name in names]
        for place, other in enumerate(self.content[section]):
            if [other[name] for name in names] == key:
                del self.content[section][place]
                return place
        return None

    def _put(self, section: str, names: Sequence[str], run: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        if run not in self.content["runs"]:
            self.content["runs"].append(dict(run))
        place = self._drop(section, names, row)
        rows = self.content[section]
        rows.insert(len(rows) if place is None else place, {**row, "run": self.content["runs"].index(dict(run))})


def load(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Results from their JSON file.

    Raises:
        ValueError: when the file holds something else; the message starts with its name.
        FileNotFoundError: when there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file of python -m tools.benchmark, but there is none.")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) != {"runs", "rows", "failed"}:
        raise ValueError(f"{path}: expected a JSON file of python -m tools.benchmark with runs, rows and failed.")
    return content


def split_at_markers(readme: str | Path) -> tuple[str, str]:
    """What stands before and after the table's place in a Markdown file.

    Raises:
        ValueError: when the marker lines are not there exactly once, in order; the message starts with the file.
        FileNotFoundError: when there is no such file.
    """
    readme = Path(readme)
    if not readme.is_file():
        raise FileNotFoundError(f"{readme}: expected a Markdown file for the performance table, but there is none.")
    text = readme.read_text(encoding="utf-8")
    counts = text.count(BEGIN), text.count(END)
    if counts != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{readme}: expected one line {BEGIN} and below it one line {END}, got {counts[0]} and {counts[1]}; "
            "put both where the table belongs."
        )
    return text.partition(BEGIN)[0], text.partition(END)[2]


def write_table(readme: str | Path, results: str | Path) -> None:
    """Put the performance table of a JSON file between the two marker lines of a Markdown file.

    Args:
        readme: the file to change; see :func:`split_at_markers`.
        results: the JSON file; the table links to the Markdown file beside it.

    Raises:
        ValueError: when either file is not what it should be; the message starts with its name.
        FileNotFoundError: when either is missing.
    """
    readme, results = Path(readme), Path(results)
    before, after = split_at_markers(readme)
    details = Path(os.path.relpath(results.with_suffix(".md"), readme.parent)).as_posix()
    table = performance_table(load(results), details=details)
    with atomic_path(readme) as part:
        part.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
