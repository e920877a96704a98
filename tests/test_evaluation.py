# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from monai.transforms import Compose, SelectItemsd
from PIL import Image

from shared.handlers.evaluation import GenerativeEvaluation
from shared.label_sentences import CHEXPERT_LABELS
from shared.metrics.measures import (
    FrechetAndKernelDistance,
    Memorization,
    RealDiversity,
    ReconstructionMsssim,
    SampleDiversity,
)
from shared.metrics.prompt_measures import CHEXPERT_TO_XRV, Agreement, PathologyAgreement
from shared.metrics.translation import TranslationQuality
from shared.transforms.labels import LabelsToTextd
from shared.transforms.volumes import for_display

NAMES = ("left", "right", "none")
HEIGHT, WIDTH = 48, 40
SSIM: dict[str, Any] = {"kernel_size": 7, "weights": (0.3, 0.4, 0.3)}


def _picture(finding: str, seed: int) -> torch.Tensor:
    """(1, 48, 40): smooth noise, with a bright blob on the side that the finding names."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * F.interpolate(torch.rand(1, 1, 6, 5, generator=generator), size=(HEIGHT, WIDTH), mode="bilinear")[0]
    if finding != "none":
        column = 6 if finding == "left" else 26
        image[:, 16:28, column : column + 8] += 0.55
    return image.clamp(0, 1)


def _items(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    items = []
    for i in range(n):
        finding = NAMES[i % 3]
        meta = {"filename_or_obj": f"/data/SMITH^JOHN_{seed + i}/p100{i}.png"}
        image = MetaTensor(_picture(finding, seed + i), meta=meta)
        items.append({"image": image, "labels": {"finding": finding}, "subject": f"p100{i}", "number": seed + i})
    return items


class BlobClassifier:
    """Reads the blob; its features are the small image."""

    name = "blob features"
    pathologies = ("Left blob", "Right blob", "Edema")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, 8).flatten(1)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        left = images[:, 0, 18:26, 8:12].mean((1, 2)) - 0.5
        right = images[:, 0, 18:26, 28:32].mean((1, 2)) - 0.5
        return torch.softmax(20 * torch.stack([left, right, torch.full_like(left, 0.1)], dim=1), dim=1)


class PromptedPictures(Inferer):
    """A generator that draws what the label says, except for the rows in ``wrong`` (and slightly out of range)."""

    def __init__(self, wrong: tuple[int, ...] = (), copies: dict[int, torch.Tensor] | None = None) -> None:
        self.row, self.wrong, self.copies = 0, wrong, copies or {}

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        samples = []
        for _ in inputs:
            finding = NAMES[(self.row + (self.row in self.wrong)) % 3]
            samples.append(self.copies.get(self.row, 1.25 * _picture(finding, 5000 + self.row)))
            self.row += 1
        return torch.stack(samples)


def _run(
    folder: Path,
    measures: list[Any],
    *,
    n: int = 30,
    inferer: Inferer | None = None,
    decollate: bool = True,
    items: list[dict[str, Any]] | None = None,
    transform: Any = None,
    **options: Any,
) -> SupervisedEvaluator:
    handler = GenerativeEvaluation(folder, measures, **options)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items or _items(n), transform), batch_size=7),
        network=torch.nn.Identity(),
        inferer=inferer or PromptedPictures(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"].to(device), None),
        val_handlers=[handler],
        decollate=decollate,
    )
    evaluator.run()
    return evaluator


def _blurred(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def _summary(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert all(set(row) == {"name", "value", "ci_low", "ci_high", "n", "note"} for row in rows)
    return {row["name"]: row for row in rows}


def _per_image(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation" / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.reliability(13)
@pytest.mark.parametrize("decollate", [True, False])
def test_everything_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture, decollate: bool) -> None:
    classifier = BlobClassifier()
    training = [{"image": _picture(NAMES[i % 3], 9000 + i)} for i in range(45)]
    copies = {2: training[31]["image"].clone(), 11: training[5]["image"] + 0.01}
    measures = [
        ReconstructionMsssim(**SSIM),
        SampleDiversity(**SSIM),
        RealDiversity(**SSIM),
        FrechetAndKernelDistance(classifier, subsets=20),
        Agreement(classifier, class_names=NAMES),
        PathologyAgreement(classifier, findings={"left": "Left blob", "right": "Right blob"}),
        Memorization(training, feature_extractor=classifier, batch_size=10),
    ]
    inferer = PromptedPictures(wrong=(4, 9), copies=copies)
    with caplog.at_level(logging.INFO):
        evaluator = _run(tmp_path, measures, inferer=inferer, reconstruct=_blurred, decollate=decollate)
    summary, table = _summary(tmp_path), _per_image(tmp_path)

    # 2 wrong prompts; the copies of training rows 31 (right) and 5 (none) show 'none' prompts: row 2 is wrong too.
    agreement = summary["Prompt agreement"]
    assert (agreement["value"], agreement["n"]) == (27 / 30, 30)
    assert agreement["ci_low"] < 0.9 < agreement["ci_high"]
    assert summary["Prompt agreement, left"]["n"] == 10
    assert abs(summary["Prompt agreement, wrong prompts (control)"]["value"] - 1 / 3) < 0.05
    assert summary["Classifier accuracy on real images"]["value"] == 1.0
    assert summary["AUROC, Left blob"]["value"] > 0.8
    assert "AUROC, Edema" not in summary
    assert [row["row"] for row in table if row["prompted_finding"] != row["predicted_finding"]] == ["2", "4", "9"]

    reconstruction = summary["MS-SSIM of reconstructions"]
    assert 0.5 < reconstruction["ci_low"] < reconstruction["value"] < reconstruction["ci_high"] < 1
    assert "data range 1, kernel 7, sigma 1.5, 3 scales" in reconstruction["note"]
    mean = np.mean([float(row["reconstruction_ms_ssim"]) for row in table])
    assert mean == pytest.approx(reconstruction["value"], abs=1e-5)
    assert "all 435 unordered pairs" in summary["MS-SSIM between samples"]["note"]
    assert "% of pred lay outside" in summary["MS-SSIM between samples"]["note"]
    assert summary["MS-SSIM between real images"]["n"] == 30

    fid = summary["FID (blob features)"]
    assert (fid["n"], fid["ci_low"]) == (30, None)
    assert "30 samples, 30 real images, 30 features" in fid["note"]
    assert summary["FID floor, real versus real (blob features)"]["n"] == 15
    assert summary["FID at the floor's n (blob features)"]["n"] == 15

    assert table[2]["near_copy"] == table[11]["near_copy"] == "1"
    assert (table[2]["training_row_pixel"], table[11]["training_row_correlation"]) == ("31", "5")
    assert "45 training images" in summary["Near copies of training images"]["note"]
    assert evaluator.state.metrics["Prompt agreement"] == 0.9

    assert len(table) == 30
    assert table[0]["image_id"] == hashlib.sha256(b"/data/SMITH^JOHN_0/p1000.png").hexdigest()[:12]
    texts = [path.read_text() for path in (tmp_path / "evaluation").glob("*.[jc]*")] + [caplog.text]
    assert not any("SMITH" in text or "p100" in text for text in texts)
    assert "Prompt agreement" in caplog.text
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == [
        "failures.png",
        "per_image.csv",
        "reconstructions.png",
        "samples.png",
        "summary.json",
    ]


def test_pictures_hold_the_right_images(tmp_path: Path) -> None:
    inferer = PromptedPictures(wrong=(4,))
    measures = [ReconstructionMsssim(**SSIM), Agreement(BlobClassifier(), class_names=NAMES)]
    _run(tmp_path, measures, n=10, inferer=inferer, reconstruct=_blurred, columns=4)

    def cell(name: str, row: int, column: int) -> np.ndarray:
        grid = np.asarray(Image.open(tmp_path / "evaluation" / f"{name}.png"), dtype=np.float32) / 255
        top, left = row * (HEIGHT + 2), column * (WIDTH + 2)
        return grid[top : top + HEIGHT, left : left + WIDTH]

    real, sample = _picture("right", 4)[0], (1.25 * _picture("none", 5004))[0].clamp(0, 1)
    np.testing.assert_allclose(cell("samples", 1, 0), sample, atol=1 / 255)
    np.testing.assert_allclose(cell("reconstructions", 2, 0), real, atol=1 / 255)
    np.testing.assert_allclose(cell("reconstructions", 3, 0), _blurred(real[None, None])[0, 0], atol=1 / 255)
    np.testing.assert_allclose(cell("failures", 2, 0), real, atol=1 / 255)
    np.testing.assert_allclose(cell("failures", 3, 0), sample, atol=1 / 255)
    worst = min(_per_image(tmp_path), key=lambda row: float(row["reconstruction_ms_ssim"]))["row"]
    np.testing.assert_allclose(cell("failures", 0, 0), _picture(NAMES[int(worst) % 3], int(worst))[0], atol=1 / 255)


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    agreement = Agreement(BlobClassifier(), class_names=NAMES)
    _run(tmp_path, [agreement], n=9, inferer=PromptedPictures(wrong=(1,)))
    assert (tmp_path / "evaluation" / "failures.png").exists()
    _run(tmp_path, [agreement], n=6)
    assert not (tmp_path / "evaluation" / "failures.png").exists()
    assert len(_per_image(tmp_path)) == 6
    assert _summary(tmp_path)["Prompt agreement"]["n"] == 6


def test_paths_are_hashed_relative_to_the_dataset(tmp_path: Path) -> None:
    _run(tmp_path, [], n=2, dataset_dir="/data")
    assert _per_image(tmp_path)[1]["image_id"] == hashlib.sha256(b"SMITH^JOHN_1/p1001.png").hexdigest()[:12]


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reconstruction: expected images for MS-SSIM of reconstructions"):
        _run(tmp_path, [ReconstructionMsssim(**SSIM)], n=4)
    assert not (tmp_path / "evaluation" / "summary.json").exists()


def test_bad_samples_are_named(tmp_path: Path) -> None:
    broken = _picture("left", 0)
    broken[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="pred: expected finite values, got NaN or Inf in row 8"):
        _run(tmp_path, [], inferer=PromptedPictures(copies={8: broken}))

    class Small(Inferer):
        def __call__(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return inputs[..., ::2]

    with pytest.raises(ValueError, match=r"pred: expected \(1, H, W\) of one size, \(1, 48, 40\), got \(1, 48, 20\)"):
        _run(tmp_path, [], inferer=Small())


def test_labels_without_findings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels.kind: .* no item has one"):
        _run(tmp_path, [Agreement(BlobClassifier(), class_names=NAMES, field="kind")], n=4)
    with pytest.raises(ValueError, match=r"findings: expected pathologies among .* got \['Nodule'\]"):
        PathologyAgreement(BlobClassifier(), findings={"left": "Nodule"})


def test_a_bundles_label_table_without_findings(tmp_path: Path) -> None:
    """Labels of real data: pathology -> 0 or 1; what an item does not state is unknown."""
    measure = PathologyAgreement(BlobClassifier())
    pictures = torch.stack([_picture(NAMES[i % 2], i) for i in range(8)])
    labels: list[Any] = [{"Left blob": (i + 1) % 2} for i in range(8)]
    rows, columns = measure({"pred": pictures, "labels": labels})
    assert [(row["name"], row["value"], row["n"]) for row in rows] == [("AUROC, Left blob", 1.0, 8)]
    assert columns == {}


def _uneven_items(n: int) -> list[dict[str, Any]]:
    """As MIMIC-CXR gives them: other labels, and other optional keys, in every item."""
    items = _items(n)
    for i, item in enumerate(items):
        state = float(NAMES[i % 3] == "left")
        item["labels"] = [{"Left blob": state}, {"Left blob": state, "Edema": -1.0}, {"Pleural Other": 1.0}][i % 4 % 3]
        item["item_id"] = str(i)
        if i % 2:
            item["study"] = f"s{i}"
        if i % 5 == 0:
            del item["labels"], item["subject"]
    return items


@pytest.mark.parametrize("decollate", [True, False])
def test_items_with_different_labels_pass_a_data_loader(tmp_path: Path, decollate: bool) -> None:
    items = _uneven_items(30)
    seen: list[Any] = []

    class Keep:
        def __call__(self, collected: Any) -> tuple[list[Any], dict[str, Any]]:
            seen.extend(collected["labels"])
            return [], {}

    measures = [Keep(), PathologyAgreement(BlobClassifier())]
    select = Compose([LabelsToTextd(), SelectItemsd(keys=["image", "item_id", "labels"])])
    _run(tmp_path, measures, items=items, transform=select, decollate=decollate)
    assert seen == [item.get("labels", {}) for item in items]
    row = _summary(tmp_path)["AUROC, Left blob"]
    assert row["n"] == sum("Left blob" in label for label in seen) > 10
    assert row["value"] == 1.0
    assert "unknown to the classifier: Pleural Other" in row["note"]
    assert "fewer than two with and two without: Edema" in row["note"]
    assert len(_per_image(tmp_path)[0]["image_id"]) == 12  # the path stays known


def test_without_the_transform_the_data_loader_fails(tmp_path: Path) -> None:
    """The reason for LabelsToTextd; when MONAI joins such items, it may go."""
    with pytest.raises((KeyError, RuntimeError)):
        _run(tmp_path, [], items=_uneven_items(30))


def test_data_without_labels_are_evaluated_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = [{"image": item["image"], "item_id": str(i)} for i, item in enumerate(_items(9))]
    measures = [
        Agreement(BlobClassifier(), class_names=NAMES),
        PathologyAgreement(BlobClassifier()),
        SampleDiversity(**SSIM),
    ]
    evaluator = _run(tmp_path, measures, items=items, transform=LabelsToTextd())
    summary = _summary(tmp_path)
    for name in ("Prompt agreement", "AUROC"):
        assert summary[name] == {
            **{"name": name, "value": None, "ci_low": None, "ci_high": None, "n": 0},
            "note": "no labels in the data list",
        }
        assert f"{name}: not measured, no labels in the data list" in caplog.text
        assert name not in evaluator.state.metrics
    assert list(_per_image(tmp_path)[0]) == ["row", "image_id"]
    assert summary["MS-SSIM between samples"]["value"] is not None


def test_labels_that_are_no_dictionary_are_named(tmp_path: Path) -> None:
    for wrong, message in (("left", "expected a dictionary as JSON text, got 'left'"), ("[1]", r"got \[1\]")):
        items = [{**item, "labels": wrong} for item in _items(2)]
        with pytest.raises(ValueError, match=f"labels: .*{message}"):
            _run(tmp_path, [], items=items)


class XrvNames(BlobClassifier):
    """Twelve of torchxrayvision's 18 outputs; those of the CheXpert labels are all there."""

    pathologies = (  # type: ignore[assignment]
        *("Atelectasis", "Consolidation", "Pneumothorax", "Edema", "Effusion", "Pneumonia", "Pleural_Thickening"),
        *("Cardiomegaly", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
    )

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return super().classify(images)[:, :1].expand(-1, len(self.pathologies))


def test_chexpert_names_find_the_classifiers_outputs() -> None:
    datasets = pytest.importorskip("torchxrayvision").datasets
    assert set(XrvNames.pathologies) < set(datasets.default_pathologies)
    outputs = [CHEXPERT_TO_XRV.get(name, name) for name in CHEXPERT_LABELS]
    without = [name for name in outputs if name not in datasets.default_pathologies]
    assert sorted(without) == ["Pleural Other", "Support Devices"]
    pictures = torch.stack([_picture(NAMES[i % 2], i) for i in range(8)])
    labels = [dict.fromkeys(CHEXPERT_LABELS, float(i % 2 == 0)) for i in range(8)]
    rows, _ = PathologyAgreement(XrvNames())({"pred": pictures, "labels": labels})
    assert [row["name"].removeprefix("AUROC, ") for row in rows] == [
        name for name in XrvNames.pathologies if name != "Pleural_Thickening"
    ]
    assert all(row["note"].endswith("unknown to the classifier: Pleural Other, Support Devices") for row in rows)
    assert {row["value"] for row in rows} == {1.0}


def test_labels_that_cannot_be_judged_leave_one_row(tmp_path: Path) -> None:
    measure = PathologyAgreement(BlobClassifier())
    pictures = torch.stack([_picture("left", i) for i in range(4)])
    (row,), _ = measure({"pred": pictures, "labels": [{"finding": "left", "severity": "small"}] * 4})
    assert (row["name"], row["value"]) == ("AUROC", None)
    assert row["note"] == "not judged, unknown to the classifier: finding, severity"
    with pytest.raises(ValueError, match=r"labels\.Edema: expected 1, 0 or -1 \(uncertain\), got 'severe'"):
        measure({"pred": pictures, "labels": [{"Edema": "severe"}] * 4})


def _slices(n: int = 12, *, channels: int = 1) -> list[dict[str, Any]]:
    """Brain-like items: three subjects, an image under another key, further images of any type, plain values."""
    items = []
    for i in range(n):
        flair, mask = torch.rand(channels, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
        mask[:, 8:40, 8:32] = i != 3
        subject = f"SMITH^JOHN {i // 4}"
        items.append({"image": torch.zeros(1), "t1w": _picture("left", i), "flair": flair, "mask": mask}
                     | {"subject": subject, "slice": i % 4, "weight": 0.5 * i})  # fmt: skip
    return items


class _Copy:
    note = "the condition image itself"

    def __call__(self, condition: torch.Tensor) -> torch.Tensor:
        return condition[:, :1]


BRAIN: dict[str, Any] = {
    "image_key": "t1w",
    "extra_keys": {"condition": "flair", "mask": "mask", "pred_sd": "pred_sd"},
    "info_keys": ["subject", "slice", "weight"],
}


@pytest.mark.parametrize("decollate", [True, False])
def test_translation_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture, decollate: bool) -> None:
    seen: dict[str, Any] = {}

    def keep(collected: Any) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        seen.update(collected)
        line = {"subject": collected["info"]["subject"][0], "session": None, "value": 0.25}
        return [], {}, {"more": [line, {"value": 1, "further": "x"}], "per_subject": [], "none": []}

    items = _slices(channels=2)
    measures = [keep, ReconstructionMsssim(**SSIM), TranslationQuality(baselines={"FLAIR copied": _Copy()}, **SSIM)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "none.csv").write_text("of an earlier evaluation")
    options = {**BRAIN, "display": for_display, "reconstruct": _blurred, "decollate": decollate}
    with caplog.at_level(logging.INFO):
        evaluator = _run(tmp_path, measures, items=items, **options)

    assert torch.equal(seen["condition"], torch.stack([item["flair"] for item in items]))
    assert torch.equal(seen["mask"], torch.stack([item["mask"].float() for item in items]))
    assert "pred_sd" not in seen  # no item has one
    for key in BRAIN["info_keys"]:
        assert seen["info"][key] == [item[key] for item in items]

    rows = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    row = next(row for row in rows if row["name"] == "PSNR (dB) in the brain, ControlNet")
    assert (row["n"], row["method"], row["measure"]) == (3, "ControlNet", "brain_psnr")
    assert "11 slices of 3 subjects" in row["note"]
    assert evaluator.state.metrics[row["name"]] == row["value"]

    digest = hashlib.sha256(b"SMITH^JOHN 1").hexdigest()[:12]
    table = _per_image(tmp_path)
    assert list(table[5])[:6] == ["row", "image_id", "subject", "slice", "weight", "reconstruction_ms_ssim"]
    assert (table[5]["subject"], table[5]["slice"], table[5]["weight"]) == (digest, "1", "2.5")
    assert table[3]["brain_psnr"] == ""
    with (tmp_path / "evaluation" / "per_subject.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == "ControlNet"]
    assert [line["slices"] for line in lines] == ["4", "4", "4"]
    assert lines[1]["subject"] == digest
    psnr = [float(row["psnr"]) for row in table[4:8]]
    assert float(lines[1]["psnr"]) == pytest.approx(np.mean(psnr), rel=1e-4)
    first = hashlib.sha256(b"SMITH^JOHN 0").hexdigest()[:12]
    more = (tmp_path / "evaluation" / "more.csv").read_text().splitlines()
    assert more == ["subject,session,value,further", f"{first},,0.25,", ",,1,x"]
    assert not (tmp_path / "evaluation" / "none.csv").exists()
    texts = [path.read_text() for path in (tmp_path / "evaluation").glob("*.[jc]*")] + [caplog.text]
    assert not any("SMITH" in text for text in texts)

    picture = np.asarray(Image.open(tmp_path / "evaluation" / "translation.png"), dtype=np.float32) / 255
    assert picture.shape == (6 * (WIDTH + 2) - 2, 5 * (HEIGHT + 2) - 2)  # 2 contrasts and 3, turned; 32 // 5 lines
    generated = picture[:WIDTH, 2 * (HEIGHT + 2) : 3 * (HEIGHT + 2) - 2]
    np.testing.assert_allclose(generated, for_display(seen["pred"][0, 0]), atol=1 / 255)
    assert (tmp_path / "evaluation" / "failures.png").exists()


def test_further_images_have_the_size_of_the_others(tmp_path: Path) -> None:
    items = _slices(7) + _slices(7, channels=2)  # the second batch
    with pytest.raises(ValueError, match=r"flair: expected \(1, 48, 40\), the size .* got \(2, 48, 40\) in row 7"):
        _run(tmp_path, [], items=items, **BRAIN)
    items = [{**item, "flair": item["flair"][..., :30]} for item in _slices()]
    with pytest.raises(ValueError, match=r"flair: expected \(C, 48, 40\), the size .* got \(1, 48, 30\) in row 0"):
        _run(tmp_path, [], items=items, **BRAIN)
    items = [{**item, "flair": item["flair"] / 0} for item in _slices()]
    with pytest.raises(ValueError, match="flair: expected finite values, got NaN or Inf in row 0"):
        _run(tmp_path, [], items=items, **BRAIN)
    with pytest.raises(ValueError, match=r"subject: expected text or a number, got list; remove it from info_keys"):
        _run(tmp_path, [], items=[{**item, "subject": ["a", "b"]} for item in _slices(2)], **BRAIN)
    with pytest.raises(ValueError, match=r"extra_keys: expected names of their own, got \['labels', 'pred'\]"):
        GenerativeEvaluation(tmp_path, [], extra_keys={"pred": "a", "labels": "b"})


def test_few_images_give_a_row_without_a_distance_instead_of_an_error() -> None:
    images = torch.rand(7, 1, 16, 16)
    rows, columns = FrechetAndKernelDistance(BlobClassifier(), subsets=2)({"image": images, "pred": images})
    assert [row["name"].split()[0] for row in rows] == ["FID", "KID"]
    assert all(row["value"] is None and row["n"] == 7 for row in rows)
    assert "needs at least 8 images in each set, got 7 samples and 7 real ones" in rows[0]["note"]
    assert columns == {}
