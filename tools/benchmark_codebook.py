# SPDX-License-Identifier: Apache-2.0
"""How much faster the codebook is than MONAI core's: `python -m tools.benchmark_codebook [--out FILE.json]`.

The published size: 8192 codes of 8 numbers and the vectors of one 32^3 latent. The ways take turns (A B C A B C ...),
because other work on the machine slows neighbours in time alike; what counts is the ratio within a turn. Times are
processor seconds of this process.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import nn

from shared.files import save_json
from shared.networks.codebook import nearest_code
from tools import command_line


def take_turns(ways: Mapping[str, Callable[[], Any]], *, turns: int) -> dict[str, dict[str, float]]:
    """Time several ways of doing the same, in turns.

    Args:
        ways: functions by name; the last is the one whose advantage is asked for. Each runs once before the clock does.
        turns: how often each is timed.

    Returns:
        By name the median ``seconds``, and the median, smallest and largest ``ratio``, ``ratio_min``, ``ratio_max`` of
        its time to that of the last way in the same turn.
    """
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time_ns()
            way()
            seconds[name].append(max(time.process_time_ns() - start, 1) / 1e9)
    last = list(seconds.values())[-1]
    result = {}
    for name, times in seconds.items():
        ratios = [time_ / fast for time_, fast in zip(times, last, strict=True)]
        result[name] = {
            **{"seconds": statistics.median(times), "ratio": statistics.median(ratios)},
            **{"ratio_min": min(ratios), "ratio_max": max(ratios)},
        }
    return result


def searches(vectors: torch.Tensor, codes: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to the indices ``(M,)`` of the nearest of ``codes`` ``(K, D)`` for ``vectors`` ``(M, D)``."""
    core = EMAQuantizer(3, *codes.shape)
    core.embedding.weight.data.copy_(codes)
    latent = vectors.t().reshape(1, -1, len(vectors), 1, 1).contiguous()
    return {
        "EMAQuantizer.quantize": lambda: core.quantize(latent)[2].flatten(),
        "torch.cdist + argmin": lambda: torch.cdist(vectors, codes).argmin(dim=1),
        "nearest_code": lambda: nearest_code(vectors, codes),
    }


def statistics_of_codes(vectors: torch.Tensor, indices: torch.Tensor, count: int) -> dict[str, Callable[[], Any]]:
    """Ways to the number of ``vectors`` ``(M, D)`` that chose each of ``count`` codes, and to their sums ``(K, D)``."""
    # Core's quantize has built the one-hot matrix already, so building it is not timed.
    encodings = nn.functional.one_hot(indices, count).float()
    return {
        "one-hot sum + matmul": lambda: (encodings.sum(0), torch.mm(encodings.t(), vectors)),
        "bincount + index_add": lambda: (
            torch.bincount(indices, minlength=count).float(),
            torch.zeros(count, vectors.shape[1]).index_add_(0, indices, vectors),
        ),
    }


@torch.no_grad()
def benchmark(
    *, codes: int = 8192, dim: int = 8, side: int = 32, turns: int = 5, threads: int = 1, out: str = ""
) -> None:
    """Time the search for the nearest code and the statistics of its moving averages, on the CPU.

    Args:
        codes: number of codes.
        dim: length of a code.
        side: voxels along each side of the latent; side^3 vectors.
        turns: how often each way is timed.
        threads: of torch.
        out: JSON file to write; "" prints alone.

    Raises:
        ValueError: when two ways disagree.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(side**3, dim, generator=generator)
    table = torch.randn(codes, dim, generator=generator)
    ways = searches(vectors, table)
    found = {name: way() for name, way in ways.items()}
    indices = found["nearest_code"]
    different = {name: int((index != indices).sum()) for name, index in found.items()}
    # Single precision may order two codes of almost equal distance either way.
    if max(different.values()) > len(vectors) // 1000:
        raise ValueError(f"nearest_code: expected the indices of the other ways, got {different} different; fix it.")
    result: dict[str, Any] = {
        "setting": {"codes": codes, "dim": dim, "vectors": side**3, "turns": turns, "threads": threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__},
        "machine": platform.machine(),
        "different_indices": different,
        "search": take_turns(ways, turns=turns),
        "statistics": take_turns(statistics_of_codes(vectors, indices, codes), turns=turns),
    }
    for part in ("search", "statistics"):
        for name, row in result[part].items():
            print(
                f"{part:10}  {name:22}  {row['seconds']:9.4f} s  {row['ratio']:8.1f} x "
                f"({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
            )
    if out:
        save_json(result, Path(out))


if __name__ == "__main__":
    command_line.run(benchmark, name="benchmark_codebook")
