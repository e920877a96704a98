# SPDX-License-Identifier: Apache-2.0
"""The count of tensor bytes equals what theory says: a chain of linear layers, with and without what backward keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from tools.benchmarks.measuring import old_objects_aside
from tools.benchmarks.memory import TensorMemory, peak_memory

ROWS, WIDTH, DEPTH = 7, 33, 8
ACTIVATION = 4 * ROWS * WIDTH
WEIGHTS = 4 * DEPTH * (WIDTH * WIDTH + WIDTH)


@pytest.fixture(autouse=True, scope="module")
def _fast_collection() -> Iterator[None]:
    with old_objects_aside():
        yield


@pytest.fixture
def chain() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


def test_backward_keeps_the_output_of_every_layer(chain, x):
    assert peak_memory(lambda: chain(x)) == WEIGHTS + ACTIVATION * (1 + DEPTH)


def test_without_gradients_one_input_and_one_output_live(chain, x):
    with torch.no_grad():
        assert peak_memory(lambda: chain(x)) == WEIGHTS + ACTIVATION * (1 + 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_keep_one_activation_per_part(chain, x, use_reentrant):
    x.requires_grad_()

    def forward() -> torch.Tensor:
        # Four parts of two layers: after three parts their outputs, then both layers of the last.
        return checkpoint_sequential(chain, 4, x, use_reentrant=use_reentrant, preserve_rng_state=False)

    assert peak_memory(forward) == WEIGHTS + ACTIVATION * (1 + 3 + 2)


def test_operations_in_place_and_views_take_no_memory(x):
    assert peak_memory(lambda: x + 1) == 2 * ACTIVATION
    assert peak_memory(lambda: (x + 1).mul_(2).t()[3:].add_(1).relu_()) == 2 * ACTIVATION
    # Out of place each operation holds its input, which the expression refers to, and its output.
    assert peak_memory(lambda: (x + 1) * 2) == 3 * ACTIVATION


def test_freed_tensors_stop_counting(x):
    def one_at_a_time() -> None:
        for _ in range(5):
            made = x + 1
            del made

    def all_kept() -> list[torch.Tensor]:
        return [x + 1 for _ in range(5)]

    assert peak_memory(one_at_a_time) == 2 * ACTIVATION
    assert peak_memory(all_kept) == 6 * ACTIVATION


def test_training_step_counts_weights_moments_gradients_and_is_the_same_every_time(chain, x):
    other = nn.Linear(500, 500)
    optimizer = torch.optim.AdamW(chain.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        chain(x).sum().backward()
        optimizer.step()

    step()
    steps = 4 * 2 * DEPTH  # one float per parameter
    peaks = {peak_memory(step) for _ in range(3)}
    # Gradients of the step before are there at the start and freed: they count, though no operation touches them.
    assert len(peaks) == 1
    assert 4 * WEIGHTS + steps <= peaks.pop() <= 4 * WEIGHTS + steps + ACTIVATION * (1 + DEPTH + 3)
    assert other.weight.nbytes > 4 * WEIGHTS  # unused, so it would have shown


def test_first_step_makes_what_later_steps_hold(chain, x):
    with TensorMemory() as memory:
        chain(x).sum().backward()
    assert memory.held == WEIGHTS + ACTIVATION
    assert memory.peak >= WEIGHTS
    assert memory.live >= WEIGHTS


def test_memory_from_numpy_and_lists_counts_while_it_is_used():
    def stream() -> float:
        total = 0.0
        for _ in range(10):
            total += float(torch.from_numpy(np.ones(1000, np.float32)).sum())
            total += float(torch.tensor([1.0] * 1000).sum())
        return total

    assert peak_memory(stream) == 4000 + 4


def test_sizes_that_change_are_followed():
    def grow() -> torch.Tensor:
        out = torch.empty(0)
        torch.add(torch.zeros(100), 1, out=out)
        return out

    assert peak_memory(grow) == 800


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_tensors_of_other_kinds_do_no_harm(x):
    sparse = torch.eye(3).to_sparse()
    assert peak_memory(lambda: (MetaTensor(x) + 1, sparse * 2, torch.zeros(1000, device="meta"))) >= 2 * ACTIVATION
    assert peak_memory(lambda: torch.func.vmap(torch.sin)(x)) == 2 * ACTIVATION
    assert peak_memory(lambda: "no tensor") == 0


def test_error_ends_the_count(x):
    with pytest.raises(RuntimeError, match="shapes"):
        peak_memory(lambda: x @ x)
    assert peak_memory(lambda: x + 1) == 2 * ACTIVATION


def test_profiler_sees_the_same_peak_of_a_forward_and_backward_pass(x):
    layers = (layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.SiLU()))
    chain = nn.Sequential(*layers)

    def step() -> None:
        chain(x).square().mean().backward()
        chain.zero_grad(set_to_none=True)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert len(changes) > 4 * DEPTH
    with TensorMemory() as memory:
        step()
    assert memory.peak == pytest.approx(max(itertools.accumulate(changes)), rel=0.02)
