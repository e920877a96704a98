# SPDX-License-Identifier: Apache-2.0
"""Time from the file of a picture to the files of its mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tools.benchmarks.sdseg_programs import Inference
from tools.benchmarks.workload import Setting, Workload

HALF = "bfloat16"
# Shares of pixels. Random weights put many pixels near the threshold: the shipped ones change 0.07 % in bfloat16.
EXACT_LIMIT, HALF_LIMIT = 2e-4, 0.1


def inference(setting: Setting) -> Workload:
    """One reverse step, everything included: single levers one after the other.

    There is no way in float32 with channels-last: on a CPU it gains 1.25, but torch's group normalisation then sums the
    pixels of a plane one after the other, and latents of flat pictures are 4e-3 off, no better than in bfloat16.
    """
    count = setting.pick(2, 2, 16)
    work = Inference(setting, count)
    return Workload(
        name="masks of pictures in one step",
        sizes=work.sizes,
        ways={
            "MONAI's default attention, float32, one by one": work.program(
                default_attention=True, default_upsampling=True
            ),
            "+ scaled-dot-product attention": work.program(default_upsampling=True),
            "sdseg in float32: + upsampling and convolution in one": work.program(),
            "+ batches of pictures": work.program(images_per_batch=count),
            f"sdseg in {HALF}, channels not last": work.program(amp=True, channels_last=False),
            f"sdseg in {HALF} (--amp True)": work.program(amp=True),
        },
        equal=masks_equal,
        target=1.5,
    )


def reverse_steps(setting: Setting) -> Workload:
    """One reverse step beside 1000, with the weights that the bundle ships: their masks can be compared."""
    steps = setting.pick(10, 1000, 1000)
    work = Inference(setting, setting.pick(1, 1, 4), shipped=True)
    plain = {"default_attention": True, "default_upsampling": True}

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        overlaps = {name: dice(masks, work.labels) for name, masks in results.items()}
        first = next(iter(overlaps))
        for name, overlap in overlaps.items():
            if overlap < overlaps[first] - 0.02:
                raise ValueError(
                    f"{name}: expected a Dice to the truth not below that of {first}, {overlaps[first]:.3f}, by 0.02, "
                    f"got {overlap:.3f}."
                )
        return "Dice to the truth " + ", ".join(f"{value:.3f}" for value in overlaps.values()) + ", in this order"

    return Workload(
        name=f"masks in one step instead of {steps}",
        sizes=work.sizes,
        ways={
            f"{steps} steps, MONAI's default attention, float32": work.program(num_inference_steps=steps, **plain),
            "20 steps": work.program(num_inference_steps=setting.pick(2, 20, 20)),
            "one step, MONAI's default attention": work.program(**plain),
            "one step": work.program(),
            f"sdseg: one step in {HALF} (--amp True)": work.program(amp=True),
        },
        equal=equal,
        target=100.0,
        repeats=2,
    )


def masks_equal(results: Mapping[str, torch.Tensor]) -> str:
    """How many pixels differ from the baseline's masks, and their Dice.

    Raises:
        ValueError: for more than a way's arithmetic explains, or masks without foreground or background, which could
            not differ; the message starts with the way's name.
    """
    names = list(results)
    first = results[names[0]]
    if not 0.01 < float(first.float().mean()) < 0.99:
        raise ValueError(f"{names[0]}: expected masks with foreground and background, got {first.float().mean():.3f}.")
    shares: dict[bool, list[float]] = {False: [], True: []}
    for name in names[1:]:
        if results[name].shape != first.shape:
            raise ValueError(f"{name}: expected masks {tuple(first.shape)}, got {tuple(results[name].shape)}.")
        share = float((results[name] != first).float().mean())
        half = HALF in name
        limit = HALF_LIMIT if half else EXACT_LIMIT
        if share > limit:
            raise ValueError(f"{name}: expected at most {limit:.2%} of the pixels to differ, got {share:.2%}.")
        shares[half].append(share)
    last = results[names[-1]]
    return (
        f"masks differ in {max(shares[False]):.4%} of the pixels in float32, {max(shares[True]):.3%} in {HALF} "
        f"(Dice {dice(last, first):.4f}) with random weights"
    )


def dice(one: torch.Tensor, other: torch.Tensor) -> float:
    """Dice of boolean masks, all pictures together; 1 where both are empty."""
    total = int(one.sum() + other.sum())
    return 2.0 * int((one & other).sum()) / total if total else 1.0
