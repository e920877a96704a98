# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.benchmark` with small workloads: what it runs, keeps, prints and refuses."""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import benchmark as module
from tools import command_line
from tools.benchmark import benchmark, kinds_of, stem_of
from tools.benchmarks.measuring import old_objects_aside
from tools.benchmarks.workload import Builder, Kind, Setting, Workload

BUILT: list[tuple[str, Setting]] = []


@pytest.fixture(autouse=True, scope="module")
def _fast_collection() -> Iterator[None]:
    with old_objects_aside():
        yield


def work(name: str, setting: Setting, **changes: Any) -> Workload:
    BUILT.append((name, setting))
    x = torch.zeros(50)
    ways = {"twice": lambda: (x + 1, x + 2), "once": lambda: (x + 1,)}
    content: dict[str, Any] = {
        "name": name,
        "sizes": "50 numbers",
        "ways": ways,
        "equal": lambda _: "sum",
        "repeats": 2,
    }
    return Workload(**(content | changes))


def training(setting: Setting) -> Workload:
    return work("a training step", setting)


def sampling(setting: Setting) -> Workload:
    return work("an image", setting, target=1e9)


def broken(setting: Setting) -> Workload:
    raise RuntimeError("out of luck\nand more")


def peaks(setting: Setting) -> Workload:
    return work("a step's memory", setting, measured="memory", target=1.5)


@pytest.fixture(autouse=True)
def fake(monkeypatch) -> dict[Kind, list[Builder]]:
    """A module `tools.benchmarks.fake` and its workloads."""
    BUILT.clear()
    workloads: dict[Kind, list[Builder]] = {Kind.TRAIN: [training], Kind.SAMPLE: [sampling], Kind.MEMORY: [peaks]}
    fake = types.ModuleType("tools.benchmarks.fake")
    fake.WORKLOADS = workloads  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tools.benchmarks.fake", fake)
    monkeypatch.setattr("sys.argv", ["benchmark", "fake", "--only=it's"])
    return workloads


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def test_everything_is_run_printed_and_kept(tmp_path, capsys):
    benchmark("fake", out=str(tmp_path / "result"))
    assert [name for name, _ in BUILT] == ["a training step", "an image", "a step's memory"]
    content = json.loads((tmp_path / "result.json").read_text())
    assert [(row["bundle"], row["kind"], row["work"]) for row in content["rows"]] == [
        ("fake", "train", "a training step"),
        ("fake", "sample", "an image"),
        ("fake", "memory", "a step's memory"),
    ]
    assert [row["reached"] for row in content["rows"]] == [None, False, True]
    (run,) = content["runs"]
    assert (run["size"], run["device"], run["threads"]) == ("quick", "cpu", 1)
    assert run["command"].endswith("""python -m tools.benchmark fake '--only=it'"'"'s'""")
    assert {"python", "torch", "monai", "numpy"} <= set(run["versions"])
    said = capsys.readouterr().out
    assert "below target: fake sample: an image, target 1e+09×: not reached" in said or "not reached" in said
    assert "fake memory: a step's memory; sum; target 1.5×: reached" in said
    assert said.index("  twice ") < said.index("  once ")
    assert "3 workloads in" in said
    assert "# result\n" in (tmp_path / "result.md").read_text()


def test_failure_loses_nothing_and_ends_in_exit_code_1(fake, tmp_path, capsys):
    fake[Kind.TRAIN].insert(0, broken)
    with pytest.raises(SystemExit) as stopped:
        benchmark("fake", out=str(tmp_path / "result"))
    assert stopped.value.code == 1
    content = json.loads((tmp_path / "result.json").read_text())
    assert len(content["rows"]) == 3
    assert [(row["builder"], row["error"]) for row in content["failed"]] == [
        ("broken", "RuntimeError: out of luck\nand more")
    ]
    printed = capsys.readouterr()
    assert "not measured: fake train, broken: RuntimeError: out of luck" in printed.out
    assert "Traceback" in printed.err
    assert "- fake train, broken: RuntimeError: out of luck and more" in (tmp_path / "result.md").read_text()


