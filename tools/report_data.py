# SPDX-License-Identifier: Apache-2.0
"""What a run left on disk, read for the report; nothing is computed that was not written."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tools.report_masks import Mask, is_mask, read_mask

_NOT_RUNS = {"previews", "evaluation", "checkpoints", "models", "mlruns"}
_DEPTH = 3
# Columns of per_image.csv, per_subject.csv that say which image a row is or is compared with; no spread of theirs.
_ROW_NUMBERS = {"row", "slice", "training_row_pixel", "training_row_correlation", "training_row_feature"}
_ROW_NUMBERS |= {"name", "group", "subject", "both_empty", "one_empty"}
# Columns by which an image has several rows; the spread is that of the rows like the first.
_ROW_KINDS = ("method", "resolution", "class")
_SAMPLE_SETTINGS = ("guidance_scale", "num_inference_steps", "negative_prompt", "scheduler")
_TRANSLATION_SETTINGS = (
    "conditioning_scale",
    "guidance_scale",
    "num_inference_steps",
    "scheduler",
    "num_samples",
    "seed",
)
_SAMPLE_ORIGIN = ("weights_sha256", "monai_version", "torch_version")
EXPECTED = (
    "manifest.json, metrics.csv, previews/, evaluation/summary.json, pictures with prompts (PNG and JSON pairs), "
    "translated volumes or masks"
)


@dataclass
class Sample:
    """A generated picture and the JSON beside it: prompt, what varies (`settings`), what made it (`origin`)."""

    path: Path
    prompt: str
    seed: Any
    settings: dict[str, Any]
    origin: dict[str, Any]


@dataclass
class Translation:
    """A translated volume as the JSON beside it tells: `path` of its picture (None: none was written), what the
    picture shows from left to right, what varies (`settings`), the unit of the values, what made it (`origin`)."""

    path: Path | None
    panels: tuple[str, ...]
    settings: dict[str, Any]
    intensity: dict[str, Any]
    origin: dict[str, Any]


@dataclass
class Run:
    """One run folder. Empty containers and None mean: the run did not write it.

    Attributes:
        curves: quantity -> phase ("train", "validation") -> points (epoch, value), finite ones only.
        not_finite: how many values of `metrics.csv` were NaN or infinite.
        previews: name of the preview -> (epoch, picture), by epoch.
        evaluation: rows `name, value, ci_low, ci_high, n, note` as written; a row may have `sd`, `group` (a heading),
            `method` and `measure` (then it is a cell of a table of methods).
        protocol: how the evaluation was made, with `conventions` (subject -> words).
        per_image: column of `per_image.csv` -> its finite numbers, of the rows like the first where an image has rows
            for several methods, resolutions and classes; `per_image_of` says which. Without that file, of
            `per_subject.csv`; `per_image_unit` says of what the rows are.
    """

    folder: Path
    name: str
    manifest: dict[str, Any] | None = None
    config: Any = None
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    not_finite: int = 0
    times: list[datetime] = field(default_factory=list)
    epochs: int = 0
    previews: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] | None = None
    evaluation_pictures: list[Path] = field(default_factory=list)
    protocol: dict[str, Any] | None = None
    per_image: dict[str, list[float]] = field(default_factory=dict)
    per_image_of: str = ""
    per_image_unit: str = "images"
    samples: list[Sample] = field(default_factory=list)
    translations: list[Translation] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)

    @property
    def recorded_start(self) -> datetime | None:
        """When the run began: the earliest time in the manifest (rewritten on resuming) and the curves."""
        known = list(self.times)
        if self.manifest and isinstance(self.manifest.get("started"), str):
            known.append(_time(self.manifest["started"], self.folder / "manifest.json"))
        return min(known, default=None)

    @property
    def order(self) -> datetime:
        """What the sections are sorted by: the recorded start, else the date of the folder."""
        return self.recorded_start or datetime.fromtimestamp(self.folder.stat().st_mtime, timezone.utc)

    @property
    def is_training(self) -> bool:
        """Whether curves and previews are to be expected."""
        others = self.samples or self.translations or self.masks or self.evaluation is not None
        return bool(self.curves or self.previews) or not others


def find_runs(folder: str | Path) -> list[Run]:
    """Read the run folder, or every run in its subfolders, by start time.

    Raises:
        FileNotFoundError: the folder does not exist or holds nothing that a run writes.
        ValueError: a file of a run is damaged; the message starts with its path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a run folder, found no such folder")
    runs = []
    for candidate in _folders(folder, _DEPTH):
        run = _read_run(candidate, folder)
        if run is not None:
            runs.append(run)
    if not runs:
        raise FileNotFoundError(
            f"{folder}: expected a run folder or a folder of run folders with {EXPECTED}; found none"
        )
    return sorted(runs, key=lambda run: run.order)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth > 0:
        for child in sorted(folder.iterdir()):
            # A run may itself be called like a part of one: evaluate.json writes into runs/evaluation.
            is_part = child.name in _NOT_RUNS and not (child / "manifest.json").is_file()
            if child.is_dir() and not is_part and not child.name.startswith("."):
                yield from _folders(child, depth - 1)


