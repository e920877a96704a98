# SPDX-License-Identifier: Apache-2.0
"""Results of benchmarks as Markdown: a file with every way, and the table of the README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def ratio_text(value: float) -> str:
    """Two significant digits: 12×, 1.7×, 0.85×, 1200×."""
    value = float(f"{value:.2g}")
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{value:.{digits}f}×" if value >= 0.1 else f"{value:g}×"


def seconds_text(seconds: float) -> str:
    """Three significant digits in a unit that keeps them readable, from µs to h."""
    units = ((1e-3, "µs", 1e6), (1.0, "ms", 1e3), (7200.0, "s", 1.0), (float("inf"), "h", 1 / 3600))
    unit, factor = next((unit, factor) for limit, unit, factor in units if seconds < limit)
    return f"{_three_digits(seconds * factor)} {unit}"


def bytes_text(count: float) -> str:
    """Three significant digits in kB, MB or GB (powers of 1000); nothing was seen: a dash."""
    units = ((1e6, "kB", 1e-3), (1e9, "MB", 1e-6), (float("inf"), "GB", 1e-9))
    unit, factor = next((unit, factor) for limit, unit, factor in units if count < limit)
    return f"{_three_digits(count * factor)} {unit}" if count else "–"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def ratio_cell(way: Mapping[str, Any]) -> str:
    """Ratio of a way with its range: "12× (11×–13×)"."""
    low, high = ratio_text(way["ratio"]["min"]), ratio_text(way["ratio"]["max"])
    return ratio_text(way["ratio"]["median"]) + ("" if low == high else f" ({low[:-1]}–{high[:-1]})")


def target_text(row: Mapping[str, Any]) -> str:
    """Target and whether it is reached, "target 8×: not reached"; empty without a target."""
    if row["target"] is None:
        return ""
    return f"target {row['target']:.3g}×: {'reached' if row['reached'] else 'not reached'}"


def way_line(way: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """One line of text for a way, printed as it is measured."""
    time = "" if row["measured"] == "memory" else f"{seconds_text(way['seconds']['median']):>9}  "
    return f"  {way['name']:<48}  {time}{ratio_cell(way):<20}  peak {bytes_text(way['peak_bytes'])}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *lines)]
    text = [f"| {' | '.join(line)} |" for line in cells]
    return [text[0], f"|{' --- |' * len(header)}", *text[1:]]


def _work_lines(row: Mapping[str, Any]) -> Iterator[list[str]]:
    for way in row["ways"]:
        first, last = way is row["ways"][0], way is row["ways"][-1]
        ratio, target = ratio_cell(way), target_text(row)
        seconds = way["seconds"]
        spread = f"{seconds_text(seconds['median'])} ({seconds_text(seconds['min'])}–{seconds_text(seconds['max'])})"
        yield [
            row["work"] if first else "",
            way["name"],
            "" if row["measured"] == "memory" else spread,
            f"**{ratio}**" + (f"; {target}" if target else "") if last else ratio,
            bytes_text(way["peak_bytes"]),
            row["equal"] if last else "",
        ]


def _run_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    about = dict.fromkeys(_about(run) for run in runs)
    return ["```bash", *dict.fromkeys(run["command"] for run in runs), "```", "", *about]


def _about(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    where = run["cpu"] if run["device"] == "cpu" else f"{run['device']} ({run['cpu']})"
    threads = f"{run['threads']} thread" + ("" if run["threads"] == 1 else "s")
    return f"{run['date']}, {run['size']} size, {where}, {threads}, commit {run['commit']}; {versions}."


def markdown(content: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> str:
    """The whole Markdown file: one table per bundle and kind, with sizes and command under it, and what failed.

    Args:
        content: of :func:`tools.benchmarks.report.load`.
        title: first line.
    """
    lines = [
        f"# {title}",
        "",
        "Written by `python -m tools.benchmark`. Times are medians (smallest–largest) of processor seconds of this "
        "process, or of wall-clock seconds where a line below says so. The first way of a work is the baseline, the "
        "last what the bundle does. A ratio is the baseline's time in a turn divided by that of the way in the same "
        "turn; where no time stands, it is that of the peaks of memory.",
    ]
    alone = len(content["runs"]) == 1
    if alone:
        lines += ["", *_run_lines(content["runs"])]
    for bundle, kind in dict.fromkeys((row["bundle"], row["kind"]) for row in content["rows"]):
        rows = [row for row in content["rows"] if (row["bundle"], row["kind"]) == (bundle, kind)]
        header = ("work", "way", "time", "ratio to the baseline", "peak memory", "what stayed equal")
        lines += ["", f"## {bundle}: {kind}", ""]
        lines += _table(header, [line for row in rows for line in _work_lines(row)])
        lines += ["", *(f"- {row['work']}: {row['sizes']}{_how(row)}" for row in rows)]
        if not alone:
            lines += ["", *_run_lines(_runs_of(content, rows))]
    if content["failed"]:
        lines += ["", "## Not measured", ""]
        lines += [
            f"- {row['bundle']} {row['kind']}, {row['builder']}: {' '.join(row['error'].split())}"
            for row in content["failed"]
        ]
    return "\n".join(lines) + "\n"


def _how(row: Mapping[str, Any]) -> str:
    factors = [f"{way['name']} × {way['factor']:g}" for way in row["ways"] if way["factor"] != 1]
    clock = "; wall clock" if row["clock"] == "wall" and row["measured"] == "time" else ""
    turns = f"; {row['repeats']} turn" + ("" if row["repeats"] == 1 else "s")
    return ("" if row["measured"] == "memory" else turns + clock) + (
        f"; timed part and how often it occurs: {', '.join(factors)}" if factors else ""
    )


def performance_table(content: Mapping[str, Sequence[Mapping[str, Any]]], *, details: str) -> str:
    """The README's table: the last way beside the baseline, for every work that has a target.

    Args:
        content: of :func:`tools.benchmarks.report.load`.
        details: link to the Markdown file with all ways.
    """
    rows = [row for row in content["rows"] if row["target"] is not None]
    lines = []
    for row in rows:
        base, ours = row["ways"][0], row["ways"][-1]
        peaks = base["peak_bytes"], ours["peak_bytes"]
        memory = f"{ratio_text(peaks[0] / peaks[1])} ({bytes_text(peaks[1])})" if all(peaks) else "–"
        ratio = f"**{ratio_cell(ours)}**"
        lines.append(
            [
                f"{row['bundle']}: {row['work']}",
                f"{base['name']} → {ours['name']}",
                *(("–", f"{ratio} ({bytes_text(peaks[1])})") if row["measured"] == "memory" else (ratio, memory)),
                row["equal"],
                f"{row['target']:.3g}×" + ("" if row["reached"] else ": not reached"),
            ]
        )
    header = ("work", "from → to", "faster", "less memory", "what stayed equal", "target")
    link = f"All ways and sizes: [{Path(details).name}]({details})."
    return "\n".join([*_table(header, lines), "", link, "", *_run_lines(_runs_of(content, rows))])


def _runs_of(content: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [content["runs"][run] for run in dict.fromkeys(row["run"] for row in rows)]
