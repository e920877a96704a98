# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from shared.inferers import seeded_noise
from tests.published_networks import old  # skips where monai-generative is not installed
from tools.benchmarks import brain_controlnet_training as training
from tools.benchmarks.brain_controlnet import WORKLOADS
from tools.benchmarks.brain_controlnet_networks import (
    CONTEXT_LENGTH,
    Networks,
    brain_config,
    published_networks,
    random_model,
    random_pairs,
)
from tools.benchmarks.brain_controlnet_sampling import SLICES, flair_slab, published_sampler
from tools.benchmarks.workload import Kind, Setting, Size, Workload

TINY = Setting(size=Size.TINY)
BUILDERS = [builder for builders in WORKLOADS.values() for builder in builders]


@functools.cache
def built(build: Callable[[Setting], Workload]) -> Workload:
    return build(TINY)


def shifted(result: Any) -> Any:
    """The same with everything a little off."""
    if isinstance(result, torch.Tensor):
        return result + 0.2 * torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    if isinstance(result, dict):
        return {key: shifted(value) for key, value in result.items()}
    return type(result)(shifted(value) for value in result)


def test_every_kind_has_its_workloads():
    assert set(WORKLOADS) == set(Kind) - {Kind.SCALING}
    assert old.ControlNet is not None


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_ways_do_the_same_and_a_fault_is_found(build: Callable[[Setting], Workload]):
    workload = built(build)
    results = {name: way() for name, way in workload.ways.items()}
    assert any(character.isdigit() for character in workload.equal(results))
    first, *others = results
    # bf16 has tolerances of its own, but no fault passes them either.
    for name in others:
        with pytest.raises(ValueError, match="expected"):
            workload.equal({**results, name: shifted(results[name])})
    # A second run starts from the same state, or turns would measure different work.
    again = {name: workload.ways[name]() for name in (first, others[-1])}
    workload.equal({**results, **again})


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(Kind.TRAIN, [1.5, 1.5]), (Kind.SAMPLE, [12.0, None]), (Kind.MEMORY, [1 / 0.6, 1 / 0.6])],
)
def test_targets(kind: Kind, targets: list[float | None]):
    workloads = [built(build) for build in WORKLOADS[kind]]
    assert [workload.target for workload in workloads] == targets
    assert {workload.measured for workload in workloads} == {"memory" if kind == Kind.MEMORY else "time"}


def calls_of(*networks: nn.Module) -> list[tuple[str, int]]:
    """Class and batch size of every forward pass from now on."""
    seen: list[tuple[str, int]] = []
    for network in networks:
        network.register_forward_hook(
            lambda net, args, kwargs, output: seen.append((type(net).__name__, len((*args, *kwargs.values())[0]))),
            with_kwargs=True,
        )
    return seen


class TestPublishedSampler:
    @pytest.fixture
    def parts(self) -> tuple[Any, Networks, DDPMScheduler, torch.Tensor]:
        parser = brain_config(TINY, "train")
        model = random_model(parser, TINY).eval()
        context = seeded_noise([1, 2], (CONTEXT_LENGTH, 32))
        with torch.no_grad():
            model.diffusion.prompt.embeddings.copy_(context)
        return model, published_networks(model, parser), parser.get_parsed_content("noise_scheduler"), context

    def test_it_evaluates_both_branches_and_embeds_the_condition_in_every_step(self, parts):
        _, networks, scheduler, context = parts
        assert networks.controlnet is not None
        seen = calls_of(networks.controlnet.controlnet_cond_embedding, networks.controlnet, networks.unet)
        condition = random_pairs(TINY, 1)[1]
        published_sampler(networks, scheduler, context, condition, seeded_noise([0], (3, 4, 8)), steps=8)
        step = [("ControlNetConditioningEmbedding", 2), ("ControlNet", 2), ("DiffusionModelUNet", 2)]
        assert seen == 8 * step

    def test_it_is_ddim_on_the_published_timesteps(self, parts):
        """Against the bundle's network and MONAI core's scheduler, whose own timesteps are replaced."""
        from monai.networks.schedulers import DDIMScheduler

        model, networks, scheduler, context = parts
        condition, noise = random_pairs(TINY, 1)[1], seeded_noise([0], (3, 4, 8))
        schedule = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}
        ddim = DDIMScheduler(1000, **schedule, prediction_type="v_prediction", clip_sample=False)
        ddim.set_timesteps(10)
        for guidance in (1.0, 3.0):
            x = noise
            with torch.no_grad():
                for timestep in range(900, -1, -100):
                    t = torch.tensor([timestep])
                    prompt, null = (model(x, t, condition, null_prompt=torch.tensor([flag])) for flag in (False, True))
                    x, _ = ddim.step(null + guidance * (prompt - null), timestep, x)
                expected = model.decode(x).clamp(0, 1)
            image = published_sampler(networks, scheduler, context, condition, noise, 10, guidance)
            assert image.std() > 0.01
            assert torch.allclose(image, expected, atol=2e-4)


class TestPublishedTraining:
    @pytest.mark.parametrize("file", ["train_diffusion", "train"])
    def test_it_encodes_images_and_prompts_in_every_step(self, file: str):
        parts = training.parts_of(TINY, file, batch_size=2)
        seen = calls_of(parts.text, parts.networks.unet)
        encoded: list[int] = []
        encode = parts.networks.autoencoder.encode
        parts.networks.autoencoder.encode = lambda x: (encoded.append(len(x)), encode(x))[1]
        training.published_loop(parts.work, parts.networks, parts.text, parts.order)()
        assert encoded == [2, 2]
        assert seen == 2 * [("TransformerTextEncoder", 2), ("DiffusionModelUNet", 2)]

    def test_the_bundle_does_neither(self):
        parts = training.parts_of(TINY, "train_diffusion", batch_size=2)
        parts.model.autoencoder.encode = None
        result = training.bundle_training(parts.work, parts.parser, parts.model, parts.latents)()
        assert result["losses"].shape == (2,)
        assert result["update"].abs().max() > 1e-5

    def test_both_see_the_null_prompt(self):
        """Draws of the two must stay in step, or a null prompt would go unnoticed."""
        parts = training.parts_of(TINY, "train_diffusion", batch_size=2)
        flags: list[bool] = []
        draw = parts.work.draw
        parts.work.draw = lambda mean: (drawn := draw(mean), flags.extend(drawn[3].tolist()))[0]
        published = training.published_loop(parts.work, parts.networks, parts.text, parts.order)
        while not any(flags):
            parts.work.seed += 1
            theirs = published()
        ours = training.bundle_training(parts.work, parts.parser, parts.model, parts.latents)()
        assert torch.allclose(ours["losses"], theirs["losses"], rtol=1e-4)

    def test_its_text_encoder_takes_gradients(self):
        parts = training.parts_of(TINY, "train_diffusion", batch_size=2)
        reached: list[bool] = []
        parts.text.position_embedding.register_hook(lambda gradient: reached.append(bool(gradient.any())))
        training.published_loop(parts.work, parts.networks, parts.text, parts.order)()
        assert reached == [True, True]


def test_the_condition_is_a_slab_of_a_head():
    slab = flair_slab(seed=0)
    assert slab.shape == (1, 1, 80, 112, SLICES)
    assert slab.min() >= 0
    assert slab.max() <= 1
    assert (slab > 0.2).float().mean() > 0.2
