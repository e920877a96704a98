# SPDX-License-Identifier: Apache-2.0
"""Every training of every bundle, small, in two processes and in one, and how far the two are apart.

``test_multi_gpu_stages.py`` reads what is left behind. The table in ``docs/measurements`` is made by ::

    python -m tests.stage_gang FOLDER

which writes ``FOLDER/figures.json``. The trainings (kinds):

``whole``, ``crashed`` and ``resumed``
    in two processes, with everything that the configuration leaves to chance.
``equal``
    in two processes and in one with the doubled batch, where chance is that of the batch: the same items in each step,
    noise by place in the batch, no random transforms, and no batch normalisation.
``batch norm``
    the same with the batch normalisation that the configuration has.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import DistributedSampler
from torch import nn

from shared.distributed import join_processes, unwrapped
from shared.files import save_json, sha256_of_state
from shared.handlers.seeding import EpochSeeds
from tests import dmri_runs, sdseg_runs, test_brain_bundle, test_cxr_bundle
from tests.bundle_runs import Interruption
from tests.bundle_tools import read
from tests.conftest import ROOT
from tests.tiny_networks import spread
from tools.phantoms.brain_controlnet import make_dataset as make_heads
from tools.phantoms.cxr_ldm import make_dataset as make_films
from tools.phantoms.sdseg import make_dataset as make_pictures

SHARE = 2  # batch_size of each of the two processes
CHANCE = ("whole", "crashed", "resumed")
# Of the discriminators and the classifier; what it makes of a share differs from what it makes of the whole batch.
BATCH_NORM = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm2d: nn.InstanceNorm2d, nn.BatchNorm3d: nn.InstanceNorm3d}

_CXR, _BRAIN = test_cxr_bundle.STAGES, test_brain_bundle.STAGES
_JUDGE = {"image_size": [64, 64], "device": "$torch.device('cpu')", "num_workers": 0, "tracking_uri": ""}
_JUDGE["network_def#init_features"], _JUDGE["network_def#growth_rate"] = 8, 4
_JUDGE["network_def#block_config"] = [2, 2]
# Stage -> overrides over tiny.json that make it small. In two of them two batches make a step.
SMALL: dict[str, dict[str, Any]] = {
    "cxr_ldm train_autoencoder": _CXR["train_autoencoder"],
    "cxr_ldm train": _CXR["train"] | {"accumulation_steps": 2},
    "cxr_ldm train_classifier": _JUDGE,
    "brain_controlnet train_autoencoder": _BRAIN["train_autoencoder"],
    "brain_controlnet train_diffusion": _BRAIN["train_diffusion"],
    "brain_controlnet train": _BRAIN["train"],
    "brain_controlnet train_regression": _BRAIN["train_regression"],
    "sdseg train_autoencoder": sdseg_runs.STAGES["train_autoencoder"],
    "sdseg train": sdseg_runs.STAGES["train"] | {"accumulation_steps": 2},
    "sdseg train_baseline": sdseg_runs.STAGES["train_baseline"],
    "dmri2noddi train_vqgan": dmri_runs.STAGES["train_vqgan"],
    "dmri2noddi train_encoder": dmri_runs.STAGES["train_encoder"],
    "dmri2noddi train": dmri_runs.STAGES["train"],
    "dmri2noddi train_baseline": dmri_runs.STAGES["train_baseline"],
}
# Random weights of the stages before, below FOLDER/data/<bundle>.
EARLIER: dict[str, dict[str, str]] = {
    "cxr_ldm train": {"autoencoder#path": "autoencoder.pt"},
    "brain_controlnet train_diffusion": {"autoencoder#path": "autoencoder.pt"},
    "brain_controlnet train": {"diffusion_path": "diffusion.pt"},
    "sdseg train": {"autoencoder_weights": "autoencoder.pt"},
    "dmri2noddi train_encoder": {"autoencoder_weights": "models/stages/vqgan.pt"},
    "dmri2noddi train": {
        "autoencoder_weights": "models/stages/vqgan.pt",
        "encoder_weights": "models/stages/encoder.pt",
    },
}
CLASSIFIER = "cxr_ldm train_classifier"
ADVERSARIAL = [stage for stage in SMALL if stage.endswith(("train_autoencoder", "train_vqgan"))]
# Gradients of an absolute value, or against another network: rounding that changes a sign makes them jump.
JUMPING = [*ADVERSARIAL, "brain_controlnet train_regression", "dmri2noddi train_baseline"]
WITH_BATCH_NORM = [*ADVERSARIAL, CLASSIFIER]


class OneShare(DistributedSampler):
    """For one process the order of two: the items that two processes see in a step are those of its batch."""

    def __init__(self, dataset: Any, *, shares: int = 2, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        # Filled up by the first items, as the list of two processes is.
        self.num_samples = self.total_size = math.ceil(len(dataset) / shares) * shares


def without_batch_norm(network: nn.Module) -> nn.Module:
    """The network with instance normalisation in place of batch normalisation."""
    for name, child in network.named_children():
        if type(child) in BATCH_NORM:
            setattr(network, name, BATCH_NORM[type(child)](child.num_features))
        else:
            without_batch_norm(child)
    return network


@contextlib.contextmanager
def shared_draws(rank: int, world: int) -> Iterator[None]:
    """Random numbers as one process draws them for a whole batch, of which every rank takes those of its items.

    Ranks draw noise of their own in a real training, which is as good but not equal to what one process draws.
    """

    def share(draw: Callable[..., torch.Tensor], lengthen: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def shared(*arguments: Any, **options: Any) -> torch.Tensor:
            # With a generator of its own, as in validation, a draw depends on the item already.
            if "generator" in options:
                return draw(*arguments, **options)
            return draw(*lengthen(*arguments), **options)[rank::world]

        return shared

    def like(x: torch.Tensor) -> tuple[int, ...]:
        return (len(x) * world, *x.shape[1:])

    randn, randint, rand, seed = torch.randn, torch.randint, torch.rand, EpochSeeds._seed

    def same_seed(self: EpochSeeds, engine: Any) -> None:
        with mock.patch.object(engine.state, "rank", 0):
            seed(self, engine)

    with (
        mock.patch("torch.randn_like", share(randn, lambda x: (like(x),))),
        mock.patch("torch.randint", share(randint, lambda *a: (*a[:-1], (a[-1][0] * world, *a[-1][1:])))),
        mock.patch("torch.rand", share(rand, lambda count: (count * world,))),
        mock.patch.object(EpochSeeds, "_seed", same_seed),
    ):
        yield


# Options


def names(stage: str) -> tuple[Path, str]:
    """Folder of the bundle, and the configuration."""
    bundle, config = stage.split()
    return ROOT / "bundles" / bundle, config


def files(stage: str, *overlays: str) -> list[str]:
    bundle, config = names(stage)
    # The classifier is small as it is, and its network no part of tiny.json.
    small = [] if config == "train_classifier" else ["tiny"]
    return [str(bundle / f"configs/{name}.json") for name in (config, *overlays, *small)]


def home(folder: Path, kind: str, rank: int = 0, world: int = 2) -> Path:
    """Where a training writes: a folder for every rank, so that what rank 1 writes is found out."""
    kind = "broken" if kind in ("crashed", "resumed") else kind
    return folder / (f"{kind} of one" if world == 1 else kind if rank == 0 else f"{kind} rank {rank}")


def options(stage: str, kind: str, folder: Path, rank: int = 0, world: int = 2) -> dict[str, Any]:
    """Overrides of a training."""
    bundle, config = names(stage)
    content = read(bundle / f"configs/{config}.json")
    data, own = folder / "data" / bundle.name, home(folder, kind, rank, world)
    # Copied: MONAI writes overrides into the dictionaries that it is given.
    result: dict[str, Any] = {**copy.deepcopy(SMALL[stage]), "bundle_root": str(bundle), "dataset_dir": str(data)}
    result |= {"ckpt_dir": str(own / stage / "models"), "output_dir": str(own / stage / "run")}
    result |= {"latent_cache_dir": str(own / stage / "latents")} if "latent_cache_dir" in content else {}
    result |= {"volume_cache_dir": str(data / "volumes")} if "volume_cache_dir" in content else {}
    result |= {name: str(data / path) for name, path in EARLIER.get(stage, {}).items()}
    result |= {"batch_size": SHARE, "max_epochs": 2}
    result |= {name: 2 for name in ("adversarial_start", "preview_interval") if name in content}
    return result if kind in CHANCE else result | _equal(stage, kind, result, content, data, world)


def _equal(
    stage: str, kind: str, given: dict[str, Any], content: dict[str, Any], data: Path, world: int
) -> dict[str, Any]:
    """Changes that leave nothing to chance but the draws of the batch, and no step that magnifies rounding."""
    result: dict[str, Any] = {"max_epochs": 5, "val_interval": 5, **without_chance(content)}
    known = {"accumulation_steps": 1, "warmup_steps": 2, "flips": "none", "preview_interval": 9}
    known |= dict.fromkeys(("learning_rate", "discriminator_learning_rate"), 1e-4 if stage in JUMPING else 1e-3)
    result |= {name: value for name, value in known.items() if name in content}
    # Adam divides a gradient by its size: one that is zero but for rounding would move its weight all the same.
    result |= {f"{name}#eps": 1e-4 for name in ("optimizer", "discriminator_optimizer") if name in content}
    if stage == "cxr_ldm train":
        result |= {"null_prompt_probability": 0.0, "train#preprocessing#transforms#1#_disabled_": True}
    if stage == "dmri2noddi train_vqgan":
        # Codes start from vectors of a batch, and restart at some of them: which ones is left to chance.
        result["model_weights"] = str(data / "models/stages/vqgan.pt")
        result["autoencoder_def"] = {**given["autoencoder_def"], "restart_threshold": None}
    if stage in WITH_BATCH_NORM and kind == "equal":
        name = "network_def" if stage == CLASSIFIER else "discriminator_def"
        tiny = read(names(stage)[0] / "configs/tiny.json")
        definition = given.get(name) or (content if stage == CLASSIFIER else tiny)[name]
        nested = {key.partition("#")[2]: given.pop(key) for key in list(given) if key.startswith(f"{name}#")}
        result[name] = {"_target_": "tests.stage_gang.without_batch_norm", "network": {**definition, **nested}}
    if world == 1:
        sampler = {"_target_": "tests.stage_gang.OneShare", "dataset": "@train#dataset", "seed": "@seed"}
        result |= {"batch_size": 2 * SHARE, "train#sampler": sampler, "train#dataloader#sampler": "@train#sampler"}
        result |= {"train#dataloader#shuffle": False}
        result |= {"train#dataloader#drop_last": "$len(@train#sampler) > @batch_size"}
    return result


def without_chance(content: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that switch off random transforms: their draws belong to a process, not to an item."""
    return {
        f"train#{name}#transforms#{index}#prob": 0.0
        for name in ("preprocessing", "image_preprocessing")
        for index, transform in enumerate(content["train"].get(name, {}).get("transforms", []))
        if "prob" in transform
    }


