# SPDX-License-Identifier: Apache-2.0
"""What is measured of dmri2noddi: every way runs, does the same, and is the way that it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.networks.noddi import NoddiModel
from tools.benchmarks import dmri2noddi_codes, dmri2noddi_sampling
from tools.benchmarks.dmri2noddi import WORKLOADS
from tools.benchmarks.dmri2noddi_networks import noddi_config, random_features, random_model, with_default_attention
from tools.benchmarks.dmri2noddi_sampling import patch_sampling, published_sampling, quality
from tools.benchmarks.dmri2noddi_training import BASELINE, Work, bundle_training, published_loop
from tools.benchmarks.workload import Kind, Setting, Size

TINY = Setting(size=Size.TINY)
BUILDERS = [(kind, builder) for kind, builders in WORKLOADS.items() for builder in builders]


def disturbed(result: Any) -> Any:
    """A result that another program would give."""
    if isinstance(result, list):  # of items
        return [
            {key: value + 0.1 if key == "condition_latent" else value for key, value in item.items()} for item in result
        ]
    if isinstance(result, dict):
        return {**result, "update": result["update"].roll(1)}
    return result * float("nan") if result.is_floating_point() and result.ndim > 2 else result + 1


@pytest.mark.parametrize(("kind", "builder"), BUILDERS, ids=[builder.__name__ for _, builder in BUILDERS])
def test_every_way_does_the_same(kind, builder):
    workload = builder(TINY)
    results = {name: way() for name, way in workload.ways.items()}
    last = list(results)[-1]
    assert "dmri2noddi" in last
    said = workload.equal(results)
    with pytest.raises(ValueError, match="dmri2noddi"):
        workload.equal({**results, last: disturbed(results[last])})
    again = workload.ways[last]()
    assert workload.equal({**results, last: again}) == said, "a run leaves traces"


def test_all_kinds_are_there():
    assert set(WORKLOADS) == {Kind.TRAIN, Kind.SAMPLE, Kind.METRIC, Kind.DATA, Kind.MEMORY}


def test_targets_are_those_agreed():
    found = {builder.__name__: builder(TINY).target for _, builder in BUILDERS if builder.__name__ != "patch_loading"}
    assert {name: target for name, target in found.items() if target} == {
        **{"training_step": 1.5, "patch_sampling": 5.0, "denoising": 5.0, "nearest_codes": 10.0},
        "training_memory": pytest.approx(5 / 3),
    }


class Calls:
    """Rows of every call of a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.rows: list[int] = []
        network.register_forward_hook(lambda module, inputs, output: self.rows.append(len(inputs[0])))


@torch.no_grad()
def test_published_sampler_takes_a_patch_at_a_time():
    model = random_model(noddi_config(TINY, ["inference"], share=1 / 16, patch=[8, 8, 8]), TINY)
    unet, encoder, decoder = (Calls(part) for part in (model.unet, model.encoder, model.autoencoder.decoder))
    features, noise = random_features(TINY, (8, 8, 20)), torch.randn(1, 8, 8, 8, 20)
    maps = published_sampling(model, features, noise, 4, patch=[8, 8, 8], stride=[6, 6, 6])
    assert maps.shape == (1, 3, 16, 16, 40)
    assert unet.rows == [1] * 4 * 3
    assert encoder.rows == decoder.rows == [1] * 3
    # Where one patch covers a voxel, its maps; where two do, their mean.
    ends = [published_sampling(model, features[..., a:b], noise[..., a:b], 4, patch=[8] * 3, stride=[8] * 3)
            for a, b in ((0, 8), (6, 14))]  # fmt: skip
    torch.testing.assert_close(maps[..., :12], ends[0][..., :12])
    torch.testing.assert_close(maps[..., 12:16], (ends[0][..., 12:] + ends[1][..., :4]) / 2)


def test_solver_that_ends_farther_is_refused(monkeypatch):
    """Of 50 steps, 10 of the published are nearer than 3 of the other; 30 are nearer than 10."""
    with pytest.raises(ValueError, match=r"^way: expected latents as near to those of 50 steps as 10 steps of DDIM"):
        quality(TINY, "way", "dpm", 2, 10)
    assert quality(TINY, "way", "dpm", 30, 10).startswith("demo weights: latents 0.")
    assert quality(TINY, "way", "ddim", 10, 10) == "solver and steps as published"


def test_last_way_of_sampling_is_that_of_the_configuration(monkeypatch):
    seen = []
    plain = dmri2noddi_sampling.noddi_config

    def changed(*args: Any, **options: Any) -> Any:
        parser = plain(*args, **options)
        parser["scheduler"], parser["num_inference_steps"] = "dpm", 7
        return parser

    monkeypatch.setattr(dmri2noddi_sampling, "noddi_config", changed)
    monkeypatch.setattr(dmri2noddi_sampling, "quality", lambda *args: seen.append(args) or "good")
    workload = patch_sampling(TINY)
    last = list(workload.ways)[-1]
    assert last == "dmri2noddi: 7 steps of dpm"
    assert workload.equal({name: way() for name, way in workload.ways.items()}).endswith("; good")
    assert seen == [(TINY, last, "dpm", 7, 10)]


def test_attention_is_what_the_ways_say():
    model = random_model(noddi_config(TINY, ["inference"], share=1 / 16, patch=[8, 8, 8]), TINY)

    def flags(one: torch.nn.Module) -> set[bool]:
        return {module.use_flash_attention for module in one.modules() if hasattr(module, "use_flash_attention")}

    assert flags(model) == {True}
    assert flags(with_default_attention(model)) == {False}
    assert flags(model) == {True}, "a copy was changed"


def test_frozen_networks_run_in_every_published_step_and_never_in_the_bundle_s(monkeypatch):
    work = Work.of(TINY)
    model: NoddiModel = work.model
    unet, estimates, latents = (Calls(part) for part in (model.unet, model.encoder, model.autoencoder.encoder))
    published_loop(work, model)()
    assert unet.rows == estimates.rows == latents.rows == [2, 2]
    published_loop(work, model, latents=True, estimates=True)()
    bundle_training(work)()
    assert len(unet.rows) == 6
    assert estimates.rows == latents.rows == [2, 2]
    assert "published" in BASELINE


def test_other_losses_are_refused():
    workload = next(builder for _, builder in BUILDERS if builder.__name__ == "training_step")(TINY)
    results = {name: way() for name, way in workload.ways.items()}
    last = list(results)[-1]
    assert len(results[last]["losses"]) == 2
    assert results[last]["update"].abs().max() > 0
    with pytest.raises(ValueError, match="^dmri2noddi.*: expected losses within"):
        workload.equal({**results, last: {**results[last], "losses": results[last]["losses"] * 1.01}})


def test_wrong_search_is_found_out(monkeypatch):
    monkeypatch.setattr(dmri2noddi_codes, "nearest_code", lambda vectors, codes: torch.zeros(len(vectors)).long())
    workload = dmri2noddi_codes.nearest_codes(TINY)
    with pytest.raises(ValueError, match="^dmri2noddi: expected the codes of the other ways"):
        workload.equal({name: way() for name, way in workload.ways.items()})
