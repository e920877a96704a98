# SPDX-License-Identifier: Apache-2.0
"""Training steps of the diffusion stage of ``dmri2noddi``: the published loop and the bundle's trainer.

The published loop runs two frozen networks in every step: the VQ-GAN's encoder on the maps and the low-resolution
encoder on the features (spec dmri2noddi 4.5). The bundle's trainer reads from disk what both say.
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
from torch import nn

from shared.handlers.guard import GradientGuard
from shared.networks.activation_checkpointing import checkpoint_activations
from tools.benchmarks.dmri2noddi_networks import in_words, noddi_config, random_model, with_default_attention
from tools.benchmarks.workload import Setting, Size, Workload, relative_difference

OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 5e-5}
# Adam divides by the gradient's size: where it is nearly zero, rounding decides the update's sign.
LOSS_TOLERANCE, UPDATE_TOLERANCE, BF16_LOSS_TOLERANCE = 1e-4, 2e-2, 5e-2

Result = Mapping[str, torch.Tensor]
"""``losses`` of the steps, and ``update``: what they added to the U-Net's weights, as one vector on the CPU."""


class _Start:
    """The U-Net's weights before the first step. In numpy's memory, which a training does not have to hold."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.values = [parameter.detach().cpu().numpy().copy() for parameter in unet.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.unet.parameters(), self.values, strict=True):
            parameter.copy_(torch.from_numpy(value))
        torch.manual_seed(0)

    @torch.no_grad()
    def result(self, losses: list[torch.Tensor]) -> Result:
        pairs = zip(self.unet.parameters(), self.values, strict=True)
        update = torch.cat([(parameter.cpu() - torch.from_numpy(value)).flatten() for parameter, value in pairs])
        return {"losses": torch.stack(losses).float().cpu(), "update": update}


@dataclass
class Work:
    """Steps to be trained, the same for every way, and what the ways are made of.

    Attributes:
        setting: gives the device.
        share: of the published channels.
        parser: the bundle's configuration.
        model: ``NoddiModel``.
        batches: features ``(B, 8, p, p, p)`` and maps ``(B, 3, 2p, 2p, 2p)``.
        encoded: of each batch the latents of the maps and the encoder's estimate.
        side: ``p``.
    """

    setting: Setting
    share: float
    parser: ConfigParser
    model: Any
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    encoded: list[tuple[torch.Tensor, torch.Tensor]]
    side: int

    @classmethod
    def of(cls, setting: Setting) -> Work:
        share, side = setting.pick((1 / 16, 8), (1 / 8, 32), (1.0, 32))
        size, steps = setting.pick(2, 1, 2), setting.pick(2, 1, 1)
        parser = noddi_config(setting, ["train"], share=share, patch=[side] * 3, batch_size=size)
        model = random_model(parser, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        batches, encoded = [], []
        for _ in range(steps):
            features = torch.rand(size, 8, *[side] * 3, generator=generator).to(setting.device)
            maps = torch.rand(size, 3, *[2 * side] * 3, generator=generator).to(setting.device)
            batches.append((features, maps))
            with torch.no_grad():
                encoded.append((model.autoencoder.encode(maps), model.encoder(features)))
        return cls(setting, share, parser, model, batches, encoded, side)

    def in_half(self, way: Callable[[], Result]) -> dict[str, Callable[[], Result]]:
        """The way by its name; not on the smallest patches, where the gradient of a convolution in bfloat16 over 2^3
        voxels holds what was in memory before (torch 2.14 on a CPU)."""
        return {} if self.setting.size == Size.TINY else {"+ fused Adam, bfloat16": way}

    @property
    def sizes(self) -> str:
        steps, size = len(self.batches), len(self.batches[0][0])
        return (
            f"{steps} step{'s' if steps > 1 else ''} of {size} patch{'es' if size > 1 else ''} {self.side}^3, "
            f"{in_words(self.share)}, nothing read from files"
        )


def published_loop(
    work: Work, model: Any, *, latents: bool = False, estimates: bool = False, fused: bool = False, half: bool = False
) -> Callable[[], Result]:
    """The published loop as a function that trains from the same weights every time.

    Args:
        work: what is trained on.
        model: the networks.
        latents: take those of the maps from memory, instead of encoding in each step.
        estimates: likewise the encoder's.
        fused: the fused optimizer instead of torch's default, a loop over the weights.
        half: autocast to bfloat16.
    """
    start = _Start(model.unet)
    scheduler = work.parser.get_parsed_content("noise_scheduler")

    def run() -> Result:
        start.restore()
        model.unet.train()
        optimizer = torch.optim.Adam(model.unet.parameters(), **OPTIMIZER, foreach=False, fused=fused or None)
        losses = []
        for (features, maps), (latent, estimate) in zip(work.batches, work.encoded, strict=True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(work.setting.device.type, dtype=torch.bfloat16, enabled=half):
                with torch.no_grad():
                    clean = model.normalize(latent if latents else model.autoencoder.encode(maps))
                    condition = model.normalize(estimate if estimates else model.encoder(features))
                # In the order of the bundle, which has a draw for autoencoders with a posterior too.
                timesteps = torch.randint(0, scheduler.num_train_timesteps, (len(clean),), device=clean.device)
                _, noise = torch.randn_like(clean), torch.randn_like(clean)
                noisy = scheduler.add_noise(clean, noise, timesteps)
                loss = F.l1_loss(model.unet(torch.cat((noisy, condition), dim=1), timesteps).float(), noise)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        return start.result(losses)

    return run


def bundle_training(work: Work) -> Callable[[], Result]:
    """The trainer of the bundle's configuration, with its optimizer, average of weights and check of gradients.

    Handlers that write files, and the warm-up of the learning rate, which the published loop has not, are left out.
    Gradients are measured but not clipped, for the same reason.
    """
    parser, model = work.parser, work.model
    items = ["0"] * len(work.batches[0][0])
    parser["network_def"] = model
    parser["train#handlers"] = [GradientGuard(max_norm=None)]
    parser["train#dataloader"] = [
        {"latent_mean": latent, "condition_latent": estimate, "item_id": items} for latent, estimate in work.encoded
    ]
    parser["train#trainer#train_handlers"] = "$[*@train#handlers, @ema]"
    parser["ema#_requires_"] = None
    parser["max_epochs"] = 1
    trainer = parser.get_parsed_content("train#trainer")
    start, losses = _Start(model.unet), []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(torch.as_tensor(engine.state.output["loss"]).detach())
    )

    def run() -> Result:
        start.restore()
        losses.clear()
        trainer.run()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.optimizer.state.clear()
        return start.result(losses)

    return run


def equal_training(results: Mapping[str, Result]) -> str:
    """Losses of all ways, and updates of the weights of those in float32, are those of the first.

    Raises:
        ValueError: where they differ; the message starts with the way.
    """
    first, *others = results
    exact, half = [0.0, 0.0], 0.0
    for name in others:
        loss, update = (relative_difference(results[name][key], results[first][key]) for key in ("losses", "update"))
        limit = BF16_LOSS_TOLERANCE if "bfloat16" in name else LOSS_TOLERANCE
        if not loss <= limit:
            raise ValueError(f"{name}: expected losses within {limit:g} of {first}, got {loss:.3g}.")
        if "bfloat16" in name:
            half = max(half, loss)
            continue
        if not update <= UPDATE_TOLERANCE:
            raise ValueError(f"{name}: expected updates within {UPDATE_TOLERANCE:g} of {first}, got {update:.3g}.")
        exact = [max(exact[0], loss), max(exact[1], update)]
    text = f"loss equal within {exact[0]:.1e}, update of the weights within {exact[1]:.1e} (relative)"
    return text + (f"; in bfloat16 the loss within {half:.1e}" if half else "")


BASELINE = "published loop, MONAI's default attention"


def training_step(setting: Setting) -> Workload:
    """Time of a step, with what makes the difference added one after the other."""
    work = Work.of(setting)
    loop = partial(published_loop, work)
    cached = {"latents": True, "estimates": True}
    ways = {
        BASELINE: loop(with_default_attention(work.model)),
        "+ latents of the maps from the cache": loop(with_default_attention(work.model), latents=True),
        "+ the encoder's estimates from the cache": loop(with_default_attention(work.model), **cached),
        "+ scaled-dot-product attention": loop(work.model, **cached),
        **work.in_half(loop(work.model, **cached, fused=True, half=True)),
        "dmri2noddi (fused Adam, average of weights)": bundle_training(work),
    }
    return Workload(
        name="training step of the diffusion model",
        sizes=work.sizes,
        ways=ways,
        equal=equal_training,
        target=1.5,
        repeats=setting.pick(1, 3, 5),
    )


def training_memory(setting: Setting) -> Workload:
    """Peak memory of a step; smaller ones in return for time or digits beside the bundle's."""
    work = Work.of(setting)
    loop = partial(published_loop, work)
    cached = {"latents": True, "estimates": True}
    checkpointed = checkpoint_activations(copy.deepcopy(work.model))
    ways = {
        BASELINE: loop(with_default_attention(work.model)),
        "+ latents and estimates from the cache": loop(with_default_attention(work.model), **cached),
        "+ scaled-dot-product attention": loop(work.model, **cached),
        **work.in_half(loop(work.model, **cached, fused=True, half=True)),
        "+ activations computed twice, float32": loop(checkpointed, **cached),
        "dmri2noddi (average of weights, float32)": bundle_training(work),
    }
    return Workload(
        name="peak memory of a training step of the diffusion model",
        sizes=work.sizes,
        ways=ways,
        equal=equal_training,
        target=1 / 0.6,
        measured="memory",
        repeats=1,
    )


