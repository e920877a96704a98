# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from PIL import Image
from scipy.ndimage import gaussian_filter

from shared.files import sha256_of_file
from shared.handlers.noddi_evaluation import NoddiEvaluation
from shared.metrics.noddi_baselines import UpsampledMaps
from shared.metrics.noddi_maps import MAPS, MEASURES
from shared.metrics.uncertainty import nominal_coverage
from shared.resolution import block_average
from tools.report import write_report

LOW = (8, 10, 7)
HIGH = tuple(2 * n for n in LOW)
MEAN = "diffusion, mean of 4 samples"


def items(n: int = 4) -> list[dict[str, Any]]:
    """Features are the true maps and, as a fourth channel, the subject's number."""
    result = []
    axes = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in HIGH), indexing="ij")
    brain = (sum(axis**2 for axis in axes) < 0.8).float()[None]
    for i in range(n):
        noise = gaussian_filter(np.random.default_rng(i).normal(size=(3, *HIGH)), (0, 1, 1, 1))
        maps = torch.from_numpy(0.5 + 0.8 * noise).float().clamp(0, 1)
        affine = torch.diag(torch.tensor([1.0, 1.0, 1.5, 1.0], dtype=torch.float64))
        image = torch.cat((block_average(maps), torch.full((1, *LOW), float(i))))
        names = {"name": f"secret{i}_dwi", "subject": f"secret{i // 2 if i < 2 else i}"}
        result.append({"image": image, "maps": MetaTensor(maps, affine=affine), "brain": brain, **names})
    return result


TRUE = [torch.as_tensor(item["maps"]).as_subclass(torch.Tensor) for item in items(6)]


class Noisy(Inferer):
    """Samples with sd 0.1, of which the truth is another draw; less of it for later subjects."""

    def __init__(self, samples: int = 1) -> None:
        self.samples = samples

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        number = int(inputs[0, 3].mean())
        generator = torch.Generator().manual_seed(number)
        shape = (self.samples, 3, *HIGH)
        sd = 0.02 / (1 + number)
        centre = TRUE[number] + sd * torch.randn(shape[1:], generator=generator)
        drawn = centre + sd * torch.randn(shape, generator=generator)
        return drawn.clamp(0, 1).flatten(0, 1)[None]


class Untrained:
    note = "not trained: baseline.pt was not found."

    def __call__(self, item: Mapping[str, Any]) -> None:
        return None


def run(folder: Path, data: Sequence[dict[str, Any]], inferer: Inferer, *, batch_size: int = 1, **options: Any) -> Any:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(list(data)), batch_size=batch_size),
        network=torch.nn.Identity(),
        inferer=inferer,
        val_handlers=[NoddiEvaluation(folder, **options)],
    )
    evaluator.run()
    return evaluator


