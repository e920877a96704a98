# SPDX-License-Identifier: Apache-2.0
"""What one call of the network costs: seconds and memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from shared.distributed import from_all_processes, process_count
from shared.files import sha256_of_file
from shared.provenance import git_commit, software_versions


class CallCost:
    """Time each iteration from its start, the batch being loaded, until the inferer has returned; and its memory.

    ``ignite.handlers.BasicTimeProfiler`` does not fit: it times the handlers too, keeps no single iterations, and does
    not wait for the GPU. ``FORWARD_COMPLETED`` is the moment before ``MODEL_COMPLETED``, whose first handlers are the
    engine's own decollating and postprocessing.

    Attributes:
        seconds: of the present iteration.
        peak_bytes: the most so far; None where it is not known.
        memory_note: what ``peak_bytes`` counts.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        self.memory_note = ""
        self._began = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop)

    def merge(self) -> None:
        """Of several processes the most that one took. All ranks must call it."""
        peaks = from_all_processes(self.peak_bytes)
        if len(peaks) > 1:
            self.peak_bytes = max((peak for peak in peaks if peak is not None), default=None)
            self.memory_note = f"{self.memory_note}; the most of {len(peaks)} processes"

    def _reset(self, engine: Engine) -> None:
        self.peak_bytes = None

    def _start(self, engine: Any) -> None:
        device = engine.state.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._began = time.perf_counter()

    def _stop(self, engine: Any) -> None:
        device = engine.state.device
        wait_for(device)
        self.seconds = time.perf_counter() - self._began
        used, self.memory_note = _peak(device)
        if used is not None:
            self.peak_bytes = max(used, self.peak_bytes or 0)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; on a CPU that is so already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cost_rows(
    cost: CallCost,
    times: Mapping[str, Sequence[float]],
    notes: Mapping[str, str],
    *,
    device: torch.device,
    peak_of: str,
    what: str = "image",
) -> list[dict[str, Any]]:
    """Summary rows of the median time of each method and of the peak memory, under one heading.

    Args:
        cost: knows the memory.
        times: method -> seconds of each image; methods without any are left out.
        notes: method -> note.
        device: where it ran.
        peak_of: the method that the memory is of.
        what: that the times are of, in words.

    Returns:
        ``{"name", "value", "ci_low", "ci_high", "n", "note", "method", "measure", "group"}`` each.
    """
    rows = []
    for method, seconds in times.items():
        if len(seconds):
            note = f"median over {what}s, on {device}; {notes[method]}"
            row = _plain_row(f"Time per {what} (s), {method}", float(np.median(seconds)), len(seconds), note)
            rows.append(row | {"method": method, "measure": "seconds"})
    if rows:
        value = None if cost.peak_bytes is None else cost.peak_bytes / 1e6
        row = _plain_row(f"Peak memory (MB), {peak_of}", value, rows[0]["n"], cost.memory_note)
        rows.append(row | {"method": peak_of, "measure": "memory_mb"})
    return [row | {"group": "Time and memory"} for row in rows]


def setting_of(
    cost: CallCost, device: torch.device, dataset_dir: str | os.PathLike[str] | None, *, timed: str
) -> dict[str, Any]:
    """What the numbers of a ``protocol.json`` hold for: device, processes, what time and memory mean, data, versions.

    Args:
        cost: knows the memory.
        device: where it ran.
        dataset_dir: its ``datalist.json`` is hashed; None, or a folder without one, states null.
        timed: what the seconds are of, in words.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    datalist = None if dataset_dir is None else Path(dataset_dir) / "datalist.json"
    return {
        "device": f"{device} ({name})" if name else str(device),
        "processes": process_count(),
        "time": timed,
        "memory": cost.memory_note,
        "datalist_sha256": sha256_of_file(datalist) if datalist is not None and datalist.exists() else None,
        "git_commit": git_commit(Path(__file__).parent),
        "software": software_versions(),
    }


def _plain_row(name: str, value: float | None, n: int, note: str) -> dict[str, Any]:
    return {"name": name, "value": value, "ci_low": None, "ci_high": None, "n": n, "note": note}


def _peak(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "torch.cuda.max_memory_allocated"
    if sys.platform == "win32":
        return None, "not measured: Windows has no resource.getrusage"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return used, "resource.getrusage: ru_maxrss of the whole process, with data loading and libraries"
