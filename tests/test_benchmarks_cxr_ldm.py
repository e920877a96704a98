# SPDX-License-Identifier: Apache-2.0
"""What is measured of `cxr_ldm`: the ways do the same, the baselines do what was published, and faults are seen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from PIL import Image
from torch import nn

from shared.inferers import seeded_noise
from tests.tiny_networks import AUTOENCODER, LATENT_SHAPE, UNET
from tools.benchmarks import cxr_ldm, published_chest
from tools.benchmarks.bundle_config import bundle_config, options_of
from tools.benchmarks.cxr_ldm_sampling import _Sampling
from tools.benchmarks.cxr_ldm_stage2 import Stage2, Trained
from tools.benchmarks.cxr_ldm_training import HALF_LIMITS
from tools.benchmarks.published_networks import published_network, some_in_core_order, spread_zeros
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.trained import equally_trained
from tools.benchmarks.workload import Builder, Kind, Setting, Size

TINY = Setting(size=Size.TINY)
BUILDERS = [builder for builders in cxr_ldm.WORKLOADS.values() for builder in builders]
TARGETS = {"training_step": 1.5, "guided_sampling": 8.0, "pairwise_diversity": 30.0, "training_memory": 1 / 0.6}


def spoiled(result: Any) -> Any:
    """A result with a fault that a user would care about."""
    if isinstance(result, Trained):
        return result._replace(gradients=1.1 * result.gradients)
    if isinstance(result, list):
        return [{**item, "latent_mean": item["latent_mean"] + 0.01} for item in result]
    return result * 1.01 + 0.01


def test_every_kind_of_work_is_measured():
    assert set(cxr_ldm.WORKLOADS) == {Kind.TRAIN, Kind.SAMPLE, Kind.METRIC, Kind.DATA, Kind.MEMORY}


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_ways_are_equal_and_a_fault_in_the_last_is_named(builder: Builder):
    workload = builder(TINY)
    assert workload.target == TARGETS.get(builder.__name__)
    assert (workload.measured == "memory") == (builder.__name__ == "training_memory")
    results = {name: way() for name, way in workload.ways.items()}
    assert any(character.isdigit() for character in workload.equal(results))
    last = list(results)[-1]
    with pytest.raises(ValueError, match=f"^{last}: expected "):
        workload.equal({**results, last: spoiled(results[last])})


class Recorder(nn.Module):
    """A network whose prediction is `factor` times the sum of its context, and which notes its calls."""

    def __init__(self, factor: float = 0.1) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls: list[tuple[int, list[int]]] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(x), timesteps.tolist()))
        return self.factor * x + context.sum(dim=(1, 2)).view(-1, 1, 1, 1)


def test_published_sampler_takes_200_steps_for_each_image_with_its_text_encoded_anew():
    unet, encoded = Recorder(), []

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        encoded.append(tuple(tokens.shape))
        return tokens[..., None].float() * 1e-3

    images = published_chest.sample_images(
        unet,
        SimpleNamespace(decode=torch.abs),
        embed,
        [torch.tensor([[0, 0], [1, number]]) for number in range(3)],
        seeds=[4, 5, 6],
        latent_shape=(1, 4, 6),
        guidance_scale=7.0,
        scale_factor=0.3,
        steps=200,
    )
    assert images.shape == (3, 1, 4, 6)
    assert len(unet.calls) == 3 * 200
    assert {rows for rows, _ in unet.calls} == {2}
    assert encoded == [(2, 2)] * 3
    levels = [timesteps[0] for _, timesteps in unet.calls[:200]]
    assert levels == list(range(995, -1, -5))


def test_published_sampler_starts_from_the_noise_of_the_bundle():
    unet, seen = Recorder(), []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    options: dict[str, Any] = {"latent_shape": (3, 8, 12), "guidance_scale": 7.0, "scale_factor": 0.3, "steps": 1}
    pairs = [torch.zeros(2, 2), torch.ones(2, 2)]
    with torch.no_grad():
        published_chest.sample_images(
            unet, SimpleNamespace(decode=torch.abs), lambda tokens: tokens[..., None], pairs, seeds=[9, 2], **options
        )
    for x, noise in zip(seen, seeded_noise([9, 2], (3, 8, 12)), strict=True):
        assert torch.equal(x, torch.stack((noise, noise)))


def test_bundle_draws_all_images_in_one_batch_of_few_steps():
    parts = _Sampling(TINY)
    calls: list[int] = []
    parts.network.unet.register_forward_pre_hook(
        lambda module, inputs, named: calls.append(len(inputs[0])), with_kwargs=True
    )
    parts.ours(parts.steps, parts.count, together=parts.count)
    assert calls == [2 * parts.count] * parts.steps


@pytest.fixture(scope="module")
def stage() -> Stage2:
    return Stage2(TINY, steps=2, batch_size=1)


def counted(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> list[int]:
    """Sizes of the batches that a method of a class is called with."""
    sizes: list[int] = []
    plain: Callable = getattr(kind, method)

    def call(self: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        tensor = x if x is not None else next(iter(kwargs.values()))
        sizes.append(len(tensor))
        return plain(self, *(() if x is None else (x,)), *args, **kwargs)

    monkeypatch.setattr(kind, method, call)
    return sizes


def test_published_training_runs_both_encoders_in_every_step_and_the_bundle_neither(stage, monkeypatch):
    from generative.networks import nets
    from transformers import CLIPTextModel

    stage.bundle()()  # fills the caches
    texts = counted(monkeypatch, CLIPTextModel, "forward")
    published_images = counted(monkeypatch, nets.AutoencoderKL, "encode")
    images = counted(monkeypatch, AutoencoderKL, "encode")
    program = stage.published()
    del published_images[:], texts[:]
    program()
    assert (published_images, texts) == ([1, 1], [1, 1])
    program = stage.bundle()
    del images[:], texts[:]
    program()
    assert (images, texts) == ([], [])


def test_text_encoder_keeps_its_graph_though_it_is_not_trained():
    encoder, unet = nn.Embedding(5, 4), Recorder()
    before = encoder.weight.detach().clone()
    losses = published_chest.training_steps(
        unet,
        torch.optim.AdamW(unet.parameters()),
        [(torch.ones(2, 3, 4, 6), torch.tensor([[1, 2], [3, 4]]))] * 3,
        latents_of=lambda x: x,
        context_of=encoder,
        seed=0,
    )
    assert losses.shape == (3,)
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.abs().sum() > 0
    assert torch.equal(encoder.weight, before)
    assert unet.factor.item() != pytest.approx(0.1, abs=1e-6)


def test_runs_of_a_program_start_from_the_same_weights(stage):
    for program in (stage.published(), stage.bundle()):
        first, second = program(), program()
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        assert first.updates.abs().max() > 0


def test_checkpointing_and_half_precision_change_what_they_say(stage):
    plain, checkpointed, half = stage.bundle()(), stage.bundle(checkpointing=True)(), stage.bundle(half=True)()
    torch.testing.assert_close(checkpointed.gradients, plain.gradients, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(half.gradients, plain.gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="^ours: expected losses within 0.0001 of published, got"):
        equally_trained({"published": plain, "ours": half}, half_limits=HALF_LIMITS)
    sentence = equally_trained({"published": plain, "ours in bfloat16": half}, half_limits=HALF_LIMITS)
    assert sentence.startswith("in bfloat16 losses within ")


@pytest.mark.parametrize(("kind", "options"), [(AutoencoderKL, AUTOENCODER), (DiffusionModelUNet, UNET)])
def test_published_network_has_the_weights_of_the_core_one(kind, options):
    torch.manual_seed(0)
    core = spread_zeros(kind(**options), seed=0).eval()
    published = published_network(core, {**options, "use_flash_attention": True})
    assert type(published).__module__.startswith("generative.")
    assert not published.training
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if kind is AutoencoderKL:
            x = torch.rand(2, 1, 32, 48, generator=generator)
            pair = core.reconstruct(x), published.reconstruct(x)
        else:
            x = torch.randn(2, *LATENT_SHAPE, generator=generator)
            named = {"timesteps": torch.tensor([3, 700]), "context": torch.randn(2, 5, 6, generator=generator)}
            pair = core(x, **named), published(x, **named)
    assert pair[0].abs().mean() > 0.01
    torch.testing.assert_close(pair[1], pair[0], rtol=1e-4, atol=1e-5)
    some = some_in_core_order(dict(published.named_parameters()), core)
    assert torch.equal(some, some_in_core_order(dict(core.named_parameters()), core))


def test_published_pairs_come_twice():
    pairs = published_chest.ordered_pairs(64)
    assert len(pairs) == 64 * 63
    assert {(j, i) for i, j in pairs} == set(pairs)


def test_frechet_distance_of_a_shift_and_a_scale_is_known():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=generator)
    shift = torch.arange(5.0)
    assert published_chest.frechet_distance(a, a + shift) == pytest.approx(30.0, rel=1e-6)
    spread = torch.cov(a.T).trace().item()
    centred = a - a.mean(dim=0)
    assert published_chest.frechet_distance(centred, 3.0 * centred) == pytest.approx(4.0 * spread, rel=1e-5)


def test_published_films_come_out_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    image = published_chest.film_transforms((40, 48), augmented=0.0)({"image": str(tmp_path / "film.png")})["image"]
    assert image.shape == (1, 40, 48)
    expected = torch.from_numpy(pixels[:, 2:50]).float() / 255
    torch.testing.assert_close(image.as_tensor()[0], expected)


def test_every_published_film_is_moved_where_all_shall_be(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)).save(tmp_path / "film.png")
    paths = {"image": str(tmp_path / "film.png")}
    transforms = published_chest.film_transforms((40, 48), augmented=1.0).set_random_state(0)
    assert not torch.equal(transforms(paths)["image"], transforms(paths)["image"])


def test_configurations_are_the_bundles_own_and_can_be_changed():
    parser = bundle_config("cxr_ldm", ["inference", "tiny"], {"unet_def#channels": [8, 16, 24]})
    assert options_of(parser, "unet_def")["channels"] == [8, 16, 24]
    assert "_target_" not in options_of(parser, "unet_def")
    assert parser["ckpt_dir"] == "$@bundle_root + '/models/tiny'"
    with pytest.raises(FileNotFoundError, match=r"no_such\.json: expected a configuration, found no file"):
        bundle_config("cxr_ldm", ["no_such"])


def test_temporary_folders_are_apart():
    first, second = temporary_folder("films"), temporary_folder("films")
    assert first != second
    assert first.is_dir()
    assert first.name.startswith("benchmark_films_")