def summary_of(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert all(
        {"name", "value", "ci_low", "ci_high", "n", "note", "group", "method", "measure"} <= set(r) for r in rows
    )
    found = {(row["group"], row["method"], row["measure"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def lines_of(folder: Path, name: str = "per_subject") -> list[dict[str, str]]:
    with (folder / "evaluation" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def options_of(folder: Path) -> dict[str, Any]:
    (folder / "datalist.json").write_text("{}")
    baselines = {"trilinear": UpsampledMaps("trilinear"), "cubic": UpsampledMaps("cubic"), "U-Net": Untrained()}
    return {
        "num_samples": 4,
        "baselines": baselines,
        "reconstruct": lambda maps: maps * 0.99,
        "compare": [["cubic", "trilinear"]],
        "shown": ["cubic"],
        "dataset_dir": folder,
    }


def test_everything_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        evaluator = run(tmp_path, items(), Noisy(4), **options_of(tmp_path))
    summary, lines = summary_of(tmp_path), lines_of(tmp_path)

    methods = ["diffusion, one sample", MEAN, "trilinear", "cubic", "autoencoder's ceiling"]
    assert [line["method"] for line in lines] == methods * 4
    assert (lines[0]["subject"], lines[0]["name"]) == ("secret0", "secret0_dwi")
    assert len(lines[0]) == 3 + 3 * len(MEASURES) + 2 + 1
    own = [line for line in lines if line["method"] == MEAN]
    row = summary["ODI", MEAN, "odi_psnr_brain"]
    assert row["value"] == pytest.approx(np.mean([float(line["odi_psnr_brain"]) for line in own]), rel=1e-5)
    assert (row["n"], row["groups"]) == (4, 3)
    assert row["ci_low"] < row["value"] < row["ci_high"]
    # Mean of 4: error variance 1 + 1/4 of that of the truth, of one sample 2.
    one = summary["ODI", "diffusion, one sample", "odi_psnr_brain"]["value"]
    assert row["value"] - one == pytest.approx(10 * math.log10(2 / 1.25), abs=0.2)
    cubic = summary["ODI", "cubic", "odi_psnr_brain"]
    assert row["value"] > cubic["value"] + 3
    difference = summary["ODI", f"{MEAN} - cubic", "odi_psnr_brain"]
    assert difference["value"] == pytest.approx(row["value"] - cubic["value"])
    assert 0 < difference["ci_low"] < difference["ci_high"]
    assert ("ODI", "diffusion, one sample - trilinear", "odi_ssim") in summary
    assert summary["FWF", "cubic - trilinear", "fwf_psnr"]["value"] > 0
    assert ("FWF", "trilinear - cubic", "fwf_psnr") not in summary
    assert summary["NDI", "U-Net", "ndi_psnr"]["note"] == Untrained.note
    assert summary["NDI", f"{MEAN} - U-Net", "ndi_psnr"]["value"] is None
    assert summary["NDI", "autoencoder's ceiling", "ndi_mae"]["value"] == pytest.approx(0.005, abs=3e-4)
    flattened = summary["As published (not comparable with other work)", MEAN, "flattened_ssim"]
    assert "flattened SSIM (as published)" in flattened["name"]
    assert evaluator.state.metrics[f"PSNR (dB) in the brain, {MEAN} (ODI)"] == row["value"]
    assert "PSNR (dB) in the brain" in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in (tmp_path / "evaluation" / "summary.json").read_text()

    seconds = summary["Time and memory", MEAN, "seconds"]
    assert seconds["value"] == pytest.approx(4 * summary["Time and memory", methods[0], "seconds"]["value"])
    assert "median over subjects" in seconds["note"]
    assert summary["Time and memory", "cubic", "seconds"]["n"] == 4
    assert ("Time and memory", "autoencoder's ceiling", "seconds") not in summary
    assert summary["Time and memory", MEAN, "memory_mb"]["value"] > 1

    protocol = json.loads((tmp_path / "evaluation" / "protocol.json").read_text())
    assert (protocol["scans"], protocol["subjects"], protocol["samples"]) == (4, 3, 4)
    assert protocol["datalist_sha256"] == sha256_of_file(tmp_path / "datalist.json")
    assert "one-dimensional" in protocol["conventions"]["flattened SSIM and PSNR"]
    assert "Student" in protocol["conventions"]["coverage"]


def test_calibrated_samples_are_found_calibrated(tmp_path: Path) -> None:
    run(tmp_path, items(), Noisy(4), num_samples=4, pictures=())
    summary, heading = summary_of(tmp_path), "Uncertainty: sd of 4 samples"
    for title in MAPS.values():
        covered = summary[heading, title, "coverage_1sd"]
        assert covered["value"] == pytest.approx(nominal_coverage(1, 4), abs=0.05)
        assert covered["ci_low"] <= covered["value"] <= covered["ci_high"]
        assert summary[heading, title, "calibration_slope"]["value"] == pytest.approx(1, abs=0.1)
    lines = lines_of(tmp_path, "uncertainty")
    assert [line["map"] for line in lines] == list(MAPS) * 4
    bins = lines_of(tmp_path, "calibration")
    assert len(bins) == 4 * 3 * 10
    assert set(bins[0]) == {"subject", "name", "map", "bin", "voxels", "predicted", "observed"}
    assert not list((tmp_path / "evaluation").glob("*.png"))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_few_samples_have_no_table_of_uncertainty(tmp_path: Path, num_samples: int) -> None:
    run(tmp_path, items(), Noisy(4), num_samples=4, pictures=())
    run(tmp_path, items(3), Noisy(num_samples), num_samples=num_samples)
    assert not any(heading.startswith("Uncertainty") for heading, _, _ in summary_of(tmp_path))
    assert not (tmp_path / "evaluation" / "calibration.csv").exists(), "of the earlier run"
    methods = {line["method"] for line in lines_of(tmp_path)}
    assert len(methods) == (1 if num_samples == 1 else 2)
    with Image.open(tmp_path / "evaluation" / "best_ndi.png") as picture:
        # true | diffusion | error (| sd), each enlarged from 20 to 120 pixels
        assert picture.size[0] == 122 * (3 if num_samples == 1 else 4) - 2


def test_pictures_of_worst_median_and_best(tmp_path: Path) -> None:
    run(tmp_path, items(4), Noisy(4), **options_of(tmp_path))
    folder = tmp_path / "evaluation"
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {f"{name}_{key}" for name in ("worst", "median", "best") for key in MAPS}
    errors = {}
    for name in ("worst", "median", "best"):
        with Image.open(folder / f"{name}_odi.png") as picture:
            assert "contains synthetic images" in picture.text["Comment"]
            values = np.asarray(picture)
        panel = values.shape[1] // 5  # true | cubic | mean of 4 | error | sd
        errors[name] = values[30:130, 3 * panel + 10 : 4 * panel - 10].mean()
        if name == "worst":  # sd 0.02, unbiased over 4 samples: 0.92 of it on average; times 4 in 8 bits
            assert values[30:130, 4 * panel + 18 : -16].mean() == pytest.approx(255 * 4 * 0.92 * 0.02, rel=0.15)
    assert errors["worst"] > errors["median"] > errors["best"]
    run(tmp_path, items(2), Noisy(), pictures=["best", "worst"])
    assert {path.stem for path in folder.glob("*.png")} == {
        f"{name}_{key}" for name in ("worst", "best") for key in MAPS
    }
    run(tmp_path, items(1), Noisy())
    assert {path.stem for path in folder.glob("*.png")} == {f"median_{key}" for key in MAPS}


def test_report_shows_it(tmp_path: Path) -> None:
    run(tmp_path, items(), Noisy(4), **options_of(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"task": "dmri2noddi evaluation"}))
    text = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    for part in (
        "PSNR (dB) in the brain", "flattened SSIM (as published)", "As published", "Uncertainty: sd of 4 samples",
        f"{MEAN} − cubic", ">Map<", "Time and memory", "Spread over subjects, diffusion, one sample", "Truth within",
        "ODI of the subject of worst PSNR", "Failure cases",
    ):  # fmt: skip
        assert part in text, part
    assert "No failure cases were saved" not in text
    assert text.count("data:image/png") == 9
    assert "secret" not in text
    spread = text.split("Spread over subjects")[1].split("</table>")[0]
    assert ">4<" in spread, "one line a scan, not one for each method"


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    handler = NoddiEvaluation(tmp_path, pictures=())
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items(2)), batch_size=1),
        network=torch.nn.Identity(),
        inferer=Noisy(),
        val_handlers=[handler],
    )
    evaluator.run()
    evaluator.run()
    assert len(lines_of(tmp_path)) == 2


def changed(**values: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in {**items(1)[0], **values}.items() if value is not None}]


