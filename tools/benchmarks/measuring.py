# SPDX-License-Identifier: Apache-2.0
"""Time the ways of a workload in turns, after checking that they do the same."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tools.benchmarks.memory import peak_memory
from tools.benchmarks.workload import Workload

Clock = Callable[[], int]
"""Nanoseconds since some moment."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Way:
    """What was measured of one way.

    Attributes:
        name: of the way.
        seconds: of the whole work, the factor applied.
        ratio: the baseline's time divided by this way's in the same turn, so above 1 is faster; where the workload
            measures memory, the baseline's peak divided by this way's.
        peak_bytes: see :func:`tools.benchmarks.memory.peak_memory`.
        factor: how often the timed part occurs in the whole work.
    """

    name: str
    seconds: Spread
    ratio: Spread
    peak_bytes: int
    factor: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """A workload and what was measured of its ways, the baseline first; ``equal`` says what stayed equal."""

    workload: str
    sizes: str
    equal: str
    ways: tuple[Way, ...]
    target: float | None
    measured: str
    clock: str
    repeats: int

    @property
    def reached(self) -> bool | None:
        """Whether the last way reaches the target; ``None`` without a target."""
        return None if self.target is None else self.ways[-1].ratio.median >= self.target


def clock_of(workload: Workload, device: torch.device) -> tuple[str, Clock]:
    """Name of the clock and the clock for a workload on a device.

    Raises:
        ValueError: for a clock that does not exist; the message starts with the workload's name.
    """
    clocks = {"process": time.process_time_ns, "wall": time.perf_counter_ns}
    if workload.clock not in clocks:
        raise ValueError(f"{workload.name}: expected a clock of {list(clocks)}, got {workload.clock!r}.")
    # The processor waits, or does other things, while a GPU works.
    name = "wall" if device.type == "cuda" else workload.clock
    return name, clocks[name]


@contextlib.contextmanager
def old_objects_aside() -> Iterator[None]:
    """Spare the objects that exist from garbage collection: of imported modules alone there are half a million, and
    visiting them takes longer than much of what is timed. Within another such block nothing happens."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def take_turns(
    ways: Mapping[str, Callable[[], Any]], *, turns: int, clock: Clock, finish: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Time several ways of doing the same in turns, A B C A B C: other work on the machine slows neighbours alike.

    Args:
        ways: functions by name; their results are dropped.
        turns: how often each is timed.
        clock: read before and after each.
        finish: waits until the device is idle.

    Returns:
        The seconds of every turn by name, at least one nanosecond.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with old_objects_aside():
        for _ in range(turns):
            for name, way in ways.items():
                gc.collect()
                finish()
                start = clock()
                way()
                finish()
                seconds[name].append(max(clock() - start, 1) / 1e9)
    return seconds


def measure(
    workload: Workload,
    *,
    device: str | torch.device = "cpu",
    repeats: int | None = None,
    clock: Clock | None = None,
    peak: Callable[..., int] = peak_memory,
) -> Measurement:
    """Check, time and weigh the ways of a workload.

    Every way runs once before the clock does; the results of these runs are compared and freed. Then all are timed in
    turns, and run once more each for their peak memory.

    Args:
        workload: what is measured.
        device: where it runs.
        repeats: turns; ``None``: as many as the workload asks for. One where memory is measured.
        clock: ``None``: the one the workload asks for, on a GPU always a wall clock.
        peak: peak memory of a way, called with it and ``device``.

    Raises:
        ValueError: when the ways do not do the same, from ``workload.equal``; when ``measured`` or ``clock`` is
            unknown or ``repeats`` below 1; the message starts with the workload's name.
    """
    device = torch.device(device)
    name, its_clock = clock_of(workload, device)
    repeats = workload.repeats if repeats is None else repeats
    repeats = 1 if workload.measured == "memory" else repeats
    if workload.measured not in ("time", "memory"):
        raise ValueError(f"{workload.name}: expected measured 'time' or 'memory', got {workload.measured!r}.")
    if repeats < 1:
        raise ValueError(f"{workload.name}: expected repeats of 1 or more, got {repeats}.")

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    results = {way: run() for way, run in workload.ways.items()}
    equal = workload.equal(results)
    # They may be as large as what is measured.
    results.clear()
    seconds = take_turns(workload.ways, turns=repeats, clock=clock or its_clock, finish=finish)
    factors = {way: float(workload.factors.get(way, 1)) for way in workload.ways}
    whole = {way: [factors[way] * value for value in values] for way, values in seconds.items()}
    peaks = {way: peak(run, device=device) for way, run in workload.ways.items()}
    first = next(iter(workload.ways))

    def ratio(way: str) -> Spread:
        if workload.measured == "memory":
            return Spread.of([peaks[first] / max(peaks[way], 1)])
        return Spread.of([base / value for base, value in zip(whole[first], whole[way], strict=True)])

    return Measurement(
        workload=workload.name,
        sizes=workload.sizes,
        equal=equal,
        ways=tuple(Way(way, Spread.of(whole[way]), ratio(way), peaks[way], factors[way]) for way in workload.ways),
        target=workload.target,
        measured=workload.measured,
        clock=name,
        repeats=repeats,
    )
