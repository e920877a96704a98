# SPDX-License-Identifier: Apache-2.0
"""One run in several processes, one for each GPU, as ``torchrun`` starts them."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shared.errors import root_cause

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_A_TIME = 16


def local_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    Raises:
        ValueError: when torchrun did not start this process, or started more of them than the machine has GPUs.
    """
    local_rank = _set_by_torchrun("LOCAL_RANK")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"--nproc_per_node: expected at most {count}, a process for each GPU, got "
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)}; give torchrun --nproc_per_node={count}."
        )
    return torch.device("cuda", local_rank)


def join_processes(device: torch.device | str, *, timeout_hours: float = 6.0) -> None:
    """Connect the processes that torchrun started: by NCCL between GPUs, by gloo between CPUs.

    Only the main process, rank 0, logs below the level WARNING from here on. Does nothing when they are connected.

    Args:
        device: where this process computes.
        timeout_hours: how long a process waits for the others. Long, since rank 0 may encode a whole data set while
            they wait; when a process ends, torchrun ends the others at once.

    Raises:
        ValueError: when torchrun did not start this process.
    """
    rank = _set_by_torchrun("RANK")
    if is_distributed():
        return
    _report_to_torchrun()
    device = torch.device(device)
    timeout = datetime.timedelta(hours=timeout_hours)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    with _without("SLURM_JOB_ID"):
        # ignite looks at the group when it is first asked, and exchanges numbers then: all must ask together. In a
        # Slurm job it would replace LOCAL_RANK by Slurm's number of the task, which is that of torchrun itself.
        idist.get_world_size()
    if rank != 0:
        logging.disable(logging.INFO)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Hide an environment variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def leave_processes() -> None:
    """Undo :func:`join_processes`."""
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)
    # DistributedDataParallel, which cycles of references keep, holds on to the group. Its threads would still be
    # letting go of the last tensors when Python ends, and then abort the process: seen once in about twenty runs.
    atexit.register(gc.collect)


def data_parallel(network: nn.Module, *, find_unused_parameters: bool = False) -> DistributedDataParallel:
    """Wrap a network so that every backward pass averages the gradients over the processes.

    ``DistributedDataParallel`` as a ``_target_`` does not fit: buffers must not be sent from rank 0 in every forward
    pass, and the argument that says so changes its name between the releases of torch. Sent in validation, where the
    ranks have shares of different size, they would make one rank wait for ever; and a discriminator that runs twice
    before its backward pass must find them as they were. No network here evaluates with buffers that training changes,
    but for batch normalisation, whose statistics `shared.handlers.batch_statistics` averages.

    Args:
        network: on the device of this process.
        find_unused_parameters: set it for a network that leaves trained parameters out of some forward passes; it costs
            a walk through the graph in every step.
    """
    name = "forward_sync_buffers"
    if name not in inspect.signature(DistributedDataParallel).parameters:  # torch before 2.14
        name = "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(network, find_unused_parameters=find_unused_parameters, **options)


def is_distributed() -> bool:
    """Whether this process works together with others."""
    return dist.is_available() and dist.is_initialized()


def is_main_process() -> bool:
    """Whether this is rank 0, which alone writes files, or a process of its own."""
    return not is_distributed() or dist.get_rank() == 0


def process_count() -> int:
    """Number of processes that work together; 1 for a process of its own."""
    return dist.get_world_size() if is_distributed() else 1


def from_main_process(value: T) -> T:
    """The ``value`` (anything that can be pickled) of rank 0, on every rank. All ranks must call it."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_processes(value: T) -> list[T]:
    """The ``value`` (anything that can be pickled) of every rank, by rank. All ranks must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def to_main_process(values: Sequence[T]) -> list[list[T]]:
    """The ``values`` (anything that can be pickled) of every rank, by rank, on rank 0; nothing on the others. All ranks
    must call it. Values travel a few at a time: all of them at once would fill the memory of a GPU (NCCL)."""
    if not is_distributed():
        return [list(values)]
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    for start in range(0, max(from_all_processes(len(values))), _AT_A_TIME):
        parts: list[Any] | None = [None] * len(gathered) if is_main_process() else None
        dist.gather_object(list(values[start : start + _AT_A_TIME]), parts, dst=0)
        for mine, part in zip(gathered, parts or (), strict=False):
            mine.extend(part)
    return gathered if is_main_process() else []


def first_owner(name: str, owner: str) -> str:
    """The first ``owner`` of all processes that asked for ``name``; in a process of its own the one that asks.

    Without waiting for the others, which may have nothing to ask.
    """
    if not is_distributed():
        return owner
    # The store by which the processes found one another; torch has no public name for it.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().compare_set(f"owner of {name}", "", owner).decode()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Mean of a floating-point tensor over the ranks, where one NaN or infinity leaves no finite mean. All ranks must
    call it, with equal shapes, on the device they train on. The argument is unchanged."""
    if not is_distributed():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def unwrapped(network: Any) -> Any:
    """The network inside ``torch.compile`` and ``DistributedDataParallel``, which hide its methods and rename its
    weights; anything else as it is."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, (DistributedDataParallel, nn.DataParallel)):
        network = network.module
    return getattr(network, "_orig_mod", network)


def _report_to_torchrun() -> None:
    """Let the summary with which torchrun ends a failed run hold the message of the process that failed.

    The others fail too, because they lose their connection: one line instead of a traceback says so.
    """
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = root_cause(error)
        message = str(cause)
        if isinstance(cause, dist.DistError) or "gloo" in message:
            logger.debug("lost connection", exc_info=(kind, error, trace))
            reason = message.split(". ")[0]
            message = f"lost another process of this run, whose own message says why ({reason})"
            print(message, file=sys.stderr)
        else:
            report(kind, error, trace)
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file is not None:
            content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")

    sys.excepthook = hook


def _set_by_torchrun(name: str) -> int:
    if name not in os.environ:
        raise ValueError(
            f"{name}: expected to be started by torchrun, which sets this variable, but it is not set; run "
            "torchrun --standalone --nproc_per_node=N -m monai.bundle run ..., or leave out multi_gpu_train.json, "
            "multi_gpu_evaluate.json or multi_gpu_inference.json."
        )
    return int(os.environ[name])
