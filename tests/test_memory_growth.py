# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from tests import dmri_runs, sdseg_runs, small_stages, test_brain_bundle, test_cxr_bundle
from tests.bundle_runs import BundleRuns

pytestmark = pytest.mark.reliability(15)

FIRST, LAST = 20, 100
GROWTH = 0.01  # of what the process held at FIRST
SLACK = 2048  # bytes a step: rows of curves, caches that fill up late; a tensor that is kept with its graph is more
RUNS: dict[str, BundleRuns] = {
    "cxr_ldm": test_cxr_bundle.CXR,
    "brain_controlnet": test_brain_bundle.BRAIN,
    "sdseg": sdseg_runs.SDSEG,
    "dmri2noddi": dmri_runs.DMRI,
}


# Epochs between validations, of which the first comes before FIRST.
INTERVALS = {"cxr_ldm": 7, "brain_controlnet": 7, "sdseg": 3, "dmri2noddi": 4}
# Two patches of a head instead of all.
CROPS = {"dmri2noddi": (slice(0, 8), slice(0, 9), slice(0, 8))}


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    ))  # fmt: skip


def live_bytes() -> int:
    """What the process holds: bytes of the C library's heap in use, and of Python's own small blocks.

    Tensors, arrays and everything of torch's C++ side come from that heap. Counted there, a leak of one small tensor
    per step shows: the resident size moves by whole pages that the allocator keeps or returns when it likes,
    ``tracemalloc`` sees no tensor, and ``gc`` sees none that only an autograd graph holds.
    """
    gc.collect()
    heap = _libc().mallinfo2()
    return heap.uordblks + heap.hblkhd + 64 * sys.getallocatedblocks()


def _libc() -> Any:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer to count bytes in use")
    library.mallinfo2.restype = _Mallinfo2
    return library


def check_growth(found: list[int], steps: int, what: str, record_property: Any) -> None:
    """Args: found: bytes held at two points that are alike, so many steps apart."""
    held, growth = found[0], found[1] - found[0]
    record_property("figure", f"{what}: {growth / held:+.4%} of {held / 1e6:.0f} MB in {steps} steps")
    assert growth < GROWTH * held
    # What the libraries hold would hide a leak of the small networks here.
    assert growth < SLACK * steps


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_stages.prepare(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("bundle", RUNS)
def test_training_holds_no_more_after_100_steps(bundle, data, roots, record_property):
    """With validation, checkpoints, weights and curves as in any training; measured in steps after a validation."""
    found: list[int] = []
    iterations: list[int] = []
    options: dict[str, Any] = {"max_epochs": 40, "val_interval": INTERVALS[bundle], "preview_interval": 99}
    with small_stages.loaded(f"{bundle} train", data, roots / bundle, **options) as workflow:
        trainer = workflow.parser.get_parsed_content("train#trainer")

        def note(engine: Any) -> None:
            number = engine.state.iteration
            steps = INTERVALS[bundle] * engine.state.epoch_length
            if len(found) < 2 and number % steps == 1 and number >= (FIRST, LAST)[len(found)]:
                found.append(live_bytes())
                iterations.append(number)
            if len(found) == 2:
                engine.terminate()

        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        workflow.run()
    check_growth(found, iterations[1] - iterations[0], f"{bundle} training", record_property)


@pytest.mark.parametrize("bundle", RUNS)
def test_sampling_holds_no_more_after_100_calls(bundle, data, roots, tmp_path, record_property):
    options: dict[str, Any] = {"ckpt_dir": str(roots / bundle / "models"), "output_dir": str(tmp_path)}
    calls: list[tuple[Any, ...]] = []
    found: list[int] = []
    with RUNS[bundle].small("inference", data / "data" / bundle, options) as workflow:
        evaluator = workflow.parser.get_parsed_content("evaluator")
        sampler = evaluator.inferer

        def keep(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return sampler(*args, **kwargs)

        evaluator.inferer = keep
        workflow.run()
        (inputs, *others), given = calls[0]
        inputs = inputs[(..., *CROPS.get(bundle, ()))]
        with torch.no_grad():
            for number in range(1, LAST + 1):
                sampler(inputs, *others, **given)
                if number in (FIRST, LAST):
                    found.append(live_bytes())
    check_growth(found, LAST - FIRST, f"{bundle} sampling", record_property)
