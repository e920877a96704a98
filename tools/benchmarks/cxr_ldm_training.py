# SPDX-License-Identifier: Apache-2.0
"""Time and memory of training steps of stage 2 of ``cxr_ldm``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from tools.benchmarks.cxr_ldm_stage2 import Program, Stage2, Trained
from tools.benchmarks.workload import Setting, Workload, relative_difference

BASELINE = "published loop on monai-generative"
CORE = "published loop on MONAI core"
BUNDLE = "cxr_ldm"
HALF = "bfloat16"
# Relative, of losses, gradients and updates, in single and in half precision. Texts are cached in half precision. Of a
# gradient near zero little more than the sign decides Adam's first updates, so that rounding shows in them most.
LIMITS = {False: (1e-4, 2e-3, 0.05), True: (1e-2, 5e-2, 0.5)}


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
        equal=partial(equally_trained, half=setting.device.type == "cuda"),
        target=1.5,
        repeats=3,
    )


def training_memory(setting: Setting) -> Workload:
    """Peak memory of a step of stage 2: networks that only fill caches, moments of the optimizer, everything included.

    The last way has the bundle's switch for memory on, which is off by default because it costs time.
    """
    stage = Stage2(setting, steps=1, batch_size=setting.pick(2, 8, 32))
    stage.bundle()()  # fills the caches, as the first epoch does
    ways: dict[str, Callable[..., Program]] = {
        BASELINE: stage.published,
        CORE: partial(stage.published, core=True),
        BUNDLE: stage.bundle,
    }
    if setting.device.type == "cpu":
        ways[f"{BUNDLE} in {HALF}"] = partial(stage.bundle, half=True)
    ways[f"{BUNDLE} with gradient_checkpointing"] = partial(stage.bundle, checkpointing=True)

    def built_and_run(build: Callable[..., Program]) -> Trained:
        # Networks are part of what must fit.
        return build(once=True)()

    return Workload(
        name="peak memory of a training step of stage 2",
        sizes=stage.sizes,
        ways={name: partial(built_and_run, build) for name, build in ways.items()},
        equal=partial(equally_trained, half=setting.device.type == "cuda"),
        target=1 / 0.6,
        measured="memory",
    )


def equally_trained(results: Mapping[str, Trained], *, half: bool = False) -> str:
    """How much losses and gradients differ from the baseline's; with ``half``, all ways may be in half precision.

    Raises:
        ValueError: for a larger difference than a way's arithmetic explains; the message starts with its name.
    """
    names = list(results)
    worst: dict[bool, list[float]] = {}
    for name in names[1:]:
        in_half = half or HALF in name
        differences = [relative_difference(a, b) for a, b in zip(results[name], results[names[0]], strict=True)]
        for what, difference, limit in zip(Trained._fields, differences, LIMITS[in_half], strict=True):
            if not difference <= limit:
                raise ValueError(
                    f"{name}: expected {what} within {limit:g} of {names[0]}, got {difference:.2g}; the two programs "
                    "train differently."
                )
        worst[in_half] = [max(pair) for pair in zip(differences, worst.get(in_half, differences), strict=True)]
    sentences = [
        ("in half precision " if in_half else "")
        + ", ".join(f"{what} within {value:.0e}" for what, value in zip(Trained._fields, values, strict=True))
        for in_half, values in sorted(worst.items())
    ]
    return f"{'; '.join(sentences)} (relative)"
