# SPDX-License-Identifier: Apache-2.0
"""Tests of `tools.phantoms`: the chest phantom, its reports and its dataset folder."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import digest
from tools.phantoms.__main__ import main
from tools.phantoms.chest_anatomy import ENLARGED_RATIO, NORMAL_RATIO, ZONES
from tools.phantoms.chest_organs import Film, heart
from tools.phantoms.cxr_ldm import (
    FINDINGS,
    SECTIONS,
    SEVERITIES,
    Anatomy,
    Finding,
    draw_finding,
    draw_patient,
    finding_prompt,
    make_dataset,
    render,
    write_report,
)

SMALL_WORDS = {"small", "mild", "mildly", "slightly", "focal", "tiny"}
LARGE_WORDS = {"large", "big", "marked", "markedly", "severe", "severely", "extensive"}
POSITIVE = {
    "cardiomegaly": r"cardiomegaly|enlarged",
    "pleural_effusion": r"(small|mild|large|big)\b.*\beffusion",
    "opacity": r"(small|focal|large|extensive)\b.*\b(opacity|consolidation)",
    "pneumothorax": r"(small|tiny|large|big)\b.*\bpneumothorax",
}


@pytest.fixture
def patient() -> Anatomy:
    """A patient standing straight, so that the midline is the middle of the film within the position's shift."""
    return dataclasses.replace(draw_patient(np.random.default_rng(3)), rotation=0.0)


def film_of(patient: Anatomy, finding: Finding, *, size: int = 128, seed: int = 0) -> np.ndarray:
    return render(patient, finding, size=size, rng=np.random.default_rng(seed))


def read_text(text: str) -> list[tuple[str, str, str | None]]:
    """Independent reader: every (finding, severity, side) that the sentences affirm."""
    found = []
    for sentence in re.findall(r"[^.]+\.", text.lower()):
        if re.match(r"\s*(no|there is no)\b", sentence):
            continue
        for kind, pattern in POSITIVE.items():
            if re.search(pattern, sentence):
                words = set(re.findall(r"[a-z]+", sentence))
                severity = {(True, False): "small", (False, True): "large"}[
                    bool(words & SMALL_WORDS), bool(words & LARGE_WORDS)
                ]
                sides = words & {"left", "right"}
                assert len(sides) == (kind != "cardiomegaly"), sentence
                found.append((kind, severity, sides.pop() if sides else None))
    return found


def every_finding() -> list[Finding]:
    rng = np.random.default_rng(0)
    return [draw_finding(name, severity=severity, rng=rng) for name in FINDINGS for severity in SEVERITIES]


# pictures


