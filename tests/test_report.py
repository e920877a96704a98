# SPDX-License-Identifier: Apache-2.0
"""The report shows what the run wrote, says what it did not, and asks nobody for anything."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.report import BANNER, main, write_report
from tools.report_chart import Series, line_chart, smoothed
from tools.report_data import find_runs

EVIL = '<script>alert("x")</script> & "effusion" <img src=http://evil.example/x.png>'
SUMMARY = [
    {"name": "reconstruction_ms_ssim", "value": 0.97893, "ci_low": 0.97711, "ci_high": 0.98066, "n": 120, "note": ""},
    {"name": "fid", "value": 9.02371, "ci_low": None, "ci_high": None, "n": 1000, "note": "floor, real to real: 2.1"},
    {"name": "finding_accuracy", "value": 0.8125, "ci_low": 0.7312, "ci_high": 0.8741, "n": 112, "note": None},
    {"name": "label_flips", "value": None, "ci_low": None, "ci_high": None, "n": 0, "note": "not measured"},
]


def gradient(index: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A grey picture (H, W) that differs by index."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((rows * (index + 2) + columns * 3) % 256).astype(np.uint8)


def write_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def make_training(folder: Path, *, stage: str, started: str, epochs: int = 40, picture: Callable = gradient) -> Path:
    """A run folder as a training writes it."""
    folder.mkdir(parents=True)
    manifest = {
        "task": f"cxr_ldm {stage}", "started": started, "device": "cuda:0", "settings": {"seed": 42, "batch_size": 16},
        "config_sha256": "c" * 64, "datalist_sha256": "d" * 64,
        "git_commit": "0123456789abcdef" * 2 + "01234567+changes",
        "software": {"python": "3.11.4", "monai": "1.6.1", "torch": "2.14.1"},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"max_epochs": epochs, "prompt": EVIL, "learning_rate": 5e-5}))
    random = np.random.default_rng(0)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["time", "epoch", "iteration", "phase", "name", "value"])
        for epoch in range(1, epochs + 1):
            time = f"{started[:14]}{epoch % 60:02d}:00+00:00"
            loss = 0.02 + 1.2 * math.exp(-epoch / 6)
            for name, value in (("loss", loss * random.uniform(0.8, 1.2)), ("learning_rate", 5e-5), ("kl", epoch**0.5)):
                writer.writerow([time, epoch, epoch * 10, "train", name, repr(float(value))])
            if epoch % 5 == 0:
                writer.writerow([time, epoch, "", "validation", "loss", repr(loss * 1.1 + 0.01)])
    for epoch in range(5, epochs + 1, 5):
        write_picture(folder / "previews" / f"epoch_{epoch:04d}_samples.png", picture(epoch))
    return folder


def add_evaluation(folder: Path, picture: Callable = gradient) -> None:
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    (evaluation / "summary.json").write_text(json.dumps(SUMMARY))
    lines = [f"patient_{index}.png,{0.9 + index / 1000}" for index in range(51)]
    (evaluation / "per_image.csv").write_text("image,ms_ssim\n" + "\n".join(lines) + "\n")
    write_picture(evaluation / "reconstructions.png", picture(3))
    write_picture(evaluation / "failure_cases.png", picture(9))


def add_samples(folder: Path, prompts: list[str], *, seeds: int = 4, picture: Callable = gradient) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row, prompt in enumerate(prompts):
        for seed in range(seeds):
            write_picture(folder / f"sample_{row}_{seed}.png", picture(row * seeds + seed))
            content = {"prompt": prompt, "seed": seed, "guidance_scale": 7.0, "num_inference_steps": 50}
            content |= {"weights_sha256": "e" * 64, "monai_version": "1.6.1", "torch_version": f"2.{seed}"}
            (folder / f"sample_{row}_{seed}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stages and samples; the names sort against the order of their dates."""
    folder = tmp_path_factory.mktemp("demo")
    make_training(folder / "b_autoencoder", stage="autoencoder", started="2026-01-31T10:00:00+00:00", epochs=30)
    diffusion = make_training(folder / "a_diffusion", stage="diffusion", started="2026-01-31T12:00:00+00:00")
    add_evaluation(diffusion)
    add_samples(folder / "samples", ["Big right-sided pleural effusion", EVIL])
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return Page(write_report(demo, title="Chest X-ray demo"))


