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

The first three are networks of monai-generative, the fourth is torchxrayvision's classifier. The key
rules and the reason why MONAI's own loader is not used: `shared/checkpoints.py`.

    python -m tools.convert_checkpoint kl_f8 --source model.ckpt --out bundles/sdseg/models/stages/autoencoder.pt
    python -m tools.convert_checkpoint diffusers_autoencoder --source diffusion_pytorch_model.safetensors --out ...
    python -m tools.convert_checkpoint ldm_unet --source model.ckpt --out bundles/sdseg/models/stages/unet.pt
    python -m tools.convert_checkpoint sdseg --source last.ckpt --out bundles/sdseg/models/model.pt

These are latent diffusion and SDSeg: `tools/convert_latent_diffusion.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import monai.networks.nets
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from shared.checkpoints import KEYS
from shared.metrics.features import convert_xrv_checkpoint
from tools import command_line, convert_latent_diffusion
from tools.conversion import (
    BUNDLES,
    checked_scale_factor,
    convert,
    definition,
    read_config,
    report,
    save,
    under,
)

_CXR_CONFIG = BUNDLES / "cxr_ldm" / "configs" / "inference.json"
_BRAIN_CONFIG = BUNDLES / "brain_controlnet" / "configs" / "inference.json"
_BRAIN_PROMPT = BUNDLES / "brain_controlnet" / "models" / "pretrained" / "prompt.pt"


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
    weights = {"scale_factor": checked_scale_factor(scale_factor)}
    parser, files = read_config(config)
    network_def = definition(parser, "network_def", files)
    unet_def = definition(parser, "network_def#unet", files)
    _check_text_encoder(parser, files, network_def, unet_def, text_encoder)
    for part, source in (("autoencoder", autoencoder), ("unet", diffusion)):
        definition(parser, f"network_def#{part}", files)
        with torch.device("meta"):  # names and shapes suffice
            network = parser.get_parsed_content(f"network_def#{part}")
        weights |= under(part, convert(source, network))
    save(weights, out)


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
    factor = checked_scale_factor(scale_factor)
    if not Path(prompt_weights).is_file():
        raise FileNotFoundError(
            f"{prompt_weights}: expected the embedded prompt, found no file. The published U-Net listens to a sentence "
            "that is no part of its weights. Remedy: make it once with `python -m tools.embed_prompt --text_encoder "
            f"DIR --out {prompt_weights}`, or give yours with --prompt_weights"
        )
    parser, files = read_config(config)
    definition(parser, "network_def", files)
    with torch.device("meta"):  # names and shapes suffice
        model = parser.get_parsed_content("network_def")

    weights = {"scale_factor": factor}
    weights |= under("autoencoder", convert(autoencoder, model.diffusion.autoencoder))
    weights |= under("unet", convert(diffusion, model.diffusion.unet))
    weights |= under("prompt", convert(prompt_weights, model.diffusion.prompt, rules={}))
    if controlnet is not None:
        sources = [controlnet] if isinstance(controlnet, str) else list(controlnet)
        weights = under("diffusion", weights) | _controlnets(sources, model)
    save(weights, out)


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
        for key, value in convert(source, net).items():
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
    save(convert(source, built, entry=entry), out)


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
    report(out)


def _check_text_encoder(
    parser: ConfigParser, files: list[str], network_def: dict, unet_def: dict, folder: str | None
) -> None:
    """The published U-Net listens to a frozen CLIP encoder, which is not part of the weights."""
    encoder = definition(parser, "network_def#text_encoder", files)
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


def main() -> None:
    """Entry point; expected errors end with their message alone."""
    commands = {
        "cxr_ldm": cxr_ldm,
        "brain_controlnet": brain_controlnet,
        "network": network,
        "xrv": xrv,
        **convert_latent_diffusion.COMMANDS,
    }
    command_line.run(commands, name="tools.convert_checkpoint")


if __name__ == "__main__":
    main()
