# SPDX-License-Identifier: Apache-2.0
"""Patients' identifiers go the whole documented way of each bundle, and every byte that comes of it is searched."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import re
import shutil
import sqlite3
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from shared.networks.finding_classifier import FindingClassifier
from tests import commands, dmri_runs, planted_sources, sdseg_runs, test_brain_bundle, test_cxr_bundle
from tests.conftest import ROOT
from tests.planted import PLANTED, kinds_in, kinds_in_file, search

PLACE = PLANTED["typed"]["folder of the input"]


@dataclass(frozen=True)
class Journey:
    """The documented way of a bundle.

    Attributes:
        source: writes what a hospital hands over into a folder.
        prepare: words after ``tools.prepare``.
        trainings: stages in their order -> overrides.
        evaluate: overrides of the evaluation.
        inference: overrides of the inference.
        given: input of the inference, below the source.
    """

    source: Callable[[Path], None]
    prepare: tuple[str, ...]
    trainings: Mapping[str, Mapping[str, Any]]
    evaluate: Mapping[str, Any]
    inference: Mapping[str, Any]
    given: str = ""


def small(stages: Mapping[str, Mapping[str, Any]], *names: str) -> dict[str, dict[str, Any]]:
    """Stages of one epoch, with previews where there are any."""
    shown = {"preview_interval": 1}
    return {
        name: {**stages[name], "max_epochs": 1, **(shown if "preview_interval" in stages[name] else {})}
        for name in names
    }


SPLIT = "--fractions=0.5,0.25,0.25"
CXR, BRAIN, SDSEG, DMRI = test_cxr_bundle.STAGES, test_brain_bundle.STAGES, sdseg_runs.STAGES, dmri_runs.STAGES
JOURNEYS = {
    "cxr_ldm": Journey(
        planted_sources.films,
        ("image_text_folder", "--size=64", SPLIT),
        small(CXR, "train_autoencoder", "train"),
        {**CXR["train"], "num_inference_steps": 2, "ms_ssim_kernel_size": 3},
        {**CXR["inference"], "dicom": True, "num_inference_steps": 2},
        given="../prompts.txt",
    ),
    "brain_controlnet": Journey(
        planted_sources.heads,
        ("brain_pairs", "--size=48,64", "--slices=2", SPLIT),
        small(BRAIN, "train_autoencoder", "train_diffusion", "train", "train_regression"),
        {
            **{**BRAIN["train"], "regression_def": BRAIN["train_regression"]["regression_def"]},
            **{"num_inference_steps": 2, "ms_ssim_kernel_size": 3},
        },
        {**BRAIN["inference"], "num_inference_steps": 2},
    ),
    "sdseg": Journey(
        planted_sources.polyps,
        ("image_mask_folder", f"--group_pattern=({planted_sources.WHO}[0-9])", SPLIT),
        small(SDSEG, "train_autoencoder", "train", "train_baseline"),
        {**SDSEG["train"], "baseline_def": sdseg_runs.BASELINE, "num_samples": 2},
        SDSEG["inference"],
        given="images",
    ),
    "dmri2noddi": Journey(
        planted_sources.series,
        ("dmri_pairs", "--fractions=0.34,0.33,0.33"),
        small(DMRI, "train_vqgan", "train_encoder", "train", "train_baseline"),
        {
            **{**DMRI["train"], "baseline_def": dmri_runs.BASELINE, "num_samples": 2},
            **{"num_inference_steps": 2, "patch_size": [16, 16, 16]},
        },
        {**DMRI["inference"], "num_inference_steps": 2, "num_samples": 2, "patch_size": [16, 16, 16]},
        given="../INBOX",
    ),
}


class Trip:
    """A journey, made: what comes of it lies below ``root``, but the data below ``given``."""

    def __init__(self, bundle: str, root: Path) -> None:
        self.bundle, self.root, self.journey = bundle, root / "ALL", JOURNEYS[bundle]
        self.given = root / PLACE
        self.source, self.dataset = self.given / "SOURCE", self.given / "DATASET"
        self.home, self.models = self.root / "BUNDLE", self.root / "MODELS"
        shutil.copytree(ROOT / "bundles" / bundle / "configs", self.home / "configs")
        if (tokenizer := ROOT / "bundles" / bundle / "models/tokenizer").is_dir():
            shutil.copytree(tokenizer, self.home / "models/tokenizer")
        (self.root / "SCREEN").mkdir()

    def run(self, name: str, *words: str | Path, code: int = 0) -> None:
        done = commands.run(*words, cwd=self.home, limit=120)
        assert done.code == code, f"{name}: {done.err[-3000:]}"
        assert done.network_attempts == ()
        (self.root / f"SCREEN/{name}.txt").write_text(done.out + done.err)

    def workflow(self, name: str, kind: str, files: list[str], options: Mapping[str, Any]) -> None:
        given = {**options, "ckpt_dir": self.models, "output_dir": self.root / "RUN" / name}
        config = json.loads((self.home / f"configs/{files[0]}.json").read_text())
        for key in ("latent_cache_dir", "volume_cache_dir", "text_cache_dir"):
            if key in config:
                given[key] = self.root / "CACHE" / key
        configs = str([f"configs/{file}.json" for file in (*files, "tiny")])
        arguments = [f"--{key}={value}" for key, value in given.items()]
        self.run(name, "monai.bundle", "run", kind, "--config_file", configs, *arguments)

    def go(self) -> Trip:
        journey = self.journey
        journey.source(self.source)
        self.run("prepare", "tools.prepare", *journey.prepare, f"--source={self.source}", f"--out={self.dataset}")
        tracked = {"dataset_dir": self.dataset, "tracking_uri": f"sqlite:///{self.root}/TRACKER/mlflow.db"}
        for stage, options in journey.trainings.items():
            self.workflow(stage, "training", [stage], {**options, **tracked})
        judge = {"feature_extractor#weights_path": self.judge()} if self.bundle == "cxr_ldm" else {}
        self.workflow("evaluation", "run", ["train", "evaluate"], {**journey.evaluate, **tracked, **judge})
        (self.given / "prompts.txt").write_text(f"Cardiomegaly in Mr {PLANTED['prompt']['prompt']}.\n")
        key = "prompt" if self.bundle == "cxr_ldm" else "dataset_dir"
        options = {**journey.inference, key: (self.source / journey.given).resolve()}
        self.workflow("inference", "run", ["inference"], options)
        self.run("report", "tools.report", self.root / "RUN", f"--out={self.root}/REPORT/report.html")
        self.spoil()
        self.run("check_data", "tools.check_data", self.dataset, code=1)
        return self

    def judge(self) -> Path:
        """The classifier of the evaluation, with random weights."""
        path = self.models / "stages/classifier.pt"
        torch.save(FindingClassifier().state_dict(), path)
        return path

    def spoil(self) -> None:
        """Cut off a file of the data set, so that an error has to name it."""
        image = next(path for path in (self.dataset / "images").rglob("*") if path.suffix in (".png", ".nii", ".gz"))
        image.write_bytes(image.read_bytes()[:60])

    def found(self) -> dict[str, tuple[set[str], set[str]]]:
        """Of every file, by its place as SECURITY.md calls it."""
        return search(self.root) | {f"DATASET/{place}": kinds for place, kinds in search(self.dataset).items()}


def exceptions(bundle: str) -> set[tuple[str, str, str]]:
    """The table of SECURITY.md: (pattern of files, "in" or "in the name of", kind of identifier)."""
    section = (ROOT / "SECURITY.md").read_text().split("\n## Patient data\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    result = set()
    for row in rows:
        patterns, bundles, inside, name = (re.findall(r"`([^`]+)`", cell) for cell in row)
        if row[1].strip() == "all" or bundle in bundles:
            result |= {(pattern, "in", kind) for pattern in patterns for kind in inside}
            result |= {(pattern, "in the name of", kind) for pattern in patterns for kind in name}
    return result


@pytest.mark.reliability(12)
@pytest.mark.parametrize("bundle", list(JOURNEYS))
def test_identifiers_are_where_the_document_says_and_nowhere_else(bundle, tmp_path, record_property):
    trip = Trip(bundle, tmp_path).go()
    found = trip.found()
    seen = {(place, "in", kind) for place, (inside, _) in found.items() for kind in inside}
    seen |= {(place, "in the name of", kind) for place, (_, name) in found.items() for kind in name}
    listed, used, leaks = exceptions(bundle), set(), []
    for place, where, kind in sorted(seen):
        rows = {row for row in listed if fnmatch(place, row[0]) and row[1:] == (where, kind)}
        used |= rows
        leaks += [] if rows else [f"{kind} {where} {place}"]
    assert leaks == []
    assert listed - used == set(), "SECURITY.md lists more than there is"
    check_what_was_searched(trip, set(found))
    planted = sum(len(values) for values in PLANTED.values())
    record_property("cases", planted)
    record_property("figure", f"{bundle}: {planted} identifiers looked for in {len(found)} files")


def check_what_was_searched(trip: Trip, places: set[str]) -> None:
    """A search of nothing, or for what was not there, would find nothing."""
    given = [kinds for place, kinds in search(trip.given).items() if not place.startswith("DATASET")]
    expected = {"header", "name", "prompt"} | ({"text"} if trip.bundle == "cxr_ldm" else set())
    assert set().union(*(inside | name for inside, name in given)) == expected
    assert sum("header" in inside for inside, _ in given) >= 4
    result = ".dcm" if trip.bundle == "cxr_ldm" else "_mask.png" if trip.bundle == "sdseg" else ".nii.gz"
    for ending in ("metrics.csv", "manifest.json", "config.json", ".png", ".pt", ".npy", "summary.json", result):
        assert any(place.endswith(ending) for place in places), ending
    stages = trip.journey.trainings
    for name in ("prepare", "check_data", "evaluation", "inference", "report", *stages):
        assert f"SCREEN/{name}.txt" in places
    assert {"REPORT/report.html", "TRACKER/mlflow.db", *(f"RUN/{stage}/config.json" for stage in stages)} <= places
    assert any(fnmatch(place, "TRACKER/mlruns/*.png") for place in places)


# The search itself


def packed(kind: str) -> bytes:
    """A report with a name in it, as a file of this kind."""
    text, file = "seen by Dr. QUARTERMAINE today", io.BytesIO()
    if kind in ("zip", "zip in zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", packed("zip") if kind == "zip in zip" else text)
    elif kind == "npz":
        np.savez_compressed(file, a=np.array([text]))
    elif kind == "checkpoint":
        torch.save({"name": text}, file)
    elif kind == "gzip":
        file.write(gzip.compress(text.encode()))
    elif kind == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("Comment", text, zip=True)
        Image.new("L", (3, 2)).save(file, "PNG", pnginfo=chunks)
    elif kind == "page":
        file.write(b'<img src="data:image/png;base64,' + base64.b64encode(packed("png")) + b'">')
    else:
        file.write(text.encode(kind))
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["utf-8", "utf-16", "utf-16-be", "zip", "zip in zip", "npz", "checkpoint", "gzip", "png", "page"],
)
def test_search_looks_into_files(kind):
    assert kinds_in(packed(kind)) == {"header"}


@pytest.mark.parametrize("text", ["Þorgerður", r"\u00deorger\u00f0ur", "&#222;orger&#240;ur", "%C3%9Eorger%C3%B0ur"])
def test_search_knows_escapes(text):
    assert kinds_in(text.encode()) == {"header"}
    assert kinds_in("Þorgerður".encode("latin-1")) == {"header"}


def test_search_reads_databases(tmp_path):
    """Longer than a page, so that the name is not in one piece."""
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("create table notes (words text)")
        for offset in range(3900, 4200, 7):
            database.execute("insert into notes values (?)", ("x" * offset + PLANTED["text"]["report"] + "x" * 300,))
        database.commit()
    assert kinds_in_file(tmp_path / "a.db") == {"text"}
