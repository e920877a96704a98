# SPDX-License-Identifier: Apache-2.0
"""Curves as a plain file."""

from __future__ import annotations

import csv
import io
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from shared.distributed import mean_over_processes
from shared.files import atomic_path

logger = logging.getLogger(__name__)

COLUMNS = ("time", "epoch", "iteration", "phase", "name", "value")


class MetricsCsv:
    """Append losses and metrics to ``metrics.csv`` in long form, one value a row, and log them in one line.

    ``monai.handlers.MetricsSaver`` does not fit: it overwrites its files at the end of every run and records no losses.
    For a trainer: the mean over each epoch, and over the ranks of a distributed run, of ``loss`` and of the terms in
    ``engine.state.losses``, the last gradient norm and learning rate. For an evaluator: ``engine.state.metrics``. Rows
    beyond the epoch from which a run resumes are removed, so that the file never holds an epoch twice. The file is
    whole at any moment: a killed run and a full disk leave no half row.

    Args:
        path: file to append to.
        phase: ``train`` or ``validation``.
        tracker: ``ExperimentTracker`` that records the same values, or ``None``.
    """

    def __init__(self, path: str | Path, *, phase: str, tracker: Any = None) -> None:
        self.path = Path(path)
        self.phase = phase
        self.tracker = tracker
        self._sums: dict[str, Any] = {}
        self._count = 0
        self._is_clean = False

    def attach(self, engine: Engine) -> None:
        if self.phase == "train":
            engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write_losses)
        else:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write_metrics)

    def _drop_repeated(self, engine: Any) -> None:
        if engine.state.rank != 0 or not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["epoch"] or "").isdigit()]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["epoch"]) < engine.state.epoch and row["value"])

    def _reset(self, engine: Engine) -> None:
        self._sums, self._count = {}, 0
        if not self._is_clean:
            # Only now is the epoch known from which a run resumes.
            self._drop_repeated(engine)
            self._is_clean = True

    def _add(self, engine: Any) -> None:
        # Sums stay on the device: reading a number each step would make the host wait for it.
        for name, value in {"loss": engine.state.output["loss"], **getattr(engine.state, "losses", {})}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1

    def _write_losses(self, engine: Any) -> None:
        sums = torch.stack([torch.as_tensor(total) for total in self._sums.values()]).double()
        means = (mean_over_processes(sums) / self._count).tolist()
        values = dict(zip(self._sums, means, strict=True))
        values["learning_rate"] = engine.optimizer.param_groups[0]["lr"]
        if hasattr(engine.state, "gradient_norm"):
            values["gradient_norm"] = float(engine.state.gradient_norm)
        self._append(engine, values)

    def _write_metrics(self, engine: Any) -> None:
        # A validator runs for one epoch that carries the trainer's number; its iteration count means nothing here.
        self._append(engine, {name: float(value) for name, value in engine.state.metrics.items()})

    def _append(self, engine: Any, values: dict[str, float]) -> None:
        if engine.state.rank != 0:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows = io.StringIO(newline="")
        writer = csv.writer(rows)
        if not self.path.exists():
            writer.writerow(COLUMNS)
        for name, value in values.items():
            iteration = engine.state.iteration if self.phase == "train" else ""
            writer.writerow((now, engine.state.epoch, iteration, self.phase, name, repr(value)))
        before = self.path.read_bytes() if self.path.exists() else b""
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(before + rows.getvalue().encode())
        logger.info(
            "epoch %d, %s: %s", engine.state.epoch, self.phase, ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        )
        if self.tracker is not None:
            prefixed = {f"{self.phase}_{name}": value for name, value in values.items()}
            self.tracker.log_values(engine, prefixed, engine.state.epoch)
