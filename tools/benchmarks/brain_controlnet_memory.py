# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step of ``brain_controlnet``: the published loop, the bundle, and what saves more."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tools.benchmarks.brain_controlnet_networks import brain_config, random_model
from tools.benchmarks.brain_controlnet_training import (
    Result,
    bundle_name,
    bundle_training,
    equal_training,
    parts_of,
    published_loop,
    sizes_of,
)
from tools.benchmarks.workload import Setting, Workload


def under_autocast(run: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    def lower() -> Result:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return run()

    return lower


def memory_workload(setting: Setting, file: str, name: str) -> Workload:
    """Peak memory of a step: weights, gradients, optimizer, average of weights, activations."""
    batch_size = setting.pick(2, 16, 128)
    parts = parts_of(setting, file, batch_size)
    ours = bundle_training(parts.work, parts.parser, parts.model, parts.latents)
    saving = brain_config(setting, file, changes={"gradient_checkpointing": True, "amp": False})
    model = random_model(saving, setting)
    getattr(model, "diffusion", model).prompt.embeddings.data.copy_(parts.context)
    checkpointed = bundle_training(parts.work, saving, model, parts.latents)
    ways = {
        "published loop, monai-generative": published_loop(parts.work, parts.networks, parts.text, parts.order),
        "bundle, bf16 autocast": under_autocast(ours, setting.device),
        "bundle, activations computed twice": checkpointed,
        "bundle, bf16 and activations computed twice": under_autocast(checkpointed, setting.device),
        bundle_name(setting): ours,
    }
    return Workload(
        name=name,
        sizes=sizes_of(setting, batch_size, len(parts.work.pairs)),
        ways=ways,
        equal=equal_training,
        target=1 / 0.6,
        measured="memory",
    )


def stage2_memory(setting: Setting) -> Workload:
    """Peak of a step of stage 2."""
    return memory_workload(setting, "train_diffusion", "peak memory of a training step, stage 2")


def stage3_memory(setting: Setting) -> Workload:
    """Peak of a step of stage 3."""
    return memory_workload(setting, "train", "peak memory of a training step, stage 3")
