# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from PIL import Image

from shared.files import sha256_of_file
from shared.handlers.segmentation_evaluation import SegmentationEvaluation
from shared.metrics.stability import StabilityStudy
from shared.transforms.in_plane import resize_in_plane
from tools.report import write_report

WORK = (40, 48)
NATIVE = (60, 50)


def disc(row: float, column: float, radius: float, *, size: tuple[int, int] = NATIVE) -> torch.Tensor:
    """(1, H, W) in {0, 1}; centre and radius as parts of the sides."""
    rows = torch.linspace(0, 1, size[0])[:, None]
    columns = torch.linspace(0, 1, size[1])
    return (((rows - row) ** 2 + (columns - column) ** 2) < radius**2).float()[None]


def picture_items(n: int = 6) -> list[dict[str, Any]]:
    """Colour pictures of a disc; two of a group; the last has none."""
    items = []
    for i in range(n):
        label = disc(0.3 + 0.07 * i, 0.5, 0.2 if i < n - 1 else 0.0)
        image = resize_in_plane(0.2 + 0.6 * label, WORK).expand(3, -1, -1)
        items.append({"image": image, "label": MetaTensor(label), "name": f"frame{i}", "group": f"video{i // 2}"})
    return items


def volume_items() -> list[dict[str, Any]]:
    """Three classes in two volumes of 5 mm slices; class 2 only in the first, none in the first slice."""
    items = []
    for i in range(2):
        label = torch.stack([disc(0.3, 0.3, 0.2 if z else 0.0) for z in range(3)], dim=-1)
        if i == 0:
            label = torch.maximum(label, 2 * torch.stack([disc(0.7, 0.7, 0.15 if z else 0.0) for z in range(3)], -1))
        affine = torch.diag(torch.tensor([0.5, 0.8, 5.0, 1.0], dtype=torch.float64))
        image = resize_in_plane((label == 1) * 0.4 + (label == 2) * 0.8, WORK, "nearest")
        items.append({"image": image, "label": MetaTensor(label, affine=affine), "name": f"vol{i}", "group": i})
    return items


class Brightness(Inferer):
    """The foreground is bright; a sample of number j is moved j columns to the right."""

    def __init__(self, *, samples: int = 1, classes: int = 1) -> None:
        self.samples, self.classes = samples, classes

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        grey = torch.as_tensor(inputs).mean(1, keepdim=True)
        one = grey if self.classes == 1 else torch.cat([1 - (grey - level).abs() for level in (0.0, 0.4, 0.8)], 1)
        return torch.cat([torch.roll(one, j, dims=3) for j in range(self.samples)], 1)


def run(folder: Path, items: Sequence[dict[str, Any]], inferer: Inferer, *, batch_size: int = 1, **options: Any) -> Any:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(list(items)), batch_size=batch_size),
        network=torch.nn.Identity(),
        inferer=inferer,
        val_handlers=[SegmentationEvaluation(folder, **options)],
    )
    evaluator.run()
    return evaluator


