# SPDX-License-Identifier: Apache-2.0
"""Campaigns: cases of one kind, tried one after the other until there are enough or the time is over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """What became of one case.

    Attributes:
        title: what was tried.
        survived: how many of the ``tried`` ended as they should.
        tried: e.g. kills of one training.
        problems: what was wrong, a line each.
        counts: what else was counted, summed up over the campaign.
    """

    title: str
    survived: int = 1
    tried: int = 1
    problems: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Campaign:
    """Cases that a seed and a number decide.

    Attributes:
        name: for the command line.
        row: of the fifteen.
        title: for people.
        share: of the time box.
        target: cases after which it is enough.
        case: ``case(folder, rng, number)`` tries the case of that number; what all cases need is kept in ``folder``.
    """

    name: str
    row: int
    title: str
    share: float
    target: int
    case: Callable[[Path, random.Random, int], Case]


@dataclass
class Result:
    """Sums of a campaign; ``failures`` are told with how to repeat them."""

    name: str
    row: int
    title: str
    target: int
    tried: int = 0
    survived: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = "".join(f"; {number} {what}" for what, number in self.counts.items())
        late = f"; time was over before the target of {self.target}" if self.tried < self.target else ""
        return f"{self.row:2d} {self.title}: {self.tried} tried, {self.survived} survived{counts}{late}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def attempt(campaign: Campaign, folder: Path, *, seed: int, seconds: float, only: int | None = None) -> Result:
    """Try the cases of a campaign and print them.

    Args:
        folder: for data, networks and what the cases write.
        seed: of the whole soak.
        seconds: no case starts after them; one case at least is tried.
        only: number of the one case to try.
    """
    result = Result(campaign.name, campaign.row, campaign.title, campaign.target)
    print(f"{campaign.row} {campaign.title}: at most {seconds / 60:.1f} minutes", flush=True)
    start, number = time.monotonic(), only or 0
    while True:
        before = time.monotonic()
        try:
            case = campaign.case(folder, random.Random(f"{seed} {campaign.name} {number}"), number)
        except Exception as error:
            case = Case("could not be tried", survived=0, problems=(f"{type(error).__name__}: {error}",))
        result.tried += case.tried
        result.survived += case.survived
        for what, count in case.counts.items():
            result.counts[what] = result.counts.get(what, 0) + count
        good = not case.problems and case.survived == case.tried
        print(
            f"  {'ok ' if good else 'BAD'} {number} {case.title} ({time.monotonic() - before:.1f} s)",
            *(f"      {problem}" for problem in case.problems),
            sep="\n",
            flush=True,
        )
        if not good:
            again = f"python -m tests.soak --campaign {campaign.name} --seed {seed} --case {number}"
            result.failures.append({"case": case.title, "problems": list(case.problems), "again": again})
        number += 1
        result.seconds = time.monotonic() - start
        if only is not None or result.tried >= campaign.target or result.seconds >= seconds:
            return result
