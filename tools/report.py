# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about a run, or about a folder of runs.

    python -m tools.report demo --out demo/report.html [--extra DIR,DIR] [--title TEXT]

Pictures, style and curves are inside the page; it makes no request and runs no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from shared.files import atomic_path
from tools import command_line
from tools.report_data import Run, find_runs
from tools.report_html import Element, element, missing, table, words
from tools.report_sections import duration, section_of, title_of

BANNER = "Synthetic images and masks, made by models – research only, not for diagnosis"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    run_dir: str | Path, out: str | Path | None = None, *, extra: Sequence[str | Path] = (), title: str | None = None
) -> Path:
    """Write the page.

    Args:
        run_dir: a run folder or a folder with runs in subfolders; each run becomes a section, by start time.
        out: the page; None writes `report.html` into `run_dir`.
        extra: more such folders, e.g. of generated samples elsewhere.
        title: heading of the page; None makes one from the folder's name.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError: a folder holds nothing that a run writes.
        ValueError: a file of a run is damaged; the message starts with its path.
    """
    runs = [run for folder in (run_dir, *extra) for run in find_runs(folder)]
    runs.sort(key=lambda run: run.order)
    out = Path(out) if out is not None else Path(run_dir) / "report.html"
    page = build_page(runs, title=title or f"{words(Path(run_dir).resolve().name)} – report")
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def build_page(runs: Sequence[Run], *, title: str) -> str:
    """The page as text; all texts of the runs are escaped."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("title", title),
        element("style", style),
    )
    sections = [section_of(run, anchor=f"run-{index}") for index, run in enumerate(runs, start=1)]
    main = element("main", *_missing_everywhere(runs), *sections)
    body = element(
        "body",
        element("div", BANNER, class_="banner", role="note"),
        element("header", element("h1", title), _overview(runs)),
        main,
        _footer(),
    )
    html = element("html", head, body, lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(html, encoding="unicode", method="html") + "\n"


def _overview(runs: Sequence[Run]) -> Element:
    rows = []
    for index, run in enumerate(runs, start=1):
        start = run.recorded_start
        seconds = (max(run.times) - start).total_seconds() if start and run.times else None
        rows.append(
            element(
                "tr",
                element("th", element("a", title_of(run), href=f"#run-{index}"), scope="row"),
                element("td", _contents(run)),
                element("td", f"{start:%Y-%m-%d %H:%M} UTC" if start else "not recorded"),
                element("td", duration(seconds) if seconds else "–", class_="num"),
                element("td", str(run.epochs or "–"), class_="num"),
            )
        )
    names = ("Part", "Contains", "Started", "Duration", "Epochs")
    return table(names, rows, numeric={"Duration", "Epochs"})


def _contents(run: Run) -> str:
    parts = [
        "training curves" if run.curves else "",
        "previews" if run.previews else "",
        "evaluation" if run.evaluation is not None else "",
        f"{len(run.samples)} generated images" if run.samples else "",
        f"{len(run.translations)} translated volumes" if run.translations else "",
        f"{len(run.masks)} masks" if run.masks else "",
    ]
    return ", ".join(part for part in parts if part) or "manifest"


def _missing_everywhere(runs: Sequence[Run]) -> list[Element]:
    notes = []
    if all(run.evaluation is None for run in runs):
        notes.append("No evaluation was run: there is no evaluation/summary.json, so no measured quality is reported.")
    if not any(run.samples or run.translations or run.masks for run in runs):
        notes.append(
            "No generated images to show: there are no pictures from prompts, translated volumes or masks. (Maps of "
            "dmri2noddi are volumes without a picture; its evaluation has pictures.)"
        )
    return [missing(note) for note in notes]


def _footer() -> Element:
    written = (
        f"Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by python -m tools.report from the files of the runs."
    )
    warning = "Generated images show no patient; masks are a model's. Both can be wrong in ways that look right."
    return element("footer", element("p", f"{written} {warning}"))


def main(run_dir: str, *, out: str | None = None, extra: str | Sequence[str] = (), title: str | None = None) -> None:
    """Write the report of RUN_DIR; see `write_report`. `--extra a,b` adds folders."""
    folders = extra.split(",") if isinstance(extra, str) else extra
    path = write_report(str(run_dir), out, extra=[str(folder) for folder in folders if folder], title=title)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    command_line.run(main, name="tools.report")
