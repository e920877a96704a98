# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: the same work done in several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.utils import StrEnum


class Kind(StrEnum):
    """What a workload is about; ``scaling`` is how cost grows, or shrinks with more processes."""

    TRAIN = "train"
    SAMPLE = "sample"
    METRIC = "metric"
    DATA = "data"
    MEMORY = "memory"
    SCALING = "scaling"


class Size(StrEnum):
    """How large the work is: ``tiny`` for the tests (a second), ``quick`` for a CPU (ten minutes for everything),
    ``full`` as published, for a GPU or a patient CPU."""

    TINY = "tiny"
    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: where the work runs.
        size: how large it is.
        seed: of weights and data, which are random: time does not depend on what a network has learned.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    size: Size = Size.QUICK
    seed: int = 0

    def pick(self, tiny: Any, quick: Any, full: Any) -> Any:
        """The one of three values that belongs to ``size``."""
        return {Size.TINY: tiny, Size.QUICK: quick, Size.FULL: full}[self.size]


@dataclass(frozen=True)
class Workload:
    """The same work done in several ways.

    Attributes:
        name: of the work, as a row of the table says it: "guided sampling of 16 chest images".
        sizes: what was run, in words, and how that differs from full size.
        ways: the ways by name, each a function without arguments that does all of the work and returns its result. The
            first is the baseline, what a user would run today; the last is what the bundle does; those between change
            one thing at a time.
        equal: gets the result of one run of each way, and returns the sentence that says what stayed equal, with the
            measured number: "images equal within 2e-6".
        target: ratio of baseline to bundle that is aimed at; ``None``: none.
        factors: by way, how often the timed part occurs in the whole work, where running all of it would take too
            long: 100 for 10 of 1000 equal steps. ``sizes`` says so. 1 for ways that are not named.
        measured: "time", or "memory": the ratio is then that of the peaks.
        clock: "process" counts processor seconds of this process, which other work on the machine hardly changes;
            "wall" is for work in other processes or on a GPU.
        repeats: how often each way is timed.
    """

    name: str
    sizes: str
    ways: Mapping[str, Callable[[], Any]]
    equal: Callable[[Mapping[str, Any]], str]
    target: float | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    measured: str = "time"
    clock: str = "process"
    repeats: int = 5

    def __post_init__(self) -> None:
        if len(self.ways) < 2:
            raise ValueError(f"{self.name}: expected a baseline and at least one other way, got {list(self.ways)}.")
        unknown = set(self.factors) - set(self.ways)
        if unknown:
            raise ValueError(f"{self.name}: expected factors of ways {list(self.ways)}, got {sorted(unknown)}.")


Builder = Callable[[Setting], Workload]
Catalogue = Mapping[Kind, Sequence[Builder]]
"""What a module of this package offers as ``WORKLOADS``: built one at a time, since each workload holds networks."""


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference of two tensors of equal shape, divided by the norm of the second.

    Raises:
        ValueError: for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"result: expected {tuple(b.shape)}, got {tuple(a.shape)}; the ways do different work.")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def equal_within(tolerance: float, what: str = "results") -> Callable[[Mapping[str, Any]], str]:
    """An ``equal`` for ways that return tensors: each must be near the first, the baseline's.

    Raises:
        ValueError: (the returned function) for a larger relative difference; the message starts with the way's name.
    """

    def check(results: Mapping[str, Any]) -> str:
        names = list(results)
        differences = {name: relative_difference(results[name], results[names[0]]) for name in names[1:]}
        for name, difference in differences.items():
            if not difference <= tolerance:
                raise ValueError(f"{name}: expected {what} within {tolerance:g} of {names[0]}, got {difference:.3g}.")
        return f"{what} equal within {max(differences.values()):.1e} (relative)"

    return check
