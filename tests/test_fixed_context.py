# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import weakref
from collections import Counter

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from shared.networks.film_unet import FiLMUNet
from shared.networks.fixed_context import fixed_context
from tests.tiny_networks import FILM_UNET, UNET, controlnet_model, spread


@pytest.fixture
def projections(monkeypatch) -> Counter:
    """How often each linear layer of a context computed."""
    counted: Counter = Counter()
    plain = nn.Linear.forward

    def forward(self, x):
        counted[self] += 1
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return counted


def filled(network: nn.Module) -> nn.Module:
    spread(network.parameters(), torch.Generator().manual_seed(3))
    return network.eval()


def unet(**options) -> nn.Module:
    torch.manual_seed(0)
    return filled(DiffusionModelUNet(**{**UNET, **options}))


def film_unet() -> nn.Module:
    torch.manual_seed(0)
    return filled(FiLMUNet(**FILM_UNET, cross_attention_dim=6))


def inputs(network: nn.Module, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, getattr(network, "in_channels", 3), 8, 12, generator=generator)
    return x, torch.full((batch,), 400), torch.randn(batch, 5, 6, generator=generator)


def context_layers(network: nn.Module) -> list[nn.Linear]:
    blocks = [module for module in network.modules() if isinstance(module, CrossAttentionBlock)]
    return [layer for block in blocks for layer in (block.to_k, block.to_v)]


@pytest.mark.parametrize("make", [unet, lambda: unet(use_flash_attention=True), film_unet])
@pytest.mark.parametrize("amp", [False, True])
def test_same_bits_and_computed_once(make, amp, projections):
    network = make()
    x, t, context = inputs(network)
    layers = context_layers(network)
    assert len(layers) >= 6
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        steps = [(x + step, t - step) for step in range(3)]
        plain = [network(*step, context) for step in steps]
        projections.clear()
        with fixed_context(network):
            fast = [network(*step, context) for step in steps]
    assert all(torch.equal(one, two) for one, two in zip(plain, fast, strict=True))
    assert not torch.equal(fast[0], fast[1])
    assert [projections[layer] for layer in layers] == [1] * len(layers)
    self_attention = next(
        layer for name, layer in network.named_modules() if name.endswith(("attn1.to_k", "attn.to_q"))
    )
    assert projections[self_attention] == 3


def test_controlnets_and_a_prompt_that_is_expanded_anew(projections):
    model = controlnet_model((1, 1), condition_channels=[[0], [1]]).eval()
    x, t, _ = inputs(model)
    condition = torch.rand(2, 2, 32, 48, generator=torch.Generator().manual_seed(1))
    layers = context_layers(model)
    assert {name.split(".")[0] for name, module in model.named_modules() if module in layers} == {
        "diffusion",
        "controlnets",
    }
    with torch.no_grad():
        embedded = model.embed_condition(condition)
        plain = [model(x + step, t, embedded=embedded) for step in range(2)]
        projections.clear()
        with fixed_context(model):
            fast = [model(x + step, t, embedded=embedded) for step in range(2)]
        counts = [projections[layer] for layer in layers]
    assert all(torch.equal(one, two) for one, two in zip(plain, fast, strict=True))
    assert counts == [1] * len(layers)


