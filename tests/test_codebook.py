# SPDX-License-Identifier: Apache-2.0
"""The codebook: beside a search in float64, beside MONAI's quantiser, in one process and in two."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import nn

from shared.handlers.ema import TrainedWeightsAverage
from shared.networks import codebook as module
from shared.networks.codebook import Codebook, nearest_code
from tests.codebook_gang import SIZE, batch, started
from tests.conftest import ROOT


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_distances(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared distances ``(M, K)`` in float64, from differences: without cancellation."""
    return (vectors.double()[:, None] - codes.double()[None]).square().sum(dim=2)


# Search


@pytest.mark.parametrize(("count", "chunk"), [(777, 256), (1000, 1), (257, 256), (256, 256), (3, 256), (1, 7)])
def test_search_equals_brute_force(count: int, chunk: int):
    vectors, codes = normal(1500, 8), normal(count, 8, seed=1)
    found = nearest_code(vectors, codes, chunk=chunk)
    assert found.dtype == torch.int64
    assert torch.equal(found, exact_distances(vectors, codes).argmin(dim=1))


def test_search_equals_brute_force_at_the_published_size():
    vectors, codes = normal(600, 8), normal(8192, 8, seed=1)
    expected = torch.cat([exact_distances(part, codes).argmin(dim=1) for part in vectors.split(100)])
    assert torch.equal(nearest_code(vectors, codes), expected)


def test_search_holds_far_from_the_origin():
    # |v|^2 is 8e8 here and differences are 1: without centring float32 has no digit left for them.
    vectors, codes = normal(500, 8) + 1e4, normal(300, 8, seed=1) + 1e4
    assert torch.equal(nearest_code(vectors, codes), exact_distances(vectors, codes).argmin(dim=1))
    plain = (codes.square().sum(dim=1) / 2 - vectors @ codes.t()).argmin(dim=1)
    assert (plain != exact_distances(vectors, codes).argmin(dim=1)).float().mean() > 0.5


@pytest.mark.parametrize("chunk", [2, 3, 256])
def test_lowest_index_of_equal_codes(chunk: int):
    # Numbers that float32 holds exactly: no rounding decides between equals.
    codes = torch.tensor([[4.0, 0.0], [0.0, 8.0], [4.0, 0.0], [0.0, 8.0], [-4.0, -8.0], [4.0, 0.0], [-8.0, 0.0]])
    vectors = torch.tensor([[4.0, 0.0], [0.0, 8.0], [-4.0, -8.0], [100.0, 1.0]])
    assert nearest_code(vectors, codes, chunk=chunk).tolist() == [0, 1, 4, 0]


def test_blocks_are_joined_in_order(monkeypatch):
    vectors, codes = normal(103, 4), normal(50, 4, seed=1)
    whole = nearest_code(vectors, codes)
    monkeypatch.setattr(module, "CPU_BLOCK", 10)
    assert torch.equal(nearest_code(vectors, codes), whole)


def test_largest_matrix_is_a_block_of_a_chunk(monkeypatch):
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: sizes.append(addmm(*args, **kwargs)) or sizes[-1])
    nearest_code(normal(5000, 8), normal(1000, 8))
    assert max(matrix.numel() for matrix in sizes) == module.CPU_BLOCK * 256


@pytest.mark.parametrize(
    ("vectors", "codes", "chunk", "message"),
    [
        ((5, 8), (3, 7), 256, r"codes: expected .* got \(3, 7\) beside \(5, 8\)"),
        ((5, 8), (0, 8), 256, "codes: expected"),
        ((1, 8, 2, 2), (3, 8), 256, "channels last"),
        ((5, 8), (3, 8), 0, "chunk: expected at least 1"),
    ],
)
def test_search_refuses_shapes(vectors, codes, chunk, message):
    with pytest.raises(ValueError, match=message):
        nearest_code(torch.zeros(vectors), torch.zeros(codes), chunk=chunk)