def test_nothing_is_requested_and_nothing_runs(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "video", "audio"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:80]
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_are_inside_and_decode(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 6 + 6 + 2 + 8  # previews of two stages, evaluation, samples
    for image in images:
        assert image["alt"]
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert decoded.size == (int(image["width"]), int(image["height"])) == (56, 40)
    first = base64.b64decode(images[-8]["src"].split(",")[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first))), gradient(0))


def test_values_intervals_and_n_are_those_of_the_summary(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["Reconstruction MS-SSIM"] == ["0.9789", "0.9771 to 0.9807", "120", ""]
    assert rows["FID"] == ["9.024", "–", "1000", "floor, real to real: 2.1"]
    assert rows["Finding accuracy"] == ["0.8125", "0.7312 to 0.8741", "112", ""]
    assert rows["Label flips"] == ["–", "–", "0", "not measured"]
    assert rows["MS-SSIM"] == ["51", "0.9", "0.9125", "0.925", "0.9375", "0.95"]
    assert "patient_" not in page.source, "names of files can be identifiers"


def test_prompts_are_shown_but_never_taken_for_html(page: Page) -> None:
    assert f"“{EVIL}”" in page.text
    assert "“Big right-sided pleural effusion”" in page.text
    assert "guidance 7.0, steps 50" in page.text
    assert "seed 3" in page.text
    assert page.text.count("alert(") == 3  # the prompt, and two configurations: as text


def test_sections_follow_time_and_say_what_made_them(page: Page) -> None:
    heads = [row[0] for row in page.rows[1:4]]
    assert heads == ["CXR LDM autoencoder", "CXR LDM diffusion", "Samples"]
    for fact in ("cuda:0", "monai 1.6.1", "0123456789ab with changes", "Seed", "42"):
        assert fact in page.text
    assert page.text.count(BANNER) == 1
    samples = page.text.split("Samples")[-1]
    assert "Weights, SHA-256eeeeeeeeeeeeeeee…" in samples
    assert "Torch version" not in samples, "the pictures disagree on it"
    assert len(page.all("details")) == 2


def test_curves_are_drawn_at_the_recorded_values(page: Page) -> None:
    charts = page.all("svg")
    assert len(charts) == 4  # loss and KL of both stages; the learning rate is constant
    assert "Learning rate was 5e-05 throughout." in page.text
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    loss = 1.1 * (0.02 + 1.2 * math.exp(-40 / 6)) + 0.01
    assert f"validation {loss:.4g}" in page.text
    assert "log scale" in page.text


def test_missing_parts_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"started": "2026-01-31T10:00:00", "git_commit": None}))
    text = Page(write_report(folder)).text
    for statement in (
        "No evaluation was run", "No images were generated", "No curves were recorded", "No previews were saved",
        "Device", "not recorded", "The configuration was not recorded",
    ):  # fmt: skip
        assert statement in text

    samples = tmp_path / "samples"
    write_picture(samples / "0_0.png", gradient(0))
    (samples / "0_0.json").write_text('{"prompt": ""}')
    text = Page(write_report(samples)).text
    assert "(empty prompt)" in text
    assert "seed not recorded" in text
    assert "What made this was not recorded" in text
    assert "No curves" not in text, "nobody expects curves of an inference"


def test_a_report_needs_something_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: expected a run folder, found no such folder"):
        write_report(tmp_path / "none")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "datalist.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: expected .* manifest.json, metrics.csv, previews/"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(FileNotFoundError, match="found none"):
        main(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", "time,epoch,iteration,phase,name,value\n,1,1,train,loss,abc\n,2,2,train,loss,1\n", "line 2"),
        ("metrics.csv", "epoch,loss\n1,0.5\n2,0.5\n", "expected time,epoch,iteration,phase,name,value in line 2"),
        ("manifest.json", "{", "expected JSON"),
        ("manifest.json", '{"started": "yesterday"}', "expected a date and time"),
        ("evaluation/summary.json", '{"fid": 3}', "expected a JSON list, got dict"),
        ("evaluation/summary.json", '[{"name": "fid", "value": 3}]', "expected name, value and n in entry 0"),
        ("previews/epoch_0001_samples.png", "no picture", "expected a PNG picture"),
        ("evaluation/grid.png", "", "expected a PNG picture"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / file))}: .*{message}"):
        write_report(tmp_path)


