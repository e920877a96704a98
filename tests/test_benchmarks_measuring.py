# SPDX-License-Identifier: Apache-2.0
"""Turns, ratios and peaks of a workload, with a clock that the ways move themselves: nothing here is timed."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from tools.benchmarks import measuring
from tools.benchmarks.measuring import Spread, measure, old_objects_aside, take_turns
from tools.benchmarks.workload import Workload, equal_within


@pytest.fixture(autouse=True, scope="module")
def _fast_collection() -> Iterator[None]:
    with old_objects_aside():
        yield


class Clock:
    """Moved by ways that "take" the given seconds in their first, second, ... call after the one that warms up."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now

    def way(self, name: str, *seconds: float, result: Any = None) -> Callable[[], Any]:
        left = iter([0.0, *seconds, 0.0])

        def run() -> Any:
            self.calls.append(name)
            self.now += round(next(left) * 1e9)
            return result

        return run


def workload(moved: Clock, **changes: Any) -> Workload:
    ways = {
        "plain": moved.way("plain", 6, 8, 12),
        "some": moved.way("some", 3, 8, 4),
        "ours": moved.way("ours", 2, 2, 3),
    }
    content: dict[str, Any] = {"name": "work", "sizes": "small", "ways": ways, "equal": lambda _: "all", "repeats": 3}
    return Workload(**(content | changes))


def no_peak(way: Callable[[], Any], *, device: torch.device) -> int:
    return 0


def test_ways_take_turns_between_a_checked_run_and_one_for_the_peak():
    clock = Clock()
    measure(workload(clock), clock=clock)
    assert clock.calls == ["plain", "some", "ours"] * 5


def test_ratios_are_those_of_each_turn():
    clock = Clock()
    result = measure(workload(clock, target=4.0), clock=clock, peak=no_peak)
    plain, some, ours = result.ways
    assert plain.seconds == Spread(8, 6, 12)
    assert plain.ratio == Spread(1, 1, 1)
    # 6/3, 8/8, 12/4 and 6/2, 8/2, 12/3
    assert (some.seconds, some.ratio) == (Spread(4, 3, 8), Spread(2, 1, 3))
    assert (ours.seconds, ours.ratio) == (Spread(2, 2, 3), Spread(4, 3, 4))
    assert (result.workload, result.sizes, result.equal, result.repeats) == ("work", "small", "all", 3)
    assert result.reached is True


def test_factors_scale_times_and_ratios():
    clock = Clock()
    result = measure(workload(clock, factors={"plain": 100, "ours": 0.5}, target=801.0), clock=clock, peak=no_peak)
    plain, some, ours = result.ways
    assert plain.seconds == Spread(800, 600, 1200)
    assert some.ratio == Spread(200, 100, 300)
    assert (ours.seconds, ours.ratio) == (Spread(1, 1, 1.5), Spread(800, 600, 800))
    assert [way.factor for way in result.ways] == [100, 1, 0.5]
    assert result.reached is False


def test_memory_workload_compares_peaks_after_one_turn():
    clock = Clock()
    x = torch.zeros(100)
    ways = {"copies": lambda: (x + 1, x + 2), "none": lambda: (x.view(10, 10),)}
    result = measure(
        Workload(name="adding", sizes="100", ways=ways, equal=lambda _: "", measured="memory", target=1 / 0.4),
        clock=clock,
    )
    assert [way.peak_bytes for way in result.ways] == [1200, 400]
    assert result.ways[1].ratio == Spread(3, 3, 3)
    assert (result.repeats, result.reached) == (1, True)


def test_time_workload_knows_its_peaks_and_whether_no_target_is_reached():
    x = torch.zeros(100)
    result = measure(
        Workload(name="a", sizes="", ways={"a": x.clone, "b": x.view_as(x).detach}, equal=lambda _: ""), repeats=2
    )
    assert result.repeats == 2
    assert result.reached is None
    assert result.ways[0].peak_bytes == 800


def test_results_are_compared_then_freed():
    alive: list[weakref.ref] = []
    seen: list[str] = []

    def way(value: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            if seen:
                assert not any(reference() is not None for reference in alive)
            result = torch.full((3,), value)
            alive.append(weakref.ref(result))
            return result

        return run

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        assert all(reference() is not None for reference in alive)
        seen.extend(results)
        return equal_within(1e-3)(results)

    ways = {"a": way(1.0), "b": way(1.00001)}
    result = measure(Workload(name="a", sizes="", ways=ways, equal=equal, repeats=1))
    assert seen == ["a", "b"]
    assert result.equal == "results equal within 1.0e-05 (relative)"


def test_ways_that_differ_are_not_timed():
    clock = Clock()
    ways = {"plain": clock.way("plain", result=torch.ones(2)), "ours": clock.way("ours", result=torch.zeros(2))}
    with pytest.raises(ValueError, match="^ours: expected results within 0.001 of plain, got 1"):
        measure(workload(clock, ways=ways, equal=equal_within(1e-3)), clock=clock)
    assert clock.calls == ["plain", "ours"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock": "sun"}, "^work: expected a clock of .'process', 'wall'., got 'sun'"),
        ({"measured": "heat"}, "^work: expected measured 'time' or 'memory', got 'heat'"),
        ({"repeats": 0}, "^work: expected repeats of 1 or more, got 0"),
    ],
)
def test_wrong_workloads_are_refused_before_they_run(changes, message):
    clock = Clock()
    with pytest.raises(ValueError, match=message):
        measure(workload(clock, **changes), clock=clock)
    assert clock.calls == []


def test_clock_is_the_one_asked_for_and_a_wall_clock_on_gpus():
    for name, function in (("process", time.process_time_ns), ("wall", time.perf_counter_ns)):
        work = workload(Clock(), clock=name)
        assert measuring.clock_of(work, torch.device("cpu")) == (name, function)
        assert measuring.clock_of(work, torch.device("cuda")) == ("wall", time.perf_counter_ns)


def test_gpu_is_idle_when_the_clock_is_read():
    events: list[str] = []

    def clock() -> int:
        events.append("clock")
        return len(events)

    ways = {"a": lambda: events.append("a")}
    seconds = take_turns(ways, turns=2, clock=clock, finish=lambda: events.append("idle"))
    assert events == ["idle", "clock", "a", "idle", "clock"] * 2
    assert seconds == {"a": [3e-9, 3e-9]}


def test_time_is_never_zero():
    assert take_turns({"a": lambda: None}, turns=1, clock=lambda: 7) == {"a": [1e-9]}


def test_old_objects_return_to_the_collector():
    def fail_inside() -> None:
        with old_objects_aside():
            assert gc.get_freeze_count() > 1000
            with old_objects_aside():
                pass
            assert gc.get_freeze_count() > 1000
            raise RuntimeError("inside")

    gc.unfreeze()
    try:
        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()
