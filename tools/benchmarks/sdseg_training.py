# SPDX-License-Identifier: Apache-2.0
"""Time and memory of training steps of the main stage of ``sdseg``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from torch import nn

from tools.benchmarks.bundle_config import bundle_config
from tools.benchmarks.sdseg_diffusers import diffusers_unet, in_our_names
from tools.benchmarks.sdseg_programs import REDUCED, model_changes, phantoms, save_model, with_default_attention
from tools.benchmarks.sdseg_published import LEARNING_RATE, PublishedAverage, training_steps
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.trained import HALF, Trained, equally_trained
from tools.benchmarks.workload import Setting, Workload

BASELINE = "published loop, MONAI's default attention"


# The gradient of an absolute error is a sign, which rounding turns where the error is small.
HALF_LIMITS = (2e-2, 0.3, 0.8)
Program = Callable[[], Trained]


class Stage:
    """Pictures, masks and weights on disk, and programs that train on them.

    Args:
        setting: where and how large.
        steps: optimizer steps of one run.
        batch_size: pictures in a batch.
    """

    def __init__(self, setting: Setting, *, steps: int, batch_size: int) -> None:
        self.setting, self.steps, self.batch_size = setting, steps, batch_size
        self.folder = temporary_folder("sdseg_training")
        self.items = phantoms(self.folder / "data", steps * batch_size, size=(144, 192), seed=setting.seed)
        changes = {**model_changes(setting), "amp": False, "dataset_dir": str(self.folder)}
        save_model(bundle_config("sdseg", ["inference"], changes), self.folder / "models", setting.seed)

    @property
    def sizes(self) -> str:
        """What is run, in words."""
        height, width = model_changes(self.setting)["image_size"]
        return (
            f"{self.steps} steps, {self.batch_size} pictures of {height} x {width} a step, without dropout, which "
            f"would not compare; {REDUCED[self.setting.size]}; the pictures of the published loop are in memory, those "
            "of the bundle are read from their files"
        )

    def published(self, *, default_attention: bool = True, diffusers: bool = False) -> Program:
        """The published loop, on the bundle's networks or with the U-Net of diffusers."""
        parser = self._parser(latent_cache_dir="")
        model = parser.get_parsed_content("pretrained").to(self.setting.device)
        if default_attention:
            with_default_attention(model)
        unet = diffusers_unet(model.unet) if diffusers else model.unet
        trained = nn.ModuleDict({"unet": unet, "vision_encoder": model.vision_encoder})
        dataset = parser.get_parsed_content("train#dataset")
        pairs = [
            (item["image"].as_tensor(), item["target"].as_tensor()) for item in map(dataset.__getitem__, self._range)
        ]
        images, targets = (torch.stack(column).split(self.batch_size) for column in zip(*pairs, strict=True))
        initial = _copies(trained)
        scheduler = parser.get_parsed_content("noise_scheduler")
        groups = [{"params": list(part.parameters())} for part in trained.values()]

        def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return unet(x, timesteps, return_dict=False)[0]

        def run() -> Trained:
            trained.load_state_dict(initial)
            losses = training_steps(
                model,
                torch.optim.AdamW(groups, lr=LEARNING_RATE),
                zip(images, targets, strict=True),
                scheduler=scheduler,
                average=PublishedAverage(unet),
                seed=self.setting.seed,
                unet=unet,
                denoise=denoise if diffusers else None,
            )
            return _trained(losses, trained, initial, model)

        return run

    def bundle(self, *, half: bool = False, checkpointing: bool = False) -> Program:
        """The bundle's program.

        Args:
            half: bfloat16 autocast on a CPU too; on a GPU the bundle has it anyway.
            checkpointing: ``--gradient_checkpointing True``.
        """
        parser = self._parser(gradient_checkpointing=checkpointing, amp=self.setting.device.type == "cuda")
        model = parser.get_parsed_content("pretrained")
        trainer, ema, optimizer = (parser.get_parsed_content(key) for key in ("train#trainer", "ema", "optimizer"))
        if half and not trainer.amp:
            trainer.inferer = _HalfPrecision()  # the trainer's own autocast is that of GPUs
        trained = nn.ModuleDict({"unet": model.unet, "vision_encoder": model.vision_encoder})
        initial = _copies(trained)
        losses: list[torch.Tensor] = []
        trainer.add_event_handler(
            Events.ITERATION_STARTED,
            lambda engine: torch.manual_seed(self.setting.seed + engine.state.iteration - 1),
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].detach())
        )

        def run() -> Trained:
            losses.clear()
            optimizer.state.clear()
            trained.load_state_dict(initial)
            ema.ema_model.load_state_dict(model.state_dict())
            trainer.run()
            return _trained(torch.stack(losses).cpu(), trained, initial, model)

        return run

    @property
    def _range(self) -> range:
        return range(len(self.items))

    def _parser(self, **changes: Any) -> ConfigParser:
        """The configuration at this size, without what the published loop does not have, or what only takes time once:
        warm-up and clipping change the weights, records, previews and checkpoints take time."""
        values = {
            **model_changes(self.setting),
            "ckpt_dir": str(self.folder / "models"),
            "model_weights": str(self.folder / "models/model.pt"),
            "latent_cache_dir": str(self.folder / "latents"),
            "seed": self.setting.seed,
            "learning_rate": LEARNING_RATE,
            "batch_size": self.batch_size,
            "max_epochs": 1,
            "num_workers": 0,
            "flips": "none",
            "clip_norm": None,
            "amp": False,
            "train#dataset#data": self.items,
            # Both programs take the pictures in the order of the list.
            "train#dataloader#shuffle": False,
            "train#dataloader#drop_last": False,
            **changes,
        }
        parser = bundle_config("sdseg", ["train"], values)
        parser["train#handlers"] = [
            part for part in parser["train#handlers"] if part["_target_"].endswith("GradientGuard")
        ]
        parser["train#trainer#train_handlers"] = "$[*@train#handlers, @ema]"
        return parser


