# SPDX-License-Identifier: Apache-2.0
"""Training steps of ``brain_controlnet``, stage 2 and stage 3: the published loop and the bundle's trainer.

The published loop encodes every image and every prompt anew in each step, the prompt with a text encoder whose
parameters nobody has frozen, so that the backward pass goes through it too (spec cxr_ldm 1.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from shared.handlers.guard import GradientGuard
from tools.benchmarks.brain_controlnet_networks import (
    TOKENS,
    Networks,
    attention,
    brain_config,
    core_networks,
    image_size,
    in_core_order,
    published_networks,
    random_model,
    random_pairs,
    text_encoder,
    whole_controlnet,
    width_in_words,
    width_share,
)
from tools.benchmarks.workload import Setting, Workload, relative_difference

LEARNING_RATE = 2.5e-5
NULL_SHARE = 0.1
# Adam divides by the gradient's size: where it is nearly zero, rounding decides the update's sign.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-4, 2e-2
BF16_LOSS_TOLERANCE = 5e-2

Result = Mapping[str, torch.Tensor]
"""``losses`` of the steps, and ``update``: what they added to the trained weights, as one vector on the CPU."""


@dataclass
class Work:
    """Steps to be trained: images and conditions ``(B, 1, H, W)``, the same for every way."""

    setting: Setting
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    scheduler: DDPMScheduler
    seed: int

    def draw(self, mean: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Timesteps, noise of the posterior, noise, and where the null prompt stands, in the order of the bundle."""
        timesteps = torch.randint(0, self.scheduler.num_train_timesteps, (len(mean),), device=mean.device)
        noises = torch.randn_like(mean), torch.randn_like(mean)
        return timesteps, *noises, torch.rand(len(mean), device=mean.device) < NULL_SHARE


class _Start:
    """The trained weights before the first step. In numpy's memory, which a training does not have to hold."""

    def __init__(self, trained: nn.Module) -> None:
        self.trained = trained
        self.values = [parameter.detach().cpu().numpy().copy() for parameter in trained.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.trained.parameters(), self.values, strict=True):
            parameter.copy_(torch.from_numpy(value))

    @torch.no_grad()
    def update(self) -> dict[str, torch.Tensor]:
        """What was added to each weight since, by name."""
        named = zip(self.trained.named_parameters(), self.values, strict=True)
        return {name: parameter.cpu() - torch.from_numpy(value) for (name, parameter), value in named}


def published_loop(
    work: Work,
    networks: Networks,
    text: Any,
    order: nn.Module,
    *,
    latents: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    context: torch.Tensor | None = None,
    fused: bool = False,
) -> Callable[[], Result]:
    """The published loop as a function that trains from the same weights every time.

    Args:
        work: what is trained on.
        networks: the published ones, or MONAI core's with the same weights.
        text: the text encoder.
        order: network whose state dict gives the order of ``update``.
        latents: mean and log-variance of every batch, instead of the encoder in each step.
        context: ``(2, L, D)`` of the null prompt and the prompt, instead of the text encoder in each step.
        fused: the fused optimizer instead of torch's default, a loop over the weights.
    """
    trained = networks.unet if networks.controlnet is None else networks.controlnet
    networks.unet.requires_grad_(networks.controlnet is None)
    start = _Start(trained)
    tokens = TOKENS.to(work.setting.device)
    scale = networks.scale_factor

    def run() -> Result:
        start.restore()
        torch.manual_seed(work.seed)
        trained.train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, fused=fused or None)
        losses = []
        for index, (images, conditions) in enumerate(work.pairs):
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                if latents is None:
                    mean, sigma = networks.autoencoder.encode(images)
                else:
                    mean, sigma = latents[index][0], torch.exp(0.5 * latents[index][1])
                timesteps, posterior_noise, noise, null = work.draw(mean)
                clean = (mean + sigma * posterior_noise) * scale
            rows = 1 - null.long()
            prompt = text(tokens[rows]) if context is None else context[rows]
            noisy = work.scheduler.add_noise(clean, noise, timesteps)
            residuals: dict[str, Any] = {}
            if networks.controlnet is not None:
                down, middle = networks.controlnet(noisy, timesteps, controlnet_cond=conditions, context=prompt)
                residuals = {
                    "down_block_additional_residuals": tuple(down),
                    "mid_block_additional_residual": middle,
                }
            prediction = networks.unet(noisy, timesteps=timesteps, context=prompt, **residuals)
            loss = F.mse_loss(prediction.float(), work.scheduler.get_velocity(clean, noise, timesteps))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        for module in (trained, text):
            module.zero_grad(set_to_none=True)
        del optimizer
        return {"losses": torch.stack(losses).cpu(), "update": in_core_order(start.update(), order)}

    return run


