# SPDX-License-Identifier: Apache-2.0
"""What two processes do for ``test_multi_gpu.py``: ``torchrun --nproc_per_node=2 -m tests.gang FOLDER``.

All of it in one launch, since starting two processes takes longer than the work. Each process leaves its answers in
``FOLDER/rank<rank>.pt``; the tests compare them. Whole trainings are in ``tests/stage_gang.py``.
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn

from shared.distributed import data_parallel, from_main_process, join_processes, leave_processes, unwrapped
from shared.handlers.guard import GradientGuard, NonFiniteLossError
from shared.handlers.metrics_csv import MetricsCsv
from shared.losses import NoiseAndLatentLoss
from shared.prepare_batch import SegmentationBatch
from tests.test_engines import make_trainer
from tests.tiny_networks import pictures, segmentation_model, segmentation_scheduler

# One process with the doubled batch


def train_on_shares(folder: Path) -> dict[str, Any]:
    """Train the same networks on shares of batches and, each process for itself, on whole batches."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(1)
    batches = [{"image": torch.rand(4, 1, 8, 12, generator=generator)} for _ in range(6)]
    shares = [{"image": batch["image"][rank * 2 : rank * 2 + 2]} for batch in batches]
    result: dict[str, Any] = {}
    for name, data in (("whole", batches), ("shared", shares)):
        losses: list[float] = []
        options: dict[str, Any] = {"train_data_loader": data, "epochs": 3}
        handlers = (GradientGuard(max_norm=0.5), MetricsCsv(folder / f"{name}.csv", phase="train"))
        template = make_trainer()
        networks = {key: getattr(template, key) for key in ("network", "discriminator")}
        if name == "shared":
            networks = {key: data_parallel(network) for key, network in networks.items()}
        optimizers = {
            "optimizer": torch.optim.SGD(networks["network"].parameters(), lr=0.1),
            "discriminator_optimizer": torch.optim.SGD(networks["discriminator"].parameters(), lr=0.1),
        }
        trainer = make_trainer(handlers=handlers, **options, **networks, **optimizers)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, to=losses: to.append(float(e.state.output["loss"]))
        )
        trainer.run()
        result[name] = {key: unwrapped(network).state_dict() for key, network in networks.items()}
        result[f"{name}_losses"] = losses
    return result


def segment_on_shares() -> dict[str, Any]:
    """Train SDSeg's model on shares and on whole batches: noise and level depend on the item alone."""
    rank = torch.distributed.get_rank()
    scheduler = segmentation_scheduler()
    target = (pictures(16, seed=1) > 0.5).float()
    items = {"image": pictures(16), "target": target, "item_id": [str(index) for index in range(16)]}
    whole = [{key: value[start : start + 4] for key, value in items.items()} for start in range(0, 16, 4)]
    share = slice(rank * 2, rank * 2 + 2)
    shares = [{key: value[share] for key, value in batch.items()} for batch in whole]
    result: dict[str, Any] = {}
    for name, data in (("whole", whole), ("shared", shares)):
        model = segmentation_model()
        network = data_parallel(model) if name == "shared" else model
        losses: list[float] = []
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=3,
            train_data_loader=data,
            network=network,
            optimizer=torch.optim.SGD(model.parameter_groups(0.01), lr=0.01),
            loss_function=NoiseAndLatentLoss(scheduler),
            prepare_batch=SegmentationBatch(scheduler, model, seed=0),
            train_handlers=[GradientGuard(max_norm=0.5)],
            decollate=False,
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, to=losses: to.append(float(e.state.output["loss"]))
        )
        trainer.run()
        result[name] = model.state_dict()
        result[f"{name}_losses"] = losses
    return result


# Steps that one rank must refuse


def train_with_bad_batch(policy: str, *, in_gradient: bool) -> dict[str, Any]:
    """Four steps; in the second, rank 1 alone sees a NaN."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    network = data_parallel(nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(rank)
    batches: list[dict[str, Any]] = []
    for index in range(4):
        image = torch.rand(2, 3, generator=generator)
        if rank == 1 and index == 1:
            image[1, 2] = float("nan")
        batches.append({"image": image, "label": torch.zeros(2, 2), "item_id": [f"{rank}{index}a", f"{rank}{index}b"]})

    def loss_function(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.mse_loss(output, target)
        # A gradient of zero where the loss is NaN: the other rank cannot see it in the average.
        return loss if in_gradient or torch.isfinite(loss) else 0.0 * output.nan_to_num().sum() + float("nan")

    guard = GradientGuard(policy=policy)
    skipped: list[int] = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss_function,
        train_handlers=[guard],
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: skipped.append(guard._skipped[True]))
    message = ""
    try:
        trainer.run()
    except NonFiniteLossError as error:
        message = str(error)
    return {"message": message, "skipped": skipped, "weights": network.module.state_dict()}


def name_threads(file: Path) -> None:
    """Write the names of this process's threads, also those that Python does not know of."""
    file.write_text("".join(path.read_text() for path in Path("/proc/self/task").glob("*/comm")))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    rank = torch.distributed.get_rank()
    name_threads(folder / f"threads{rank}_joined.txt")
    # What is registered first is called last.
    atexit.register(name_threads, folder / f"threads{rank}_left.txt")
    results: dict[str, Any] = {"from main": from_main_process(f"said by {rank}"), "shares": train_on_shares(folder)}
    results["segmentation shares"] = segment_on_shares()
    for policy in ("skip", "stop"):
        for where in ("gradient", "loss"):
            results[f"{policy} {where}"] = train_with_bad_batch(policy, in_gradient=where == "gradient")
    # As in a workflow, whose parts refer to one another.
    wrapped = data_parallel(nn.Linear(2, 2))
    wrapped.__dict__["workflow"] = {"network": wrapped}
    leave_processes()
    assert not torch.distributed.is_initialized()
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
