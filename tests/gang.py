# SPDX-License-Identifier: Apache-2.0
"""What two processes do for ``test_multi_gpu.py``: ``torchrun --nproc_per_node=2 -m tests.gang FOLDER``.

All of it in one launch, since starting two processes takes longer than the work. The data sets lie in ``FOLDER/data``,
by bundle. Each process leaves its answers in ``FOLDER/rank<rank>.pt``; the tests compare them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from torch import nn

from shared.distributed import data_parallel, from_main_process, join_processes, unwrapped
from shared.files import sha256_of_state
from shared.handlers.guard import GradientGuard, NonFiniteLossError
from shared.handlers.metrics_csv import MetricsCsv
from shared.losses import NoiseAndLatentLoss
from shared.prepare_batch import SegmentationBatch
from tests import dmri_runs, sdseg_runs
from tests.bundle_tools import read
from tests.conftest import ROOT
from tests.test_engines import make_trainer
from tests.tiny_networks import pictures, segmentation_model, segmentation_scheduler

BUNDLE = ROOT / "bundles/cxr_ldm"
TINY = read(BUNDLE / "configs/tiny.json")
SMALL: dict[str, Any] = {
    **{"bundle_root": str(BUNDLE), "device": "$torch.device('cpu')", "num_workers": 0, "tracking_uri": ""},
    **{"image_size": [64, 64], "latent_shape": [3, 8, 8], "max_epochs": 3, "batch_size": 2},
    "autoencoder_def": {**TINY["autoencoder_def"], "channels": [4, 4, 8, 8], "norm_num_groups": 4},
}
STAGES: dict[str, dict[str, Any]] = {
    "train_autoencoder": {**SMALL, "adversarial_start": 2, "ms_ssim_kernel_size": 3},
    "train": {
        **{**SMALL, "preview_prompts": ["Cardiomegaly."], "preview_interval": 9, "accumulation_steps": 2},
        "unet_def": {
            **{**TINY["unet_def"], "channels": [8, 16, 16], "num_head_channels": [0, 8, 8], "norm_num_groups": 8}
        },
    },
    "segmentation": {
        **{**sdseg_runs.STAGES["train"], "bundle_root": str(sdseg_runs.SDSEG.folder), "flips": "none"},
        **{"max_epochs": 3, "batch_size": 2, "preview_interval": 3, "accumulation_steps": 2},
    },
}
# Of a codebook, an adaptive weight and measured statistics, which the stages above have not: whole trainings alone.
NODDI: dict[str, dict[str, Any]] = {
    f"noddi {stage}": {
        **{**dmri_runs.STAGES[stage], "bundle_root": str(dmri_runs.DMRI.folder), "batch_size": 2},
        **({} if stage == "train_encoder" else {"preview_interval": 9}),
    }
    for stage in dmri_runs.TRAININGS[:3]
}
# What is not a stage of cxr_ldm under its own name.
CONFIGS = {"segmentation": (sdseg_runs.SDSEG.folder, "train")}
CONFIGS |= {stage: (dmri_runs.DMRI.folder, stage.split()[1]) for stage in NODDI}
ADVERSARIAL = ("train_autoencoder", "noddi train_vqgan")


class Interruption(Exception):
    """Stands for a crash."""


# Whole trainings of the bundle


def train_stage(stage: str, folder: Path, crash_at: int | None = None, *, is_last: bool = False) -> dict[str, Any]:
    """Train a stage, with folders of its own for every rank: what rank 1 writes is found out."""
    rank = int(os.environ["RANK"])
    own = folder if rank == 0 else folder.with_name(f"{folder.name}_rank{rank}")
    bundle, config = CONFIGS.get(stage, (BUNDLE, stage))
    data = folder.parent / "data" / bundle.name
    # Copied: MONAI writes overrides into the dictionaries that it is given.
    options = {**copy.deepcopy((STAGES | NODDI)[stage]), "dataset_dir": str(data)}
    options |= {"ckpt_dir": str(own / "models" / bundle.name), "output_dir": str(own / "runs" / stage)}
    if stage not in ADVERSARIAL:
        options["latent_cache_dir"] = str(own / "runs/latents")
    if stage == "train":
        options["autoencoder#path"] = str(folder / "models" / bundle.name / "stages/autoencoder.pt")
    if stage == "segmentation":
        options["autoencoder_weights"] = str(data / "autoencoder.pt")
    if stage in NODDI:
        options["volume_cache_dir"] = str(data / "volumes")
        earlier = {"autoencoder_weights": "vqgan", "encoder_weights": "encoder"}
        for key in [key for key in earlier if key in read(bundle / f"configs/{config}.json")]:
            options[key] = str(data / f"models/stages/{earlier[key]}.pt")
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / f"{name}.json") for name in (config, "multi_gpu_train", "tiny")],
        logging_file=False,
        run_id="training",
        workflow_type="train",
        **options,
    )
    workflow.initialize()
    content = workflow.parser.get_parsed_content
    orders: list[list[int]] = []
    iterations: list[int] = []

    def step(engine: Any) -> None:
        iterations.append(engine.state.iteration)
        if engine.state.iteration == crash_at:
            raise Interruption

    trainer = content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: orders.append(list(content("train#sampler"))))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
    with contextlib.suppress(RuntimeError) if crash_at else contextlib.nullcontext():
        workflow.run()
    result = {
        "properties": workflow.check_properties() if crash_at is None else [],
        "settings": content("settings"),
        "orders": orders,
        "iterations": iterations,
        "validation": list(content("validate#sampler")),
        "metrics": dict(content("validate#evaluator").state.metrics),
        "average": sha256_of_state(content("ema").ema_model.state_dict()),
        "scale_factor": float(getattr(unwrapped(content("network")), "scale_factor", 1.0)),
        "files": sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()),
    }
    buffers = unwrapped(content("network")).named_buffers()
    result["buffers"] = sha256_of_state(dict(buffers))
    for name in ("network", "discriminator") if stage in ADVERSARIAL else ("network",):
        parameters = unwrapped(content(name)).named_parameters()
        result[name] = sha256_of_state({key: parameter.detach() for key, parameter in parameters})
    if is_last:
        workflow.finalize()
    return result


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
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: skipped.append(guard._skipped))
    message = ""
    try:
        trainer.run()
    except NonFiniteLossError as error:
        message = str(error)
    return {"message": message, "skipped": skipped, "weights": network.module.state_dict()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {"from main": from_main_process(f"said by {rank}"), "shares": train_on_shares(folder)}
    results["segmentation shares"] = segment_on_shares()
    for policy in ("skip", "stop"):
        for where in ("gradient", "loss"):
            results[f"{policy} {where}"] = train_with_bad_batch(policy, in_gradient=where == "gradient")
    for stage in NODDI:
        results[f"{stage} whole"] = train_stage(stage, folder / "whole")
    for stage in STAGES:
        results[f"{stage} whole"] = train_stage(stage, folder / "whole")
        crashed = train_stage(stage, folder / "broken", crash_at=3)
        # A group can be joined once in the life of a process, so only the last workflow may leave it.
        resumed = train_stage(stage, folder / "broken", is_last=stage == list(STAGES)[-1])
        results[f"{stage} broken"] = resumed | {"iterations": [crashed["iterations"], resumed["iterations"]]}
    assert not torch.distributed.is_initialized()
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
