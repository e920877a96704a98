# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from shared.controlnet_sampler import ControlNetSampler
from shared.networks.compiled import channels_last, compile_in_place
from shared.schedulers import DPMSolverMultistepScheduler
from tests.conftest import ROOT
from tests.tiny_networks import IMAGE_SIZE, LATENT_SHAPE, controlnet_model, film_unet, inputs


class Backend:
    """As ``backend="eager"``, and counts."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1

        def run(*args):
            self.calls += 1
            return module.forward(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def test_a_sampler_runs_the_compiled_networks_with_weights_loaded_later(backend):
    """Samplers take wrappers off, and would run what is inside."""
    sampler = ControlNetSampler(
        scheduler=DPMSolverMultistepScheduler(1000),
        num_inference_steps=3,
        latent_shape=LATENT_SHAPE,
        image_size=IMAGE_SIZE,
    )
    model, trained = controlnet_model(seed=1).eval(), controlnet_model().eval()
    condition = inputs(2)[2]
    expected = sampler(condition, trained)
    names = list(model.state_dict())
    assert compile_in_place(model, True, backend=backend) is model
    model.load_state_dict(trained.state_dict())
    result = sampler(condition, model)
    assert torch.allclose(result, expected, rtol=0, atol=1e-5)
    # A U-Net and a ControlNet, each of one graph, in three steps.
    assert (backend.graphs, backend.calls) == (2, 6)
    assert list(model.state_dict()) == names


def test_a_network_itself_and_one_with_film_are_compiled(backend):
    network = film_unet().eval()
    x = torch.randn(2, 6, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x, torch.tensor([3, 900]))
        result = compile_in_place(network, backend=backend)(x, torch.tensor([3, 900]))
    assert torch.allclose(result, expected, atol=1e-5)
    assert backend.calls == 1


def test_switched_off_nothing_happens():
    model = controlnet_model()
    assert compile_in_place(model, enabled=False) is model
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert compile_in_place(nn.Conv2d(1, 1, 3), enabled=False) is not None
    with pytest.raises(ValueError, match=r"^compile: expected a model with a U-Net, got Conv2d"):
        compile_in_place(nn.Conv2d(1, 1, 3))


def test_channels_last_changes_strides_alone():
    model = controlnet_model().eval()
    x, timesteps, condition = inputs()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(x, timesteps, condition)
        assert channels_last(model, False) is model
        weight = model.diffusion.unet.down_blocks[0].resnets[0].conv1.conv.weight
        assert weight.is_contiguous()
        assert channels_last(model) is model
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        result = model(x, timesteps, condition)
        model.load_state_dict(state)
        assert torch.allclose(model(x, timesteps, condition), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "cxr_ldm/configs/inference",
        "brain_controlnet/configs/inference",
        "brain_controlnet/configs/inference_unconditional",
    ],
)
def test_configurations_offer_both(name):
    path = ROOT / "bundles" / f"{name}.json"
    parser = ConfigParser()
    parser.read_config([str(path), str(path.with_name("tiny.json"))])
    assert parser["evaluator"]["_requires_"] == "@compiled"
    parser.update({"compile": True, "channels_last": True, "device": "cpu"})
    parser.get_parsed_content("compiled")
    network = parser.get_parsed_content("network")
    unet = getattr(network, "diffusion", network).unet
    assert unet._compiled_call_impl is not None
    assert not unet.down_blocks[0].resnets[0].conv1.conv.weight.is_contiguous()
