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


@pytest.mark.reliability(12)
def test_configuration_is_shown_without_paths(tmp_path: Path) -> None:
    """Folders of data can be called after patients."""
    config = {"dataset_dir": "patient_1", "prompt": "/home/patient_2.txt", "train": [{"files": "C:\\patient_3"}, 3]}
    config |= {"reference": ["patient_4.nii"], "unit": "$1 / 2", "scheduler": {"dataset_dir": "@dataset_dir"}}
    folder = make_training(tmp_path / "run", stage="diffusion", started="2026-11-01T00:00:00+00:00")
    (folder / "config.json").write_text(json.dumps(config))
    page = write_report(folder).read_text()
    assert "patient_" not in page
    assert page.count("(path left out)") == 5
    assert "$1 / 2" in page


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
        "No evaluation was run", "No generated images to show", "No curves were recorded", "No previews were saved",
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


def comparison_rows() -> list[dict[str, Any]]:
    """As the evaluation of brain_controlnet writes them: a row for each method and measure, then differences."""
    rows: list[dict[str, Any]] = [
        {"name": "reconstruction_ms_ssim", "value": 0.98, "sd": 0.0123, "ci_low": 0.97, "ci_high": 0.99, "n": 5},
    ]
    values = {"ControlNet": (26.2458, 0.02632), "FLAIR copied": (14.5, 0.1104), "<b>U-Net</b>": (None, None)}
    for key, label, index in (("psnr", "PSNR (dB)", 0), ("mae", "MAE", 1)):
        for method, numbers in values.items():
            value = numbers[index]
            ends = {"ci_low": value, "ci_high": value * 1.1} if value is not None else {"ci_low": None, "ci_high": None}
            note = f"means over subjects; {label} note" + ("; its own" if method == "ControlNet" else "")
            fields = {"method": method, "measure": key, "sd": value and value / 10, "n": 5 if value else 0}
            rows.append({"name": f"{label}, {method}", "value": value, "note": note, **ends, **fields})
    rows.append(
        {
            "name": "PSNR (dB), ControlNet minus FLAIR copied", "value": 11.75, "sd": 1.0, "ci_low": 11.0,
            "ci_high": 12.0, "n": 5, "note": "paired", "method": "ControlNet - FLAIR copied", "measure": "psnr",
        }
    )  # fmt: skip
    return rows


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation/summary.json").write_text(json.dumps(rows))
    return folder


def test_methods_stand_beside_one_another(tmp_path: Path) -> None:
    page = Page(write_report(write_summary(tmp_path, comparison_rows())))
    tables = page.rows
    assert ["Method", "PSNR (dB)", "MAE"] in tables
    assert ["ControlNet", "26.25 ± 2.6226.25 to 28.87", "0.02632 ± 0.002630.02632 to 0.02895"] in tables
    assert ["FLAIR copied", "14.50 ± 1.4514.50 to 15.95", "0.1104 ± 0.01100.1104 to 0.1214"] in tables
    assert ["<b>U-Net</b>", "–", "–"] in tables, "escaped, and not measured"
    assert ["Method", "PSNR (dB)"] in tables
    assert ["ControlNet − FLAIR copied", "11.75 ± 1.0011.00 to 12.00"] in tables
    assert ["Reconstruction MS-SSIM", "0.9800 ± 0.0123", "0.97 to 0.99", "5", ""] in tables
    assert ["Measure", "Mean ± sd", "95 % interval", "n", "Note"] in tables
    assert "n = 5; means over subjects." in page.text
    assert "PSNR (dB): PSNR (dB) note" in page.text
    assert "ControlNet: its own" in page.text
    assert not page.all("b")
    compared, single = ([row[:1] for row in tables].index([name]) for name in ("Method", "Measure"))
    assert compared < single, "the comparison comes first"


def test_numbers_of_rows_and_slices_have_no_spread(tmp_path: Path) -> None:
    folder = write_summary(tmp_path, comparison_rows())
    (folder / "evaluation/per_image.csv").write_text("row,slice,training_row_pixel,psnr\n0,5,71,20.5\n1,6,72,21.5\n")
    names = [row[0] for row in Page(write_report(folder)).rows if row]
    assert "PSNR" in names
    assert not {"Row", "Slice", "Training row pixel"} & set(names)


