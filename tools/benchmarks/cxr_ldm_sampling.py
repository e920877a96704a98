# SPDX-License-Identifier: Apache-2.0
"""Guided sampling of chest images: published sampler, single levers, bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shared.schedulers import DDIMScheduler
from shared.weights import load_weights
from tools.benchmarks.bundle_config import bundle_config, options_of
from tools.benchmarks.published_chest import SCHEDULE, sample_images
from tools.benchmarks.published_networks import published_network, spread_zeros
from tools.benchmarks.workload import Setting, Workload, equal_within

PROMPTS = ("Big right-sided pleural effusion.", "Normal chest radiograph.", "Cardiomegaly.", "Left apical opacity.")
BASELINE = "published sampler"
BUNDLE = "cxr_ldm"


def guided_sampling(setting: Setting) -> Workload:
    """16 images of several prompts, by the published 200 steps of DDIM one at a time, and by the bundle's sampler.

    What must stay equal is how near the images are to those of 1000 steps from the same noise. That says something
    only of a trained network: at ``tiny`` and ``quick`` it is the one whose weights come with the bundle.
    """
    parts = _Sampling(setting)
    count, published_steps, run = parts.count, parts.published_steps, parts.run
    steps, fewer = parts.steps, parts.fewer
    ways = {
        BASELINE: parts.published,
        f"{steps} steps of DPM-Solver++, one at a time": lambda: parts.ours(steps, run, together=1),
        parts.fewer_steps: lambda: parts.ours(fewer, count, together=count),
        BUNDLE: lambda: parts.ours(steps, count, together=count),
    }
    single = list(ways)[:2]
    height, width = parts.latent_shape[1:]
    return Workload(
        name=f"guided sampling of {count} images",
        sizes=(
            f"latents {height} x {width}, U-Net channels {parts.parser['unet_def#channels']}, {parts.weights}; "
            f"guidance scale {parts.guidance:g}; published: {published_steps} steps of DDIM on a doubled batch, one "
            f"image at a time; what draws one at a time drew {run} of {count}"
        ),
        ways=ways,
        equal=parts.equally_near,
        target=8.0,
        factors=dict.fromkeys(single, count / run),
        repeats=3,
    )


class _Sampling:
    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        self.count = setting.pick(4, 16, 16)
        self.run = setting.pick(1, 2, 1)
        # Of two images the distance to many steps depends on their noise more than on the solver.
        self.judged = setting.pick(2, 8, 1)
        self.published_steps = setting.pick(10, 200, 200)
        self.reference_steps = setting.pick(200, 1000, 1000)
        self.trained: bool = setting.pick(True, True, False)
        self.weights = "the trained demo weights" if self.trained else "published sizes with random weights"
        device = f"$torch.device('{setting.device}')"
        changes = {"device": device, **setting.pick({"num_inference_steps": 20}, {}, {})}
        self.parser = bundle_config("cxr_ldm", ["inference", "tiny"] if self.trained else ["inference"], changes)
        if not self.trained:
            # That of Stable Diffusion comes with its own weights; a small one stands in for it, in all ways.
            self.parser["text_encoder_def"] = {
                "_target_": "shared.networks.text_encoder.TransformerTextEncoder",
                "embed_dim": self.parser["unet_def#cross_attention_dim"],
            }
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.network: Any = self.parser.get_parsed_content("network")
        if self.trained:
            folder = self.parser.get_parsed_content("ckpt_dir")
            load_weights(self.network, f"{folder}/model.pt")
        else:
            spread_zeros(self.network.unet, setting.seed)
        self.network.eval()
        self.steps: int = self.parser["num_inference_steps"]
        self.fewer: int = setting.pick(16, self.steps // 2, self.steps // 2)
        self.fewer_steps = f"{self.fewer} steps, {self.count} together"
        self.guidance: float = self.parser["guidance_scale"]
        self.latent_shape: list[int] = self.parser["latent_shape"]
        tokenizer = self.parser.get_parsed_content("tokenizer")
        prompts = tokenizer([PROMPTS[index % len(PROMPTS)] for index in range(self.count)])
        # The bundle's order: prompt, null prompt.
        self.tokens = torch.stack((prompts, tokenizer([""]).expand_as(prompts)), dim=1).to(self.device)
        self.seeds = list(range(setting.seed, setting.seed + self.count))
        unet, autoencoder = (getattr(self.network, part) for part in ("unet", "autoencoder"))
        self.old_unet = published_network(unet, options_of(self.parser, "unet_def")).to(self.device)
        self.old_autoencoder = published_network(autoencoder, options_of(self.parser, "autoencoder_def"))
        self.old_autoencoder.to(self.device)
        self.reference: torch.Tensor | None = None
        self.rest: torch.Tensor

    def published(self, first: int = 0, end: int | None = None) -> torch.Tensor:
        which = slice(first, self.run if end is None else end)
        return sample_images(
            self.old_unet,
            self.old_autoencoder,
            self.network.encode_text,
            self.tokens[which].flip(1).cpu().unbind(),
            seeds=self.seeds[which],
            latent_shape=self.latent_shape,
            guidance_scale=self.guidance,
            scale_factor=float(self.network.scale_factor),
            steps=self.published_steps,
        )

    def ours(self, steps: int, count: int, *, together: int, scheduler: Any = None) -> torch.Tensor:
        """The first images by the bundle's sampler."""
        sampler = self.parser.get_parsed_content("inferer")
        sampler.progress = False
        sampler.num_inference_steps, sampler.batch_size = steps, together
        sampler.scheduler = scheduler or self.bundle_scheduler
        return sampler(self.tokens[:count], self.network, self.seeds[:count])

    @property
    def bundle_scheduler(self) -> Any:
        return self.parser.get_parsed_content("noise_schedulers")[self.parser["scheduler"]]

    def equally_near(self, results: Mapping[str, torch.Tensor]) -> str:
        """How far images are from those of many steps: the bundle's may not be farther than the published ones, and
        those of fewer steps not twice as far. Drawn one at a time the bundle's are the same.

        Raises:
            ValueError: for a way that is farther or another; the message starts with its name.
        """
        if self.reference is None:
            ddim = DDIMScheduler(**{key: value for key, value in SCHEDULE.items() if key != "clip_sample"})
            self.reference = self.ours(self.reference_steps, self.judged, together=self.judged, scheduler=ddim)
            self.rest = self.published(self.run, self.judged)
        judged = {
            BASELINE: torch.cat((results[BASELINE], self.rest)),
            **{name: results[name][: self.judged] for name in (self.fewer_steps, BUNDLE)},
        }
        distances = {name: float((images - self.reference).square().mean().sqrt()) for name, images in judged.items()}
        for name, distance in distances.items():
            limit = distances[BASELINE] * (2.0 if name == self.fewer_steps else 1.0)
            if self.trained and not distance <= limit:
                raise ValueError(
                    f"{name}: expected images at most {limit:.2e} from those of {self.reference_steps} steps, where "
                    f"the {BASELINE} has {distances[BASELINE]:.2e}, got {distance:.2e}; take more steps."
                )
        alone = next(name for name in results if name not in judged)
        same = equal_within(1e-3, "images")({BUNDLE: results[BUNDLE][: self.run], alone: results[alone]})
        listed = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
        return (
            f"root mean square distance of {self.judged} images in [0, 1] to those of {self.reference_steps} steps "
            f"from the same noise: {listed}{'' if self.trained else '; random weights: no judgement of quality'}; "
            f"one at a time: {same}"
        )