def test_search_of_nothing():
    assert nearest_code(torch.zeros(0, 8), normal(3, 8)).shape == (0,)


def test_mixed_precision_does_not_reach_the_codes():
    latents = normal(1, 8, 10, 7, 9) + 3.0
    ours = Codebook(num_embeddings=2048, restart_threshold=None)
    ours.embedding.weight += 3.0
    core = EMAQuantizer(3, 2048, 8)
    core.load_state_dict(ours.state_dict())
    expected = ours.eval()(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, loss, indices = ours(latents)
        wrong = core.eval().quantize(latents)[2]
    assert torch.equal(indices, expected[2])
    assert torch.equal(quantized, expected[0])
    assert loss.dtype == quantized.dtype == torch.float32
    # Why it matters: distances in bfloat16, as core computes them on a CPU, choose other codes.
    assert (wrong != expected[2]).float().mean() > 0.1


def test_statistics_stay_float32_in_mixed_precision():
    plain, mixed = started(restart_threshold=None), started(restart_threshold=None)
    latents = batch(0).bfloat16()
    plain(latents.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(latents)
    for name, value in plain.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, mixed.state_dict()[name]), name


# Beside MONAI's quantiser


def test_training_equals_that_of_core():
    ours = started(restart_threshold=None)
    core = EMAQuantizer(3, 32, 4, epsilon=1e-7)
    assert list(core.state_dict()) != []
    core.load_state_dict(ours.state_dict())  # the same names
    assert set(core.state_dict()) == set(ours.state_dict())
    for step in range(3):
        inputs = [batch(step).requires_grad_() for _ in range(2)]
        outputs = [network(latents) for network, latents in zip((ours, core), inputs, strict=True)]
        for mine, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        for quantized, loss, _ in outputs:
            (quantized.square().sum() + loss).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-5)
        for name, value in core.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-5)


def test_gradient_passes_straight_through_and_is_pulled_to_the_code():
    codebook = started(restart_threshold=None).eval()
    latents = batch(0).requires_grad_()
    quantized, loss, indices = codebook(latents)
    weights = normal(*latents.shape, seed=5)
    (through,) = torch.autograd.grad((quantized * weights).sum(), latents, retain_graph=True)
    assert torch.equal(through, weights)
    (pulled,) = torch.autograd.grad(loss, latents)
    codes = codebook.embed(indices)
    torch.testing.assert_close(quantized, codes)
    torch.testing.assert_close(pulled, 2 * 0.25 * (latents.detach() - codes) / latents.numel())


def test_two_dimensions():
    codebook = Codebook(num_embeddings=6, embedding_dim=3, spatial_dims=2)
    quantized, _, indices = codebook(normal(2, 3, 5, 4))
    assert quantized.shape == (2, 3, 5, 4)
    assert indices.shape == (2, 5, 4)


