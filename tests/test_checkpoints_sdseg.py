# SPDX-License-Identifier: Apache-2.0
"""Published state dicts in our networks: outputs agree to 1e-5, and no longer when a rule is changed."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # interfaces that the releases of its dependencies deprecate
    from diffusers import AutoencoderKL as DiffusersAutoencoder

from shared.checkpoint_files import read_published
from shared.checkpoint_origins import Origin, convert_by_table
from shared.checkpoints_latent_diffusion import (
    DIFFUSERS,
    OLD_DIFFUSERS,
    autoencoder_table,
    part_of,
    unet_table,
    vision_encoder_table,
    with_averages,
)
from shared.networks.film_unet import FiLMUNet
from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.vision_encoder import VisionEncoder
from tests import compvis_reference as published

CHANNELS = [16, 32, 32]
AUTOENCODER: dict[str, Any] = {"channels": CHANNELS, "attention_levels": [False] * 3, "norm_num_groups": 8}
WIDTHS, ATTENTION, HEADS = [32, 64, 96], [True, True, False], 4
UNET: dict[str, Any] = {
    "channels": WIDTHS, "attention_levels": ATTENTION, "num_heads": HEADS, "norm_num_groups": 16, "num_classes": 3,
}  # fmt: skip
FULL_CHANNELS, FULL_WIDTHS, FULL_ATTENTION = [128, 256, 512, 512], [192, 384, 384, 768, 768], [True] * 4 + [False]
Change = Callable[[dict[str, Origin]], dict[str, Origin]]


def picture() -> torch.Tensor:
    return torch.rand((2, 3, 32, 48), generator=torch.Generator().manual_seed(1))


def changed(table: dict[str, Origin], match: str, **changes: Any) -> dict[str, Origin]:
    return {k: dataclasses.replace(o, **changes) if match in o.key else o for k, o in table.items()}


def exchanged(table: dict[str, Origin], first: str, second: str) -> dict[str, Origin]:
    """Origins of all keys with `first` in their name against those with `second` in its place."""
    other = {k: k.replace(first, second) if first in k else k.replace(second, first) for k in table}
    assert any(k != o for k, o in other.items())
    return {k: table[o] for k, o in other.items()}


# ----------------------------------------------------------------------------------------------------------------------
# autoencoder and vision encoder
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def autoencoder_difference(change: Change = dict) -> float:
    state = published.random_state(published.autoencoder_shapes(CHANNELS))
    network = KLAutoencoder(**AUTOENCODER).eval()
    network.load_state_dict(convert_by_table(state, network, change(autoencoder_table(network))), strict=True)
    reference = published.Autoencoder(state, groups=8)
    mean, log_variance = reference.encode(2 * picture() - 1)
    image = (reference.decode(mean) + 1) / 2
    assert min(mean.std(), log_variance.std(), image.std()) > 0.05, "the comparison would be blind"
    ours = (*network.encode(picture()), network.decode(mean))
    theirs = (mean, torch.exp(log_variance / 2), image)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_the_autoencoder_agrees():
    assert autoencoder_difference() <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda table: exchanged(table, "quant_conv_mu", "quant_conv_log_sigma"),
        lambda table: exchanged(table, ".attn.to_q.", ".attn.to_k."),
        lambda table: exchanged(table, ".attn.to_v.", ".attn.out_proj."),
        lambda table: exchanged(table, "decoder.blocks.4.", "decoder.blocks.5."),
        lambda table: exchanged(table, "encoder.blocks.1.conv1", "encoder.blocks.1.conv2"),
    ],
    ids=["mean and variance", "query and key", "value and projection", "blocks", "convolutions"],
)
def test_a_changed_table_is_seen_in_the_autoencoders_output(change: Change):
    assert autoencoder_difference(change) > 1e-3


@torch.no_grad()
def test_the_vision_encoder_agrees():
    shapes = published.encoder_shapes(CHANNELS)
    published.conv(shapes, "out", 8, 4, 1, 1)
    state = published.random_state(shapes)
    network = VisionEncoder(**AUTOENCODER).eval()
    network.load_state_dict(convert_by_table(state, network, vision_encoder_table(network)), strict=True)
    reference = published.Autoencoder(state, groups=8)
    expected = reference.conv("out", reference.encoder(2 * picture() - 1))
    assert expected.std() > 0.05
    assert (network(picture()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", [DIFFUSERS, OLD_DIFFUSERS], ids=["names of today", "names before 0.12"])
@torch.no_grad()
def test_autoencoders_of_diffusers_agree(layout: Any):
    torch.manual_seed(0)
    theirs = DiffusersAutoencoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    state = theirs.state_dict()
    old = dict(zip(DIFFUSERS.attention_layers, layout.attention_layers, strict=True))
    for key in list(state):
        layer = next((name for name in old if f"attentions.0.{name}." in key), None)
        if layer is not None:
            value = state.pop(key)
            # Some old files keep them as 1x1 convolutions.
            is_conv = layout is OLD_DIFFUSERS and value.ndim == 2 and "to_q" in key
            state[key.replace(layer, old[layer])] = value[:, :, None, None] if is_conv else value
    network = KLAutoencoder(**AUTOENCODER).eval()
    network.load_state_dict(convert_by_table(state, network, autoencoder_table(network, layout)), strict=True)
    expected = theirs.encode(2 * picture() - 1).latent_dist.mean
    assert expected.std() > 0.05
    assert (network.encode(picture())[0] - expected).abs().max() <= 1e-5
    decoded = (theirs.decode(expected).sample + 1) / 2
    assert (network.decode(expected) - decoded).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# U-Net
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def unet_difference(change: Change = dict) -> float:
    state = published.random_state(published.unet_shapes(WIDTHS, ATTENTION, classes=3))
    network = FiLMUNet(**UNET).eval()
    network.load_state_dict(convert_by_table(state, network, change(unet_table(network))), strict=True)
    x = torch.randn((2, 8, 12, 8), generator=torch.Generator().manual_seed(1))
    timesteps, labels = torch.tensor([3, 999]), torch.tensor([0, 2])
    expected = published.UNet(state, groups=16, heads=HEADS, levels=3)(x, timesteps, labels)
    assert expected.std() > 0.1, "the comparison would be blind"
    return (network(x, timesteps, class_labels=labels) - expected).abs().max().item()


def test_the_unet_agrees():
    assert unet_difference() <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda table: exchanged(table, ".attn.to_q.", ".attn.to_k."),
        lambda table: exchanged(table, ".attn.to_k.", ".attn.to_v."),
        lambda table: changed(table, ".qkv.", heads=1),
        lambda table: changed(table, ".qkv.", heads=2 * HEADS),
        lambda table: exchanged(table, "middle.0.resblock", "middle.1.resblock"),
        lambda table: exchanged(table, "time_embed.0.bias", "time_embed.2.bias"),
    ],
    ids=["query and key", "key and value", "order without heads", "other heads", "blocks", "time embedding"],
)
def test_a_changed_table_is_seen_in_the_unets_output(change: Change):
    assert unet_difference(change) > 1e-3


def test_rows_are_taken_from_each_head():
    rows = torch.arange(2 * 3 * 2)  # heads, query key value, channels of a head
    take = [Origin("x", part=part, parts=3, heads=2).take(rows, torch.empty(4)).tolist() for part in range(3)]
    assert take == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    new_order = Origin("x", part=1, parts=3).take(rows, torch.empty(4))
    assert new_order.tolist() == [4, 5, 6, 7]


# ----------------------------------------------------------------------------------------------------------------------
# strictness
# ----------------------------------------------------------------------------------------------------------------------
def test_published_sizes_fit():
    """Every key and every shape at full width, without storage."""
    with torch.device("meta"):
        networks = {"autoencoder": KLAutoencoder(), "vision_encoder": VisionEncoder(), "unet": FiLMUNet()}
    condition = published.encoder_shapes(FULL_CHANNELS)
    published.conv(condition, "out", 8, 4, 1, 1)
    cases = {
        "autoencoder": (published.autoencoder_shapes(FULL_CHANNELS), autoencoder_table),
        "vision_encoder": (condition, vision_encoder_table),
        "unet": (published.unet_shapes(FULL_WIDTHS, FULL_ATTENTION), unet_table),
    }
    for name, (shapes, table) in cases.items():
        network: Any = networks[name]
        source = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        converted = convert_by_table(source, network, table(network))  # type: ignore[operator]
        assert list(converted) == list(network.state_dict())
        assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in source.values())
    # The log of the published training names 522 buffers of the average: the weights and two counters.
    assert len(cases["unet"][0]) + 2 == 522


def test_what_does_not_fit_is_named():
    state = published.random_state(published.unet_shapes(WIDTHS, ATTENTION, classes=3))
    network = FiLMUNet(**UNET)
    table = unet_table(network)
    less = {key: value for key, value in state.items() if key != "middle_block.1.qkv.bias"}
    with pytest.raises(ValueError, match=r"^FiLMUNet: .* 3 of its \d+ keys .*: middle_block.1.qkv.bias\[1/3\], middle"):
        convert_by_table(less, network, table)
    with pytest.raises(ValueError, match="1 source keys fit nowhere: intruder.weight"):
        convert_by_table({**state, "intruder.weight": torch.ones(1)}, network, table)
    narrow = {**state, "out.2.bias": torch.ones(3), "input_blocks.0.0.weight": torch.ones(32, 4, 3, 3)}
    with pytest.raises(
        ValueError, match=r"2 shapes differ .*: input_blocks.0.0.weight \(32, 4, 3, 3\) against \(32, 8"
    ):
        convert_by_table(narrow, network, table)
    ragged = {**state, "middle_block.1.qkv.bias": torch.ones(7)}
    with pytest.raises(ValueError, match=r"middle_block.1.qkv.bias\[1/3\] \(7,\) against \(96,\)"):
        convert_by_table(ragged, network, table)
    without = FiLMUNet(**{**UNET, "num_classes": None})
    with pytest.raises(ValueError, match="1 source keys fit nowhere: label_emb.weight"):
        convert_by_table(state, without, unet_table(without))
    listening = FiLMUNet(**UNET, cross_attention_dim=4)
    with pytest.raises(ValueError, match=r"^FiLMUNet: .*down.0.cross_attention.*leave options away"):
        convert_by_table(state, listening, unet_table(listening))
    key = "middle.0.attention.attn.to_k.bias"
    twice = {**table, key: dataclasses.replace(table[key], part=0)}
    with pytest.raises(ValueError, match="uses each part of middle_block.1.qkv.bias once"):
        convert_by_table(state, network, twice)
    no_middle = KLAutoencoder(**AUTOENCODER, with_encoder_nonlocal_attn=False)
    with pytest.raises(ValueError, match="^with_encoder_nonlocal_attn: expected true"):
        autoencoder_table(no_middle)


def test_half_precision_becomes_that_of_the_network_and_the_source_stays():
    shapes = published.autoencoder_shapes(CHANNELS)
    state = {key: value.half() for key, value in published.random_state(shapes).items()}
    network = KLAutoencoder(**AUTOENCODER)
    converted = convert_by_table(state, network, autoencoder_table(network))
    assert {value.dtype for value in converted.values()} == {torch.float32}
    assert list(state) == list(shapes)


# ----------------------------------------------------------------------------------------------------------------------
# whole checkpoints
# ----------------------------------------------------------------------------------------------------------------------
def test_parts_of_a_checkpoint():
    one = torch.ones(1)
    state = {"unet.a": one, "first.b": one, "betas": one, "intruder": one}
    assert set(part_of(state, "unet.", inert=("first.",))) == {"a", "intruder (not under unet.)"}
    assert set(part_of(state, "unet.")) == {"a", "first.b (not under unet.)", "intruder (not under unet.)"}


def test_averages_take_the_place_of_the_last_weights():
    weights = {"input_blocks.1.0.bias": torch.ones(1), "input_blocks.10.bias": torch.ones(2)}
    state = {f"model.diffusion_model.{key}": value for key, value in weights.items()} | {"betas": torch.ones(3)}
    names = {"input_blocks.1.0.bias": "input_blocks10bias", "input_blocks.10.bias": "input_blocks10bias"}
    assert with_averages(state) == (state, False)
    with pytest.raises(ValueError, match=r"^model_ema.: expected averages of the U-Net, found none"):
        with_averages(state, ema=True)
    # Without dots these two have one name; the published program could not have kept both.
    averages = {f"model_ema.diffusion_model{name}": torch.zeros(1) for name in names.values()}
    with pytest.raises(ValueError, match="two share one"):
        with_averages({**state, **averages})

    del state["model.diffusion_model.input_blocks.10.bias"]
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    whole = {**state, **averages, **counters}
    averaged, used = with_averages(whole)
    assert used
    assert list(averaged) == list(state)
    assert averaged["model.diffusion_model.input_blocks.1.0.bias"].item() == 0
    last, used = with_averages(whole, ema=False)
    assert (list(last), used) == (list(state), False)
    assert last["model.diffusion_model.input_blocks.1.0.bias"].item() == 1
    with pytest.raises(ValueError, match=r"one average for each weight.*model_ema.extra stands alone.*--ema False"):
        with_averages({**whole, "model_ema.extra": torch.ones(1)})


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package that is there when the file is written and gone when it is read."""
    module: Any = types.ModuleType("lightning_of_old")
    ran: list[str] = []

    def run(word: str) -> str:
        ran.append(word)
        return word

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = np.float64(0.9)

    class AttributeDict(dict):
        pass

    class Names(list):
        pass

    class Trap:
        def __reduce__(self) -> Any:
            return module.run, ("trap",)

    for name, value in {"run": run, **{c.__name__: c for c in (ModelCheckpoint, AttributeDict, Names, Trap)}}.items():
        value.__module__, value.__qualname__ = module.__name__, name
        setattr(module, name, value)
    module.ran = ran
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_objects_in_training_checkpoints_are_never_made(lightning: Any, tmp_path: Path, monkeypatch):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    hyper = lightning.AttributeDict(rate=np.float32(1), names=lightning.Names(["x", "y"]))
    content = {
        "callbacks": {lightning.ModelCheckpoint: {"best": 0.9}, "object": lightning.ModelCheckpoint()},
        "hyper_parameters": hyper,
        "trap": lightning.Trap(),
        "state_dict": OrderedDict(weights),
    }
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, lightning.__name__)
    with pytest.raises(ValueError, match=r"last.ckpt: expected tensors only, .*lightning_of_old"):
        read_published(tmp_path / "last.ckpt")
    read = read_published(tmp_path / "last.ckpt", placeholders=True)
    assert list(read) == list(weights)
    assert all(torch.equal(read[key], weights[key]) for key in weights)
    assert lightning.ran == []
    assert lightning.__name__ not in sys.modules

    # Functions of the operating system have no stand-in: torch refuses the file.
    class Shell:
        def __reduce__(self) -> Any:
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": weights, "x": Shell()}, tmp_path / "shell.ckpt")
    with pytest.raises(ValueError, match=r"shell.ckpt: expected tensors only"):
        read_published(tmp_path / "shell.ckpt", placeholders=True)
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_read(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.arange(3.0)}, tmp_path / "x.safetensors")
    assert read_published(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"cut.safetensors: not readable as a safetensors file"):
        read_published(tmp_path / "cut.safetensors")