def _read_run(folder: Path, root: Path) -> Run | None:
    name = " / ".join(folder.relative_to(root).parts) or folder.resolve().name
    run = Run(folder=folder, name=name)
    run.manifest = _json(folder / "manifest.json", dict)
    _read_metrics(run, folder / "metrics.csv")
    for path in sorted((folder / "previews").glob("epoch_*_*.png")):
        match = re.fullmatch(r"epoch_(\d+)_(.+)", path.stem)
        if match:
            run.previews.setdefault(match[2], []).append((int(match[1]), path))
    run.evaluation = _evaluation(folder / "evaluation" / "summary.json")
    run.evaluation_pictures = sorted((folder / "evaluation").glob("*.png"))
    run.protocol = _json(folder / "evaluation" / "protocol.json", dict)
    _read_per_image(run, folder / "evaluation" / "per_image.csv")
    if not run.per_image and run.evaluation is not None:
        run.per_image_unit = "subjects"
        _read_per_image(run, folder / "evaluation" / "per_subject.csv")
    run.samples = list(_samples(folder))
    for place, content in _results(folder, root):
        if is_mask(content):
            run.masks.append(read_mask(content, place, _origin(content)))
        else:
            run.translations.append(_translation(content, place))
    found = run.manifest or run.curves or run.previews or run.evaluation is not None or run.evaluation_pictures
    if not (found or run.samples or run.translations or run.masks):
        return None
    run.config = _json(folder / "config.json", (dict, list))
    return run


def _json(path: Path, kind: type | tuple[type, ...]) -> Any:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: expected a JSON {'list' if kind is list else 'object'}, got {type(content).__name__}"
        )
    return content


def _time(text: str, path: Path) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a date and time as in 2026-01-31T12:00:00+00:00, got {text!r}") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _read_metrics(run: Run, path: Path) -> None:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and rows[-1].get("value") in (None, ""):
        rows.pop()  # the run was stopped while it wrote this row
    collected: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=2):
        try:
            epoch, value = int(row["epoch"]), float(row["value"])
            phase, name = row["phase"], row["name"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected time,epoch,iteration,phase,name,value in line {number}, got {list(row.values())}"
            ) from error
        if row.get("time"):
            run.times.append(_time(row["time"], path))
        run.epochs = max(run.epochs, epoch)
        if math.isfinite(value):
            collected[name, phase][epoch].append(value)
        else:
            run.not_finite += 1
    for (name, phase), epochs in collected.items():
        # Several rows of one epoch are spread over it: row k of K stands at epoch - 1 + k / K.
        points = [
            (epoch - 1 + (index + 1) / len(values), value)
            for epoch, values in sorted(epochs.items())
            for index, value in enumerate(values)
        ]
        run.curves.setdefault(name, {})[phase] = points


def _evaluation(path: Path) -> list[dict[str, Any]] | None:
    rows = _json(path, list)
    for index, row in enumerate(rows or []):
        if not isinstance(row, dict) or "name" not in row or "value" not in row or "n" not in row:
            raise ValueError(f"{path}: expected name, value and n in entry {index}, got {row!r}")
    return rows


def _read_per_image(run: Run, path: Path) -> None:
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kind = {column: rows[0][column] for column in _ROW_KINDS if column in rows[0]} if rows else {}
    run.per_image_of = ", ".join(kind.values())
    for row in rows:
        if any(row[column] != value for column, value in kind.items()):
            continue
        for column, text in row.items():
            try:
                value = float(text)
            except (TypeError, ValueError):
                continue  # names of files and classes
            if column and column not in _ROW_NUMBERS and column not in kind and math.isfinite(value):
                run.per_image.setdefault(column, []).append(value)


def _samples(folder: Path) -> Iterator[Sample]:
    for sidecar in sorted(folder.glob("*.json")):
        picture = sidecar.with_suffix(".png")
        if not picture.is_file():
            continue
        content = _json(sidecar, dict)
        if "prompt" not in content:
            continue
        settings = {key: content[key] for key in _SAMPLE_SETTINGS if content.get(key) not in (None, "")}
        yield Sample(picture, str(content["prompt"] or ""), content.get("seed"), settings, _origin(content))


def _results(folder: Path, root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and content of each JSON that a saver of translated volumes or of masks wrote."""
    # Results keep the subfolders of their inputs, one for each subject: they belong to the run above them.
    above = (parent for parent in folder.parents if parent == root or root in parent.parents)
    if not _has_manifest(folder) and any(_has_manifest(parent) for parent in above):
        return
    for place in _parts_of_run(folder) if _has_manifest(folder) else [folder]:
        for sidecar in sorted(place.glob("*.json")):
            if not any(sidecar.with_suffix(suffix).is_file() for suffix in (".nii.gz", ".png")):
                continue
            content = _json(sidecar, dict)
            if "prompt" not in content and "source" in content and content.get("synthetic") is True:
                yield place, content


def _translation(content: dict[str, Any], place: Path) -> Translation:
    files = content.get("files") or {}
    # Only the name: a JSON from elsewhere must not put other files of this machine into the page.
    picture = place / Path(str(files.get("picture", ""))).name
    return Translation(
        path=picture if files.get("picture") and picture.is_file() else None,
        panels=tuple(str(panel) for panel in content.get("panels") or ()),
        settings={key: content[key] for key in _TRANSLATION_SETTINGS if content.get(key) not in (None, "")},
        intensity=content.get("intensity") or {},
        origin=_origin(content),
    )


def _origin(content: dict[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in _SAMPLE_ORIGIN if content.get(key) is not None}


def _parts_of_run(folder: Path) -> Iterator[Path]:
    """The folder and those below it that are no runs of their own."""
    yield folder
    for child in sorted(folder.iterdir()):
        skipped = child.name in _NOT_RUNS or child.name.startswith(".") or _has_manifest(child)
        if child.is_dir() and not child.is_symlink() and not skipped:
            yield from _parts_of_run(child)


def _has_manifest(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()
