# SPDX-License-Identifier: Apache-2.0
"""Old and new network, the same weights, the same input: the outputs must agree to 1e-5."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import monai.networks.nets as core
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from shared.checkpoint_files import read_published
from shared.checkpoints import KEYS, convert_state_dict
from tests.published_networks import old, old_names, old_network
from tools import convert_checkpoint

AUTOENCODER = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16, 16, 16), "latent_channels": 3,
    "num_res_blocks": 2, "norm_num_groups": 8, "attention_levels": (False,) * 4,
    "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
}  # fmt: skip
ATTENTION_AUTOENCODER = {
    **AUTOENCODER, "channels": (8, 16), "attention_levels": (False, True),
    "with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True,
}  # fmt: skip
UNET = {
    "spatial_dims": 2, "in_channels": 3, "out_channels": 3, "channels": (8, 16, 24), "num_res_blocks": 2,
    "norm_num_groups": 8, "attention_levels": (False, True, True), "num_head_channels": (0, 8, 24),
}  # fmt: skip
CONDITIONED = {**UNET, "with_conditioning": True, "cross_attention_dim": 12}
CONTROLNET = {key: value for key, value in UNET.items() if key != "out_channels"}
CONTROLNET |= {"conditioning_embedding_in_channels": 1, "conditioning_embedding_num_channels": (8,)}
CONDITIONED_CONTROLNET = {**CONTROLNET, "with_conditioning": True, "cross_attention_dim": 12}
VQVAE = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "num_res_channels": (8, 16),
    "num_res_layers": 2, "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
    "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), "num_embeddings": 16, "embedding_dim": 8,
}  # fmt: skip
DISCRIMINATOR = {"spatial_dims": 2, "channels": 8, "in_channels": 1, "out_channels": 1, "num_layers_d": 3}

# class, options of both, options of the new network alone
CASES = {
    "published autoencoder, narrow": ("AutoencoderKL", AUTOENCODER, {}),
    "autoencoder with attention": ("AutoencoderKL", ATTENTION_AUTOENCODER, {}),
    "autoencoder, no fc": ("AutoencoderKL", ATTENTION_AUTOENCODER, {"include_fc": False}),
    "autoencoder, combined linear": ("AutoencoderKL", ATTENTION_AUTOENCODER, {"use_combined_linear": True}),
    "published U-Net, narrow": ("DiffusionModelUNet", CONDITIONED, {}),
    "conditioned U-Net, 2 layers, classes": (
        "DiffusionModelUNet", {**CONDITIONED, "transformer_num_layers": 2, "num_class_embeds": 5}, {},
    ),
    "conditioned U-Net, combined linear": ("DiffusionModelUNet", CONDITIONED, {"use_combined_linear": True}),
    "U-Net": ("DiffusionModelUNet", UNET, {}),
    "U-Net, no fc": ("DiffusionModelUNet", UNET, {"include_fc": False}),
    "U-Net, combined linear": ("DiffusionModelUNet", UNET, {"use_combined_linear": True}),
    "U-Net, residual up and down": ("DiffusionModelUNet", {**UNET, "resblock_updown": True}, {}),
    "U-Net in 3-D": ("DiffusionModelUNet", {**UNET, "spatial_dims": 3, "channels": (8, 8, 24)}, {}),
    "ControlNet": ("ControlNet", CONTROLNET, {}),
    "conditioned ControlNet": ("ControlNet", CONDITIONED_CONTROLNET, {}),
    "VQVAE": ("VQVAE", VQVAE, {}),
    "discriminator": ("PatchDiscriminator", DISCRIMINATOR, {}),
}  # fmt: skip


def _output(network: nn.Module, kind: str, options: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if kind in ("AutoencoderKL", "VQVAE", "PatchDiscriminator"):
            x = noise(2, 1, 32, 48)
            if kind == "AutoencoderKL":
                mean, sigma = network.encode(x)
                outputs = [mean, sigma, network.decode(mean)]
            else:
                outputs = network(x)
        else:
            size = (8, 8, 12)[-options["spatial_dims"] :]
            inputs = {"x": noise(2, 3, *size), "timesteps": torch.tensor([3, 870])}
            if "cross_attention_dim" in options:
                inputs["context"] = noise(2, 5, 12)
            if "num_class_embeds" in options:
                inputs["class_labels"] = torch.tensor([0, 4])
            if kind == "ControlNet":
                inputs["controlnet_cond"] = noise(2, 1, *size)
            outputs = network(**inputs)
    flat: list[torch.Tensor] = []
    for item in outputs if isinstance(outputs, (list, tuple)) else [outputs]:
        flat += [t.flatten() for t in item] if isinstance(item, (list, tuple)) else [item.flatten()]
    return torch.cat(flat)


def _difference(kind: str, options: dict[str, Any], new_options: dict[str, Any], rules: Any = None) -> float:
    source = old_network(kind, options)
    network = getattr(core, kind)(**options, **new_options).eval()
    network.load_state_dict(convert_state_dict(source.state_dict(), network, rules=rules), strict=True)
    expected = _output(source, kind, options)
    assert expected.std() > 0.05, "the comparison would be blind"
    return (_output(network, kind, options) - expected).abs().max().item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_agree(case: tuple[str, dict, dict]) -> None:
    assert _difference(*case) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [("AutoencoderKL", ATTENTION_AUTOENCODER), ("DiffusionModelUNet", UNET), ("ControlNet", CONTROLNET)],
)
def test_a_changed_rule_is_seen_in_the_output(kind: str, options: dict) -> None:
    other = {"to_k": "to_v", "to_v": "to_k"}
    swapped = {
        pattern: new.replace(name, other[name]) if (name := pattern.split(".")[-2]) in other else new
        for pattern, new in KEYS[kind].items()
    }
    assert _difference(kind, options, {}, rules=swapped) > 1e-3

    # what `load_old_state_dict` of MONAI 1.6.1 does: apply a projection that the old network never applied
    applied = {pattern: getattr(new, "key", new) for pattern, new in KEYS[kind].items()}
    assert _difference(kind, options, {}, rules=applied) > 1e-3


def test_cross_attention_rules_are_seen_in_the_output() -> None:
    """The rules for `transformer_blocks`: exchanging self- and cross-attention changes the output."""
    options = {**CONDITIONED, "cross_attention_dim": 16, "channels": (8, 16, 16), "num_head_channels": (0, 8, 16)}
    source = old_network("DiffusionModelUNet", options).state_dict()
    network = core.DiffusionModelUNet(**options).eval()
    right = convert_state_dict(source, network)
    wrong = {key: right[key.replace("attn1.out_proj", "attn2.out_proj")] for key in right}
    outputs = []
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((2, 3, 8, 12), generator=generator), torch.tensor([3, 870]), torch.randn(2, 5, 16)
    for weights in (right, wrong):
        network.load_state_dict(weights)
        with torch.no_grad():
            outputs.append(network(*inputs))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_every_rule_is_needed_by_some_network() -> None:
    """Leaving out any one rule is refused, for at least one network."""
    needed: dict[str, set[str]] = {kind: set() for kind in KEYS}
    for kind, options, new_options in CASES.values():
        with torch.device("meta"):
            source = getattr(old, kind)(**old_names(options)).state_dict()
            network = getattr(core, kind)(**options, **new_options)
        for left_out in KEYS[kind]:
            try:
                convert_state_dict(source, network, rules={k: v for k, v in KEYS[kind].items() if k != left_out})
            except ValueError:
                needed[kind].add(left_out)
    assert needed == {kind: set(rules) for kind, rules in KEYS.items()}


def test_published_sizes_fit() -> None:
    """The published chest X-ray networks at full width: every key and every shape (without storage)."""
    autoencoder = {**AUTOENCODER, "channels": (64, 128, 128, 128), "norm_num_groups": 32}
    unet = {
        **CONDITIONED, "channels": (256, 512, 768), "num_head_channels": (0, 512, 768), "norm_num_groups": 32,
        "cross_attention_dim": 1024,
    }  # fmt: skip
    parameters = []
    with torch.device("meta"):
        for kind, options in (("AutoencoderKL", autoencoder), ("DiffusionModelUNet", unet)):
            network = getattr(core, kind)(**options)
            converted = convert_state_dict(getattr(old, kind)(**old_names(options)).state_dict(), network)
            assert list(converted) == list(network.state_dict())
            parameters.append(sum(tensor.numel() for tensor in converted.values()))
    assert [round(n / 1e6, 2) for n in parameters] == [4.61, 263.64]  # the spec measured 4.61 M and 263.6 M


def test_new_weights_pass_unchanged() -> None:
    network = core.DiffusionModelUNet(**UNET)
    weights = network.state_dict()
    converted = convert_state_dict(weights, network)
    assert all(torch.equal(converted[key], weights[key]) for key in weights)


def test_half_precision_becomes_that_of_the_network_and_source_stays() -> None:
    source = {key: value.half() for key, value in old_network("AutoencoderKL", AUTOENCODER).state_dict().items()}
    keys = list(source)
    converted = convert_state_dict(source, core.AutoencoderKL(**AUTOENCODER))
    assert {value.dtype for value in converted.values()} == {torch.float32}
    assert list(source) == keys


def test_what_does_not_fit_is_named() -> None:
    source = old_network("AutoencoderKL", AUTOENCODER).state_dict()
    network = core.AutoencoderKL(**AUTOENCODER)
    less = {key: value for key, value in source.items() if key != "quant_conv_mu.conv.bias"}
    with pytest.raises(ValueError, match=r"AutoencoderKL: .* 1 of its \d+ keys are not in the source: quant_conv_mu"):
        convert_state_dict(less, network)
    with pytest.raises(ValueError, match="1 source keys fit nowhere: intruder.weight"):
        convert_state_dict({**source, "intruder.weight": torch.ones(1)}, network)
    wide = core.AutoencoderKL(**{**AUTOENCODER, "channels": (16, 16, 16, 16)})
    with pytest.raises(ValueError, match=r"shapes differ .*encoder.blocks.0.conv.weight \(8, 1, 3, 3\) against \(16,"):
        convert_state_dict(source, wide)
    with pytest.raises(ValueError, match="Linear: there are no key rules"):
        convert_state_dict(source, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="use_convtranspose=True cannot be converted"):
        convert_state_dict(
            getattr(old, "AutoencoderKL")(**old_names(AUTOENCODER), use_convtranspose=True).state_dict(),  # noqa: B009
            core.AutoencoderKL(**AUTOENCODER, use_convtranspose=True),
        )
    conditioned = old_network("DiffusionModelUNet", CONDITIONED).state_dict()
    no_fc = core.DiffusionModelUNet(**CONDITIONED, include_fc=False)
    with pytest.raises(ValueError, match="include_fc=True"):
        convert_state_dict(conditioned, no_fc)


def test_attention_without_its_unused_projection_is_refused() -> None:
    """A lost `out_proj` of new weights must not be replaced by an identity matrix in silence."""
    network = core.DiffusionModelUNet(**UNET)
    weights = {key: value for key, value in network.state_dict().items() if ".out_proj." not in key}
    with pytest.raises(ValueError, match=r"keys are not in the source: .*out_proj"):
        convert_state_dict(weights, network)


# ----------------------------------------------------------------------------------------------------------------------
# files
# ----------------------------------------------------------------------------------------------------------------------
WEIGHTS = {"encoder.weight": torch.ones(2, 2), "decoder.weight": torch.zeros(2)}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("entry", [None, "state_dict", "diffusion", "controlnet", "model"])
def test_published_forms(tmp_path: Path, prefix: str, entry: str | None) -> None:
    weights: dict[str, Any] = {prefix + key: value for key, value in WEIGHTS.items()}
    if entry:
        weights = {"epoch": 3, entry: weights, "optimizer": {"state": {}, "param_groups": []}, "best_loss": 0.5}
    torch.save(weights, tmp_path / "checkpoint.pth")
    read = read_published(tmp_path / "checkpoint.pth")
    assert list(read) == list(WEIGHTS)
    assert all(torch.equal(read[key], WEIGHTS[key]) for key in WEIGHTS)


def test_a_named_entry_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "discriminator": WEIGHTS}, tmp_path / "checkpoint.pth")
    assert list(read_published(tmp_path / "checkpoint.pth", entry="discriminator")) == list(WEIGHTS)
    with pytest.raises(ValueError, match=r"checkpoint.pth: expected entry 'ema' .* got the entries state_dict, disc"):
        read_published(tmp_path / "checkpoint.pth", entry="ema")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file"):
        read_published(tmp_path / "none.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(
        ValueError, match=r"module.pth: expected tensors only, .*torch.nn.modules.linear.Linear.*Remedy"
    ):
        read_published(tmp_path / "module.pth")
    torch.save({"state_dict": WEIGHTS, "best_loss": np.float64(1)}, tmp_path / "numpy.pth")
    with pytest.raises(ValueError, match=r"numpy.pth: expected tensors only, .*numpy"):
        read_published(tmp_path / "numpy.pth")
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    for size in (0, 10, 300):
        (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:size])
        with pytest.raises(ValueError, match=r"cut.pth: not readable as a torch file"):
            read_published(tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("hello, this is a web page")
    with pytest.raises(ValueError, match=r"text.pth: not readable as a torch file"):
        read_published(tmp_path / "text.pth")
    torch.save({"epoch": 3, "weights": WEIGHTS}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other.pth: expected one of the entries state_dict.* got the entries epoch, w"
    ):
        read_published(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth: expected a state dict or a training checkpoint, got list"):
        read_published(tmp_path / "list.pth")


# ----------------------------------------------------------------------------------------------------------------------
# the command line
# ----------------------------------------------------------------------------------------------------------------------
class FrozenClipTextEncoder(nn.Module):
    """Stands in for the CLIP encoder: no weights in the state dict."""

    def __init__(self, *, folder: str, width: int = 12) -> None:
        super().__init__()
        self.folder, self.width = folder, width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.width)


@pytest.fixture
def published(tmp_path: Path) -> dict[str, str]:
    """Files as published, and a configuration of the bundle, at reduced width."""
    stage1 = {f"module.{key}": value for key, value in old_network("AutoencoderKL", AUTOENCODER).state_dict().items()}
    torch.save({"epoch": 74, "state_dict": stage1, "discriminator": {}, "best_loss": 0.1}, tmp_path / "stage1.pth")
    torch.save(old_network("DiffusionModelUNet", CONDITIONED).state_dict(), tmp_path / "diffusion_model.pth")
    config = {
        "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER},
        "text_encoder_dir": "somewhere",
        "network_def": {
            "_target_": "shared.networks.latent_diffusion.TextToImageModel",
            "autoencoder": "@autoencoder_def",
            "unet": {"_target_": "monai.networks.nets.DiffusionModelUNet", **CONDITIONED},
            "text_encoder": {"_target_": f"{__name__}.FrozenClipTextEncoder", "folder": "@text_encoder_dir"},
        },
    }
    (tmp_path / "inference.json").write_text(json.dumps(config))
    return {
        "autoencoder": str(tmp_path / "stage1.pth"),
        "diffusion": str(tmp_path / "diffusion_model.pth"),
        "config": str(tmp_path / "inference.json"),
        "out": str(tmp_path / "model.pt"),
    }


def _edit(published: dict[str, str], **network_def: Any) -> dict[str, str]:
    path = Path(published["config"])
    config = json.loads(path.read_text())
    config["network_def"] |= network_def
    path.write_text(json.dumps(config))
    return published


def test_the_bundle_loads_the_converted_weights(published: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint.cxr_ldm(**published, scale_factor=0.3, text_encoder="clip")
    printed = capsys.readouterr().out
    assert hashlib.sha256(Path(published["out"]).read_bytes()).hexdigest() in printed
    assert "text encoder: frozen, width 12, from clip; not stored" in printed
    assert "AutoencoderKL: 0.07 M values" in printed

    model = ConfigParser(json.loads(Path(published["config"]).read_text())).get_parsed_content("network_def").eval()
    model.load_state_dict(torch.load(published["out"], weights_only=True), strict=True)
    assert model.scale_factor.item() == pytest.approx(0.3)
    for kind, options, part in (
        ("AutoencoderKL", AUTOENCODER, model.autoencoder),
        ("DiffusionModelUNet", CONDITIONED, model.unet),
    ):
        expected = _output(old_network(kind, options), kind, options)
        assert (_output(part, kind, options) - expected).abs().max() <= 1e-5


def test_bundle_conversion_explains_what_is_missing(published: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--scale_factor: expected a number, got none.*--scale_factor 0.3"):
        convert_checkpoint.cxr_ldm(**published)
    with pytest.raises(ValueError, match=r"--scale_factor: expected a positive number, got nan"):
        convert_checkpoint.cxr_ldm(**published, scale_factor=float("nan"))
    with pytest.raises(ValueError, match=r"^clip: expected a text encoder of width 12 .*, got 7"):
        convert_checkpoint.cxr_ldm(
            **_edit(
                published, text_encoder={"_target_": f"{__name__}.FrozenClipTextEncoder", "folder": "x", "width": 7}
            ),
            scale_factor=0.3,
            text_encoder="clip",
        )
    with pytest.raises(ValueError, match=r"diffusion_model.pth: AutoencoderKL: the weights do not fit"):
        convert_checkpoint.cxr_ldm(**published | {"autoencoder": published["diffusion"]}, scale_factor=0.3)
    with pytest.raises(ValueError, match=r"inference.json: expected network_def#text_encoder to be FrozenClip.*Linear"):
        convert_checkpoint.cxr_ldm(**_edit(published, text_encoder={"_target_": "torch.nn.Linear"}), scale_factor=0.3)
    with pytest.raises(ValueError, match=r"inference.json: expected the key network_def#unet to define .*, got None"):
        convert_checkpoint.cxr_ldm(**_edit(published, unet=None), scale_factor=0.3)
    assert not Path(published["out"]).exists()


def test_one_network_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "old.pth", tmp_path / "new.pt"
    published = old_network("AutoencoderKL", ATTENTION_AUTOENCODER)
    torch.save(published.state_dict(), source)
    words = ["convert_checkpoint", "network", "--kind", "AutoencoderKL", "--source", str(source), "--out", str(out)]

    monkeypatch.setattr("sys.argv", [*words, "--options", json.dumps(ATTENTION_AUTOENCODER)])
    convert_checkpoint.main()
    network = core.AutoencoderKL(**ATTENTION_AUTOENCODER).eval()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    case = "AutoencoderKL", ATTENTION_AUTOENCODER
    assert (_output(network, *case) - _output(published, *case)).abs().max() <= 1e-5

    monkeypatch.setattr("sys.argv", [*words, "--options", '{"spatial_dim": 2}'])
    with pytest.raises(SystemExit, match="^--options: expected a JSON object of arguments for AutoencoderKL"):
        convert_checkpoint.main()
    with pytest.raises(ValueError, match="--kind: expected one of AutoencoderKL, .*, got 'UNet'"):
        convert_checkpoint.network(kind="UNet", source=str(source), out=str(out), options="{}")