# One training


def train(stage: str, kind: str, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Train a stage and say what came of it."""
    with contextlib.nullcontext() if kind in CHANCE else shared_draws(rank, world):
        return _train(stage, kind, folder, rank, world)


def _train(stage: str, kind: str, folder: Path, rank: int, world: int) -> dict[str, Any]:
    workflow = ConfigWorkflow(
        config_file=files(stage, *(["multi_gpu_train"] if world > 1 else [])),
        logging_file=False,
        run_id="training",
        workflow_type="train",
        **options(stage, kind, folder, rank, world),
    )
    workflow.initialize()
    content = workflow.parser.get_parsed_content
    trainer = content("train#trainer")
    networks = {name: unwrapped(content(name)) for name in ("network", "discriminator")[: 1 + (stage in ADVERSARIAL)]}
    start = copy.deepcopy(networks["network"].state_dict())
    result: dict[str, Any] = {"iterations": [], "orders": [], "losses": [], "gradients": []}

    def step(engine: Any) -> None:
        result["iterations"].append(engine.state.iteration)
        terms = {"loss": engine.state.output["loss"], **getattr(engine.state, "losses", {})}
        result["losses"].append({name: float(value) for name, value in terms.items()})
        gradients = [p.grad.flatten() for net in networks.values() for p in net.parameters() if p.grad is not None]
        result["gradients"].append(torch.cat(gradients).clone())
        if kind == "crashed" and engine.state.epoch == 2:
            raise Interruption

    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: result["orders"].append(list(content("train#sampler"))))
    with contextlib.suppress(RuntimeError) if kind == "crashed" else contextlib.nullcontext():
        workflow.run()
    own = home(folder, kind, rank, world) / stage
    return result | {
        "properties": workflow.check_properties() if kind == "whole" else [],
        "settings": content("settings"),
        "metrics": dict(content("validate#evaluator").state.metrics),
        "average": sha256_of_state(content("ema").ema_model.state_dict()) if "ema" in workflow.parser else "",
        "validation": list(content("validate#dataloader").sampler),
        "files": sorted(path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()),
        "weights": {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()},
        "moved": max(
            float((tensor - start[name]).abs().max()) for name, tensor in networks["network"].named_parameters()
        ),
    }


# Data


def prepare(folder: Path) -> Path:
    """Phantoms of odd number, so that shares differ in size and in the last batch, and random weights."""
    data = folder / "data"
    make_films(str(data / "cxr_ldm"), n=14, size=64, split=(0.6, 0.3, 0.1))
    make_pictures(str(data / "sdseg"), num_images=18, size=(80, 64), split=(0.6, 0.3, 0.1))
    make_heads(str(data / "brain_controlnet"), n=4, size=(48, 64, 7), spacing=(3.4, 3.5, 6.0), split=(0.5, 0.25, 0.25))
    dmri_runs.make_phantoms(data / "dmri2noddi", num_subjects=3)
    for bundle, training, validation in (("cxr_ldm", 7, 3), ("sdseg", 7, 3), ("brain_controlnet", 1, 1)):
        _shorten(data / bundle / "datalist.json", training=training, validation=validation)
    films = _network("cxr_ldm train", folder)
    torch.save(films.autoencoder.state_dict(), data / "cxr_ldm/autoencoder.pt")
    diffusion = _network("brain_controlnet train_diffusion", folder)
    diffusion.scale_factor.fill_(0.5)
    torch.save(diffusion.state_dict(), data / "brain_controlnet/diffusion.pt")
    torch.save(diffusion.autoencoder.state_dict(), data / "brain_controlnet/autoencoder.pt")
    torch.save(sdseg_runs.network().autoencoder.state_dict(), data / "sdseg/autoencoder.pt")
    dmri_runs.save_network(data / "dmri2noddi/models")
    return folder


def _shorten(path: Path, **counts: int) -> None:
    content = json.loads(path.read_text())
    for section, count in counts.items():
        assert len(content[section]) >= count
        content[section] = content[section][:count]
    path.write_text(json.dumps(content))


def _network(stage: str, folder: Path) -> Any:
    """The network of a stage with random weights, also those that start at zero."""
    path, hook = list(sys.path), sys.excepthook
    workflow = ConfigWorkflow(
        files(stage), logging_file=False, workflow_type="train", **options(stage, "whole", folder)
    )
    with torch.random.fork_rng():
        workflow.initialize()
        sys.path[:], sys.excepthook = path, hook
        torch.manual_seed(0)
        network = workflow.parser.get_parsed_content("network_def")
        spread(network.parameters(), torch.Generator().manual_seed(0))
    return network


# All of them


def launch(folder: Path, *kinds: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in two processes, then in one; returns what each of the two found, and the one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for start in (torchrun, []):
        done = subprocess.run(
            [sys.executable, *start, "-m", "tests.stage_gang", str(folder), *kinds],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{done.args}: {done.stdout[-6000:]}")
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return ranks, torch.load(folder / "one.pt", weights_only=True)


def work(folder: Path, kinds: list[str]) -> None:
    """Part of this process, which torchrun started beside another, or which is alone."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        join_processes("cpu")
    results = {
        f"{stage} {kind}": train(stage, kind, folder, rank, world)
        for stage in SMALL
        for kind in kinds
        if (world > 1 or kind not in CHANCE) and (kind != "batch norm" or stage in WITH_BATCH_NORM)
    }
    torch.save(results, folder / (f"rank{rank}.pt" if world > 1 else "one.pt"))


# Figures


def difference(one: torch.Tensor | float, two: torch.Tensor | float) -> float:
    """Largest difference, as a part of numbers that are larger than 1."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (one, two))
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max()) if a.numel() else 0.0


def compared(result: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of one stage: two processes to one, then rank to rank.

    Args:
        result: stage and kind.
        ranks: what each of the two processes found.
        alone: what one process found.
    """
    one, two, whole = ranks[0][result], ranks[1][result], alone[result]
    means = [{name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(one["losses"], two["losses"], strict=True)]

    def weights(other: dict[str, Any]) -> float:
        return max(
            difference(tensor, other["weights"][name][key])
            for name, state in one["weights"].items()
            for key, tensor in state.items()
        )

    pairs = list(zip(means, whole["losses"], strict=True))
    return {
        "stage": result,
        "steps": len(pairs),
        "loss": max(difference(mean[name], losses[name]) for mean, losses in pairs for name in losses),
        "gradient": max(map(difference, one["gradients"], whole["gradients"])),
        "weights": weights(whole),
        "metrics": max(difference(one["metrics"][name], value) for name, value in whole["metrics"].items()),
        "moved": whole["moved"],
        "between_ranks": weights(two),
    }


def main(folder: Path) -> None:
    ranks, alone = launch(prepare(folder), "equal", "batch norm")
    rows = [compared(result, ranks, alone) for result in alone if result in ranks[0]]
    save_json({"torch": torch.__version__, "python": platform.python_version(), "rows": rows}, folder / "figures.json")
    columns = [name for name in rows[0] if name != "stage"]
    print("| stage |", " | ".join(columns), "|")
    for row in sorted(rows, key=lambda row: row["stage"].endswith("batch norm")):
        print(f"| `{row['stage'].removesuffix(' equal')}` |", " | ".join(f"{row[name]:.2g}" for name in columns), "|")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        work(Path(sys.argv[1]), sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
