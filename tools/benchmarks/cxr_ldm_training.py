# SPDX-License-Identifier: Apache-2.0
"""Time and memory of training steps of stage 2 of ``cxr_ldm``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.benchmarks.cxr_ldm_stage2 import Program, Stage2
from tools.benchmarks.trained import HALF, Trained, equally_trained
from tools.benchmarks.workload import Setting, Workload

BASELINE = "published loop on monai-generative"
CORE = "published loop on MONAI core"
BUNDLE = "cxr_ldm"
# Texts are cached in half precision.
HALF_LIMITS = (1e-2, 5e-2, 0.5)


def training_step(setting: Setting) -> Workload:
    """Steps of stage 2: published program, single levers, bundle."""
    stage = Stage2(setting, steps=setting.pick(2, 2, 4), batch_size=setting.pick(2, 2, 32))
    ways = {
        BASELINE: stage.published(),
        CORE: stage.published(core=True),
        "+ latents cached": stage.published(core=True, cached_latents=True),
        "+ texts cached": stage.published(core=True, cached_latents=True, cached_texts=True),
    }
    if setting.device.type == "cpu":
        ways[f"{BUNDLE} in {HALF}"] = stage.bundle(half=True)
    return Workload(
        name="training step of stage 2",
        sizes=f"{stage.sizes}; the bundle's step also averages the weights, which the published one does not",
        ways={**ways, BUNDLE: stage.bundle()},
        equal=partial(equally_trained, half_limits=HALF_LIMITS, half=setting.device.type == "cuda"),
        target=1.5,
        repeats=3,
    )


def training_memory(setting: Setting) -> Workload:
    """Peak memory of a step of stage 2: networks that only fill caches, moments of the optimizer, everything included.

    One way has the bundle's switch for memory on, which is off by default because it costs time.
    """
    stage = Stage2(setting, steps=1, batch_size=setting.pick(2, 8, 32))
    stage.bundle()()  # fills the caches, as the first epoch does
    ways: dict[str, Callable[..., Program]] = {
        BASELINE: stage.published,
        CORE: partial(stage.published, core=True),
        f"{BUNDLE} with gradient_checkpointing": partial(stage.bundle, checkpointing=True),
    }
    if setting.device.type == "cpu":
        ways[f"{BUNDLE} in {HALF}"] = partial(stage.bundle, half=True)
    ways[BUNDLE] = stage.bundle

    def built_and_run(build: Callable[..., Program]) -> Trained:
        # Networks are part of what must fit.
        return build(once=True)()

    return Workload(
        name="peak memory of a training step of stage 2",
        sizes=stage.sizes,
        ways={name: partial(built_and_run, build) for name, build in ways.items()},
        equal=partial(equally_trained, half_limits=HALF_LIMITS, half=setting.device.type == "cuda"),
        target=1 / 0.6,
        measured="memory",
    )