def test_unequal_ways_are_a_failure(fake, tmp_path):
    def unequal(results):
        raise ValueError("once: expected two tensors, got 1.")

    fake[Kind.TRAIN] = [lambda setting: work("differs", setting, equal=unequal)]
    with pytest.raises(SystemExit):
        benchmark("fake", what="train", out=str(tmp_path / "result"))
    assert rows(tmp_path / "result.json") == []


def test_results_are_on_disk_after_each_workload(fake, tmp_path):
    def interrupted(setting: Setting) -> Workload:
        assert len(rows(tmp_path / "result.json")) == 1
        raise KeyboardInterrupt

    fake[Kind.SAMPLE] = [interrupted]
    with pytest.raises(KeyboardInterrupt):
        benchmark("fake", out=str(tmp_path / "result"))
    assert len(rows(tmp_path / "result.json")) == 1


def test_parts_are_merged_and_keep_their_own_command(fake, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    benchmark("fake", out=str(out))
    with pytest.raises(ValueError, match=r"result\.json: expected a new file.*--update"):
        benchmark("fake", out=str(out))
    monkeypatch.setattr("sys.argv", ["benchmark", "later"])
    monkeypatch.setitem(fake, Kind.SAMPLE, [lambda setting: work("an image", setting, sizes="60 numbers")])
    benchmark("fake", what="sample", out=str(out), update=True)
    content = json.loads(out.read_text())
    assert [row["work"] for row in content["rows"]] == ["a training step", "an image", "a step's memory"]
    assert [row["sizes"] for row in content["rows"]] == ["50 numbers", "60 numbers", "50 numbers"]
    commands = [content["runs"][row["run"]]["command"] for row in content["rows"]]
    assert commands[0] == commands[2] != commands[1]
    assert commands[1].endswith("python -m tools.benchmark later")
    # A run that nothing belongs to any more is forgotten.
    benchmark("fake", out=str(out), update=True)
    content = json.loads(out.read_text())
    assert [run["command"][-5:] for run in content["runs"]] == ["later"]


def test_success_forgets_the_failure(fake, tmp_path, monkeypatch):
    @functools.wraps(training)
    def fails(setting: Setting) -> Workload:
        raise RuntimeError("not yet")

    monkeypatch.setitem(fake, Kind.TRAIN, [fails])
    with pytest.raises(SystemExit):
        benchmark("fake", what="train", out=str(tmp_path / "result"))
    monkeypatch.setitem(fake, Kind.TRAIN, [training])
    benchmark("fake", what="train", out=str(tmp_path / "result"), update=True)
    content = json.loads((tmp_path / "result.json").read_text())
    assert (len(content["rows"]), content["failed"]) == (1, [])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("all", list(Kind)),
        ("train", [Kind.TRAIN]),
        ("metric,data", [Kind.METRIC, Kind.DATA]),
        (("sample", "memory"), [Kind.SAMPLE, Kind.MEMORY]),
    ],
)
def test_kinds(what, expected):
    assert kinds_of(what) == expected


def test_what_and_only_choose(fake):
    benchmark("fake", what=("sample", "train"))
    assert [name for name, _ in BUILT] == ["an image", "a training step"]
    BUILT.clear()
    fake[Kind.TRAIN].append(functools.partial(work, "bound"))
    benchmark("fake", only="ork")
    assert [name for name, _ in BUILT] == ["bound"]


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, "quick"), ({"quick": False}, "full"), ({"quick": True}, "quick"), ({"tiny": True}, "tiny")],
)
def test_sizes(options, size):
    benchmark("fake", what="train", **options)
    ((_, setting),) = BUILT
    assert (str(setting.size), setting.device.type) == (size, "cpu")


