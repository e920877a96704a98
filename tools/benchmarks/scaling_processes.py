# SPDX-License-Identifier: Apache-2.0
"""Training, sampling and evaluation by one process and by two."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.scaling_chest import latent_shape, unet_channels
from tools.benchmarks.scaling_worker import RESULT
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Builder, Setting, Workload, relative_difference

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = "one process", "two processes"
# Sums over shares are taken in another order.
TOLERANCE = 1e-4
EQUAL = ("losses", "weights")


class Workers:
    """Processes that stay alive and do the same work again and again; they end with this object, or with ``close``.

    Args:
        count: number of processes; ``torch.distributed.run`` starts more than one.
        setting: what they work on; GPUs are used where there is one for each process.
    """

    def __init__(self, count: int, setting: Setting) -> None:
        self.count = count
        self.folder = temporary_folder("scaling")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if setting.device.type != "cuda" or torch.cuda.device_count() < count:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        worker = ["-m", "tools.benchmarks.scaling_worker", str(self.folder), str(setting.size), str(setting.seed)]
        if count == 1:
            environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            launcher = [sys.executable]
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        begin = time.time()
        with (self.folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                launcher + worker,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._end = weakref.finalize(self, _end, self._process)
        self.start_seconds = float(self._answer()["started"]) - begin

    def run(self, work: str) -> dict[str, Any]:
        """Let all of them do a work of ``scaling_chest.ChestWorks``; what rank 0 got, and ``seconds`` measured there.

        Raises:
            RuntimeError: when a process failed; the message holds the end of what they logged.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        self._answer()
        result = torch.load(self.folder / RESULT, weights_only=True)
        return {**result, "start_seconds": self.start_seconds}

    def close(self) -> None:
        """End the processes."""
        self._end()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (self.folder / "log.txt").read_text(encoding="utf-8")
            self.close()
            raise RuntimeError(f"{self.count} processes: expected an answer, but they ended: {log[-3000:]}")
        return json.loads(line)


def _end(process: subprocess.Popen[str]) -> None:
    # Without requests the processes end by themselves.
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@lru_cache(maxsize=2)
def workers(count: int, setting: Setting) -> Workers:
    """Processes for a setting, started once and shared by the workloads of this module."""
    return Workers(count, setting)


def _ways(work: str, setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    # One process with two threads is no way here: on a busy machine threads that wait for each other take 14 times as
    # long, which says nothing about processes.
    return {ONE: lambda: workers(1, setting).run(work), TWO: lambda: workers(2, setting).run(work)}


def _sizes(setting: Setting, what: str) -> str:
    width = setting.pick("tiny width", "U-Net of an eighth of the width", "full width")
    return f"{what}; {width} {unet_channels(setting)}, latents {latent_shape(setting)}, gloo, one thread a process"


def _seconds(results: Mapping[str, Any]) -> str:
    times = ", ".join(f"{name} {result['seconds']:.2f} s" for name, result in results.items())
    starts = " and ".join(f"{results[name]['start_seconds']:.0f} s" for name in (ONE, TWO))
    return f"inside the processes {times}; starting them, once, took {starts}"


def training(setting: Setting) -> Workload:
    """Optimizer steps on the same batch: one process takes all of it, two take half each."""

    def equal(results: Mapping[str, Any]) -> str:
        differences = {what: relative_difference(results[TWO][what], results[ONE][what]) for what in EQUAL}
        for what, difference in differences.items():
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{TWO}: expected {what} within {TOLERANCE:g} of {ONE}, got {difference:.3g}; the processes do not "
                    "average what they should."
                )
        return f"losses and trained weights equal within {max(differences.values()):.0e}; {_seconds(results)}"

    steps, batch = setting.pick((3, 4), (2, 4), (4, 32))
    return Workload(
        name=f"{steps} training steps of stage 2, cached latents, batch {batch} in all",
        sizes=_sizes(setting, "AdamW, moving average, gradient clipping"),
        ways=_ways("train", setting),
        equal=equal,
        clock="wall",
    )


def sampling(setting: Setting) -> Workload:
    """The prompts of a list, whole batches dealt in turn."""

    def equal(results: Mapping[str, Any]) -> str:
        if not torch.equal(results[TWO]["images"], results[ONE]["images"]):
            raise ValueError(f"{TWO}: expected the very images of {ONE}, got others; batches must stay whole.")
        return f"images equal bit for bit; {_seconds(results)}"

    count, batch = setting.pick((4, 2), (4, 2), (16, 4))
    return Workload(
        name=f"guided sampling of {count} chest images, batches of {batch}",
        sizes=_sizes(setting, f"{setting.pick(2, 2, 25)} steps, decoded"),
        ways=_ways("sample", setting),
        equal=equal,
        clock="wall",
    )


def evaluation(setting: Setting) -> Workload:
    """Samples and reconstructions of a test set shared, measures of the set by rank 0 while the others wait."""

    def equal(results: Mapping[str, Any]) -> str:
        one, two = results[ONE]["files"], results[TWO]["files"]
        if not one or one != two:
            different = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
            raise ValueError(f"{TWO}: expected the very files of {ONE}, got others: {different}.")
        return f"{' and '.join(one)} equal byte for byte; {_seconds(results)}"

    count, batch = setting.pick((8, 2), (8, 2), (64, 4))
    return Workload(
        name=f"evaluation with {count} test images, batches of {batch}",
        sizes=_sizes(setting, f"samples ({setting.pick(1, 1, 25)} steps), reconstructions, MS-SSIM of pairs, FID, KID"),
        ways=_ways("evaluate", setting),
        equal=equal,
        clock="wall",
        repeats=3,
    )


BUILDERS: tuple[Builder, ...] = (training, sampling, evaluation)