def bundle_training(
    work: Work, parser: ConfigParser, model: Any, latents: list[tuple[torch.Tensor, torch.Tensor]]
) -> Callable[[], Result]:
    """The trainer of the bundle's configuration, with its optimizer, average of weights and check of gradients.

    Handlers that write files, and the warm-up of the learning rate, which the published loop has not, are left out.
    Gradients are measured but not clipped, for the same reason.
    """
    batches = [
        {
            "latent_mean": mean,
            "latent_log_variance": log_variance,
            "condition": conditions,
            "item_id": ["0"] * len(mean),
        }
        for (mean, log_variance), (_, conditions) in zip(latents, work.pairs, strict=True)
    ]
    parser["network_def"] = model
    parser["train#handlers"] = [GradientGuard(max_norm=None)]
    parser["train#dataloader"] = batches
    parser["train#trainer#train_handlers"] = "$[*@train#handlers, @ema]"
    parser["ema#_requires_"] = None
    parser["max_epochs"] = 1
    parser["learning_rate"] = LEARNING_RATE
    parser["null_prompt_probability"] = NULL_SHARE
    trainer = parser.get_parsed_content("train#trainer")
    stage3 = hasattr(model, "controlnets")
    start = _Start(model.trained if stage3 else model.unet)
    order = list((whole_controlnet(model) if stage3 else model.unet).state_dict())
    losses: list[torch.Tensor] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(torch.as_tensor(engine.state.output["loss"]).detach())
    )

    def run() -> Result:
        start.restore()
        losses.clear()
        torch.manual_seed(work.seed)
        trainer.run()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.optimizer.state.clear()
        update = {_core_name(name): value for name, value in start.update().items()}
        return {
            "losses": torch.stack(losses).float().cpu(),
            "update": torch.cat([update[name].flatten() for name in order]),
        }

    return run


def _core_name(name: str) -> str:
    """The name in MONAI core's ControlNet of a weight of ``ControlNetModel``, which keeps the embedding apart."""
    return name.removeprefix("controlnets.0.").replace("embeddings.0.", "controlnet_cond_embedding.")


def equal_training(results: Mapping[str, Result]) -> str:
    """Losses of all ways, and updates of the weights of those in float32, are those of the first.

    Raises:
        ValueError: where they differ; the message starts with the way.
    """
    first, *others = results
    losses, updates, lower = 0.0, 0.0, 0.0
    for name in others:
        loss = relative_difference(results[name]["losses"], results[first]["losses"])
        update = relative_difference(results[name]["update"], results[first]["update"])
        half = "bf16" in name
        limit = BF16_LOSS_TOLERANCE if half else LOSS_TOLERANCE
        if not loss <= limit:
            raise ValueError(f"{name}: expected losses within {limit:g} of {first}, got {loss:.3g}.")
        if not half and not update <= UPDATE_TOLERANCE:
            raise ValueError(f"{name}: expected updates within {UPDATE_TOLERANCE:g} of {first}, got {update:.3g}.")
        losses, updates, lower = (
            (losses, updates, max(lower, loss)) if half else (max(losses, loss), max(updates, update), lower)
        )
    text = f"loss equal within {losses:.1e}, update of the weights within {updates:.1e} (relative)"
    return text + (f"; in bf16 the loss within {lower:.1e}" if lower else "")