def summary_of(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert all({"name", "value", "ci_low", "ci_high", "n", "note", "group"} <= set(row) for row in rows)
    return {(row["group"], row.get("method", ""), row.get("measure", row["name"])): row for row in rows}


def lines_of(folder: Path, name: str = "per_image") -> list[dict[str, str]]:
    with (folder / "evaluation" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Half:
    """A baseline that is sure of the left half."""

    note = "left half"

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(1, *image.shape[1:])
        found[:, :, : image.shape[2] // 2] = 1
        return found


class Untrained:
    note = "not trained: baseline.pt was not found."

    def __call__(self, image: torch.Tensor) -> None:
        return None


def test_pictures_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "datalist.json").write_text("{}")
    options: dict[str, Any] = {
        "baselines": {"left half": Half(), "U-Net": Untrained()},
        "reconstruct": lambda pictures: pictures * 0.9,
        "stability": StabilityStudy(),
        "num_samples": 3,
        "class_names": ["polyp"],
        "dataset_dir": tmp_path,
    }
    with caplog.at_level(logging.INFO):
        evaluator = run(tmp_path, picture_items(), Brightness(samples=3), **options)
    summary, lines = summary_of(tmp_path), lines_of(tmp_path)

    first = [row for row in lines if row["method"] == "one sample"]
    assert len(first) == 12
    assert list(first[0]) == [
        *("name", "group", "method", "resolution", "class", "dice", "iou", "hd95", "assd", "distance_unit"),
        *("true_size", "predicted_size", "size_unit", "both_empty", "one_empty", "seconds"),
    ]
    native = [row for row in first if row["resolution"] == "native"]
    work = [row for row in first if row["resolution"] == "40 x 48"]
    assert [row["name"] for row in native] == [f"frame{i}" for i in range(6)]
    assert (native[2]["group"], native[2]["class"], native[2]["size_unit"]) == ("video1", "polyp", "px")
    assert int(native[0]["true_size"]) == int(disc(0.3, 0.5, 0.2).sum())
    assert all(float(row["dice"]) > 0.95 for row in native)
    assert native[-1]["both_empty"] == "1"
    assert all(row["hd95"] == "" for row in work)
    assert native[0]["distance_unit"] == "px"
    moved = next(row for row in lines if row["method"] == "mean of 3 samples")
    assert 0.5 < float(moved["hd95"]) < 2
    assert 0.2 < float(moved["assd"]) < 1.5

    dice = summary["Native resolution", "one sample", "dice"]
    assert dice["value"] == pytest.approx(np.mean([float(row["dice"]) for row in native]), abs=1e-5)
    assert (dice["n"], dice["groups"]) == (6, 3)
    assert dice["ci_low"] <= dice["value"] <= dice["ci_high"]
    assert summary["Native resolution", "one sample", "dice_not_empty"]["n"] == 5
    assert summary["Working size 40 x 48", "autoencoder's ceiling", "dice"]["value"] == 1
    assert summary["Native resolution", "mean of 3 samples", "dice"]["value"] < dice["value"]
    difference = summary["Native resolution", "one sample - left half", "dice"]
    assert difference["value"] > 0.3
    assert difference["n"] == 6
    assert summary["Native resolution", "U-Net", "dice"]["note"] == Untrained.note
    assert summary["Native resolution", "left half", "one_empty"]["value"] == 1
    assert evaluator.state.metrics["Dice, one sample (Native resolution)"] == dice["value"]
    assert "Dice, one sample (Native resolution)" in caplog.text
    assert "frame" not in caplog.text

    seconds = summary["Time and memory", "mean of 3 samples", "seconds"]
    assert seconds["value"] == pytest.approx(3 * summary["Time and memory", "one sample", "seconds"]["value"])
    assert summary["Time and memory", "left half", "seconds"]["n"] == 6
    memory = summary["Time and memory", "mean of 3 samples", "memory_mb"]
    assert "ru_maxrss" in memory["note"]
    assert memory["value"] > 1

    heading = "Stability over 3 samples"
    assert summary[heading, "", "Pairwise Dice"]["n"] == 6
    assert summary[heading, "", "LPIPS (SqueezeNet)"]["value"] is None
    assert "no weights were given" in summary[heading, "", "LPIPS (SqueezeNet)"]["note"]
    stability = lines_of(tmp_path, "stability")
    assert stability[5]["pairwise_dice"] == "1"
    assert [row["pairs"] for row in stability] == ["3"] * 6
    # The last picture is flat: its maps are all equal.
    assert summary[heading, "", "PSNR (dB)"]["n"] == 5
    assert "0 of 18 pairs had an all-zero map, 3 identical maps" in summary[heading, "", "PSNR (dB)"]["note"]

    protocol = json.loads((tmp_path / "evaluation" / "protocol.json").read_text())
    assert (protocol["images"], protocol["groups"], protocol["device"]) == (6, 3, "cpu")
    assert protocol["resolutions"] == ["native", "40 x 48"]
    assert protocol["datalist_sha256"] == sha256_of_file(tmp_path / "datalist.json")
    assert "Dice and IoU are 1" in protocol["conventions"]["both masks empty"]
    assert not any("{" in text for text in protocol["conventions"].values())
    assert "monai" in protocol["software"]


def test_worst_cases_come_first(tmp_path: Path) -> None:
    items = picture_items()
    items[3]["image"] = torch.full((3, *WORK), 0.2)  # a missed disc
    run(tmp_path, items, Brightness(), max_pictures=2)
    names = {path.name for path in (tmp_path / "evaluation").glob("*.png")}
    assert names == {"worst.png", "median.png", "best.png"}
    worst = np.asarray(Image.open(tmp_path / "evaluation" / "worst.png"), dtype=np.int64)
    assert worst.shape[2] == 3
    # First row: image | truth | prediction | probability, under captions; the prediction is the bare image.
    height = (worst.shape[0] - 2) // 2
    first = worst[height - WORK[0] : height]
    panel = first.shape[1] // 4
    image, truth, prediction = (first[:, n * (WORK[1] + 2) : n * (WORK[1] + 2) + WORK[1]] for n in range(3))
    assert panel >= WORK[1]
    assert (image == 51).all()
    assert (prediction == image).all()
    assert (truth != image).any()
    run(tmp_path, items, Brightness(), max_pictures=0)
    assert not list((tmp_path / "evaluation").glob("*.png"))


def test_volumes_of_several_classes(tmp_path: Path) -> None:
    names = {"0": "background", "1": "liver", "2": "spleen"}
    run(
        tmp_path, volume_items(), Brightness(samples=2, classes=3), num_classes=3, class_names=names, num_samples=2,
        reconstruct=lambda pictures: pictures, stability=StabilityStudy(),
    )  # fmt: skip
    lines = [row for row in lines_of(tmp_path) if row["method"] == "one sample"]
    native = [row for row in lines if row["resolution"] == "native"]
    assert [row["class"] for row in native] == ["mean of classes", "liver", "spleen"] * 2
    liver = native[1]
    assert (liver["distance_unit"], liver["size_unit"]) == ("mm", "ml")
    assert float(liver["true_size"]) == pytest.approx(float(2 * disc(0.3, 0.3, 0.2).sum()) * 2 / 1000)
    assert 0 < float(liver["assd"]) < 1
    assert (native[5]["both_empty"], native[5]["hd95"]) == ("1", "")
    assert native[3]["dice"] == native[4]["dice"], "spleen is nowhere in the second volume and not in its mean"
    work = next(row for row in lines if row["resolution"] == "40 x 48" and row["class"] == "liver")
    # The same millilitres at both sizes.
    assert float(work["true_size"]) == pytest.approx(float(liver["true_size"]), rel=0.05)
    summary = summary_of(tmp_path)
    assert summary["Native resolution, mean of classes", "one sample", "hd95_mm"]["n"] == 2
    assert summary["Native resolution, spleen", "one sample", "dice_not_empty"]["n"] == 1
    ceiling = summary["Working size 40 x 48, mean of classes", "autoencoder's ceiling", "dice"]
    assert ceiling["value"] == 1
    assert "no interval from fewer than 3 groups" in ceiling["note"]
    stability = lines_of(tmp_path, "stability")
    assert [(row["slices"], row["slices_without_truth"]) for row in stability] == [("2", "1")] * 2


def test_surface_uses_the_spacing_of_the_volume(tmp_path: Path) -> None:
    """A prediction one slice too thick is 5 mm away."""
    items = volume_items()[1:]
    label = items[0]["label"]
    label[..., 0] = 0
    items[0]["image"] = items[0]["image"].clone()
    items[0]["image"][..., 0] = items[0]["image"][..., 1]
    run(tmp_path, items, Brightness(classes=3), num_classes=3)
    row = next(row for row in lines_of(tmp_path) if row["class"] == "class 1" and row["resolution"] == "native")
    assert float(row["hd95"]) == pytest.approx(5, abs=0.2)


def test_report_shows_the_evaluation(tmp_path: Path) -> None:
    run(
        tmp_path, picture_items(), Brightness(samples=2), num_samples=2, stability=StabilityStudy(),
        baselines={"U-Net": Half()}, class_names=["polyp"],
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"task": "sdseg evaluation"}))
    text = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    for part in (
        "Native resolution", "Working size 40 x 48", "Stability over 2 samples", "Time and memory", "HD95 (px)",
        "one sample − U-Net", "Conventions", "Both masks empty", "Failure cases", "Spread over images, one sample",
    ):  # fmt: skip
        assert part in text, part
    assert "No failure cases were saved" not in text
    assert text.count("data:image/png") == 3
    assert "frame0" not in text
    assert text.count(">Measure<") == 2, "of stability and of the spread; no empty table before the headings"
    table = text.split("Spread over images")[1].split("</table>")[0]
    dice = [float(row["dice"]) for row in lines_of(tmp_path) if row["method"] == "one sample"][::2]
    assert f"{np.median(dice):.4g}" in table
    assert ">6<" in table, "one line an image, not one for each method and resolution"


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    handler = SegmentationEvaluation(tmp_path)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(picture_items(3)), batch_size=1),
        network=torch.nn.Identity(),
        inferer=Brightness(),
        val_handlers=[handler],
    )
    evaluator.run()
    evaluator.run()
    assert len(lines_of(tmp_path)) == 6
    assert not (tmp_path / "evaluation" / "stability.csv").exists()