def training_step(setting: Setting) -> Workload:
    """Steps of the main stage: published, single levers, bundle."""
    stage = Stage(setting, steps=setting.pick(2, 2, 4), batch_size=setting.pick(2, 2, 4))
    ways = {
        BASELINE: stage.published(),
        "+ scaled-dot-product attention": stage.published(default_attention=False),
        "published loop, U-Net of diffusers": stage.published(default_attention=False, diffusers=True),
    }
    if setting.device.type == "cpu":
        ways[f"sdseg in {HALF}"] = stage.bundle(half=True)
    return Workload(
        name="training step",
        sizes=f"{stage.sizes}; the published loop averages the weights of the U-Net alone",
        ways={**ways, "sdseg": stage.bundle()},
        equal=partial(equally_trained, half_limits=HALF_LIMITS, half=setting.device.type == "cuda"),
        target=1.5,
    )


def training_memory(setting: Setting) -> Workload:
    """Peak memory of a training step, weights, moments of the optimizer and everything else included."""
    stage = Stage(setting, steps=1, batch_size=setting.pick(2, 4, 4))
    stage.bundle()()  # fills the cache, as the first epoch does
    builders: dict[str, Callable[[], Program]] = {
        BASELINE: stage.published,
        f"sdseg in {HALF}": partial(stage.bundle, half=True),
        f"sdseg in {HALF}, gradient checkpointing": partial(stage.bundle, half=True, checkpointing=True),
        "sdseg, gradient checkpointing": partial(stage.bundle, checkpointing=True),
        "sdseg": stage.bundle,
    }

    def built_and_run(build: Callable[[], Program]) -> Trained:
        return build()()  # networks are part of what must fit

    return Workload(
        name="peak memory of a training step",
        sizes=stage.sizes,
        ways={name: partial(built_and_run, build) for name, build in builders.items()},
        equal=partial(equally_trained, half_limits=HALF_LIMITS, half=setting.device.type == "cuda"),
        target=1 / 0.6,
        measured="memory",
    )


def _copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _trained(losses: torch.Tensor, trained: nn.ModuleDict, initial: dict[str, torch.Tensor], model: Any) -> Trained:
    """Vectors in the order of our networks."""
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
    updates = {name: parameter.detach() - initial[name] for name, parameter in trained.named_parameters()}
    return Trained(losses, *(_vector(values, trained, model) for values in (gradients, updates)))


def _vector(values: Mapping[str, Any], trained: nn.ModuleDict, model: Any) -> torch.Tensor:
    parts: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in trained}
    for name, value in values.items():
        prefix, _, key = name.partition(".")
        parts[prefix][key] = value
    if trained["unet"] is not model.unet:
        parts["unet"] = in_our_names(parts["unet"], model.unet)
    vectors = [parts["unet"][key] for key, _ in model.unet.named_parameters()] + list(parts["vision_encoder"].values())
    return torch.cat([vector.flatten() for vector in vectors]).cpu()


class _HalfPrecision(SimpleInferer):
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            return super().__call__(inputs, network, *args, **kwargs)