def test_repeats_and_threads_are_obeyed(tmp_path):
    before = torch.get_num_threads()
    try:
        benchmark("fake", what="train", repeats=4, threads=2, out=str(tmp_path / "result"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    content = json.loads((tmp_path / "result.json").read_text())
    assert (content["rows"][0]["repeats"], content["runs"][0]["threads"]) == (4, 2)


@pytest.mark.parametrize(
    ("bundle", "options", "message"),
    [
        ("nothing", {}, "^nothing: expected one of cxr_ldm, brain_controlnet, sdseg, dmri2noddi, scaling or all"),
        ("workload", {}, "^workload: expected one of .* tools.benchmarks.workload offers no WORKLOADS"),
        ("fake", {"what": "train,sleep"}, "^what: expected all or some of train, .*, got sleep"),
        ("fake", {"what": "data"}, "^what: expected a workload of fake with data"),
        ("fake", {"only": "zebra"}, "^what: expected a workload of fake with all and zebra"),
        ("fake", {"device": "abacus"}, "^device: expected cpu, or cuda .*, got abacus"),
        ("fake", {"threads": 0}, "^threads: expected 1 or more, got 0"),
        ("fake", {"readme": "README.md"}, "^out: expected a path"),
        ("fake", {"results": "x.json"}, "^readme: expected a Markdown file"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(bundle, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("<!-- performance: begin -->\n<!-- performance: end -->\n")
    with pytest.raises(ValueError, match=message):
        benchmark(bundle, **options)
    assert BUILT == []


def test_error_inside_a_module_is_not_taken_for_a_missing_one(monkeypatch):
    def raising(name: str) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(module.importlib, "import_module", raising)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        benchmark("sdseg")


def test_all_bundles_go_on_when_one_cannot_be_loaded(fake, monkeypatch, capsys):
    monkeypatch.setattr(module, "TOPICS", ("nothing", "fake"))
    with pytest.raises(SystemExit):
        benchmark("all", what="train")
    assert [name for name, _ in BUILT] == ["a training step"]
    assert "not measured: nothing: nothing: expected one of" in capsys.readouterr().out


def test_readme_is_checked_before_and_written_after(fake, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Fast\n")
    with pytest.raises(ValueError, match=r"README\.md: expected one line <!-- performance: begin -->"):
        benchmark("fake", out=str(tmp_path / "result"), readme=str(readme))
    assert BUILT == []
    readme.write_text("# Fast\n<!-- performance: begin -->\nold\n<!-- performance: end -->\nEnd.\n")
    benchmark("fake", out=str(tmp_path / "docs" / "result"), readme=str(readme))
    text = readme.read_text()
    assert "| fake: an image | twice → once |" in text
    assert "[result.md](docs/result.md)" in text
    assert "old" not in text
    readme.write_text("<!-- performance: begin -->\n<!-- performance: end -->\n")
    benchmark(results=str(tmp_path / "docs" / "result.json"), readme=str(readme))
    assert "| fake: an image | twice → once |" in readme.read_text()


@pytest.mark.parametrize(
    ("out", "expected"), [("a/b", "a/b"), ("a/b.json", "a/b"), ("a/b.md", "a/b"), ("a/1.5_cpu", "a/1.5_cpu")]
)
def test_stem(out, expected):
    assert stem_of(out) == Path(expected)


def test_stem_in_a_folder(tmp_path):
    assert stem_of(str(tmp_path)).parent == tmp_path
    assert stem_of("x/").name.endswith("_benchmark")


def test_command_line(monkeypatch, tmp_path, capsys):
    words = ["fake", "--what", "train,memory", "--quick", "False", "--repeats", "1", "--out", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    command_line.run(benchmark, name="benchmark")
    assert [(name, str(setting.size)) for name, setting in BUILT] == [
        ("a training step", "full"),
        ("a step's memory", "full"),
    ]
    monkeypatch.setattr("sys.argv", ["benchmark", "fake", "--wath", "train"])
    with pytest.raises(SystemExit, match="^--wath: expected an option"):
        command_line.run(benchmark, name="benchmark")
