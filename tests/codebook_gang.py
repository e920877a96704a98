# SPDX-License-Identifier: Apache-2.0
"""What two processes do for ``test_codebook.py``: ``torchrun --nproc_per_node=2 -m tests.codebook_gang FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from shared.distributed import data_parallel, join_processes, leave_processes
from shared.networks.codebook import Codebook
from shared.networks.vq_autoencoder import VQAutoencoder

SIZE = {"num_embeddings": 32, "embedding_dim": 4}


def batch(step: int) -> torch.Tensor:
    """Latents ``(4, 4, 5, 3, 2)`` of a step, the same in every process."""
    return torch.randn(4, 4, 5, 3, 2, generator=torch.Generator().manual_seed(step))


def started(*, restart_threshold: float | None, ddp_sync: bool = True) -> Codebook:
    """A codebook whose codes are there already, the same in every process."""
    codebook = Codebook(**SIZE, restart_threshold=restart_threshold, ddp_sync=ddp_sync)
    codes = torch.randn(32, 4, generator=torch.Generator().manual_seed(99))
    codebook.load_state_dict({"embedding.weight": codes, "ema_w": codes, "ema_cluster_size": torch.ones(32)})
    return codebook


def autoencoder() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(in_channels=1, num_hiddens=4, norm_num_groups=2, **SIZE)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    rank = torch.distributed.get_rank()
    share = slice(rank * 2, rank * 2 + 2)
    result: dict[str, dict] = {}
    whole, shared = started(restart_threshold=None, ddp_sync=False), started(restart_threshold=None)
    for step in range(3):
        whole(batch(step))
        shared(batch(step)[share])
    result["whole"] = {**whole.state_dict(), "perplexity": whole.perplexity, "usage": whole.usage}
    result["shared"] = {**shared.state_dict(), "perplexity": shared.perplexity, "usage": shared.usage}

    # Each rank draws other numbers, and rank 1 sees other vectors.
    torch.manual_seed(rank)
    restarting = Codebook(**SIZE, restart_threshold=1.5)
    for step in range(3):
        restarting(batch(step)[share] + rank)
    result["restarting"] = restarting.state_dict()

    bad = batch(3)[share]
    if rank == 1:
        bad[1, 2, 0, 0, 0] = float("nan")
    restarting(bad)
    result["after NaN"] = restarting.state_dict()

    network = data_parallel(autoencoder())
    for step in range(2):
        maps = torch.rand(2, 1, 6, 4, 8, generator=torch.Generator().manual_seed(10 * rank + step))
        reconstruction, commitment, *_ = network(maps)
        ((reconstruction - maps).abs().mean() + commitment).backward()
    result["autoencoder"] = network.module.state_dict()
    result["gradient"] = {name: parameter.grad for name, parameter in network.module.named_parameters()}
    torch.save(result, folder / f"rank{rank}.pt")
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
