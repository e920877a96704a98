# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from shared.networks.activation_checkpointing import checkpoint_activations
from tests.conftest import ROOT
from tests.tiny_networks import AUTOENCODER, UNET, controlnet_model, diffusion_model, inputs, spread

Loss = Callable[[nn.Module], torch.Tensor]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(network: nn.Module) -> nn.Module:
    spread(network.parameters(), torch.Generator().manual_seed(3))
    return network


def unet(dims: int, **options: Any) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    network = filled(DiffusionModelUNet(**{**UNET, "spatial_dims": dims, "dropout_cattn": 0.25, **options}))
    sides = (8, 12, 4)[:dims]

    def loss(network: nn.Module) -> torch.Tensor:
        torch.manual_seed(7)  # of the dropout
        return network(random(2, 3, *sides), torch.tensor([3, 700]), random(2, 5, 6)).square().mean()

    return network, loss


def autoencoder(dims: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    attention = {"with_encoder_nonlocal_attn": True, "attention_levels": [False, False, True]}
    network = filled(AutoencoderKL(**{**AUTOENCODER, **attention, "spatial_dims": dims}))
    sides = (8, 12, 4)[:dims]

    def loss(network: nn.Module) -> torch.Tensor:
        torch.manual_seed(7)  # of the sampled latent
        return sum(part.square().mean() for part in network(random(2, 1, *sides)))

    return network, loss


def controlnets() -> tuple[nn.Module, Loss]:
    """The frozen U-Net lets gradients through, so its activations are kept too."""
    x, timesteps, condition = inputs(2, channels=2)

    def loss(network: nn.Module) -> torch.Tensor:
        return network(x, timesteps, condition).square().mean()

    return controlnet_model((1, 1), condition_channels=[[0], [1]]).train(), loss


NETWORKS = {
    "unet": lambda: unet(2),
    "unet 3-D": lambda: unet(3),
    "autoencoder": lambda: autoencoder(2),
    "autoencoder 3-D": lambda: autoencoder(3),
    "controlnets": controlnets,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def gradients(network: nn.Module, loss: Loss) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss(network).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def kept_bytes(network: nn.Module, loss: Loss) -> int:
    """What the forward pass keeps for the backward pass, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(network)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@every_network
def test_gradients_are_equal_and_less_is_kept(make):
    network, loss = make()
    value, plain, before = loss(network).item(), gradients(network, loss), kept_bytes(network, loss)
    assert checkpoint_activations(network) is network
    assert loss(network).item() == value
    fast = gradients(network, loss)
    assert plain.keys() == fast.keys()
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
    assert max(gradient.abs().max() for gradient in fast.values()) > 0
    assert kept_bytes(network, loss) < 0.7 * before


@every_network
def test_names_types_and_results_without_gradients_stay(make):
    network, loss = make()
    names, types = list(network.state_dict()), [type(module) for module in network.modules()]
    with torch.no_grad():
        value = loss(network.eval())
    checkpoint_activations(network)
    assert list(network.state_dict()) == names
    assert [type(module) for module in network.modules()] == types
    with torch.no_grad():
        assert torch.equal(loss(network), value)


def test_a_copy_runs_with_its_own_weights():
    """An exponential moving average is a deep copy."""
    network, loss = unet(2)
    checkpoint_activations(network)
    copied = copy.deepcopy(network)
    expected = gradients(copied, loss)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    found = gradients(copied, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(gradient.any() for gradient in found.values())
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_hooks_see_a_block_once_in_each_forward_pass():
    network, loss = unet(2)
    seen = []
    network.down_blocks[0].resnets[0].register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    checkpoint_activations(network)
    loss(network).backward()
    assert seen == [True]


def test_gradients_under_autocast_are_those_of_autocast():
    network, loss = unet(2)

    def half(network: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(network)

    plain = gradients(network, half)
    fast = gradients(checkpoint_activations(network), half)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


def test_compiled_training_has_the_same_gradients():
    network, loss = unet(2, channels=[8], attention_levels=[True], num_head_channels=[8])
    network.eval()  # the random numbers of a compiled dropout are others
    plain = gradients(network, loss)
    checkpoint_activations(network)
    network.compile(backend="aot_eager", fullgraph=True)
    fast = gradients(network, loss)
    torch._dynamo.reset()
    assert all(torch.allclose(plain[name], fast[name], rtol=1e-5, atol=1e-7) for name in plain)


def test_it_can_be_switched_off():
    network, loss = unet(2)
    before = kept_bytes(network, loss)
    assert checkpoint_activations(network, enabled=False) is network
    assert kept_bytes(network, loss) == before
    checkpoint_activations(checkpoint_activations(network))
    assert kept_bytes(network, loss) < before
    checkpoint_activations(network, enabled=False)
    assert kept_bytes(network, loss) == before
    assert all("forward" not in module.__dict__ for module in network.modules())


def test_networks_without_blocks_are_named():
    network = nn.Conv2d(1, 1, 3)
    assert checkpoint_activations(network, enabled=False) is network
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: expected a U-Net.*got Conv2d"):
        checkpoint_activations(network)
    assert checkpoint_activations(diffusion_model()) is not None


@pytest.mark.parametrize(
    "name",
    [
        *("cxr_ldm/configs/train", "cxr_ldm/configs/train_autoencoder", "brain_controlnet/configs/train"),
        *("brain_controlnet/configs/train_diffusion", "brain_controlnet/configs/train_autoencoder"),
    ],
)
def test_configurations_of_training_offer_it(name):
    path = ROOT / "bundles" / f"{name}.json"
    parser = ConfigParser()
    parser.read_config([str(path), str(path.with_name("tiny.json"))])
    assert parser["gradient_checkpointing"] is False
    assert parser["train"]["trainer"]["_requires_"] == "@checkpointed"
    parser.update({"gradient_checkpointing": True, "device": "cpu"})
    parser.get_parsed_content("checkpointed")
    changed = [module for module in parser.get_parsed_content("network").modules() if "forward" in module.__dict__]
    assert len(changed) >= 6
