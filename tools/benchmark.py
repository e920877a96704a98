# SPDX-License-Identifier: Apache-2.0
"""How fast the bundles are beside what users run today: ``python -m tools.benchmark [bundle|all|scaling]``.

Each work is done in several ways in one run, in turns: the published loop or MONAI's defaults first, the bundle's way
last. See :mod:`tools.benchmarks.workload`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from tools import command_line
from tools.benchmarks.markdown import target_text, way_line
from tools.benchmarks.measuring import measure, old_objects_aside
from tools.benchmarks.report import Results, describe_run, row_of, split_at_markers, write_table
from tools.benchmarks.workload import Builder, Catalogue, Kind, Setting, Size

TOPICS = ("cxr_ldm", "brain_controlnet", "sdseg", "dmri2noddi", "scaling")


def catalogue_of(topic: str) -> Catalogue:
    """Workloads of a module of ``tools.benchmarks``.

    Raises:
        ValueError: when there is no such module, or it offers none; the message starts with ``topic``.
    """
    name = f"tools.benchmarks.{topic}"
    try:
        workloads = getattr(importlib.import_module(name), "WORKLOADS", None)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        workloads = None
    if workloads is None:
        raise ValueError(f"{topic}: expected one of {', '.join(TOPICS)} or all, but {name} offers no WORKLOADS.")
    return workloads


def kinds_of(what: str | Sequence[str]) -> list[Kind]:
    """Kinds from a word, several, or words with commas between; "all" is every kind.

    Raises:
        ValueError: for another word; the message starts with ``what``.
    """
    words = what.split(",") if isinstance(what, str) else [str(word) for word in what]
    if words == ["all"]:
        return list(Kind)
    unknown = sorted(set(words) - set(Kind))
    if unknown:
        raise ValueError(f"what: expected all or some of {', '.join(Kind)}, got {', '.join(unknown)}.")
    return [Kind(word) for word in words]


def builders(topic: str, kinds: Sequence[Kind], only: str = "") -> Iterator[tuple[Kind, Builder]]:
    """Functions that build the workloads of a module, those whose name contains ``only``."""
    workloads = catalogue_of(topic)
    for kind in kinds:
        for builder in workloads.get(kind, ()):
            if only in name_of(builder):
                yield kind, builder


def name_of(builder: Builder) -> str:
    """Name of the function, also when arguments were bound to it."""
    return str(getattr(getattr(builder, "func", builder), "__name__", builder))


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: when torch does not know or find it; the message starts with ``device``.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected cpu, or cuda where torch finds a GPU, got {name}.")
    return torch.device(name)


def use_threads(threads: int) -> None:
    """Let torch compute with this many threads.

    Raises:
        ValueError: below 1; the message starts with ``threads``.
    """
    if threads < 1:
        raise ValueError(f"threads: expected 1 or more, got {threads}.")
    torch.set_num_threads(threads)
    # Only possible before the first parallel work of the process; none of the workloads runs operators side by side.
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(threads)


def stem_of(out: str) -> Path:
    """Where the two result files go, without suffix: ``out``, or in it ``<date>_benchmark`` when it is a folder."""
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        return path / f"{date.today().isoformat()}_benchmark"
    return path.with_suffix("") if path.suffix in (".json", ".md") else path


def command_words() -> str:
    """The command line of this process, to be pasted into a shell."""
    variables = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    return " ".join([*variables, "python -m tools.benchmark", *(shlex.quote(word) for word in sys.argv[1:])])


def benchmark(
    bundle: str = "all",
    *,
    what: str | Sequence[str] = "all",
    only: str = "",
    device: str = "cpu",
    quick: bool | None = None,
    tiny: bool = False,
    threads: int = 1,
    repeats: int | None = None,
    out: str = "",
    update: bool = False,
    results: str = "",
    readme: str = "",
) -> None:
    """Measure workloads and write their tables; exit code 1 if one could not be measured.

    Args:
        bundle: name of a bundle, or scaling, or all.
        what: all, or some of train, sample, metric, data, memory, scaling with commas between.
        only: part of a name: run only the workloads whose building function has it.
        device: cpu or cuda.
        quick: sizes for ten minutes on a CPU, the default there; --quick False: as published, the default on a GPU.
        tiny: a second per workload, to see that everything runs; the figures say nothing.
        threads: of torch. numpy follows OMP_NUM_THREADS.
        repeats: how often each way is timed; by default what the workload asks for, 5 as a rule.
        out: path of the results without suffix (.json and .md are written), or a folder; "" prints alone.
        update: keep what the JSON file holds and replace the rows that are measured again.
        results: JSON file of earlier runs: measure nothing, write its table into --readme.
        readme: Markdown file whose performance table is replaced, between its two marker lines.

    Raises:
        ValueError: for a wrong option; the message starts with its name, or that of the file.
    """
    if results:
        if not readme:
            raise ValueError("readme: expected a Markdown file to write the table of --results into, got none.")
        write_table(readme, results)
        return
    if readme:
        # Nobody wants to learn after an hour that a line is missing.
        split_at_markers(readme)
        if not out:
            raise ValueError("out: expected a path for the results, since the table of --readme links to them.")
    kinds, place = kinds_of(what), device_of(device)
    topics = TOPICS if bundle == "all" else (bundle,)
    use_threads(threads)
    quick = place.type == "cpu" if quick is None else quick
    setting = Setting(device=place, size=Size.TINY if tiny else Size.QUICK if quick else Size.FULL)
    kept = Results(stem_of(out), update=update) if out else None
    run = describe_run(device=place, size=str(setting.size), command=command_words())
    print(f"{run['cpu'] if place.type == 'cpu' else run['device']}, {threads} thread(s), {setting.size} size")
    failed: list[str] = []
    missed: list[str] = []
    count, start = 0, time.monotonic()
    for topic in topics:
        # One bundle's workloads must not be lost to another's, whatever goes wrong in it.
        try:
            chosen = list(builders(topic, kinds, only))
        except Exception as error:
            if bundle != "all":
                raise
            traceback.print_exc()
            failed.append(f"{topic}: {error}")
            continue
        for kind, builder in chosen:
            count += 1
            where = {"bundle": topic, "kind": str(kind), "builder": name_of(builder)}
            began = time.monotonic()
            try:
                with old_objects_aside():
                    row = row_of(measure(builder(setting), device=place, repeats=repeats), **where)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{topic} {kind}, {where['builder']}: {type(error).__name__}: {error}")
                if kept:
                    kept.fail(run, {**where, "error": f"{type(error).__name__}: {error}"})
                continue
            target = target_text(row)
            heading = "; ".join(filter(None, (row["work"], row["equal"], target)))
            print(f"{topic} {kind}: {heading} [{time.monotonic() - began:.0f} s in all]")
            print("\n".join(way_line(way, row) for way in row["ways"]), flush=True)
            if row["reached"] is False:
                missed.append(f"{topic} {kind}: {row['work']}, {target}")
            if kept:
                kept.add(run, row)
    if not count and not failed:
        raise ValueError(f"what: expected a workload of {bundle} with {what}" + (f" and {only}" if only else "") + ".")
    minutes = (time.monotonic() - start) / 60
    print(f"{count} workloads in {minutes:.1f} min, {len(failed)} not measured, {len(missed)} below their target")
    for line in (*(f"below target: {line}" for line in missed), *(f"not measured: {line}" for line in failed)):
        print(line)
    if kept:
        print(f"{kept.json}\n{kept.markdown}")
        if readme and kept.json.exists():
            write_table(readme, kept.json)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(benchmark, name="tools.benchmark")
