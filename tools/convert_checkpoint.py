# SPDX-License-Identifier: Apache-2.0
"""Convert published weights, once, into the form the bundles load.

    python -m tools.convert_checkpoint cxr_ldm --autoencoder autoencoder.pth --diffusion diffusion_model.pth \
        --scale_factor 0.3 --out bundles/cxr_ldm/models/model.pt
    python -m tools.convert_checkpoint brain_controlnet --autoencoder autoencoder.pth --diffusion diffusion_model.pth \
        --controlnet controlnet_model.pth --scale_factor 0.3 --out bundles/brain_controlnet/models/model.pt
    python -m tools.convert_checkpoint network --kind ControlNet --source controlnet.pth --out controlnet.pt \
        --options '{"spatial_dims": 2, "in_channels": 3, ...}'
    python -m tools.convert_checkpoint xrv --source nih-pc-chex-...-best.pt --out xrv_densenet121_all.pt \
        --sha256 DIGEST --trust_pickle True

The first three are networks of monai-generative, the last is torchxrayvision's classifier. The key
rules and the reason why MONAI's own loader is not used: `shared/checkpoints.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import monai.networks.nets
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from shared.checkpoints import KEYS, Rules, convert_state_dict, read_published
from shared.files import save_tensors, sha256_of_file
from shared.metrics.features import convert_xrv_checkpoint
from tools import command_line

_BUNDLES = Path(__file__).parents[1] / "bundles"
_CXR_CONFIG = _BUNDLES / "cxr_ldm" / "configs" / "inference.json"
_BRAIN_CONFIG = _BUNDLES / "brain_controlnet" / "configs" / "inference.json"
_BRAIN_PROMPT = _BUNDLES / "brain_controlnet" / "models" / "pretrained" / "prompt.pt"


def cxr_ldm(
    *,
    autoencoder: str,
    diffusion: str,
    out: str,
    scale_factor: float | None = None,
    config: str | Sequence[str] = str(_CXR_CONFIG),
    text_encoder: str | None = None,
) -> None:
    """Join the published chest X-ray autoencoder and U-Net into `models/model.pt` of the bundle `cxr_ldm`.

    Args:
        autoencoder: weights of the first stage (`autoencoder.pth`, or a training checkpoint).
        diffusion: weights of the second stage (`diffusion_model.pth`, or a training checkpoint).
        out: the file to write; an existing one is replaced only when the new one is complete.
        scale_factor: what the latents were multiplied with in training; 0.3 for the published weights.
        config: the bundle's configuration (or several, later ones override) with `network_def`.
        text_encoder: folder of the frozen CLIP text encoder; if given, its width is checked against the U-Net.

    Raises:
        ValueError: weights that do not fit the configuration, or no scale factor.
    """
    weights = {"scale_factor": _checked(scale_factor)}
    parser, files = _read(config)
    network_def = _resolve(parser, "network_def", files)
    unet_def = _resolve(parser, "network_def#unet", files)
    _check_text_encoder(parser, files, network_def, unet_def, text_encoder)
    for part, source in (("autoencoder", autoencoder), ("unet", diffusion)):
        _resolve(parser, f"network_def#{part}", files)
        with torch.device("meta"):  # names and shapes suffice
            network = parser.get_parsed_content(f"network_def#{part}")
        weights |= _under(part, _convert(source, network))
    _save(weights, out)


def brain_controlnet(
    *,
    autoencoder: str,
    diffusion: str,
    out: str,
    controlnet: str | Sequence[str] | None = None,
    scale_factor: float | None = None,
    prompt_weights: str = str(_BRAIN_PROMPT),
    config: str | Sequence[str] = str(_BRAIN_CONFIG),
) -> None:
    """Join published brain weights into `models/model.pt` of the bundle `brain_controlnet`.

    Args:
        autoencoder: weights of the first stage (`autoencoder.pth`, or a training checkpoint).
        diffusion: weights of the second stage (`diffusion_model.pth`, or a training checkpoint).
        out: the file to write; an existing one is replaced only when the new one is complete.
        controlnet: weights of the third stage (`controlnet_model.pth`, or a training checkpoint), a list for several
            ControlNets; None writes the file of stage 2, `models/stages/diffusion.pt`, for a ControlNet of your own.
        scale_factor: what the latents were multiplied with in training; 0.3 for the published weights.
        prompt_weights: embeddings of the null prompt and the prompt, from `python -m tools.embed_prompt`.
        config: the bundle's configuration (or several, later ones override) with `network_def`.

    Raises:
        ValueError: weights that do not fit the configuration, another number of ControlNets, or no scale factor.
        FileNotFoundError: a file is missing.
    """
    factor = _checked(scale_factor)
    if not Path(prompt_weights).is_file():
        raise FileNotFoundError(
            f"{prompt_weights}: expected the embedded prompt, found no file. The published U-Net listens to a sentence "
            "that is no part of its weights. Remedy: make it once with `python -m tools.embed_prompt --text_encoder "
            f"DIR --out {prompt_weights}`, or give yours with --prompt_weights"
        )
    parser, files = _read(config)
    _resolve(parser, "network_def", files)
    with torch.device("meta"):  # names and shapes suffice
        model = parser.get_parsed_content("network_def")

    weights = {"scale_factor": factor}
    weights |= _under("autoencoder", _convert(autoencoder, model.diffusion.autoencoder))
    weights |= _under("unet", _convert(diffusion, model.diffusion.unet))
    weights |= _under("prompt", _convert(prompt_weights, model.diffusion.prompt, rules={}))
    if controlnet is not None:
        sources = [controlnet] if isinstance(controlnet, str) else list(controlnet)
        weights = _under("diffusion", weights) | _controlnets(sources, model)
    _save(weights, out)


def _controlnets(sources: list[str], model: Any) -> dict[str, Tensor]:
    """Published ControlNets as `ControlNetModel` keeps them: the embedding of the condition apart from the rest."""
    if len(sources) != len(model.controlnets):
        raise ValueError(
            f"--controlnet: expected a file for each of the {len(model.controlnets)} ControlNets of the configuration, "
            f'got {len(sources)}. Remedy: --controlnet \'["first.pth", "second.pth"]\', or change controlnet_defs'
        )
    weights: dict[str, Tensor] = {}
    for index, (source, net) in enumerate(zip(sources, model.controlnets, strict=True)):
        net.controlnet_cond_embedding = model.embeddings[index]
        for key, value in _convert(source, net).items():
            embedding = key.removeprefix("controlnet_cond_embedding.")
            weights[f"controlnets.{index}.{key}" if embedding == key else f"embeddings.{index}.{embedding}"] = value
    return weights


@fire.decorators.SetParseFns(options=str)  # fire would read the JSON words true and false as texts
def network(*, kind: str, source: str, out: str, options: str, entry: str | None = None) -> None:
    """Convert the weights of one network.

    Args:
        kind: class name in `monai.networks.nets`, one of `shared.checkpoints.KEYS`.
        source: the published file.
        out: the file to write.
        options: JSON object (or a file with one): the arguments of the MONAI core class, e.g.
            '{"spatial_dims": 2, "channels": [64, 128], "attention_levels": [false, true]}'.
        entry: which entry of a training checkpoint to take, e.g. "discriminator"; None takes the network.

    Raises:
        ValueError: unknown class, options that do not fit it, or weights that do not fit the network.
    """
    if kind not in KEYS:
        raise ValueError(f"--kind: expected one of {', '.join(KEYS)}, got {kind!r}")
    text = Path(options).read_text() if not options.lstrip().startswith("{") else options
    try:
        arguments = json.loads(text)
        with torch.device("meta"):
            built = getattr(monai.networks.nets, kind)(**arguments)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"--options: expected a JSON object of arguments for {kind}, got {text!r} ({error})"
        ) from error
    _save(_convert(source, built, entry=entry), out)


@fire.decorators.SetParseFns(source=str, out=str, sha256=str)  # a digest may look like a number
def xrv(*, source: str, out: str, sha256: str, trust_pickle: bool = False) -> None:
    """Turn torchxrayvision's DenseNet121, a pickled module, into the plain state dict that evaluations read.

    DANGER: opening the file runs the code it holds. Do it with a file you trust, best in a throw-away environment.

    Args:
        source: the downloaded file (`python -m tools.assets fetch xrv-densenet121-all`).
        out: the file to write, models/pretrained/xrv_densenet121_all.pt of the bundle; must not exist.
        sha256: of the source, from somewhere you trust; compared before the file is opened.
        trust_pickle: must be True: your consent to run the file's code.

    Raises:
        PermissionError: no consent.
        FileNotFoundError, FileExistsError: source missing, output present.
        ValueError: another checksum, or not this network.
    """
    convert_xrv_checkpoint(source, out, sha256=sha256, trust_pickle=trust_pickle)
    _report(out)


def _checked(scale_factor: float | None) -> Tensor:
    if scale_factor is None:
        raise ValueError(
            "--scale_factor: expected a number, got none. The published files do not contain it, and a wrong one gives "
            "grey or burnt images without any error. Remedy: --scale_factor 0.3 for the published weights; "
            "for your own, the value given to the diffusion training"
        )
    if not (isinstance(scale_factor, (int, float)) and math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"--scale_factor: expected a positive number, got {scale_factor!r}")
    print(f"scale_factor: {scale_factor}")
    return torch.tensor(float(scale_factor))


def _read(config: str | Sequence[str]) -> tuple[ConfigParser, list[str]]:
    files = [config] if isinstance(config, str) else list(config)
    parser = ConfigParser()
    parser.read_config(files)
    return parser, files


def _under(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for key, value in weights.items()}


def _resolve(parser: ConfigParser, name: str, files: list[str]) -> dict[str, Any]:
    """The definition behind `name`, references followed."""
    try:
        content = parser[name]
        while isinstance(content, str) and content[:1] in "@%":
            content = parser[content[1:]]
    except (KeyError, IndexError, ValueError):
        content = None
    if not isinstance(content, dict) or "_target_" not in content:
        raise ValueError(
            f"{files[-1]}: expected the key {name} to define a network with _target_, got {content!r}. "
            "Remedy: give the bundle's own configuration with --config"
        )
    return content


def _check_text_encoder(
    parser: ConfigParser, files: list[str], network_def: dict, unet_def: dict, folder: str | None
) -> None:
    """The published U-Net listens to a frozen CLIP encoder, which is not part of the weights."""
    encoder = _resolve(parser, "network_def#text_encoder", files)
    if not str(encoder["_target_"]).endswith("FrozenClipTextEncoder"):
        raise ValueError(
            f"{files[-1]}: expected network_def#text_encoder to be FrozenClipTextEncoder, got {encoder['_target_']}, "
            "whose weights are part of model.pt and not of the published files. Remedy: give with --config a "
            "configuration for the published weights"
        )
    if folder is None:
        print("text encoder: frozen, stays in its own folder; not checked (give --text_encoder DIR to check its width)")
        return
    parser["checked_text_encoder"] = {**encoder, "folder": folder}
    width = parser.get_parsed_content("checked_text_encoder")(torch.zeros(1, 77, dtype=torch.int64)).shape[-1]
    expected = unet_def.get("cross_attention_dim")
    if isinstance(expected, int) and width != expected:
        raise ValueError(
            f"{folder}: expected a text encoder of width {expected} (network_def#unet#cross_attention_dim), got {width}"
        )
    print(f"text encoder: frozen, width {width}, from {folder}; not stored")


def _convert(
    source: str, network: nn.Module, *, entry: str | None = None, rules: Rules | None = None
) -> dict[str, Tensor]:
    published = read_published(source, entry=entry)
    try:
        converted = convert_state_dict(published, network, rules=rules)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    renamed = sum(key not in published for key in converted)
    count = sum(value.numel() for value in converted.values())
    print(
        f"{type(network).__name__}: {count / 1e6:.2f} M values in {len(converted)} tensors from {source}, "
        f"{renamed} under a new name"
    )
    return converted


def _save(weights: dict[str, Tensor], out: str) -> None:
    save_tensors(weights, out)
    _report(out)


def _report(out: str) -> None:
    print(f"saved {out} ({Path(out).stat().st_size / 1e6:.1f} MB)\nsha256 {sha256_of_file(out)}")


def main() -> None:
    """Entry point; expected errors end with their message alone."""
    commands = {"cxr_ldm": cxr_ldm, "brain_controlnet": brain_controlnet, "network": network, "xrv": xrv}
    command_line.run(commands, name="tools.convert_checkpoint")


if __name__ == "__main__":
    main()