def test_a_row_cut_off_by_a_kill_and_nan_are_not_drawn(tmp_path: Path) -> None:
    rows = [
        "time,epoch,iteration,phase,name,value",
        ",1,1,train,loss,2.0",
        ",2,2,train,loss,nan",
        ",3,3,train,loss,1.0",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, ",4,4,train,loss"]))
    (run,) = find_runs(tmp_path)
    assert run.curves == {"loss": {"train": [(1.0, 2.0), (3.0, 1.0)]}}
    assert "1 recorded values were not finite" in Page(write_report(tmp_path)).text


def test_extra_folders_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_training(tmp_path / "run", stage="diffusion", started="2026-01-31T10:00:00+00:00", epochs=1)
    add_samples(tmp_path / "one", ["first"])
    add_samples(tmp_path / "two", ["second"], seeds=9)
    main(str(tmp_path / "run"), out=str(tmp_path / "page.html"), extra=f"{tmp_path / 'one'},{tmp_path / 'two'}")
    page = Page(tmp_path / "page.html")
    assert "“first”" in page.text
    assert "8 of 9 images are shown" in page.text
    assert "page.html" in capsys.readouterr().out


def test_sixteen_bit_and_wide_pictures_are_brought_to_size(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    Image.fromarray(np.full((10, 3200), 65535, dtype=np.uint16)).save(folder / "grid.png")
    (image,) = Page(write_report(tmp_path)).all("img")
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
    assert decoded.shape == (5, 1600)
    assert decoded.min() == 255


def _polyline(svg: Any, style: str) -> np.ndarray:
    lines = [node for node in svg.iter("polyline") if node.get("class") == style]
    return np.array([[float(v) for v in pair.split(",")] for pair in lines[0].get("points").split()])


def test_chart_scales() -> None:
    line = _polyline(line_chart([Series("train", "train", [(1, 0.0), (2, 1.0), (3, 2.0)])], label="loss"), "train")
    assert np.allclose(np.diff(line[:, 0]), np.diff(line[:, 0])[0], atol=0.11)
    assert line[0, 1] - line[1, 1] == pytest.approx(line[1, 1] - line[2, 1], abs=0.11)
    assert line[0, 1] > line[2, 1], "larger values stand higher"

    svg = line_chart([Series("train", "train", [(1, 1e-4), (2, 1e-2), (3, 1.0)])], label="loss")
    line = _polyline(svg, "train")
    assert line[0, 1] - line[1, 1] == pytest.approx(line[1, 1] - line[2, 1], abs=0.11), "equal factors, equal steps"
    labels = [node.text for node in svg.iter("text")]
    assert {"0.0001", "0.01", "1", "log scale", "epoch"} <= set(labels)
    assert line_chart([Series("train", "train", [(1, 5e-5)])], label="one point") is not None


def test_smoothing_does_not_lag() -> None:
    line = [(float(x), 100.0 - x) for x in range(30)]
    assert smoothed(line) == [(x, pytest.approx(y)) for x, y in line]
    noisy = [(float(x), float(x % 2)) for x in range(31)]
    assert all(abs(y - 0.5) < 0.06 for _, y in smoothed(noisy)[4:-4])


def test_run_called_evaluation_is_found(tmp_path: Path) -> None:
    """Where evaluate.json writes by default: runs/evaluation/evaluation/summary.json."""
    make_training(tmp_path / "runs/diffusion", stage="diffusion", started="2026-01-31T10:00:00+00:00")
    run = tmp_path / "runs/evaluation"
    run.mkdir()
    (run / "manifest.json").write_text('{"task": "cxr_ldm evaluation", "started": "2026-01-31T12:00:00+00:00"}')
    add_evaluation(run)
    found = find_runs(tmp_path / "runs")
    assert [part.name for part in found] == ["diffusion", "evaluation"]
    assert found[1].evaluation