@pytest.mark.parametrize("size", [64, 128, 200])
def test_render_shape_range_and_polarity(patient: Anatomy, size: int) -> None:
    image = film_of(patient, Finding("no_finding", "none"), size=size)
    assert image.shape == (size, size)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1

    def mean(x: float, y: float) -> float:
        row, column = (int((v / 36 + 0.5) * size) for v in (y, x))
        return float(image[row - 2 : row + 3, column - 2 : column + 3].mean())

    lung, spine, liver = mean(-8.5, 0.0), mean(0.0, 3.0), mean(-8.0, 14.0)
    assert image[-size // 8, 0] < 0.15, "air beside the trunk is black"
    assert lung < 0.55 < liver < spine
    assert mean(5.0, 5.0) > mean(-6.0, 3.0) + 0.1, "the heart's bulk lies on the image's right"


def test_render_is_deterministic_and_noise_is_low(patient: Anatomy) -> None:
    healthy = Finding("no_finding", "none")
    first = film_of(patient, healthy)
    assert np.array_equal(first, film_of(patient, healthy))
    assert not np.array_equal(first, film_of(patient, healthy, seed=1))
    # second differences of neighbours in the flat abdomen: the drawing cancels, white noise gives 6 sigma^2
    flat = first[116:126, 20:50]
    sigma = np.std(flat[:, :-2] - 2 * flat[:, 1:-1] + flat[:, 2:]) / np.sqrt(6)
    assert 0.001 < sigma < 0.015


def test_patients_differ(patient: Anatomy) -> None:
    other = dataclasses.replace(draw_patient(np.random.default_rng(4)), rotation=0.0)
    healthy = Finding("no_finding", "none")
    assert np.abs(film_of(patient, healthy) - film_of(other, healthy)).mean() > 0.015


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", ["pleural_effusion", "opacity", "pneumothorax"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_finding_changes_its_own_side_only(patient: Anatomy, side: str, kind: str, severity: str) -> None:
    name = kind if kind == "pneumothorax" else f"{side}_{kind}"
    zones = ZONES if kind == "opacity" else (None,)
    for zone in zones:
        change = film_of(patient, Finding(name, severity, side, zone)) - film_of(patient, Finding("no_finding", "none"))
        halves = {"right": change[:, :62], "left": change[:, 66:]}
        other = halves["right" if side == "left" else "left"]
        assert np.abs(other).max() == 0, "the patient's left is the image's right"
        area = (np.abs(halves[side]) > 0.05).mean()
        assert area > 0.01, f"hardly visible: {area:.3%} of the half film"
        # fluid brightens, free air darkens
        assert np.sign(halves[side].sum()) == (-1 if kind == "pneumothorax" else 1)


@pytest.mark.parametrize("kind", ["right_pleural_effusion", "left_opacity", "pneumothorax", "cardiomegaly"])
def test_large_changes_more_than_small(patient: Anatomy, kind: str) -> None:
    side = {"cardiomegaly": None, "pneumothorax": "right"}.get(kind, kind.split("_")[0])
    zone = "mid" if kind.endswith("opacity") else None
    healthy = film_of(patient, Finding("no_finding", "none"))
    small, large = (
        np.abs(film_of(patient, Finding(kind, severity, side, zone)) - healthy).sum() for severity in SEVERITIES
    )
    assert large > 1.5 * small


def test_effusion_is_low_and_zones_are_in_order(patient: Anatomy) -> None:
    healthy = film_of(patient, Finding("no_finding", "none"))
    rows = np.arange(128)

    def level(finding: Finding) -> float:
        weight = np.clip(film_of(patient, finding) - healthy, 0, None).sum(axis=1)
        return float((weight * rows).sum() / weight.sum())

    upper, mid, lower = (level(Finding("left_opacity", "small", "left", zone)) for zone in ZONES)
    assert upper + 10 < mid < lower - 10
    assert level(Finding("left_pleural_effusion", "small", "left")) > lower + 5
    assert level(Finding("left_pleural_effusion", "large", "left")) > 64


def test_cardiothoracic_ratio_grows_as_stated(patient: Anatomy) -> None:
    assert NORMAL_RATIO[1] < 0.5 < ENLARGED_RATIO["small"][0] < ENLARGED_RATIO["large"][0]
    axis = (np.arange(720) + 0.5) * 0.05 - 18
    film = Film(axis[None, :] + 0 * axis[:, None], axis[:, None] + 0 * axis[None, :], 0.05)
    for ratio in (0.45, 0.60, 0.68):
        columns = axis[(heart(patient, film, ratio) > 0).any(axis=0)]
        assert np.ptp(columns) / (2 * patient.thorax_half_width) == pytest.approx(ratio, abs=0.01)
        assert columns.max() < patient.thorax_half_width, "the apex stays in the chest"
        assert columns.max() > 1.2 * -columns.min(), "the heart lies to the patient's left"
    healthy = film_of(patient, Finding("no_finding", "none"))
    widths = [0.0]
    for severity in SEVERITIES:
        change = film_of(patient, Finding("cardiomegaly", severity)) - healthy
        widths.append(float((change > 0.05).any(axis=0).sum()))
        assert change.sum() > 0
    assert widths == sorted(set(widths)), "the film itself shows a wider heart"


def test_render_and_draw_reject_bad_arguments(patient: Anatomy) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="size: expected at least 32 pixels, got 16"):
        render(patient, Finding("no_finding", "none"), size=16, rng=rng)
    with pytest.raises(ValueError, match="finding: expected one of no_finding, .*got 'fracture'"):
        draw_finding("fracture", severity="small", rng=rng)
    with pytest.raises(ValueError, match="severity: expected small or large for cardiomegaly, got 'none'"):
        draw_finding("cardiomegaly", severity="none", rng=rng)
    with pytest.raises(ValueError, match="side: expected left for left_opacity, got 'right'"):
        Finding("left_opacity", "small", "right", "mid")
    with pytest.raises(ValueError, match="zone: expected upper or mid or lower for left_opacity, got None"):
        Finding("left_opacity", "small", "left")


# texts


