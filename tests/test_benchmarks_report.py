# SPDX-License-Identifier: Apache-2.0
"""Numbers in words, the Markdown of a run, and the README's table."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tools.benchmarks.markdown import bytes_text, markdown, performance_table, ratio_cell, ratio_text, seconds_text
from tools.benchmarks.measuring import Measurement, Spread, Way
from tools.benchmarks.report import BEGIN, END, Results, describe_run, load, processor, row_of, write_table

RUN = {
    **{"date": "2026-01-02", "commit": "abc", "command": "python -m tools.benchmark x", "size": "quick"},
    **{"device": "cpu", "cpu": "Abacus 9", "threads": 1, "versions": {"python": "3.11", "torch": "2.8"}},
}


def measured(**changes: Any) -> Measurement:
    ways = (
        Way("published | loop", Spread(8.0, 6.0, 12.0), Spread(1.0, 1.0, 1.0), 6_000_000, 100.0),
        Way("ours", Spread(0.7, 0.5, 0.75), Spread(11.5, 11.0, 16.2), 2_400_000),
    )
    content: dict[str, Any] = {
        "workload": "16 images",
        "sizes": "half width",
        "equal": "equal within 2e-6",
        "ways": ways,
    }
    return Measurement(**(content | {"target": 8.0, "measured": "time", "clock": "process", "repeats": 5} | changes))


def row(bundle: str = "cxr_ldm", kind: str = "sample", builder: str = "guided", **changes: Any) -> dict[str, Any]:
    return row_of(measured(**changes), bundle=bundle, kind=kind, builder=builder)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34, "12×"), (1.749, "1.7×"), (0.854, "0.85×"), (1, "1.0×"), (9.97, "10×"), (0.997, "1.0×"), (1049, "1000×"),
     (0.0123, "0.012×"), (1 / 0.6, "1.7×"), (30, "30×")],
)  # fmt: skip
def test_ratios_have_two_digits(value, text):
    assert ratio_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.1512, "4.15 s"), (0.27, "270 ms"), (0.00125, "1.25 ms"), (0.000663, "663 µs"), (123.4, "123 s"),
     (99.99, "100 s"), (12.5 * 3600, "12.5 h")],
)  # fmt: skip
def test_seconds_in_words(value, text):
    assert seconds_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "–"), (400, "0.400 kB"), (720_000, "720 kB"), (1_080_000, "1.08 MB"), (1.924e9, "1.92 GB")]
)
def test_bytes_in_words(value, text):
    assert bytes_text(value) == text


def test_range_is_left_out_where_it_says_nothing():
    assert ratio_cell(row()["ways"][0]) == "1.0×"
    assert ratio_cell(row()["ways"][1]) == "12× (11–16)"


def test_row_is_json_and_knows_its_place():
    content = json.loads(json.dumps(row()))
    assert (content["bundle"], content["kind"], content["work"], content["builder"]) == (
        *("cxr_ldm", "sample", "16 images", "guided"),
    )
    assert content["ways"][1]["ratio"] == {"median": 11.5, "min": 11.0, "max": 16.2}
    assert content["ways"][0]["factor"] == 100
    assert content["reached"] is True


def test_run_is_described():
    run = describe_run(device=torch.device("cpu"), size="tiny", command="x")
    assert set(run) == set(RUN)
    assert run["device"] == "cpu"
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert processor()


def test_markdown_has_a_table_per_bundle_and_kind():
    slow = {"target": 30.0, "clock": "wall"}
    rows = [row(), row(workload="1 image", **slow), row("sdseg", "train", measured="memory", target=None, repeats=1)]
    text = markdown({"runs": [RUN], "rows": [{**r, "run": 0} for r in rows], "failed": []}, title="2026 all")
    assert text.startswith("# 2026 all\n")
    chest, seg = text.split("## cxr_ldm: sample\n")[1].split("## sdseg: train\n")
    assert chest.count("| work | way | time | ratio to the baseline | peak memory | what stayed equal |\n") == 1
    assert "| 16 images | published \\| loop | 8.00 s (6.00 s–12.0 s) | 1.0× | 6.00 MB |  |\n" in chest
    assert (
        "|  | ours | 700 ms (500 ms–750 ms) | **12× (11–16)**; target 8×: reached | 2.40 MB | equal within 2e-6 |\n"
        in chest
    )
    assert "target 30×: not reached" in chest
    factor = "timed part and how often it occurs: published | loop × 100"
    assert f"- 16 images: half width; 5 turns; {factor}\n" in chest
    assert f"- 1 image: half width; 5 turns; wall clock; {factor}\n" in chest
    # No time stands in a table of memory.
    assert "|  | ours |  | **12× (11–16)** | 2.40 MB |" in seg
    assert "turn" not in seg
    assert text.count("python -m tools.benchmark x\n```") == 1
    assert "2026-01-02, quick size, Abacus 9, 1 thread, commit abc; python 3.11, torch 2.8." in text
    assert "Not measured" not in text


def test_tables_of_several_runs_name_their_own():
    gpu = {**RUN, "device": "H200", "command": "second", "threads": 2}
    rows = [{**row(), "run": 0}, {**row("sdseg"), "run": 1}]
    failed = [{"bundle": "sdseg", "kind": "train", "builder": "step", "error": "ValueError: a\nb", "run": 1}]
    text = markdown({"runs": [RUN, gpu], "rows": rows, "failed": failed}, title="t")
    chest, seg = text.split("## cxr_ldm: sample")[1].split("## sdseg: sample")
    assert "```bash\npython -m tools.benchmark x\n```" in chest
    assert "second" not in chest
    assert "```bash\nsecond\n```" in seg
    assert "H200 (Abacus 9), 2 threads" in seg
    assert text.endswith("## Not measured\n\n- sdseg train, step: ValueError: a b\n")


def test_readme_table_has_a_row_for_each_work_with_a_target():
    rows = [row(), row(workload="no target", target=None), row(workload="weights", measured="memory", target=20.0)]
    text = performance_table(
        {"runs": [RUN], "rows": [{**r, "run": 0} for r in rows], "failed": []}, details="docs/a.md"
    )
    assert "| cxr_ldm: 16 images | published \\| loop → ours | **12× (11–16)** | 2.5× (2.40 MB) |" in text
    assert "| equal within 2e-6 | 8× |\n" in text
    assert "| cxr_ldm: weights | published \\| loop → ours | – | **12× (11–16)** (2.40 MB) |" in text
    assert "| 20×: not reached |" in text
    assert "no target" not in text
    assert "All ways and sizes: [a.md](docs/a.md)." in text
    assert "```bash\npython -m tools.benchmark x\n```" in text


def test_row_without_memory_shows_none():
    ways = tuple(Way(name, Spread(1, 1, 1), Spread(1, 1, 1), 0) for name in ("a", "b"))
    text = performance_table({"runs": [RUN], "rows": [{**row(ways=ways), "run": 0}], "failed": []}, details="a.md")
    assert "| a → b | **1.0×** | – |" in text


def test_readme_is_rewritten_between_its_markers_and_the_same_twice(tmp_path):
    results = Results(tmp_path / "docs" / "1.5_cpu")
    results.add(RUN, row())
    assert results.json.name == "1.5_cpu.json"
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nThe end.\n")
    write_table(readme, results.json)
    once = readme.read_text()
    assert once.startswith(f"# Title\n\n{BEGIN}\n\n| work |")
    assert once.endswith(f"\n\n{END}\n\nThe end.\n")
    assert "[1.5_cpu.md](docs/1.5_cpu.md)" in once
    assert results.markdown.exists()
    write_table(readme, results.json)
    assert readme.read_text() == once


@pytest.mark.parametrize(
    "text", ["no markers", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", f"{BEGIN}\n{END}\n{END}"]
)
def test_readme_without_both_markers_is_refused_and_kept(text, tmp_path):
    results = Results(tmp_path / "r")
    results.add(RUN, row())
    readme = tmp_path / "GUIDE.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"GUIDE\.md: expected one line <!-- performance: begin -->"):
        write_table(readme, results.json)
    assert readme.read_text() == text


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.md: expected a Markdown file"):
        write_table(tmp_path / "none.md", tmp_path / "r.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json: expected a JSON file of"):
        load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other\.json: expected a JSON file of"):
        Results(tmp_path / "other", update=True)


def test_update_replaces_the_same_work_in_place(tmp_path):
    results = Results(tmp_path / "r")
    results.add(RUN, row())
    results.add(RUN, row(workload="other"))
    later = {**RUN, "date": "2026-02-03"}
    again = Results(tmp_path / "r", update=True)
    again.add(later, row(sizes="full width"))
    again.add(later, row(kind="train"))
    content = load(again.json)
    assert [(r["kind"], r["work"], r["sizes"]) for r in content["rows"]] == [
        ("sample", "16 images", "full width"),
        ("sample", "other", "half width"),
        ("train", "16 images", "half width"),
    ]
    assert [content["runs"][r["run"]]["date"] for r in content["rows"]] == ["2026-02-03", "2026-01-02", "2026-02-03"]


def test_readme_shows_the_latest_measurements(tmp_path):
    latest = max((ROOT / "docs/measurements").glob("*_benchmark.json"))
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    (tmp_path / "docs/measurements").mkdir(parents=True)
    shutil.copy(latest, tmp_path / "docs/measurements")
    write_table(readme, tmp_path / "docs/measurements" / latest.name)
    assert readme.read_text() == (ROOT / "README.md").read_text()
