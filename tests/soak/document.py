# SPDX-License-Identifier: Apache-2.0
"""The figures of the fifteen reliability tests as a document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.files import atomic_path, save_json
from tests.conftest import ROOT
from tests.reliability import ROWS

TARGETS = {
    1: "30 kills, 30 leave a loadable checkpoint; resumed losses bit for bit those of no kill (workers 0 and 2)",
    2: "10 sizes: the previous checkpoint loads 10/10, the message names path and bytes",
    3: "at least 60 files: 60/60 end in an error or skip that names the file; none hangs",
    4: "loss, gradient, autoencoder output, scale factor: weights and best checkpoint unchanged",
    5: "train, evaluate, infer with every bundle: 0 network attempts",
    6: "20 per bundle: refused early, or returned in exactly the input's shape and affine",
    7: "truncations and bit flips of each released file: clear error, never a silent partial load; golden outputs",
    8: "each optimizer moves its own parameters only; frozen bits unchanged after 20 steps",
    9: "true noise recovers x0 < 1e-4; agreement with a reference on 3 schedules x 3 prediction types",
    10: "SSIM, PSNR, MS-SSIM, FID, Dice against other implementations and closed forms: < 1e-4",
    11: "equal parameters after 10 steps, rank 0 alone writes, loss of the doubled batch < 1e-5",
    12: "none in output, logs, tracker, files, report",
    13: "10 copies of 100: all found",
    14: "run alone in an empty directory; two in one process: no clash",
    15: "memory grows < 1 %",
}
_MARK = re.compile(r"mark\.reliability\((\d+)\)")


def merge(tests: Sequence[Mapping[str, Any]], campaigns: Sequence[Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """All rows, of the tests (``tests.reliability.as_json``) and the campaigns (``tests.soak.campaign.Result``)."""
    rows = []
    for number, title in ROWS.items():
        known = next((row for row in tests if row["row"] == number), None)
        own = [result for result in campaigns if result.row == number]
        rows.append(
            {
                "row": number,
                "title": title,
                "target": TARGETS[number],
                "tried": (known["tried"] if known else 0) + sum(result.tried for result in own),
                "survived": (known["survived"] if known else 0) + sum(result.survived for result in own),
                "skipped": known["skipped"] if known else 0,
                "figures": known["figures"] if known else {},
                "failed": known["failed"] if known else [],
                "tests": tests_of(number),
                "campaigns": [str(result).strip() for result in own],
            }
        )
    return {**about, "rows": rows, "campaigns": [result.as_json() for result in campaigns]}


def tests_of(row: int) -> list[str]:
    """Test modules that mark something with this row."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path.name for path in files if str(row) in _MARK.findall(path.read_text(encoding="utf-8"))]


def write(content: Mapping[str, Any], path: Path) -> None:
    """Markdown at ``path`` and the same as JSON beside it."""
    with atomic_path(path) as temporary:
        temporary.write_text(_markdown(content), encoding="utf-8")
    save_json(content, path.with_suffix(".json"))


def _markdown(content: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# Reliability",
        "",
        "Written by `python -m tests.soak` (`make soak`); never typed by hand. A case is survived if it ends as the "
        "target says.",
        "",
        "```bash",
        content["command"],
        "```",
        "",
        f"{content['date']}, {content['machine']}, commit {content['commit']}; {versions}; seed {content['seed']}, "
        f"{content['minutes']} minutes.",
        "",
        "| # | test | target | tried | survived | made by |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        skipped = f" ({row['skipped']} skipped)" if row["skipped"] else ""
        makers = [f"`{name}`" for name in row["tests"]] + ["soak"] * bool(row["campaigns"])
        figures = f"{row['tried']}{skipped} | {row['survived']}"
        lines.append(f"| {row['row']} | {row['title']} | {row['target']} | {figures} | {', '.join(makers) or '–'} |")
    lines += ["", "## Campaigns", ""]
    for campaign in (line for row in content["rows"] for line in row["campaigns"]):
        lines.append(f"- {campaign}")
    lines += ["", "## What was measured", ""]
    for row in content["rows"]:
        for test, figure in row["figures"].items():
            lines.append(f"- {row['row']}, `{test.split('/')[-1]}`: {figure}")
    failed = [f"- `{test}`" for row in content["rows"] for test in row["failed"]]
    for campaign in content["campaigns"]:
        for failure in campaign["failures"]:
            failed.append(f"- {failure['case']}: {'; '.join(failure['problems'])}. Again: `{failure['again']}`")
    return "\n".join([*lines, "", "## What failed", "", *(failed or ["Nothing."]), ""])