@pytest.mark.parametrize("shape", [(1, 5, 2, 2, 2), (1, 4, 2, 2)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"embedding_dim: expected latents \(B, 4\) with 3 spatial axes"):
        Codebook(**SIZE)(torch.zeros(shape))


# Start, restart, evaluation


def test_first_step_takes_codes_from_the_batch():
    latents = batch(0)
    vectors = {tuple(vector.tolist()) for vector in latents.movedim(1, -1).reshape(-1, 4)}
    codebook = Codebook(**SIZE, restart_threshold=None)
    codebook._start(codebook._vectors(latents))
    codes = {tuple(code.tolist()) for code in codebook.embedding.weight}
    assert len(codes) == 32
    assert codes <= vectors
    assert torch.equal(codebook.ema_w, codebook.embedding.weight)
    assert torch.equal(codebook.ema_cluster_size, torch.ones(32))


def test_few_vectors_are_repeated_with_little_noise():
    codebook = Codebook(num_embeddings=4000, embedding_dim=4)
    vectors = 10.0 * normal(5, 4)
    torch.manual_seed(0)
    codebook._start(vectors)
    codes = codebook.embedding.weight
    owner = nearest_code(codes, vectors)
    assert torch.equal(torch.bincount(owner), torch.full((5,), 800))
    offsets = codes - vectors[owner]
    assert offsets.std().item() == pytest.approx(0.01 / 2, rel=0.05)
    assert offsets.mean().abs().item() < 2e-4


def test_unused_codes_restart_at_vectors_of_the_batch():
    codebook = started(restart_threshold=1.0)
    codebook.embedding.weight[7] = 1e3
    codebook.ema_w[7] = 1e3
    before = copy.deepcopy(codebook)
    latents = batch(0)
    torch.manual_seed(0)
    _, _, indices = codebook(latents)
    assert not (indices == 7).any()
    counts = torch.bincount(indices.flatten(), minlength=32)
    unused = counts == 0  # 0.99 * 1 + 0.01 * 0 is below 1, with one vector it is 1
    assert unused[7]
    vectors = {tuple(vector.tolist()) for vector in latents.movedim(1, -1).reshape(-1, 4)}
    for code in unused.nonzero().flatten().tolist():
        assert tuple(codebook.embedding.weight[code].tolist()) in vectors
    # Count and sum start anew.
    assert torch.equal(codebook.ema_cluster_size[unused], torch.ones(int(unused.sum())))
    assert torch.equal(codebook.ema_w[unused], codebook.embedding.weight[unused])
    before.restart_threshold = None
    before(latents)
    for name, value in before.state_dict().items():
        assert torch.equal(codebook.state_dict()[name][~unused], value[~unused]), name
    codebook(latents)
    assert codebook.usage > before.usage


def test_restart_keeps_codes_in_use():
    """Data in far clusters: without restarts most codes die; with them nearly all are used."""
    used = {}
    for threshold in (None, 1.0):
        torch.manual_seed(0)
        codebook = Codebook(num_embeddings=64, embedding_dim=4, restart_threshold=threshold)
        codebook(0.01 * torch.randn(2, 4, 10, 8, 6))  # a start that knows nothing of the data
        for _ in range(30):
            codebook(torch.randn(2, 4, 10, 8, 6))
        used[threshold] = (codebook.usage.item(), codebook.perplexity.item())
    assert used[1.0][0] > 0.95
    assert used[1.0][1] > 1.2 * used[None][1]


def test_threshold_above_one_does_not_restart_a_new_code_at_once():
    codebook = started(restart_threshold=None)
    codebook.restart_threshold, codebook._first_count = 0.5, Codebook(restart_threshold=0.5, **SIZE)._first_count
    codes = codebook.embedding.weight.clone()
    for step in range(3):
        codebook(batch(step)[:, :, :1, :1, :1])  # four vectors for 32 codes
    assert (codebook.ema_cluster_size > 0.9).all()
    assert torch.allclose(codebook.embedding.weight, codes, atol=0.2)
    assert Codebook(restart_threshold=3.0, **SIZE)._first_count == 3.0


@pytest.mark.parametrize("is_new", [False, True])
def test_evaluation_changes_nothing(is_new: bool):
    codebook = (Codebook(**SIZE) if is_new else started(restart_threshold=1.0)).eval()
    before, generator = copy.deepcopy(codebook.state_dict()), torch.get_rng_state()
    codebook(batch(0))
    codebook.nearest(batch(1))
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in before.items():
        assert torch.equal(codebook.state_dict()[name], value)


def test_training_is_reproducible():
    def trained() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        codebook = Codebook(**SIZE)
        for step in range(3):
            codebook(batch(step))
        return codebook.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_training_is_bit_equal(tmp_path):
    torch.manual_seed(3)
    whole = Codebook(**SIZE)
    for step in range(2):
        whole(batch(step))
    torch.save({"codebook": whole.state_dict(), "generator": torch.get_rng_state()}, tmp_path / "checkpoint.pt")
    for step in range(2, 5):
        expected = whole(batch(step))

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = Codebook(**SIZE)
    resumed.load_state_dict(saved["codebook"])
    torch.set_rng_state(saved["generator"])
    for step in range(2, 5):
        outputs = resumed(batch(step))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_perplexity_and_usage():
    codebook = Codebook(num_embeddings=8, embedding_dim=2, restart_threshold=None).eval()
    codebook.embedding.weight.copy_(torch.arange(8.0)[:, None].expand(8, 2))

    def latents(*values: float) -> torch.Tensor:
        return torch.tensor(values).view(1, 1, 1, -1, 1).expand(1, 2, 1, len(values), 1)

    codebook(latents(0.1, 1.1, 4.9, 7.2))
    assert codebook.perplexity.item() == pytest.approx(4.0)
    assert codebook.usage.item() == pytest.approx(0.5)
    codebook(latents(3.0, 3.1, 3.2))
    assert codebook.perplexity.item() == pytest.approx(1.0)
    assert codebook.usage.item() == pytest.approx(1 / 8)
    codebook(latents(0.0, 0.0, 0.0, 5.0))  # entropy of (3/4, 1/4)
    assert codebook.perplexity.item() == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_batch_leaves_the_codes(value: float):
    bad = batch(0)
    bad[1, 2, 3, 1, 0] = value
    torch.manual_seed(0)
    codebook = Codebook(**SIZE)
    codebook(torch.full_like(bad, value))
    assert not codebook.ema_cluster_size.any()  # not even started
    codebook = started(restart_threshold=1.0)
    before = copy.deepcopy(codebook.state_dict())
    codebook(bad)
    assert all(torch.equal(codebook.state_dict()[name], before[name]) for name in before)
    codebook(batch(0))
    assert not torch.equal(codebook.ema_w, before["ema_w"])


def test_average_of_weights_follows_the_codes():
    """Core holds the codes in a parameter without gradient, which the average copies once, at the start."""
    network = nn.ModuleDict({"layer": nn.Linear(2, 2), "codebook": started(restart_threshold=1.0)})
    ema = TrainedWeightsAverage(network)
    engine = Engine(lambda engine, batch: network["codebook"](batch))
    engine.accumulation_steps = 1
    ema.attach(engine)
    engine.run([batch(0), batch(1)])
    for name, value in network["codebook"].state_dict().items():
        assert torch.equal(ema.ema_model["codebook"].state_dict()[name], value), name
    network.requires_grad_(False).requires_grad_(True)
    assert not any(parameter is network["codebook"].embedding.weight for parameter in network.parameters())


# Two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("codebook")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.codebook_gang", str(folder)],
        **{"cwd": ROOT, "env": environment, "text": True, "timeout": 400},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["shared", "restarting", "after NaN"])
@pytest.mark.reliability(11)
def test_ranks_hold_equal_codes(ranks, name):
    for key, value in ranks[0][name].items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, ranks[1][name][key]), key


@pytest.mark.reliability(11)
def test_two_processes_train_as_one_with_the_doubled_batch(ranks):
    for key, value in ranks[0]["whole"].items():
        torch.testing.assert_close(ranks[0]["shared"][key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.reliability(11)
def test_bad_batch_on_one_rank_leaves_the_codes_of_both(ranks):
    for key, value in ranks[0]["restarting"].items():
        assert torch.equal(ranks[0]["after NaN"][key], value), key


@pytest.mark.reliability(11)
def test_wrapped_autoencoder_trains_equally_on_both_ranks(ranks):
    for part in ("autoencoder", "gradient"):
        for key, value in ranks[0][part].items():
            assert torch.equal(value, ranks[1][part][key]), key
    assert ranks[0]["autoencoder"]["codebook.ema_cluster_size"].min() >= 1.0