@dataclass
class Parts:
    """A work with all that its ways are made of; the networks of all have the same weights."""

    work: Work
    parser: ConfigParser
    model: Any
    networks: Networks
    core: Networks
    sdpa: Networks
    text: Any
    order: nn.Module
    context: torch.Tensor
    latents: list[tuple[torch.Tensor, torch.Tensor]]


def parts_of(setting: Setting, file: str, batch_size: int) -> Parts:
    """Networks, data and latents for a training; ``file`` is "train_diffusion" or "train"."""
    parser = brain_config(setting, file)
    model = random_model(parser, setting)
    text = text_encoder(setting, int(1024 * width_share(setting)))
    diffusion = getattr(model, "diffusion", model)
    with torch.no_grad():
        context = text(TOKENS.to(setting.device))
        diffusion.prompt.embeddings.copy_(context)
    networks = published_networks(model, parser).to(setting.device)
    core, sdpa = (
        core_networks(random_model(brain_config(setting, file, changes=attention(file, fused)), setting)).to(
            setting.device
        )
        for fused in (False, True)
    )
    # Without numbers: only names and shapes are looked at, and nothing of it counts as memory of a way.
    order = copy.deepcopy(core.unet if core.controlnet is None else core.controlnet).to("meta")
    steps = setting.pick(2, 1, 1)
    images, conditions = random_pairs(setting, steps * batch_size)
    pairs = list(zip(images.split(batch_size), conditions.split(batch_size), strict=True))
    with torch.no_grad():
        encoded = [core.autoencoder.encode(part) for part, _ in pairs]
    work = Work(setting, pairs, parser.get_parsed_content("noise_scheduler"), setting.seed)
    latents = [(mean, 2.0 * sigma.log()) for mean, sigma in encoded]
    return Parts(work, parser, model, networks, core, sdpa, text, order, context, latents)


def sizes_of(setting: Setting, batch_size: int, steps: int) -> str:
    return (
        f"{steps} step{'s' if steps > 1 else ''} of {batch_size} slices {'x'.join(map(str, image_size(setting)))}, "
        f"{width_in_words(width_share(setting))}, text encoder of {setting.pick(2, 23, 23)} layers; random weights, no "
        "reading of files"
    )


def bundle_name(setting: Setting) -> str:
    """Of the bundle's way: its configuration turns autocast on where there is a GPU."""
    return "bundle, bf16" if setting.device.type == "cuda" else "bundle"


def training_workload(setting: Setting, file: str, name: str, target: float | None) -> Workload:
    """Time of a step, with what makes the difference added one after the other."""
    batch_size = setting.pick(2, 4, 32)
    parts = parts_of(setting, file, batch_size)
    loop = partial(published_loop, parts.work, text=parts.text, order=parts.order)
    cached: dict[str, Any] = {"latents": parts.latents, "context": parts.context}
    ways = {
        "published loop, monai-generative": loop(parts.networks),
        "+ latents from the cache": loop(parts.networks, latents=parts.latents),
        "+ prompt embedded once": loop(parts.networks, **cached),
        "+ MONAI core": loop(parts.core, **cached),
        "+ SDPA": loop(parts.sdpa, **cached),
        "+ fused AdamW": loop(parts.sdpa, **cached, fused=True),
        bundle_name(setting): bundle_training(parts.work, parts.parser, parts.model, parts.latents),
    }
    return Workload(
        name=name,
        sizes=sizes_of(setting, batch_size, len(parts.work.pairs)),
        ways=ways,
        equal=equal_training,
        target=target,
    )


def stage2_training(setting: Setting) -> Workload:
    """The latent diffusion model under a constant prompt."""
    return training_workload(setting, "train_diffusion", "training step of the diffusion model (stage 2)", 1.5)


def stage3_training(setting: Setting) -> Workload:
    """The ControlNet; its embedding of the condition is trained, so it runs in every step of every way."""
    return training_workload(setting, "train", "training step of the ControlNet (stage 3)", 1.5)
