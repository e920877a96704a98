# SPDX-License-Identifier: Apache-2.0
"""The slow reliability tests with a time box: ``python -m tests.soak --minutes 30``.

The tests that are marked with a row of the fifteen come first, in a process of their own, then the campaigns, which
share the time that is left, a quarter of the box at least. The exit code is 1 if anything did not survive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DOCUMENT = "docs/measurements/reliability.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="time box")
    parser.add_argument("--out", type=Path, default=Path(DOCUMENT), help="Markdown to write; JSON lies beside it")
    parser.add_argument("--seed", type=int, help="of all campaigns; another one each time unless given")
    parser.add_argument("--skip-tests", action="store_true", help="campaigns alone")
    parser.add_argument("--campaign", help="this one alone; writes no document")
    parser.add_argument("--case", type=int, help="this case of --campaign alone")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.campaign:
        result = _campaigns(seed, 60 * options.minutes, options.campaign, options.case)[0]
        return int(result.survived < result.tried)
    start = time.monotonic()
    rows, tests_passed = ([], True) if options.skip_tests else _tests()
    left = 60 * options.minutes - (time.monotonic() - start)
    results = _campaigns(seed, max(left, 15 * options.minutes))
    return _report(rows, results, options, seed=seed, tests_passed=tests_passed)


def _tests() -> tuple[list[dict[str, Any]], bool]:
    """The figures of the marked tests, and whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reliability.json"
        jobs = str(min(4, os.cpu_count() or 1))
        words = ["-m", "reliability or soak", "--reliability", str(file), "-q", "-n", jobs, "-p", "no:cacheprovider"]
        done = subprocess.run([sys.executable, "-m", "pytest", *words])
        return (json.loads(file.read_text()) if file.exists() else []), done.returncode == 0


def _campaigns(seed: int, seconds: float, name: str | None = None, case: int | None = None) -> list[Any]:
    # Here, as every command's process would import what this module imports.
    from tests import commands
    from tests.soak import disk, fuzz_inputs, fuzz_weights, kills
    from tests.soak.campaign import attempt

    campaigns = [module.CAMPAIGN for module in (kills, disk, fuzz_inputs, fuzz_weights)]
    if name is not None:
        campaigns = [campaign for campaign in campaigns if campaign.name == name]
        if not campaigns:
            raise SystemExit(f"--campaign: expected kills, disk, inputs or weights, got {name}")
    # The first command waits for imports, which is not to count for its time limit.
    commands.run("tools.check_data", "--help", limit=300)
    results, deadline = [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        for number, campaign in enumerate(campaigns):
            # What a campaign leaves of its time is for those after it.
            share = campaign.share / sum(other.share for other in campaigns[number:])
            left = max(deadline - time.monotonic(), 0)
            results.append(attempt(campaign, Path(folder), seed=seed, seconds=share * left, only=case))
            print(results[-1], flush=True)
    return results


def _report(rows: list[dict[str, Any]], results: list[Any], options: Any, *, seed: int, tests_passed: bool) -> int:
    from shared.provenance import git_commit, software_versions
    from tests.soak import document
    from tools.benchmarks.report import processor

    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "commit": git_commit(),
        "versions": software_versions(),
        "seed": seed,
        "minutes": options.minutes,
        "command": f"python -m tests.soak --minutes {options.minutes:g} --seed {seed} --out {options.out}"
        + " --skip-tests" * options.skip_tests,
    }
    content = document.merge(rows, results, about)
    document.write(content, options.out)
    print(f"\n{options.out}")
    for row in content["rows"]:
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        print(f"{row['row']:2d} {row['title']}: {row['tried']} tried, {row['survived']} survived{skipped}")
    for result in results:
        for failure in result.failures:
            print(f"did not survive: {failure['case']}\n  again: {failure['again']}")
    if not tests_passed:
        print("a test failed, see above")
    bad = not tests_passed or any(row["survived"] < row["tried"] for row in content["rows"])
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
