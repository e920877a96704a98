# SPDX-License-Identifier: Apache-2.0
"""Published files become the weights of the bundle `sdseg`, whose outputs agree with the published networks to 1e-5."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from shared.networks.segmentation import SegmentationModel
from shared.weights import load_weights
from tests import compvis_reference as published
from tests.conftest import ROOT
from tools import convert_checkpoint, convert_latent_diffusion

CONFIGS = ROOT / "bundles" / "sdseg" / "configs"
SCALE_FACTOR = 0.1267  # 1 / 7.8957, spec sdseg 3.4


def schedule(beta_end: float = 0.0155) -> dict[str, torch.Tensor]:
    betas = torch.linspace(0.0015**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
    return {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float(), "logvar": torch.zeros(1000)}


def averages(unet: published.State) -> published.State:
    shadow = {f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in unet.items()}
    return {**shadow, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(70000)}


def under(prefix: str, state: published.State) -> published.State:
    return {f"{prefix}{key}": value for key, value in state.items()}


class Published:
    """Random weights in the published layout, at the width of tiny.json."""

    def __init__(self, folder: Path, classes: int | None = None) -> None:
        self.folder = folder
        self.config = [str(CONFIGS / "inference.json"), str(CONFIGS / "tiny.json")]
        parser = self.parser()
        sizes, unet = parser["autoencoder_def"], parser["unet_def"]
        channels, blocks = sizes["channels"], sizes["num_res_blocks"]
        self.unet_options = {"blocks": unet["num_res_blocks"], "classes": classes}
        self.unet_sizes = unet["channels"], unet["attention_levels"]
        self.groups, self.unet_groups, self.heads = sizes["norm_num_groups"], unet["norm_num_groups"], unet["num_heads"]
        self.autoencoder = published.random_state(published.autoencoder_shapes(channels, blocks), 1)
        condition = published.encoder_shapes(channels, blocks)
        published.conv(condition, "out", 8, 4, 1, 1)
        self.condition = published.random_state(condition, 2)
        self.last = self.unet(3)
        self.averaged = self.unet(4)

    def unet(self, seed: int, inputs: int = 8) -> published.State:
        shapes = published.unet_shapes(*self.unet_sizes, inputs=inputs, **self.unet_options)  # type: ignore[arg-type]
        return published.random_state(shapes, seed)

    def parser(self, *more: str) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config([*self.config, *more])
        return parser

    def sdseg(self) -> published.State:
        return {
            **schedule(),
            "scale_factor": torch.tensor(SCALE_FACTOR),
            **under("model.diffusion_model.", self.last),
            **averages(self.averaged),
            **under("first_stage_model.", self.autoencoder),
            **under("cond_stage_model.", self.condition),
        }

    def save(self, state: published.State, name: str = "last.ckpt") -> str:
        """As PyTorch Lightning saves it, optimiser included."""
        content = {"epoch": 3, "global_step": 70000, "state_dict": state, "optimizer_states": [{"state": {}}]}
        torch.save(content, self.folder / name)
        return str(self.folder / name)

    def convert(self, command: str, source: str, **options: Any) -> published.State:
        out = self.folder / f"{command}.pt"
        options = {"config": self.config, **options}
        convert_latent_diffusion.COMMANDS[command](source=source, out=str(out), **options)
        return torch.load(out, weights_only=True)

    def model(self, **overrides: Any) -> SegmentationModel:
        parser = self.parser()
        parser.update(overrides)
        return parser.get_parsed_content("network_def").eval()


@pytest.fixture
def files(tmp_path: Path) -> Published:
    return Published(tmp_path)


def reference_noise(files: Published, unet: published.State, image: torch.Tensor, noisy: torch.Tensor, **labels: Any):
    encoder = published.Autoencoder(files.condition, files.groups)
    condition = encoder.conv("out", encoder.encoder(2 * image - 1))
    levels, blocks = len(files.unet_sizes[0]), files.unet_options["blocks"]
    network = published.UNet(unet, groups=files.unet_groups, heads=files.heads, levels=levels, blocks=blocks)
    return network(torch.cat([noisy, condition], dim=1), torch.tensor([3, 999]), **labels)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand((2, 3, 48, 64), generator=generator), torch.randn((2, 4, 12, 16), generator=generator)


@torch.no_grad()
def test_a_whole_checkpoint_runs_as_published(files: Published, capsys: pytest.CaptureFixture[str]):
    weights = files.convert("sdseg", files.save(files.sdseg()))
    printed = capsys.readouterr().out
    assert "U-Net: exponential moving average over 70000 steps" in printed
    assert hashlib.sha256((files.folder / "sdseg.pt").read_bytes()).hexdigest() in printed
    assert "num_classes" not in printed
    model = files.model()
    load_weights(model, files.folder / "sdseg.pt")
    assert set(weights) == set(model.state_dict())
    assert model.scale_factor.item() == pytest.approx(SCALE_FACTOR)

    image, noisy = inputs()
    expected = reference_noise(files, files.averaged, image, noisy)
    assert expected.std() > 0.1, "the comparison would be blind"
    ours = model(image, noisy, torch.tensor([3, 999]))
    assert (ours - expected).abs().max() <= 1e-5
    decoder = published.Autoencoder(files.autoencoder, files.groups)
    decoded = (decoder.decode(noisy / SCALE_FACTOR) + 1) / 2
    assert (model.decode(noisy) - decoded).abs().max() <= 1e-5
    assert model(image).shape == (2, 1, 48, 64)

    # Negative control: the weights of the last step are others, and so is their output.
    last = files.convert("sdseg", files.save(files.sdseg()), ema=False)
    assert "weights of the last step" in capsys.readouterr().out
    model.load_state_dict(last, strict=True)
    assert (model(image, noisy, torch.tensor([3, 999])) - expected).abs().max() > 1e-2
    expected = reference_noise(files, files.last, image, noisy)
    assert (model(image, noisy, torch.tensor([3, 999])) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_several_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = Published(tmp_path, classes=9)
    files.convert("sdseg", files.save(files.sdseg()))
    assert "num_classes: 9; give --num_classes 9" in capsys.readouterr().out
    model = files.model(num_classes=9)
    load_weights(model, files.folder / "sdseg.pt")
    image, noisy = inputs()
    labels = torch.tensor([0, 8])
    expected = reference_noise(files, files.averaged, image, noisy, labels=labels)
    ours = model(image, noisy, torch.tensor([3, 999]), class_labels=labels)
    assert (ours - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"sdseg.pt: .*unet.class_embedding.weight is not part of the network"):
        load_weights(files.model(), files.folder / "sdseg.pt")


@torch.no_grad()
def test_the_autoencoder_alone_and_inside_others(files: Published):
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(64, 3, 4, 4)}
    alone = files.convert("kl_f8", files.save({**files.autoencoder, **loss}))
    network: Any = files.model().autoencoder
    network.load_state_dict(alone, strict=True)
    image = inputs()[0]
    mean, _ = published.Autoencoder(files.autoencoder, files.groups).encode(2 * image - 1)
    assert (network.encode(image)[0] - mean).abs().max() <= 1e-5
    inside = [
        {**files.sdseg(), **under("first_stage_model.", loss)},
        {**files.autoencoder, "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())},
    ]
    for state in inside:
        other = files.convert("kl_f8", files.save(state))
        assert all(torch.equal(other[key], value) for key, value in alone.items())
    assert "encoder.blocks.0.conv.weight" in alone


@torch.no_grad()
def test_an_autoencoder_of_diffusers(files: Published):
    from safetensors.torch import save_file

    from shared.checkpoint_origins import convert_by_table
    from shared.checkpoints_latent_diffusion import DIFFUSERS, OLD_DIFFUSERS, autoencoder_table

    network: Any = files.model().autoencoder
    state = network.state_dict()
    for name, layout in (("new.safetensors", DIFFUSERS), ("old.bin", OLD_DIFFUSERS)):
        table = autoencoder_table(network, layout)
        source: dict[str, torch.Tensor] = {}
        for key, origin in table.items():
            source[origin.key] = torch.cat([source[origin.key], state[key]]) if origin.part else state[key]
        path = files.folder / name
        save_file(source, path) if path.suffix == ".safetensors" else torch.save(source, path)
        converted = files.convert("diffusers_autoencoder", str(path))
        assert all(torch.equal(converted[key], value) for key, value in state.items())
        assert all(torch.equal(value, convert_by_table(source, network, table)[key]) for key, value in state.items())
    with pytest.raises(ValueError, match=r"last.ckpt: KLAutoencoder: the weights do not fit.*fit nowhere"):
        files.convert("diffusers_autoencoder", files.save(files.autoencoder))


@torch.no_grad()
def test_an_unconditional_unet_starts_a_training(files: Published):
    """Four input channels, as LSUN churches has them; the training adds those of the condition."""
    unet, averaged = files.unet(6, inputs=4), files.unet(7, inputs=4)
    state = {
        **schedule(), "scale_factor": torch.tensor(0.2), **under("model.diffusion_model.", unet), **averages(averaged),
        **under("first_stage_model.", files.autoencoder),
    }  # fmt: skip
    converted = files.convert("ldm_unet", files.save(state))
    assert converted["conv_in.weight"].shape[1] == 4
    network: Any = files.model().unet
    load_weights(network, files.folder / "ldm_unet.pt", adapt=network.widened)
    image, noisy = inputs()
    timesteps = torch.tensor([3, 999])
    levels, blocks = len(files.unet_sizes[0]), files.unet_options["blocks"]
    options: dict[str, Any] = {
        "groups": files.unet_groups, "heads": files.heads, "levels": levels, "blocks": blocks,
    }  # fmt: skip
    expected = published.UNet(averaged, **options)(noisy, timesteps)
    assert (network(torch.cat([noisy, image[:, :1, :12, :16].expand(-1, 4, -1, -1)], 1), timesteps) - expected).abs(
    ).max() <= 1e-5  # fmt: skip

    # The raw weights: asked for, or all that a pruned file has, under any of the usual prefixes.
    raw = files.convert("ldm_unet", files.save(state), ema=False)
    for prefix in ("model.diffusion_model.", "diffusion_model.", ""):
        pruned = files.convert("ldm_unet", files.save(under(prefix, unet)))
        assert all(torch.equal(pruned[key], value) for key, value in raw.items())
    assert not torch.equal(raw["conv_in.weight"], converted["conv_in.weight"])
    with pytest.raises(ValueError, match=r"last.ckpt: model_ema.: expected averages of the U-Net, found none"):
        files.convert("ldm_unet", files.save(unet), ema=True)


def test_what_does_not_fit_is_explained(files: Published):
    state = files.sdseg()
    out = files.folder / "sdseg.pt"
    cases = [
        ({"intruder": torch.ones(1)}, r"last.ckpt: .* fit nowhere: intruder \(not under first_stage_model.\)"),
        ({"cond_stage_model.out.bias": None}, r"last.ckpt: VisionEncoder: .* not in the source: out.bias"),
        ({"model_ema.diffusion_modelout2bias": None}, r"last.ckpt: model_ema.: .*model_ema.diffusion_modelout2bias s"),
        ({"scale_factor": None}, r"last.ckpt: expected the scale factor .*, got None"),
        ({"scale_factor": torch.tensor(float("nan"))}, r"last.ckpt: expected the scale factor .*, got nan"),
        (schedule(0.0195), r"last.ckpt: expected the noise schedule of .*tiny.json with 1000 steps .* 0.000669, got"),
        ({"first_stage_model.quant_conv.bias": torch.ones(6)}, r"quant_conv.bias\[1/2\] \(3,\) against \(4,\)"),
    ]
    for change, message in cases:
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            files.convert("sdseg", files.save(changed))
    with pytest.raises(ValueError, match=r"last.ckpt: KLAutoencoder: .*shapes differ"):
        files.convert("sdseg", files.save(state), config=str(CONFIGS / "inference.json"))
    with pytest.raises(FileNotFoundError, match=r"absent.ckpt: no such file"):
        files.convert("kl_f8", str(files.folder / "absent.ckpt"))
    (files.folder / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"empty.json: expected the key network_def#autoencoder to define"):
        files.convert("kl_f8", files.save(files.autoencoder), config=str(files.folder / "empty.json"))
    assert not out.exists()


def test_a_file_without_the_schedule_is_converted_and_says_so(files: Published, capsys: pytest.CaptureFixture[str]):
    state = {key: value for key, value in files.sdseg().items() if key not in schedule()}
    files.convert("sdseg", files.save(state))
    assert "noise schedule: not in the file, not checked" in capsys.readouterr().out


def test_on_the_command_line(files: Published, monkeypatch: pytest.MonkeyPatch):
    source, out = files.save(files.sdseg()), files.folder / "model.pt"
    words = ["convert_checkpoint", "sdseg", "--source", source, "--out", str(out), "--config", json.dumps(files.config)]
    monkeypatch.setattr("sys.argv", [*words, "--ema", "False"])
    convert_checkpoint.main()
    weights = torch.load(out, weights_only=True)
    assert torch.equal(weights["unet.conv_in.weight"], files.last["input_blocks.0.0.weight"])
    monkeypatch.setattr("sys.argv", [*words, "--emma", "False"])
    with pytest.raises(SystemExit, match=r"^--emma: expected an option .*did you mean --ema\?"):
        convert_checkpoint.main()
