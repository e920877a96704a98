# SPDX-License-Identifier: Apache-2.0
"""The published U-Net: beside diffusers' network of the same architecture, and as SDSeg extends it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # interfaces that the releases of its dependencies deprecate
    from diffusers import UNet2DModel

from shared.networks.film_blocks import FiLMResBlock
from shared.networks.film_unet import FiLMUNet, extend_input_conv
from shared.weights import load_weights
from tests.test_kl_autoencoder import randomize

TINY: dict[str, Any] = {
    "channels": [32, 64, 96], "attention_levels": [False, True, True], "num_heads": 4, "norm_num_groups": 16,
}  # fmt: skip


def inputs(channels: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, channels, 12, 8), generator=generator), torch.tensor([3, 999])


# ----------------------------------------------------------------------------------------------------------------------
# beside diffusers
# ----------------------------------------------------------------------------------------------------------------------
CHANNELS, ATTENTION, BLOCKS = (16, 32, 32), (False, True, False), 2
RESNET = {
    "norm1": "norm1", "conv1": "conv1", "embed": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
ATTENTION_LAYERS = {
    "norm": "group_norm", "attn.to_q": "to_q", "attn.to_k": "to_k", "attn.to_v": "to_v", "attn.out_proj": "to_out.0",
}  # fmt: skip


def diffusers_unet(**options: Any) -> nn.Module:
    down = ["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in ATTENTION]
    up = ["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(ATTENTION)]
    network = UNet2DModel(
        in_channels=8,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=BLOCKS,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=3,
        **options,
    )
    return randomize(network)


def names_in_diffusers() -> dict[str, str]:
    """Our layer -> the one of diffusers, stage by stage."""
    names = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "conv_in": "conv_in",
        "class_embedding": "class_embedding", "norm_out": "conv_norm_out", "conv_out": "conv_out",
    }  # fmt: skip

    def add(ours: str, theirs: str, layers: dict[str, str]) -> None:
        names.update({f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in layers.items()})

    number = 0
    for level in range(len(CHANNELS)):
        for index in range(BLOCKS):
            add(f"down.{number}.resblock", f"down_blocks.{level}.resnets.{index}", RESNET)
            add(f"down.{number}.attention", f"down_blocks.{level}.attentions.{index}", ATTENTION_LAYERS)
            number += 1
        add(f"down.{number}.resblock", f"down_blocks.{level}.downsamplers.0", RESNET)
        number += 1
    add("middle.0.resblock", "mid_block.resnets.0", RESNET)
    add("middle.0.attention", "mid_block.attentions.0", ATTENTION_LAYERS)
    add("middle.1.resblock", "mid_block.resnets.1", RESNET)
    for depth in range(len(CHANNELS)):
        for index in range(BLOCKS + 1):
            stage = f"up.{depth * (BLOCKS + 1) + index}"
            add(f"{stage}.resblock", f"up_blocks.{depth}.resnets.{index}", RESNET)
            add(f"{stage}.attention", f"up_blocks.{depth}.attentions.{index}", ATTENTION_LAYERS)
            add(f"{stage}.upsample", f"up_blocks.{depth}.upsamplers.0", RESNET)
    return names


def from_diffusers(theirs: nn.Module, ours: nn.Module) -> dict[str, torch.Tensor]:
    """Strict on both sides: every one of their weights is used once."""
    names, source = names_in_diffusers(), theirs.state_dict()
    state = {}
    for key in ours.state_dict():
        layer, _, leaf = key.rpartition(".")
        state[key] = source.pop(f"{names[layer]}.{leaf}")
    assert not source
    return state


@torch.no_grad()
def test_outputs_are_those_of_diffusers():
    theirs = diffusers_unet()
    ours = FiLMUNet(
        channels=CHANNELS, num_res_blocks=BLOCKS, attention_levels=ATTENTION, num_heads=4, norm_num_groups=8,
        num_classes=3,
    ).eval()  # fmt: skip
    state = from_diffusers(theirs, ours)
    ours.load_state_dict(state, strict=True)
    x, timesteps = inputs()
    labels = torch.tensor([2, 0])
    expected = theirs(x, timesteps, class_labels=labels).sample
    assert expected.std() > 0.1, "the comparison would be blind"
    assert (ours(x, timesteps, class_labels=labels) - expected).abs().max() <= 1e-5

    # Negative controls: every kind of layer is seen in the output.
    swaps = [
        ("middle.0.attention.attn.to_q.weight", "middle.0.attention.attn.to_k.weight"),
        ("down.3.attention.attn.to_v.weight", "down.4.attention.attn.to_v.weight"),
        ("down.2.resblock.embed.weight", "down.1.resblock.embed.weight"),
        ("up.2.upsample.conv1.weight", "up.5.upsample.conv1.weight"),
        ("time_embed.0.bias", "time_embed.2.bias"),
    ]
    for first, second in swaps:
        ours.load_state_dict({**state, first: state[second], second: state[first]})
        assert (ours(x, timesteps, class_labels=labels) - expected).abs().max() > 1e-3, first


# ----------------------------------------------------------------------------------------------------------------------
# theory
# ----------------------------------------------------------------------------------------------------------------------
def test_the_published_size():
    with torch.device("meta"):
        network = FiLMUNet()
        with_labels = FiLMUNet(num_classes=9)
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 2) == 294.97  # log of the published training, spec sdseg 3.2
    assert sum(p.numel() for p in with_labels.parameters()) - count == 9 * 768
    # Attention at 1/1, 1/2, 1/4 and 1/8, in the middle, not at 1/16.
    attends = [stage.attention is not None for stage in network.down if stage.resblock.resample is None]
    assert attends == [True] * 8 + [False] * 2
    assert network.middle[0].attention.attn.num_heads == 8


@torch.no_grad()
def test_it_starts_silent_and_every_block_as_its_skip_connection():
    torch.manual_seed(0)
    network = FiLMUNet(**TINY, cross_attention_dim=7).eval()
    x, timesteps = inputs()
    assert torch.equal(network(x, timesteps, context=torch.randn(2, 5, 7)), torch.zeros(2, 4, 12, 8))
    h, embedding = torch.randn(2, 64, 6, 4), torch.randn(2, 128)
    stage = next(stage for stage in network.down if stage.cross_attention is not None)
    assert torch.equal(stage.attention(h), h)
    assert torch.equal(stage.cross_attention(h, torch.randn(2, 5, 7)), h)
    options: dict[str, Any] = {"embed_dim": 128, "norm_num_groups": 16, "dropout": 0.5}
    assert torch.equal(FiLMResBlock(64, 64, **options)(h, embedding), h)
    down = FiLMResBlock(64, 64, resample="down", **options)(h, embedding)
    assert torch.allclose(down, h.unflatten(2, (3, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5)), atol=1e-6)
    up = FiLMResBlock(64, 64, resample="up", **options)(h, embedding)
    assert torch.equal(up, h.repeat_interleave(2, 2).repeat_interleave(2, 3))


@torch.no_grad()
def test_the_embedding_scales_and_shifts_the_normalised_features():
    block = randomize(FiLMResBlock(16, 16, embed_dim=8, norm_num_groups=4, dropout=0.0))
    block.embed.weight.zero_()
    scale, shift = torch.linspace(-2, 2, 16), torch.linspace(1, -1, 16)
    block.embed.bias.copy_(torch.cat([scale, shift]))
    seen: list[torch.Tensor] = []
    block.dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 16, 6, 4)
    block(x, torch.randn(2, 8))
    h = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    expected = nn.functional.silu(h * (1 + scale)[:, None, None] + shift[:, None, None])
    assert torch.allclose(seen[0], expected, atol=1e-6)


@torch.no_grad()
def test_timesteps_labels_and_context_are_heard():
    x, timesteps = inputs()
    plain = randomize(FiLMUNet(**TINY))
    assert (plain(x, timesteps) - plain(x, timesteps.flip(0))).abs().max() > 1e-3
    labelled = randomize(FiLMUNet(**TINY, num_classes=3))
    first, second = (labelled(x, timesteps, class_labels=torch.tensor(pair)) for pair in ([0, 2], [0, 1]))
    assert torch.equal(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-3
    listening = randomize(FiLMUNet(**TINY, cross_attention_dim=7))
    context = torch.randn((2, 5, 7), generator=torch.Generator().manual_seed(2))
    outputs = [listening(x, timesteps, context=c) for c in (context, context.flip(1), -context)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)  # a set of tokens, without order
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_what_does_not_fit_is_named():
    network = FiLMUNet(**TINY)
    with pytest.raises(ValueError, match=r"^latent: expected sizes divisible by 4 for 3 levels, got \(1, 8, 12, 6\)"):
        network(torch.randn(1, 8, 12, 6), torch.tensor([1]))
    x, timesteps = inputs()
    with pytest.raises(ValueError, match=r"^class_labels: expected none with num_classes None, got one"):
        network(x, timesteps, class_labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^context: expected none with cross_attention_dim None, got one"):
        network(x, timesteps, context=torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match=r"^class_labels: expected one with num_classes 3, got none"):
        FiLMUNet(**TINY, num_classes=3)(x, timesteps)
    with pytest.raises(ValueError, match=r"^channels: expected multiples of norm_num_groups 24"):
        FiLMUNet(**{**TINY, "norm_num_groups": 24})
    with pytest.raises(ValueError, match=r"^channels: expected multiples of num_heads 5"):
        FiLMUNet(**{**TINY, "num_heads": 5})
    with pytest.raises(ValueError, match=r"^attention_levels: expected one for each of 3 channels, got 2"):
        FiLMUNet(**{**TINY, "attention_levels": [True, True]})


# ----------------------------------------------------------------------------------------------------------------------
# in training
# ----------------------------------------------------------------------------------------------------------------------
def test_dropout_acts_in_training_only():
    network = randomize(FiLMUNet(**TINY))
    x, timesteps = inputs()
    assert torch.equal(network(x, timesteps), network(x, timesteps))
    assert not torch.equal(network.train()(x, timesteps), network(x, timesteps))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for use_checkpoint in (False, True):
        network = randomize(FiLMUNet(**TINY, use_checkpoint=use_checkpoint, cross_attention_dim=7)).train()
        x, timesteps = inputs()
        torch.manual_seed(0)  # of the dropout
        network(x, timesteps, context=torch.ones(2, 5, 7)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_it_compiles_into_one_graph():
    network = randomize(
        FiLMUNet(channels=[32, 64], attention_levels=[False, True], num_res_blocks=1, num_heads=4, num_classes=3)
    )
    x, timesteps = inputs()
    labels = torch.tensor([0, 2])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x, timesteps, class_labels=labels), network(x, timesteps, class_labels=labels))


# ----------------------------------------------------------------------------------------------------------------------
# from an unconditional U-Net
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_it_starts_as_the_pretrained_network_whatever_the_condition(tmp_path):
    pretrained = randomize(FiLMUNet(**TINY, in_channels=4))
    torch.save(pretrained.state_dict(), tmp_path / "unet.pt")
    network = FiLMUNet(**TINY, num_classes=3, cross_attention_dim=7).eval()
    labels = network.class_embedding.weight.clone()
    load_weights(network, tmp_path / "unet.pt", adapt=network.widened)
    assert torch.equal(network.class_embedding.weight, labels)
    network.class_embedding.weight.zero_()
    x, timesteps = inputs(4)
    expected = pretrained(x, timesteps)
    for condition in (torch.zeros_like(x), 100 * torch.randn_like(x)):
        output = network(
            torch.cat([x, condition], dim=1), timesteps, torch.randn(2, 5, 7), class_labels=torch.tensor([0, 2])
        )
        assert (output - expected).abs().max() <= 1e-5
    # The other half, which is the noisy latent, is heard.
    assert (network(torch.cat([-x, x], 1), timesteps, torch.randn(2, 5, 7), labels.new_zeros(2).long()) - expected).abs(
    ).max() > 1e-3  # fmt: skip

    torch.save({**pretrained.state_dict(), "intruder": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"more.pt: .*intruder is not part of the network"):
        load_weights(network, tmp_path / "more.pt", adapt=network.widened)


def test_extended_convolution():
    weight = torch.randn(5, 4, 3, 3)
    extended = extend_input_conv(weight, 8)
    assert torch.equal(extended[:, :4], weight)
    assert extended.shape == (5, 8, 3, 3)
    assert not extended[:, 4:].any()
    assert torch.equal(extend_input_conv(weight, 4), weight)
    with pytest.raises(ValueError, match=r"^in_channels: expected at least the 4 pretrained ones, got 3"):
        extend_input_conv(weight, 3)
