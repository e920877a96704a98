# SPDX-License-Identifier: Apache-2.0
"""A list of items dealt to several processes, and what they made of it put back into the order of the list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

import torch.distributed as dist
from ignite.engine import Events
from torch.utils.data import Sampler

from shared.distributed import from_all_processes, from_main_process, is_distributed, is_main_process, to_main_process

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BatchShares(Sampler[int]):
    """The items of this process where batches are dealt in turn: the first to rank 0, the second to rank 1, ...

    A data loader with the same ``batch_size`` makes the very batches of one process, so that results agree to the last
    bit: another batch would be summed in another order. ``monai.data.DistributedSampler`` does not fit: it deals single
    items, repeats some or refuses a list that is shorter than the number of processes.

    Args:
        dataset: what is dealt; its order is that of the list.
        batch_size: of the data loader.
        rank: of this process; None asks ``torch.distributed``.
        processes: how many there are; None asks ``torch.distributed``.
    """

    def __init__(
        self, dataset: Sized, batch_size: int = 1, *, rank: int | None = None, processes: int | None = None
    ) -> None:
        self.processes = processes if processes is not None else dist.get_world_size() if is_distributed() else 1
        rank = rank if rank is not None else dist.get_rank() if is_distributed() else 0
        count = len(dataset)
        starts = range(rank * batch_size, count, self.processes * batch_size)
        self.positions = [place for start in starts for place in range(start, min(start + batch_size, count))]
        batches = -(-count // batch_size)
        if batches < self.processes and is_main_process():
            logger.warning(
                "%d batches of %d items for %d processes: some have nothing to do; give a smaller batch_size or fewer "
                "processes",
                *(batches, batch_size, self.processes),
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def run_share(evaluator: Any) -> None:
    """Run a ``monai.engines.Evaluator`` on the share of this process and wait for the others. All ranks must call it.

    MONAI skips the run of an evaluator without items, and the others would wait for it for ever where handlers bring
    their results together. Its handlers start and complete here.
    """
    if evaluator.state.epoch_length == 0:
        evaluator.state.dataloader = evaluator.data_loader
        evaluator.fire_event(Events.STARTED)
        evaluator.fire_event(Events.COMPLETED)
    else:
        evaluator.run()
    # Rank 0 may hold the store by which the others find one another.
    from_all_processes(None)


def write_together(engine: Any, rows: Sequence[T], write: Callable[[list[T]], Mapping[str, float]]) -> None:
    """Let rank 0 write what all processes collected, while the others wait. All ranks must call it.

    Args:
        engine: whose data loader dealt the items; its metrics take what ``write`` returns, on every rank.
        rows: of this process, one for each item, see :func:`in_list_order`.
        write: gets the rows of all in the order of the list.
    """
    collected = in_list_order(engine, rows)
    engine.state.metrics.update(from_main_process(write(collected) if is_main_process() else {}))


def in_list_order(engine: Any, rows: Sequence[T]) -> list[T]:
    """What all processes collected, a row for each item, in the order of the list; on the ranks above 0 nothing.

    All ranks must call it. Rows must not hold tensors that are views of large ones: they are pickled whole.

    Args:
        engine: whose data loader dealt the items.
        rows: of this process, in the order of its batches.

    Raises:
        ValueError: on rank 0, when the shares hold an item twice or not at all.
    """
    if not is_distributed():
        return list(rows)
    sampler = getattr(engine.state.dataloader, "sampler", None)
    places = list(range(len(rows))) if sampler is None else list(sampler)
    if len(places) != len(rows):
        raise ValueError(f"rows: expected one for each of the {len(places)} items of this process, got {len(rows)}")
    shares = to_main_process(list(zip(places, rows, strict=True)))
    if not is_main_process():
        return []
    dealt = sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
    if [place for place, _ in dealt] != list(range(len(dealt))):
        raise ValueError(
            f"dataloader#sampler: expected the processes to share the items, each once, got {len(dealt)} of which some "
            "occur twice or not at all; lay configs/multi_gpu_evaluate.json over the configuration"
        )
    return [row for _, row in dealt]
