# SPDX-License-Identifier: Apache-2.0
"""Published brain weights in the bundle's network: the outputs must agree to 1e-5."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import monai.networks.nets as core
import pytest
import torch
from monai.bundle import ConfigParser

from shared.checkpoints import convert_state_dict
from shared.networks.constant_prompt import ConstantPrompt
from tests.conftest import ROOT
from tests.published_networks import old, old_names, old_network
from tools import convert_checkpoint

CONFIGS = ROOT / "bundles" / "brain_controlnet" / "configs"
# A prompt of one token would hide queries and keys: attention over one token does not look at them.
PROMPT = {"_target_": "shared.networks.constant_prompt.ConstantPrompt", "length": 5, "embedding_size": 32}
TWO = {"controlnet_defs": ["%controlnet_def", "%controlnet_def"]}
KINDS = {"autoencoder": "AutoencoderKL", "unet": "DiffusionModelUNet", "controlnet": "ControlNet"}


def configuration(*files: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(list(files))
    return parser


def options_of(parser: ConfigParser, name: str) -> dict[str, Any]:
    """The arguments of a network of the bundle, as numbers; without attention of a kind that the old package has from
    xformers alone, and which has no weights."""
    left_out = ("_", "use_flash_attention")
    options = {key: value for key, value in parser[f"{name}_def"].items() if not key.startswith(left_out)}
    if name == "controlnet":
        options["conditioning_embedding_in_channels"] = len(parser["condition_keys"])
    return options


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Any]:
    """Files as published, and the bundle's configuration at reduced width."""
    (tmp_path / "prompt.json").write_text(json.dumps({"prompt_def": PROMPT}))
    config = [str(CONFIGS / "inference.json"), str(CONFIGS / "tiny.json"), str(tmp_path / "prompt.json")]
    parser = configuration(*config)
    states = {name: old_network(kind, options_of(parser, name)).state_dict() for name, kind in KINDS.items()}
    # A training checkpoint of DataParallel, a plain state dict, a training checkpoint.
    wrapped = {f"module.{key}": value for key, value in states["autoencoder"].items()}
    torch.save(
        {"epoch": 74, "state_dict": wrapped, "discriminator": {}, "best_loss": 0.1}, tmp_path / "autoencoder.pth"
    )
    torch.save(states["unet"], tmp_path / "diffusion_model.pth")
    torch.save({"epoch": 1, "controlnet": states["controlnet"], "best_loss": 0.1}, tmp_path / "controlnet_model.pth")
    generator = torch.Generator().manual_seed(2)
    torch.save({"embeddings": torch.randn((2, 5, 32), generator=generator)}, tmp_path / "prompt.pt")
    return {
        "autoencoder": str(tmp_path / "autoencoder.pth"),
        "diffusion": str(tmp_path / "diffusion_model.pth"),
        "controlnet": str(tmp_path / "controlnet_model.pth"),
        "prompt_weights": str(tmp_path / "prompt.pt"),
        "config": config,
        "out": str(tmp_path / "model.pt"),
        "scale_factor": 0.3,
    }


def convert(published: dict[str, Any], **others: Any) -> dict[str, torch.Tensor]:
    arguments = {**published, **others}
    convert_checkpoint.brain_controlnet(**{key: value for key, value in arguments.items() if value is not None})
    return torch.load(published["out"], weights_only=True)


