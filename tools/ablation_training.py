# SPDX-License-Identifier: Apache-2.0
"""Trainings with a common budget that go on after an interruption without getting more than it.

`tools.demo_steps` alone does not fit: it deletes what was made by another command, which may be days of training, and
does not know how much of a budget was spent before a process was killed.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.files import save_json, sha256_of_file
from shared.handlers.checkpoint import checkpoints_in
from shared.provenance import sha256_of_json
from tools.demo_steps import Step, run_steps

RECORD = "trainings.json"
_NO_LIMIT = 1_000_000  # epochs, where the time is the limit


@dataclass(frozen=True)
class Budget:
    """What every training may use.

    Attributes:
        max_epochs: None leaves it to the configuration, or to the time.
        minutes: of training with validation, after data and networks were loaded; None is no limit.
    """

    max_epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")

    def options(self, spent_seconds: float) -> dict[str, object]:
        """Overrides of a configuration for what is left."""
        epochs = self.max_epochs if self.minutes is None else self.max_epochs or _NO_LIMIT
        options: dict[str, object] = {} if epochs is None else {"max_epochs": epochs}
        if self.minutes is not None:
            options["max_minutes"] = f"{self.minutes - spent_seconds / 60:.4f}"
        return options

    def extends(self, other: Mapping[str, Any]) -> bool:
        """Whether a training that had the `other` budget may go on under this one."""
        for name, value in asdict(self).items():
            if (value is None) != (other[name] is None) or (value is not None and value < other[name]):
                return False
        return True

    def words(self) -> str:
        limits = [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        limits += [f"{self.max_epochs} epochs"] if self.max_epochs is not None else []
        return " and at most ".join(limits) if limits else "the epochs of the configurations"


@dataclass(frozen=True)
class Training:
    """One training of an ablation.

    Attributes:
        name: unique.
        words: what follows `python -m`, without the budget.
        bundle: folder in which it runs.
        folder: all that it makes: `run` is its run folder, `models` its weights.
        weights: file that it makes, below `models`.
        reads: files on whose content it depends.
    """

    name: str
    words: tuple[str, ...]
    bundle: Path
    folder: Path
    weights: str
    reads: tuple[Path, ...] = ()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def path(self) -> Path:
        return self.folder / "models" / self.weights

    def fingerprint(self) -> str:
        return sha256_of_json([self.words, [sha256_of_file(path) for path in self.reads]])


def train(training: Training, budget: Budget, *, root: Path, threads: int = 0) -> dict[str, Any]:
    """Train unless that was finished before, and say what it took.

    `ROOT/trainings.json` records what was begun, with which options, and the time that each process used, so that one
    that was killed goes on with what is left of the budget. A larger budget continues a finished training.

    Args:
        training: what is trained.
        budget: all of it, whatever was spent before.
        root: folder of the record.
        threads: CPU threads, 0 for all cores.

    Returns:
        `epochs`, `iterations`, `seconds` (sum over processes), `processes`, `best_epoch`, `validation` (name and value
        of the metric that chose it).

    Raises:
        SystemExit: the training failed, whose own last line says why.
        ValueError: the folder was made with other options, by something else, or without weights.
    """
    record = _read_record(root / RECORD)
    entry = record.get(training.name)
    if entry is None and training.folder.exists():
        raise ValueError(
            f"{training.folder}: expected no such folder, found one that is not in {root / RECORD}; move it away or "
            "choose another --out"
        )
    fingerprint = training.fingerprint()
    differs = entry is not None and entry["fingerprint"] != fingerprint
    if entry and differs and not entry["finished"] and not checkpoints_in(training.run / "checkpoints"):
        # Nothing is lost: a training that failed at its start, perhaps because of the option that has changed.
        shutil.rmtree(training.folder, ignore_errors=True)
        entry = None
        differs = False
    if differs:
        raise ValueError(
            f"{training.folder}: expected a training with the options, configurations, data and autoencoder of now, "
            f"found one with others; choose another --out, or remove this folder and its entry in {root / RECORD}"
        )
    entry = entry or {"fingerprint": fingerprint, "budget": asdict(budget), "processes": [], "finished": False}
    if entry["finished"] and entry["budget"] == asdict(budget):
        _check_weights(training, root)
        print(f"\n=== {training.name}: was trained before", flush=True)
        return _result(training, entry)
    if not budget.extends(entry["budget"]):
        raise ValueError(
            f"{training.folder}: expected at least the budget with which it was trained, {entry['budget']}, got "
            f"{asdict(budget)}; choose another --out"
        )
    _count_process(training, entry)
    spent = _spent(entry)
    entry |= {"budget": asdict(budget), "finished": False}
    record[training.name] = entry
    save_json(record, root / RECORD)
    # A process that was killed between its last epoch and its end has nothing left to do.
    if budget.minutes is None or spent < budget.minutes * 60:
        limits = (f"--{name}={value}" for name, value in budget.options(spent).items())
        step = Step(f"training of {training.name!r}", (*training.words, *limits), folder=training.bundle)
        run_steps([step], name="ablation", root=root, threads=threads)
        _count_process(training, entry)
    _check_weights(training, root)
    entry["finished"] = True
    save_json(record, root / RECORD)
    return _result(training, entry)


def _check_weights(training: Training, root: Path) -> None:
    if not training.path.is_file():
        raise ValueError(
            f"{training.path}: expected the weights of a finished training, found no such file (no epoch had a finite "
            f"validation metric, or it was removed); look into {training.run / 'metrics.csv'}, or remove the "
            f"folder and its entry in {root / RECORD} to train anew"
        )


def _count_process(training: Training, entry: dict[str, Any]) -> None:
    """Add the time of the latest process, which may have been killed: from its start to its last epoch."""
    manifest, rows = training.run / "manifest.json", _rows(training)
    if not manifest.is_file():
        return
    started = json.loads(manifest.read_text(encoding="utf-8"))["started"]
    if any(process["started"] == started for process in entry["processes"]):
        return
    times = [datetime.fromisoformat(row["time"]) for row in rows]
    seconds = (max(times) - datetime.fromisoformat(started)).total_seconds() if times else 0.0
    entry["processes"].append({"started": started, "seconds": max(0.0, seconds)})


def _spent(entry: Mapping[str, Any]) -> float:
    return sum(process["seconds"] for process in entry["processes"])


def _rows(training: Training) -> list[dict[str, str]]:
    path = training.run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A process that was killed may have left half a line.
        return [row for row in csv.DictReader(file) if row["value"] and (row["epoch"] or "").isdigit()]


def _result(training: Training, entry: Mapping[str, Any]) -> dict[str, Any]:
    epochs = [(int(row["epoch"]), int(row["iteration"])) for row in _rows(training) if row["phase"] == "train"]
    description = training.path.with_suffix(".json")
    best = json.loads(description.read_text(encoding="utf-8")) if description.is_file() else {}
    epoch, iterations = max(epochs, default=(None, None))
    return {
        "epochs": epoch,
        "iterations": iterations,
        "seconds": _spent(entry),
        "processes": len(entry["processes"]),
        "best_epoch": best.get("epoch"),
        "validation": best.get("metric"),
    }


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error}); repair it") from error
    return record
