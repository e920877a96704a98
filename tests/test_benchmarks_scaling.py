# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.data import DataLoader

from shared.handlers.seeding import EpochSeeds
from tools.benchmarks import scaling_growth, scaling_loading, scaling_processes
from tools.benchmarks.scaling import WORKLOADS
from tools.benchmarks.workload import Kind, Setting, Size, Workload

TINY = Setting(size=Size.TINY)
IN_THIS_PROCESS = [*scaling_loading.BUILDERS, *(b for bs in scaling_growth.BUILDERS.values() for b in bs)]


@pytest.fixture(scope="module")
def shared() -> Iterator[None]:
    """Processes that are started once for this file."""
    yield
    for count in (1, 2):
        scaling_processes.workers(count, TINY).close()
    scaling_processes.workers.cache_clear()


def run(workload: Workload) -> dict[str, Any]:
    return {name: way() for name, way in workload.ways.items()}


def changed(result: Any) -> Any:
    """A result with one number that is another."""
    if isinstance(result, torch.Tensor):
        result = result.clone()
        result.view(-1)[0] += 1 + result.abs().max()
        return result
    if isinstance(result, tuple):
        return (changed(result[0]), *result[1:])
    if isinstance(result, Mapping):
        return {**result, "total": changed(result["total"])}
    result.update(torch.full((1, 16), 9.0))  # statistics: one image too many
    return result


def test_all_builders_are_in_the_catalogue():
    builders = [builder for group in WORKLOADS.values() for builder in group]
    assert {*builders} == {*IN_THIS_PROCESS, *scaling_processes.BUILDERS}
    assert [*WORKLOADS] == [Kind.DATA, Kind.MEMORY, Kind.SCALING]


@pytest.mark.parametrize("builder", IN_THIS_PROCESS, ids=lambda builder: builder.__name__)
def test_ways_agree_and_a_fault_is_found(builder):
    workload = builder(TINY)
    results = run(workload)
    sentence = workload.equal(results)
    assert "equal" in sentence or "by design" in sentence
    last = list(results)[-1]
    if builder is scaling_growth.patches_by_volume:
        results[last] = results[last].clone().fill_(float("nan"))
    else:
        results[last] = changed(results[last])
    with pytest.raises(ValueError, match="expected"):
        workload.equal(results)


def test_factors_are_those_of_one_item():
    pairs = scaling_growth.pairs_by_images(TINY)
    assert list(pairs.ways) == ["N = 3, 3 pairs", "N = 6, 15 pairs"]
    assert list(pairs.factors.values()) == [1 / 3, 1 / 15]
    assert list(scaling_growth.steps_by_batch(TINY).factors.values()) == [1, 1 / 3]
    assert list(scaling_growth.fid_by_images(TINY).factors.values()) == [1 / 60, 1 / 100]


def test_the_number_of_patches_is_that_of_the_sampler(monkeypatch):
    workload = scaling_growth.patches_by_volume(TINY)
    calls: list[int] = []
    original = scaling_growth.NoddiSampler._decoded

    def counting(self: Any, latents: torch.Tensor, model: Any) -> torch.Tensor:
        calls.append(len(latents))
        return original(self, latents, model)

    monkeypatch.setattr(scaling_growth.NoddiSampler, "_decoded", counting)
    for name, way in workload.ways.items():
        calls.clear()
        way()
        assert sum(calls) * workload.factors[name] == pytest.approx(1), name


def test_streamed_statistics_take_no_memory_for_more_images():
    """What is kept is counted in numbers, since a process's peak hardly shows sizes as small as these."""
    few, many = (scaling_growth._stream(n, 16, 0) for n in (60, 600))
    sizes = [
        sorted(value.numel() for value in vars(statistics).values() if isinstance(value, torch.Tensor))
        for statistics in (few, many)
    ]
    assert sizes[0] == sizes[1] == [16, 256]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_draw_for_themselves_and_leave_order_and_noise_alone(num_workers, tmp_path):
    dataset = scaling_loading.cached_latents(tmp_path, 24, (16, 24))
    # Free draws: two workers with one stream would give equal texts where items alternate between them.
    dataset.transform.transforms[1].num_excerpts = None

    def epoch(workers: int) -> tuple[list[Any], float, list[int]]:
        EpochSeeds(seed=3, datasets=[dataset])._seed(SimpleNamespace(state=SimpleNamespace(epoch=2, rank=0)))
        batches = list(DataLoader(dataset, batch_size=1, shuffle=True, num_workers=workers))
        latents = [(batch["item_id"][0], float(batch["latent_mean"].sum())) for batch in batches]
        return latents, torch.rand(1).item(), [int(batch["text"]) for batch in batches]

    latents, noise, _ = epoch(0)
    for _ in range(2):
        again, same_noise, texts = epoch(num_workers)
        assert again == latents
        assert same_noise == noise, "what the trainer draws does not depend on workers"
    assert texts == epoch(num_workers)[2], "an epoch is repeated"
    assert texts[0::2] != texts[1::2]


def test_training_in_two_processes_takes_the_steps_of_one(shared):
    workload = scaling_processes.training(TINY)
    results = run(workload)
    one, two = results.values()
    assert one["losses"].shape == (3,)
    assert one["losses"].std() > 0, "the steps differ"
    assert one["seconds"] > 0
    assert one["start_seconds"] > 0
    assert "losses and trained weights equal within" in workload.equal(results)
    again = scaling_processes.workers(1, TINY).run("train")
    assert torch.equal(again["losses"], one["losses"]), "a repetition starts from the same weights"
    results["two processes"] = {**two, "weights": two["weights"] * 1.01}
    with pytest.raises(ValueError, match="two processes: expected weights within"):
        workload.equal(results)


def test_sampling_in_two_processes_gives_the_same_images(shared):
    workload = scaling_processes.sampling(TINY)
    results = run(workload)
    images = results["one process"]["images"]
    assert images.shape == (4, 1, 64, 96)
    assert images.std() > 0
    assert workload.equal(results).startswith("images equal bit for bit")
    results["two processes"] = {**results["two processes"], "images": images.flip(0)}
    with pytest.raises(ValueError, match="two processes: expected the very images"):
        workload.equal(results)


def test_evaluation_in_two_processes_writes_the_same_files(shared):
    workload = scaling_processes.evaluation(TINY)
    results = run(workload)
    files = results["one process"]["files"]
    assert [*files] == ["per_image.csv", "summary.json"]
    assert "FID" in files["summary.json"]
    assert workload.equal(results).startswith("per_image.csv and summary.json equal byte for byte")
    results["two processes"] = {"files": {**files, "summary.json": "[]"}}
    with pytest.raises(ValueError, match="got others: \\['summary.json'\\]"):
        workload.equal(results)


def test_a_process_that_fails_says_why(shared):
    """The last, since it ends the process that the others use."""
    workers = scaling_processes.workers(1, TINY)
    with pytest.raises(RuntimeError, match="(?s)1 processes: expected an answer.*KeyError: 'nothing'"):
        workers.run("nothing")
    assert workers._process.returncode == 1