def test_another_context_is_computed_anew():
    """Also where it is written in place."""
    network, plain = unet(), unet()
    with torch.no_grad(), fixed_context(network):
        for seed in range(6):
            x, t, context = inputs(network, batch=2 - seed % 2, seed=seed // 2)
            assert torch.equal(network(x, t, context), plain(x, t, context))
            context.mul_(2)
            assert torch.equal(network(x, t, context), plain(x, t, context))
            one = context[:1].expand(2, -1, -1)
            x, t = x[:1].expand(2, -1, -1, -1), t[:1].expand(2)
            assert torch.equal(network(x, t, one), plain(x, t, one))
            del x, t, context, one


def copied(network: nn.Module) -> nn.Module:
    """The network as it is outside."""
    plain = DiffusionModelUNet(**UNET).eval()
    plain.load_state_dict(network.state_dict())
    return plain


def test_other_weights_and_other_precision_are_computed_anew():
    network = unet()
    x, t, context = inputs(network)
    with torch.no_grad(), fixed_context(network):
        network(x, t, context)
        with torch.autocast("cpu", torch.bfloat16):
            half, expected = network(x, t, context), copied(network)(x, t, context)
        assert torch.equal(half, expected)
        assert torch.equal(network(x, t, context), copied(network)(x, t, context))
        for layer in context_layers(network):
            layer.weight.mul_(2)
        assert torch.equal(network(x, t, context), copied(network)(x, t, context))


def test_a_context_is_held_as_long_as_its_memory_tells_it_from_others():
    block = CrossAttentionBlock(8, 2).eval()
    context = torch.randn(2, 5, 8)
    held = weakref.ref(context)
    with torch.no_grad(), fixed_context(block):
        block(torch.randn(2, 6, 8), context)
        del context
        assert held() is not None
        block(torch.randn(2, 6, 8), torch.randn(2, 5, 8))
        assert held() is None


def test_attention_of_a_block_to_itself_is_not_remembered():
    torch.manual_seed(0)
    block = CrossAttentionBlock(8, 2).eval()
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        plain = [block(x + step) for step in range(3)]
        with fixed_context(block):
            assert all(torch.equal(block(x + step), plain[step]) for step in range(3))


def test_with_gradients_nothing_is_remembered(projections):
    network = unet()
    x, t, context = inputs(network)
    layers = context_layers(network)
    plain = [torch.autograd.grad(network(x, t, context).sum(), layers[0].weight)[0] for _ in range(2)]
    projections.clear()
    with fixed_context(network):
        with torch.no_grad():
            network(x, t, context)
        fast = [torch.autograd.grad(network(x, t, context).sum(), layers[0].weight)[0] for _ in range(2)]
    assert torch.equal(plain[0], fast[0])
    assert torch.equal(plain[1], fast[1])
    assert projections[layers[0]] == 3


def test_inference_mode_computes_as_ever():
    network = unet()
    with torch.no_grad():
        expected = network(*inputs(network))
    with torch.inference_mode(), fixed_context(network):
        x, t, context = inputs(network)
        assert torch.equal(network(x, t, context), expected)
        context.mul_(2)
        assert not torch.equal(network(x, t, context), expected)


def test_everything_is_as_before_afterwards(projections):
    network = unet()
    state, attributes = set(network.state_dict()), [set(layer.__dict__) for layer in context_layers(network)]
    with fixed_context(network):
        with fixed_context(network, network):
            assert set(network.state_dict()) == state
        assert all("forward" in layer.__dict__ for layer in context_layers(network))
    assert [set(layer.__dict__) for layer in context_layers(network)] == attributes
    with pytest.raises(RuntimeError), fixed_context(network):
        network(torch.zeros(1, 4, 8, 12), torch.zeros(1))
    assert [set(layer.__dict__) for layer in context_layers(network)] == attributes
    x, t, context = inputs(network)
    with torch.no_grad():
        projections.clear()
        network(x, t, context)
        network(x, t, context)
    assert projections[context_layers(network)[0]] == 2


def test_a_forward_of_someone_else_is_kept(projections):
    network = unet()
    layer = context_layers(network)[0]
    own = layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    x, t, context = inputs(network)
    with torch.no_grad():
        expected = network(x, t, context)
        with fixed_context(network):
            assert torch.equal(network(x, t, context), expected)
    assert layer.forward is own


def test_compiled_networks_compute_as_ever():
    network, wrapped = unet(), torch.compile(unet(), backend="eager")
    network.compile(backend="eager")
    with fixed_context(network, wrapped, copy.deepcopy(unet())):
        for module in (network, wrapped):
            assert all("forward" not in layer.__dict__ for layer in context_layers(module))