class Logits(Inferer):
    """Forgot the sigmoid."""

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 8 * torch.as_tensor(inputs)[:, :1] - 4


class Thin(Half):
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return super().__call__(image)[..., :10]


def changed(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**picture_items()[0], key: value}]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (
            changed("label", 255 * disc(0.5, 0.5, 0.3)),
            {},
            r"label: expected classes 0 to 1, got \[0.0, 255.0\] of frame0",
        ),
        (changed("label", disc(0.5, 0.5, 0.3) * 0.5), {}, r"label: expected classes 0 to 1, got \[0.0, 0.5\]"),
        (changed("label", disc(0.5, 0.5, 0.3)[..., None]), {}, r"label: expected \(1, H, W\) of a picture"),
        (changed("label", "mask.png"), {}, "label: expected a tensor in the item of frame0, got NoneType"),
        (changed("name", torch.zeros(2)), {}, "name: expected text or a number, got Tensor"),
        (
            [{key: value for key, value in picture_items()[0].items() if key != "name"}],
            {},
            "name: expected it in every",
        ),
        (
            picture_items(),
            {"inferer": Logits()},
            r"pred: expected probabilities in \[0, 1\], got -2.4 to 2.4 of frame0",
        ),
        (picture_items(), {"num_samples": 4}, r"pred: expected \(4, h, w\[, Z\]\) for num_samples 4 and num_classes 1"),
        (picture_items(), {"batch_size": 2}, "batch_size: expected 1, got 2"),
        (picture_items(), {"baselines": {"thin": Thin()}}, r"thin: expected probabilities \(1, 40, 48\), got"),
    ],
)
def test_wrong_items_are_named(tmp_path: Path, items: Any, options: dict[str, Any], message: str) -> None:
    inferer = options.pop("inferer", Brightness())
    with pytest.raises(ValueError, match=message):
        run(tmp_path, items, inferer, **options)
    assert not (tmp_path / "evaluation" / "summary.json").exists()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baselines: expected names of their own, got \['one sample'\]"):
        SegmentationEvaluation(tmp_path, baselines={"one sample": Half()})
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        SegmentationEvaluation(tmp_path, num_samples=0)