def decoding_memory(setting: Setting) -> Workload:
    """Peak memory of decoding a volume: at once, or in overlapping windows as the sampler does."""
    share, side = setting.pick((1 / 16, 8), (1 / 8, 32), (1.0, 32))
    shape = setting.pick((8, 8, 12), (50, 32, 40), (68, 86, 68))
    parser = noddi_config(setting, ["inference"], share=share, patch=[side] * 3)
    model = random_model(parser, setting)
    sampler = parser.get_parsed_content("inferer")
    latents = torch.randn(1, model.latent_channels, *shape, generator=torch.Generator().manual_seed(setting.seed))
    latents = latents.to(setting.device)
    whole, own = "the whole volume at once", "dmri2noddi: windows"

    @torch.no_grad()
    def windows() -> torch.Tensor:
        return sampler._windows(latents, lambda window: sampler._decoded(window, model))

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        one, two = results[whole], results[own]
        difference = (one - two).abs().mean().item() if one.shape == two.shape else float("nan")
        if not difference <= 0.1:
            raise ValueError(f"{own}: expected maps within 0.1 of those of {whole} on average, got {difference:.3g}.")
        return f"maps differ by {difference:.1e} on average (random weights): normalisation sees a window at a time"

    return Workload(
        name="peak memory of decoding a volume",
        sizes=f"latent {' x '.join(map(str, shape))}, windows of {side}^3, {in_words(share)}",
        ways={whole: lambda: torch.no_grad()(model.decode)(latents).clamp(0.0, 1.0), own: windows},
        equal=equal,
        measured="memory",
        repeats=1,
    )