def test_cells_with_other_numbers_of_subjects_say_so(tmp_path: Path) -> None:
    rows = comparison_rows()
    rows[1]["n"] = 4
    page = Page(write_report(write_summary(tmp_path, rows)))
    assert ["ControlNet", "26.25 ± 2.6226.25 to 28.87n = 4", "0.02632 ± 0.002630.02632 to 0.02895n = 5"] in page.rows


def test_groups_of_rows_get_headings(tmp_path: Path) -> None:
    rows = [{"name": "kid", "value": 0.5, "n": 9}, {"name": "psnr", "value": 20.0, "n": 3, "group": "Subject <A>"}]
    page = Page(write_report(write_summary(tmp_path, rows)))
    assert [row for row in page.rows if len(row) == 5][2:] == [
        ["Measure", "Value", "95 % interval", "n", "Note"],
        ["KID", "0.5", "–", "9", ""],
        ["Measure", "Value", "95 % interval", "n", "Note"],
        ["PSNR", "20", "–", "3", ""],
    ]
    assert page.text.index("KID") < page.text.index("Subject <A>") < page.text.index("PSNR")


def add_volume(folder: Path, name: str = "miller_T1w", *, picture: bool = True, **said: Any) -> None:
    """What `SaveTranslatedVolumed` leaves of one volume."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "synthetic": True, "source": "miller_FLAIR.nii.gz", "conditioning_scale": 1.0, "guidance_scale": None,
        "num_inference_steps": 25, "seed": 0, "weights_sha256": "f" * 64, "monai_version": "1.6.1",
        "intensity": {"unit": "[0, 1]"}, "files": {"image": f"{name}.nii.gz"},
    }  # fmt: skip
    if picture:
        write_picture(folder / f"{name}.png", gradient(1, (40, 120)))
        content["files"]["picture"] = f"{name}.png"
        content["panels"] = ["FLAIR", "generated"]
    (folder / f"{name}.nii.gz").write_bytes(b"")
    (folder / f"{name}.json").write_text(json.dumps(content | said))


def test_translated_volumes_are_shown_with_their_settings(tmp_path: Path) -> None:
    run = tmp_path / "runs/inference"
    scanner = {"unit": "scanner intensities of the reference", "low": 3.0, "high": 812.5}
    add_volume(run / "sub-1/ses-1/anat/deep")
    add_volume(run / "sub-2", intensity=scanner)
    add_volume(run / "sub-2", "other_T1w", conditioning_scale=0.5, picture=False)
    (run / "manifest.json").write_text(json.dumps({"task": "brain_controlnet volumes", "started": "2026-01-31"}))
    add_volume(run / "second", name="x")
    (run / "second/manifest.json").write_text('{"task": "another run", "started": "2026-02-01"}')
    found = {found.name: len(found.translations) for found in find_runs(tmp_path / "runs")}
    assert found == {"inference": 3, "inference / second": 1}
    page = Page(write_report(tmp_path / "runs"))
    assert "Brain ControlNet volumes" in page.text
    assert "3 translated volumes" in page.text
    assert "2 volumes; conditioning scale 1.0, steps 25, seed 0" in page.text
    assert "1 volume, 0 shown; conditioning scale 0.5, steps 25, seed 0" in page.text
    assert "From left to right: FLAIR, generated." in page.text
    assert "Volume 2; values in scanner intensities of the reference: 0 became 3, 1 became 812.5" in page.text
    assert "No pictures were written." in page.text
    assert len(page.all("img")) == 3
    assert "No generated images to show" not in page.text
    assert "No curves" not in page.text, "nobody expects curves of an inference"
    assert "miller" not in page.source, "names of files can be identifiers"


def test_volumes_without_a_manifest_tell_their_origin(tmp_path: Path) -> None:
    add_volume(tmp_path)
    page = Page(write_report(tmp_path))
    assert "Weights, SHA-256ffffffffffffffff…" in page.text
    add_volume(tmp_path / "out", files={"picture": "../miller_T1w.png"})
    (tmp_path / "out/miller_T1w.png").unlink()
    assert len(Page(write_report(tmp_path / "out")).all("img")) == 0, "no picture from another folder"


def test_other_json_beside_volumes_is_no_result(tmp_path: Path) -> None:
    """A BIDS data set has NIfTI and JSON pairs of its own."""
    add_volume(tmp_path, synthetic=False)
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        find_runs(tmp_path)


def test_what_saves_volumes_and_the_report_understand_each_other(tmp_path: Path) -> None:
    import nibabel
    import torch
    from monai.data import MetaTensor

    from shared.transforms.volume_saving import SaveTranslatedVolumed

    flair = tmp_path / "in/sub-1_FLAIR.nii"
    flair.parent.mkdir()
    values = np.zeros((6, 9, 4), dtype=np.int16)
    values[1:5, 1:8, 2] = np.arange(28).reshape(4, 7) + 5
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])), flair)
    pred = MetaTensor(torch.rand(2, 6, 9, 4), affine=nibabel.load(flair).affine, meta={"filename_or_obj": str(flair)})
    save = SaveTranslatedVolumed(output_dir=tmp_path / "out", num_inference_steps=5, seed=3)
    save({"pred": pred})
    (run,) = find_runs(tmp_path / "out")
    (volume,) = run.translations
    assert volume.path == tmp_path / "out/sub-1_T1w.png"
    assert volume.panels == ("FLAIR", "generated", "standard deviation x 4")
    assert volume.settings == {"num_inference_steps": 5, "seed": 3}


def save_masks(folder: Path, *, num_samples: int = 2) -> None:
    """What `SaveSegmentationd` leaves of a picture and of a volume."""
    import nibabel
    import torch
    from monai.data import MetaTensor

    from shared.transforms.mask_saving import SaveSegmentationd

    source = folder / "in"
    write_picture(source / "sub-1/miller.png", np.stack([gradient(index) for index in range(3)], axis=-1))
    values = np.arange(6 * 9 * 4, dtype=np.int16).reshape(6, 9, 4)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])), source / "jones.nii")
    save = SaveSegmentationd(
        output_dir=folder / "out", source=source, num_samples=num_samples, class_names=["background", "polyp"],
        seed=3, num_inference_steps=1,
    )  # fmt: skip
    for name, shape in (("sub-1/miller.png", (40, 56)), ("jones.nii", (6, 9, 4))):
        pred = torch.zeros(1 + (num_samples > 1), *shape)
        pred[0, : shape[0] // 2], pred[1:] = 0.9, 0.75
        affine = nibabel.load(source / name).affine if len(shape) == 3 else None
        save({"pred": MetaTensor(pred, affine=affine, meta={"filename_or_obj": str(source / name)})})


def test_what_saves_masks_and_the_report_understand_each_other(tmp_path: Path) -> None:
    save_masks(tmp_path)
    (tmp_path / "out/manifest.json").write_text(json.dumps({"task": "sdseg masks", "started": "2026-01-31"}))
    (run,) = find_runs(tmp_path / "out")
    assert run.translations == []
    assert len(run.masks) == 2
    page = Page(write_report(tmp_path / "out"))
    assert "2 masks; samples 2, steps 1, seed 3, threshold 0.5" in page.text
    assert "Image 1, mask: polyp 1.3 ml" in page.text, "half of 216 voxels of 12 mm3"
    assert "Image 2, mask: polyp 50.0 %ProbabilityAgreement of the samples" in page.text
    assert len(page.all("img")) == 4, "of a volume one picture, of its slices"
    assert "No generated images to show" not in page.text
    assert "No curves" not in page.text, "nobody expects curves of an inference"
    assert "miller" not in page.source, "names of files can be identifiers"
    assert "jones" not in page.source


def test_masks_show_no_picture_of_another_folder(tmp_path: Path) -> None:
    save_masks(tmp_path, num_samples=1)
    sidecar = tmp_path / "out/sub-1/miller_mask.json"
    content = json.loads(sidecar.read_text())
    write_picture(tmp_path / "out/secret.png", gradient(0))
    content["files"]["overlay"] = "../secret.png"
    sidecar.write_text(json.dumps(content))
    (run,) = find_runs(tmp_path / "out/sub-1")
    assert [list(one.pictures) for one in run.masks] == [["probability"]]