@pytest.mark.parametrize("finding", every_finding(), ids=lambda f: f"{f.name}-{f.severity}")
def test_report_says_the_finding_and_nothing_against_it(finding: Finding) -> None:
    rng = np.random.default_rng(11)
    texts = [write_report(finding, rng=rng) for _ in range(200)]
    kind = finding.name.removeprefix("left_").removeprefix("right_")
    for text in texts:
        affirmed = read_text(text)
        expected = [] if finding.name == "no_finding" else [(kind, finding.severity, finding.side)]
        assert affirmed == expected, text
        sentences = text.split(". ")
        assert 2 <= len(sentences) <= 5
        assert text.endswith(".")
        assert len(set(sentences)) == len(sentences)
        assert len(text.split()) <= 55, "must fit 77 tokens"
        if finding.zone:
            assert set(ZONES) & set(re.findall(r"[a-z]+", text)) == {finding.zone}
        forbidden = {
            "no_finding": r"blunt|enlarged",
            "cardiomegaly": r"heart size|silhouette is normal",
            "pleural_effusion": rf"no pleural|both costophrenic|lungs are|{finding.side} lung is clear",
            "opacity": rf"lungs are|no focal consolidation|{finding.side} lung is clear|in the {finding.side} lung is",
            "pneumothorax": rf"no pneumothorax|lungs are|{finding.side} lung is clear",
        }[kind]
        assert not re.search(forbidden, text.lower()), text
    assert len(set(texts)) > 100, "the grammar is varied"


def test_finding_prompt() -> None:
    assert finding_prompt("left_pleural_effusion", severity="small") == "There is a small left pleural effusion."
    assert finding_prompt("pneumothorax", side="left") == "There is a large left pneumothorax."
    assert finding_prompt("right_opacity", zone="lower") == "There is a large opacity in the right lower lung zone."
    for name in FINDINGS[1:]:
        for severity in SEVERITIES:
            ((kind, said, _),) = read_text(finding_prompt(name, severity=severity))
            assert (name.endswith(kind), said) == (True, severity)
    assert read_text(finding_prompt("no_finding", severity="none")) == []
    with pytest.raises(ValueError, match="finding: expected one of"):
        finding_prompt("edema")
    with pytest.raises(ValueError, match="severity: expected small or large for cardiomegaly, got 'huge'"):
        finding_prompt("cardiomegaly", severity="huge")
    with pytest.raises(ValueError, match="zone: expected upper or mid or lower, got 'apex'"):
        finding_prompt("left_opacity", zone="apex")


# dataset folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "cxr"
    assert make_dataset(str(folder), n=112, size=64) == str(folder / "datalist.json")
    return folder


def read(folder: Path) -> dict[str, list[dict]]:
    datalist = json.loads((folder / "datalist.json").read_text())
    return {section: datalist[section] for section in SECTIONS}


def test_dataset_items(dataset: Path) -> None:
    items = [item for section in read(dataset).values() for item in section]
    assert len(items) == 112
    assert len({item["image"] for item in items}) == 112
    assert len(list((dataset / "images").iterdir())) == 112
    for item in items:
        assert not Path(item["image"]).is_absolute()
        with Image.open(dataset / item["image"]) as image:
            assert (image.mode, image.size) == ("L", (64, 64))
        assert item["view"] == "PA"
        assert item["study"].startswith(item["subject"])
        labels = item["labels"]
        assert set(labels) == {"finding", "severity", "sentences"}
        assert labels["sentences"] == len(item["text"].split(". "))
        expected = [] if labels["finding"] == "no_finding" else [labels["severity"]]
        affirmed = read_text(item["text"])
        assert [severity for _, severity, _ in affirmed] == expected
        for kind, _, side in affirmed:
            assert labels["finding"] in (kind, f"{side}_{kind}")


def test_dataset_is_balanced_and_patients_are_disjoint(dataset: Path) -> None:
    sections = read(dataset)
    items = [item for section in sections.values() for item in section]
    assert Counter(item["labels"]["finding"] for item in items) == dict.fromkeys(FINDINGS, 16)
    severities = Counter((item["labels"]["finding"], item["labels"]["severity"]) for item in items)
    assert severities.pop(("no_finding", "none")) == 16
    assert set(severities.values()) == {8}
    subjects = [{item["subject"] for item in section} for section in sections.values()]
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    studies = Counter(item["subject"] for item in items)
    assert set(studies.values()) == {1, 2, 3, 4}
    for section, share in zip(sections.values(), (0.7, 0.15, 0.15), strict=True):
        assert abs(len(section) - share * 112) <= 3
        assert {item["labels"]["finding"] for item in section} == set(FINDINGS)


def test_same_patient_keeps_the_anatomy(dataset: Path) -> None:
    # shoulders and neck (top eighth of the film) are touched by no finding
    by_subject: dict[str, list[np.ndarray]] = {}
    for section in read(dataset).values():
        for item in section:
            with Image.open(dataset / item["image"]) as image:
                top = np.asarray(image, dtype=float)[:6]
            by_subject.setdefault(item["subject"], []).append(top)
    groups = list(by_subject.values())
    same = [np.abs(group[0] - group[1]).mean() for group in groups if len(group) > 1]
    different = [np.abs(a[0] - b[0]).mean() for a, b in zip(groups, groups[1:], strict=False)]
    assert np.mean(same) < 0.8 * np.mean(different)


