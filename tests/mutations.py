# SPDX-License-Identifier: Apache-2.0
"""The mutation check: each deliberate fault of the catalogue must be noticed by the test named with it.

Run: python -m tests.mutations [bundle] [--out docs/measurements/mutations.md]

One copy of the tree is made. Each named test has to pass there without a fault; then each fault is planted in turn, the
test named with it has to fail, by an assertion or an error of the product, and the file is restored. Survivors are
listed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.mutation import Mutation
from tests.mutation_runs import Outcome, Server

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = ("cxr_ldm", "brain_controlnet", "sdseg", "dmri2noddi")
COMMAND = "make mutations"
LIMIT = 300.0  # seconds for a test, which takes a few
_WIDTH = 120


def catalogue(bundles: Iterable[str] = BUNDLES) -> list[Mutation]:
    """Deliberate faults, bundle by bundle: ``tests/mutations_<bundle>.py``."""
    found: list[Mutation] = []
    for bundle in bundles:
        found += importlib.import_module(f"tests.mutations_{bundle}").MUTATIONS
    return found


def copy_tree(target: Path) -> None:
    """The files of the working tree that belong to the repository, committed or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def planted(mutation: Mutation, root: Path) -> Iterator[None]:
    """The fault in the file below ``root``, which is as it was afterwards."""
    file = root / mutation.file
    before, times = file.read_bytes(), file.stat()
    file.write_text(mutation.applied(root), encoding="utf-8")
    # Python knows compiled modules by time and size.
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 3600 * 10**9))
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def failures_without_a_fault(server: Server, tests: Sequence[str]) -> list[str]:
    """Named tests that do not pass in the copy as it is, with how they ended."""
    by_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(tests):
        by_file.setdefault(test.split("::")[0], []).append(test)
    wrong = []
    for named in by_file.values():
        outcomes = server.run(named, LIMIT, compiled=True)
        for test in named:
            own = [outcome for outcome in outcomes if _belongs(outcome.test, test)]
            ends = {outcome.result for outcome in own} or {"not found"}
            if ends != {"passed"}:
                said = "; ".join(outcome.says for outcome in own if outcome.result != "passed")
                wrong.append(f"{test}: {', '.join(sorted(ends))} {said[:_WIDTH]}".rstrip())
    return wrong


def _belongs(node: str, named: str) -> bool:
    """A parametrised test may be named as a whole."""
    return node == named or node.startswith((f"{named}[", f"{named}::"))


def first_notice(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The outcome by which a fault was noticed."""
    return next((outcome for outcome in outcomes if outcome.notices), None)


def campaign(mutations: Sequence[Mutation]) -> tuple[dict[Mutation, Outcome], list[str]]:
    """Plant every fault in a copy.

    Returns:
        Fault -> outcome by which it was noticed; and what is wrong: tests that fail without a fault, and
        faults that survived.
    """
    noticed: dict[Mutation, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="mutations") as folder:
        root = Path(folder) / "tree"
        root.mkdir()
        copy_tree(root)
        server = Server(root)
        try:
            wrong = failures_without_a_fault(server, [mutation.test for mutation in mutations])
            for mutation in [] if wrong else mutations:
                start = time.monotonic()
                with planted(mutation, root):
                    outcomes = server.run([mutation.test], LIMIT)
                outcome = first_notice(outcomes)
                if outcome is None:
                    ends = "; ".join(f"{one.result} {one.says[:_WIDTH]}".rstrip() for one in outcomes) or "no test ran"
                    wrong.append(f"{mutation.bundle}: {mutation.name}: survived {mutation.test} ({ends})")
                else:
                    noticed[mutation] = outcome
                ended = "survived" if outcome is None else "caught"
                print(f"{time.monotonic() - start:5.1f} s  {ended}  {mutation.bundle}: {mutation.name}", flush=True)
        finally:
            server.close()
    return noticed, wrong


def document(mutations: Sequence[Mutation], noticed: Mapping[Mutation, Outcome]) -> str:
    """``docs/measurements/mutations.md``."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("monai", "torch", "numpy", "pytest"))
    lines = [
        "# Deliberate faults",
        "",
        f"{len(noticed)} of {len(mutations)} deliberate faults were noticed by the test named with them. Each is one "
        "substitution in one file of the product, planted in a copy of the tree; the test passes without it, and fails "
        "with it by an assertion or an error of the product.",
        "",
        f"{datetime.date.today()}, Python {sys.version_info[0]}.{sys.version_info[1]}, {versions}, CPU. "
        f"Command: `{COMMAND}`. The faults stand in `tests/mutations_<bundle>.py`.",
    ]
    for bundle in dict.fromkeys(mutation.bundle for mutation in mutations):
        own = [mutation for mutation in mutations if mutation.bundle == bundle and mutation in noticed]
        lines += ["", f"## {bundle}", "", "| fault | file | caught by | how it failed |", "|---|---|---|---|"]
        lines += [_row(mutation, noticed[mutation]) for mutation in own]
    return "\n".join(lines) + "\n"


def _row(mutation: Mutation, outcome: Outcome) -> str:
    says = outcome.says.replace("`", "'")
    says = says if len(says) <= _WIDTH else f"{says[: _WIDTH - 4]} ..."
    cells = (mutation.name, f"`{mutation.file}`", f"`{mutation.test.removeprefix('tests/')}`", f"`{says}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Plant faults; tests must notice.")
    parser.add_argument("bundle", nargs="?", choices=BUNDLES, help="one bundle alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table, if every fault was noticed")
    options = parser.parse_args()
    if options.bundle and options.out:
        parser.error("--out: expected all bundles, as the document holds them all; leave the bundle out")
    mutations = catalogue([options.bundle] if options.bundle else BUNDLES)
    start = time.monotonic()
    noticed, wrong = campaign(mutations)
    print(f"{len(mutations)} faults, {len(noticed)} caught, {time.monotonic() - start:.0f} s")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    elif options.out:
        options.out.write_text(document(mutations, noticed), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