class Broken:
    note = ""

    def __init__(self, maps: torch.Tensor) -> None:
        self.maps = maps

    def __call__(self, item: Mapping[str, Any]) -> torch.Tensor:
        return self.maps


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            changed(maps=torch.full((3, *HIGH), 45.0)),
            {},
            r"maps: expected fractions in \[0, 1\], got 45 to 45 of secret0",
        ),
        (changed(maps=torch.rand(3, 16, 20, 13)), {}, r"maps: expected \(3, 16, 20, 14\), twice the grid"),
        (
            changed(brain=torch.ones(1, *LOW)),
            {},
            r"brain: expected \(1, 16, 20, 14\), twice the grid .* LoadBrainMaskd",
        ),
        (changed(brain=torch.zeros(1, *HIGH)), {}, "brain: expected voxels inside the mask"),
        (changed(maps=None), {}, "maps: expected a tensor in the item of secret0_dwi, got NoneType"),
        (changed(name=None), {}, "name: expected it in every item, got none"),
        (changed(), {"num_samples": 2}, r"pred: expected \(6, 16, 20, 14\).* give the sampler num_samples 2"),
        (items(2), {"batch_size": 2}, "batch_size: expected 1, got 2"),
        (
            changed(),
            {"baselines": {"thin": Broken(torch.rand(3, *LOW))}},
            r"thin: expected maps \(3, 16, 20, 14\), got",
        ),
        (changed(), {"baselines": {"x": Broken(torch.full((3, *HIGH), math.nan))}}, "x: expected finite maps, got NaN"),
    ],
)
def test_wrong_items_are_named(tmp_path: Path, data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data, Noisy(), **options)
    assert not (tmp_path / "evaluation" / "summary.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": {MEAN: Untrained()}, "num_samples": 4}, "baselines: expected names of their own"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"shown": ["cubic"]}, r"shown: expected some of \[\], got \['cubic'\]"),
        ({"compare": [["a", "b"]]}, r"compare: expected pairs of .*, got \['a', 'b'\]"),
        ({"pictures": ["first"]}, r"pictures: expected some of .*, got \['first'\]"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoddiEvaluation(tmp_path, **options)