def test_dataset_is_deterministic(tmp_path: Path, dataset: Path) -> None:
    for name, n, seed in (("a", 28, 5), ("b", 28, 5), ("c", 28, 6), ("more", 42, 5)):
        make_dataset(str(tmp_path / name), n=n, size=64, seed=seed)
    a, b, c, more = (digest(tmp_path / name) for name in ("a", "b", "c", "more"))
    assert a == b
    assert not set(a.values()) & set(c.values())
    images = [name for name in a if name.endswith(".png")]
    assert sum(a[name] == more.get(name) for name in images) == 28, "an item does not depend on n"
    texts = [[item["text"] for section in read(tmp_path / name).values() for item in section] for name in ("a", "more")]
    assert texts[0] == texts[1][:28]


def test_other_splits(tmp_path: Path) -> None:
    for split, empty in (("1,0,0", {"validation", "test"}), ((0.0, 0.5, 0.5), {"training"})):
        folder = tmp_path / str(len(empty))
        make_dataset(str(folder), n=14, size=32, split=split)
        sections = read(folder)
        assert {name for name, items in sections.items() if not items} == empty
        assert sum(map(len, sections.values())) == 14
    for seed in range(12):
        folder = tmp_path / f"few{seed}"
        make_dataset(str(folder), n=12, size=32, seed=seed)
        assert all(read(folder).values()), "no section is empty even for a dozen images"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n: expected at least 3 images for 3 sections with a share, got 2"),
        ({"n": 3, "seed": 0}, "n: expected images of at least 3 patients, one per section, got"),
        ({"split": (0.5, 0.2, 0.2)}, r"split: expected shares that sum to 1, got .* with sum 0.9"),
        ({"split": (0.5, 0.5)}, r"split: expected three shares >= 0 \(training, validation, test\)"),
        ({"split": (1.2, -0.1, -0.1)}, "split: expected three shares >= 0"),
        ({"split": "most,some,few"}, "split: expected three numbers such as 0.7,0.15,0.15, got 'most,some,few'"),
        ({"size": 8}, "size: expected at least 32 pixels, got 8"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "cxr"
    make_dataset(str(folder), n=28, size=32)
    (folder / "notes.txt").write_text("mine")
    before = digest(folder)
    with pytest.raises(FileExistsError, match=rf"{re.escape(str(folder))}: expected an empty or absent folder"):
        make_dataset(str(folder), n=14, size=32)
    assert digest(folder) == before
    make_dataset(str(folder), n=14, size=32, overwrite=True)
    assert len(list((folder / "images").iterdir())) == 14
    assert (folder / "notes.txt").read_text() == "mine"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cxr"
    main(["cxr_ldm", "--out", str(folder), "--n", "14", "--size", "32", "--seed", "2", "--split", "0.6,0.2,0.2"])
    assert capsys.readouterr().out.strip() == str(folder / "datalist.json")
    make_dataset(str(tmp_path / "direct"), n=14, size=32, seed=2, split=(0.6, 0.2, 0.2))
    assert digest(folder) == digest(tmp_path / "direct")


def test_large_film_and_speed(patient: Anatomy) -> None:
    assert film_of(patient, Finding("pneumothorax", "large", "left"), size=512).shape == (512, 512)
    began = time.process_time()
    for seed in range(10):
        film_of(patient, Finding("left_opacity", "small", "left", "mid"), seed=seed)
    assert (time.process_time() - began) / 10 < 0.1, "2000 films should take about a minute"


def test_canonical_prompts_replace_the_reports_and_nothing_else(tmp_path):
    make_dataset(str(tmp_path / "report"), n=21, size=32)
    make_dataset(str(tmp_path / "prompt"), n=21, size=32, text="prompt")
    pairs = zip(
        *(
            [
                item
                for section in SECTIONS
                for item in json.loads((tmp_path / name / "datalist.json").read_text())[section]
            ]
            for name in ("report", "prompt")
        ),
        strict=True,
    )
    for report, prompt in pairs:
        assert prompt["text"].count(".") == 1
        assert {key: prompt[key] for key in ("image", "subject")} == {key: report[key] for key in ("image", "subject")}
        for side in ("left", "right"):
            if side in prompt["text"]:
                assert side in report["text"]
        same = [(tmp_path / name / prompt["image"]).read_bytes() for name in ("report", "prompt")]
        assert same[0] == same[1]
    with pytest.raises(ValueError, match="text: expected report or prompt, got 'poem'"):
        make_dataset(str(tmp_path / "x"), text="poem")