def inputs(parser: ConfigParser, count: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((2, *parser["latent_shape"]), generator=generator)
    condition = torch.rand((2, count, *parser["image_size"]), generator=generator)
    return x, torch.tensor([3, 870]), condition


@torch.no_grad()
def expected_velocity(published: dict[str, Any], scales: list[float], row: int = 1) -> torch.Tensor:
    """What the published sampling script computes: ControlNet, then U-Net, under the same prompt."""
    parser = configuration(*published["config"])
    x, timesteps, condition = inputs(parser)
    context = torch.load(published["prompt_weights"], weights_only=True)["embeddings"][row].expand(2, -1, -1)
    controlnet, unet = (old_network(KINDS[name], options_of(parser, name)) for name in ("controlnet", "unet"))
    down, middle = controlnet(x, timesteps, condition, sum(scales), context)
    return unet(
        x, timesteps, context, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle
    )


@torch.no_grad()
def velocity(published: dict[str, Any], weights: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    parser = configuration(*published["config"])
    model = parser.get_parsed_content("network_def").eval()
    model.load_state_dict(weights, strict=True)
    return model(*inputs(parser), **options)


def test_the_bundle_loads_what_is_written(published, capsys):
    weights = convert(published)
    printed = capsys.readouterr().out
    assert hashlib.sha256(Path(published["out"]).read_bytes()).hexdigest() in printed
    assert "ControlNet: " in printed
    assert "scale_factor: 0.3" in printed
    assert {key.split(".")[0] for key in weights} == {"diffusion", "controlnets", "embeddings"}

    expected = expected_velocity(published, [0.7])
    assert expected.std() > 0.05, "the comparison would be blind"
    assert (velocity(published, weights, conditioning_scale=0.7) - expected).abs().max() <= 1e-5
    null = {"null_prompt": torch.ones(2, dtype=torch.bool)}
    expected = expected_velocity(published, [1.0], row=0)
    assert (velocity(published, weights, **null) - expected).abs().max() <= 1e-5


def test_the_condition_and_every_part_of_the_controlnet_are_seen_in_the_output(published):
    """The negative control: two exchanged tensors of equal shape, in any part, are noticed."""
    weights = convert(published)
    expected = expected_velocity(published, [1.0])
    swaps = [
        ("controlnets.0.controlnet_down_blocks.0.weight", "controlnets.0.controlnet_down_blocks.1.conv.weight"),
        ("embeddings.0.blocks.0.conv.bias", "embeddings.0.conv_in.conv.bias"),
        ("controlnets.0.conv_in.conv.weight", "diffusion.unet.conv_in.conv.weight"),
        (
            "controlnets.0.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "controlnets.0.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight",
        ),
    ]
    for first, second in swaps:
        # Networks of one seed may share numbers, so that an exchange changes nothing.
        other = weights[first].flip(0) if torch.equal(weights[first], weights[second]) else weights[second]
        assert weights[first].shape == weights[second].shape
        wrong = {**weights, first: other, second: weights[first]}
        assert (velocity(published, wrong) - expected).abs().max() > 1e-3, first
    prompt = "diffusion.prompt.embeddings"
    assert (velocity(published, {**weights, prompt: weights[prompt].flip(0)}) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_decoding_undoes_the_scale_factor(published):
    parser = configuration(*published["config"])
    model = parser.get_parsed_content("network_def").eval()
    model.load_state_dict(convert(published), strict=True)
    autoencoder = old_network("AutoencoderKL", options_of(parser, "autoencoder"))
    latents = inputs(parser)[0]
    expected = autoencoder.decode(latents / 0.3)
    assert expected.std() > 0.05
    assert (model.decode(latents) - expected).abs().max() <= 1e-5
    image = torch.rand((1, 1, *parser["image_size"]), generator=torch.Generator().manual_seed(3))
    assert (model.reconstruct(image) - autoencoder.decode(autoencoder.encode(image)[0])).abs().max() <= 1e-5


def test_without_a_controlnet_it_is_the_file_of_stage_2(published):
    weights = convert(published, controlnet=None)
    whole = convert(published)
    parser = configuration(*published["config"])
    model = parser.get_parsed_content("diffusion_def")
    model.load_state_dict(weights, strict=True)
    assert {f"diffusion.{key}" for key in weights} == {key for key in whole if key.startswith("diffusion.")}
    assert all(torch.equal(value, whole[f"diffusion.{key}"]) for key, value in weights.items())


def test_several_controlnets(published, tmp_path):
    (tmp_path / "two.json").write_text(json.dumps(TWO))
    two = {**published, "config": [*published["config"], str(tmp_path / "two.json")]}
    weights = convert(two, controlnet=[published["controlnet"]] * 2)
    assert {".".join(key.split(".")[:2]) for key in weights if not key.startswith("diffusion.")} == {
        "controlnets.0", "controlnets.1", "embeddings.0", "embeddings.1",
    }  # fmt: skip
    # The same weights twice: their residuals add up to those of one with the sum of the scales.
    expected = expected_velocity(published, [0.3, 0.5])
    assert (velocity(two, weights, conditioning_scale=[0.3, 0.5]) - expected).abs().max() <= 2e-5
    with pytest.raises(ValueError, match=r"^--controlnet: expected a file for each of the 2 ControlNets .* got 1"):
        convert(two)


def test_published_sizes_fit():
    """Every key and every shape at full width (without storage), and the parameters that the spec measured."""
    parser = configuration(str(CONFIGS / "inference.json"))
    parameters = {}
    with torch.device("meta"):
        for name, kind in KINDS.items():
            options = options_of(parser, name)
            source, network = getattr(old, kind)(**old_names(options)), getattr(core, kind)(**options)
            converted = convert_state_dict(source.state_dict(), network)
            assert list(converted) == list(network.state_dict())
            parameters[name] = round(sum(tensor.numel() for tensor in converted.values()) / 1e6, 1)
    assert parameters == {"autoencoder": 34.0, "unet": 263.6, "controlnet": 117.9}
    with torch.device("meta"):
        assert parser.get_parsed_content("prompt_def").embeddings.shape == (2, 77, 1024)


def test_what_is_missing_or_does_not_fit_is_explained(published, tmp_path):
    with pytest.raises(ValueError, match=r"^--scale_factor: expected a number, got none.*--scale_factor 0.3"):
        convert(published, scale_factor=None)
    with pytest.raises(ValueError, match=r"^--scale_factor: expected a positive number, got 0"):
        convert(published, scale_factor=0)
    absent = str(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=rf"^{absent}: expected the embedded prompt.*tools.embed_prompt"):
        convert(published, prompt_weights=absent)
    with pytest.raises(FileNotFoundError, match=rf"^{absent}: no such file"):
        convert(published, controlnet=absent)
    with pytest.raises(ValueError, match=r"diffusion_model.pth: ControlNet: the weights do not fit"):
        convert(published, controlnet=published["diffusion"])
    with pytest.raises(ValueError, match=r"controlnet_model.pth: DiffusionModelUNet: the weights do not fit"):
        convert(published, diffusion=published["controlnet"])
    torch.save(ConstantPrompt(4, 32).state_dict(), tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"short.pt: ConstantPrompt: .*embeddings \(2, 4, 32\) against \(2, 5, 32\)"):
        convert(published, prompt_weights=str(tmp_path / "short.pt"))
    state = torch.load(published["controlnet"], weights_only=True)["controlnet"]
    del state["controlnet_cond_embedding.conv_out.conv.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(
        ValueError, match=r"less.pth: ControlNet: .* 1 of its \d+ keys are not in the source: controlnet_"
    ):
        convert(published, controlnet=str(tmp_path / "less.pth"))
    assert not Path(published["out"]).exists()


def test_on_the_command_line(published, monkeypatch):
    words = ["convert_checkpoint", "brain_controlnet", "--config", json.dumps(published["config"])]
    for name in ("autoencoder", "diffusion", "controlnet", "prompt_weights", "out", "scale_factor"):
        words += [f"--{name}", str(published[name])]
    monkeypatch.setattr("sys.argv", words)
    convert_checkpoint.main()
    assert "controlnets.0.conv_in.conv.weight" in torch.load(published["out"], weights_only=True)
    monkeypatch.setattr("sys.argv", [*words[:2], "--controlnets", "x"])
    with pytest.raises(SystemExit, match=r"^--controlnets: expected an option .*did you mean --controlnet\?"):
        convert_checkpoint.main()
