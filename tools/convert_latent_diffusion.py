# SPDX-License-Identifier: Apache-2.0
"""Convert weights of latent diffusion (arXiv:2112.10752), SDSeg (arXiv:2406.18361) and diffusers for `sdseg`.

Commands of `python -m tools.convert_checkpoint`. The files may be training checkpoints of PyTorch Lightning: what they
hold besides tensors is replaced by inert placeholders, so no code of the file is run and no package of it needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from shared.checkpoint_files import read_published
from shared.checkpoint_origins import Origin, convert_by_table
from shared.checkpoints_latent_diffusion import (
    AUTOENCODER,
    COMPVIS,
    CONDITION,
    COUNTERS,
    DIFFUSERS,
    EMA,
    LOSS,
    OLD_DIFFUSERS,
    SCALE_FACTOR,
    UNET,
    autoencoder_table,
    part_of,
    unet_table,
    vision_encoder_table,
    with_averages,
)
from tools.conversion import BUNDLES, definition, read_config, save, summarize, under

_CONFIG = str(BUNDLES / "sdseg" / "configs" / "inference.json")
_DOTLESS_UNET = UNET.removeprefix("model.")
# The published schedule is computed in double precision, ours in single.
_SCHEDULE_TOLERANCE = 1e-5


def kl_f8(*, source: str, out: str, config: str | Sequence[str] = _CONFIG) -> None:
    """The published autoencoder of latent diffusion, or that inside a latent or Stable Diffusion checkpoint.

    Args:
        source: `model.ckpt` of kl-f8, or of anything that holds an autoencoder of this architecture.
        out: the file to write, `models/stages/autoencoder.pt` of the bundle.
        config: the bundle's configuration (or several, later ones override) with `network_def`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that do not fit the configuration.
    """
    state = read_published(source, placeholders=True)
    network = _network(config, "autoencoder")
    save(_autoencoder(source, state, network), out)


def diffusers_autoencoder(*, source: str, out: str, config: str | Sequence[str] = _CONFIG) -> None:
    """An `AutoencoderKL` of diffusers, e.g. the folder `vae` of Stable Diffusion.

    Args:
        source: `diffusion_pytorch_model.safetensors` or `.bin`, with the names of attention layers of any release.
        out: the file to write, `models/stages/autoencoder.pt` of the bundle.
        config: the bundle's configuration (or several, later ones override) with `network_def`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that do not fit the configuration.
    """
    state = read_published(source)
    network = _network(config, "autoencoder")
    old = any(".mid_block.attentions.0.query." in key for key in state)
    table = autoencoder_table(network, OLD_DIFFUSERS if old else DIFFUSERS)
    save(_converted(source, state, network, table), out)


def ldm_unet(*, source: str, out: str, ema: bool | None = None, config: str | Sequence[str] = _CONFIG) -> None:
    """The U-Net of an unconditional latent diffusion model, from which the training of SDSeg starts.

    The file keeps the published number of input channels; the training adds those of the condition.

    Args:
        source: `model.ckpt`, e.g. of LSUN churches.
        out: the file to write, `models/stages/unet.pt` of the bundle.
        ema: True requires the averaged weights, False takes those of the last step, None the average if there is one.
        config: the bundle's configuration (or several, later ones override) with `network_def`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that do not fit the configuration.
    """
    state = _averaged(source, read_published(source, placeholders=True), ema)
    save(_unet(source, state, config, inert=(AUTOENCODER, CONDITION, SCALE_FACTOR)), out)


def sdseg(*, source: str, out: str, ema: bool | None = None, config: str | Sequence[str] = _CONFIG) -> None:
    """A whole checkpoint of SDSeg.

    Args:
        source: a checkpoint of its training, with autoencoder, vision encoder, U-Net and scale factor.
        out: the file to write, `models/model.pt` of the bundle.
        ema: True requires the averaged U-Net, False takes that of the last step, None the average if there is one. The
            vision encoder is that of the last step always, as published: it has no average.
        config: the bundle's configuration (or several, later ones override) with `network_def`; the number of classes
            is that of the checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights or noise schedule that do not fit the configuration, or no scale factor.
    """
    state = _averaged(source, read_published(source, placeholders=True), ema)
    factor = state.get(SCALE_FACTOR)
    if factor is None or factor.numel() != 1 or not (torch.isfinite(factor).all() and factor.item() > 0):
        raise ValueError(f"{source}: expected the scale factor of the latents (a positive number), got {factor}")
    _check_schedule(source, state, config)
    weights = {"scale_factor": factor.detach().float().reshape(())}
    autoencoder = _network(config, "autoencoder")
    weights |= under("autoencoder", _autoencoder(source, state, autoencoder))
    weights |= under("unet", _unet(source, state, config, inert=(AUTOENCODER, CONDITION, SCALE_FACTOR)))
    encoder = _network(config, "vision_encoder")
    condition = part_of(state, CONDITION, inert=(AUTOENCODER, UNET, SCALE_FACTOR))
    weights |= under("vision_encoder", _converted(source, condition, encoder, vision_encoder_table(encoder)))
    print(f"scale_factor: {factor.item():.6g}")
    classes = weights.get("unet.class_embedding.weight")
    if classes is not None:
        print(f"num_classes: {len(classes)}; give --num_classes {len(classes)} whenever you use these weights")
    save(weights, out)


COMMANDS: dict[str, Callable[..., None]] = {
    "kl_f8": kl_f8,
    "diffusers_autoencoder": diffusers_autoencoder,
    "ldm_unet": ldm_unet,
    "sdseg": sdseg,
}


def _network(config: str | Sequence[str], part: str, **options: Any) -> Any:
    """`network_def#part` without storage, with `options` in the place of its own."""
    parser, files = read_config(config)
    parser["converted"] = {**definition(parser, f"network_def#{part}", files), **options}
    with torch.device("meta"):
        return parser.get_parsed_content("converted")


def _converted(
    source: str, state: Mapping[str, Tensor], network: nn.Module, table: Mapping[str, Origin]
) -> dict[str, Tensor]:
    try:
        converted = convert_by_table(state, network, table)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    summarize(network, converted, state, source)
    return converted


def _autoencoder(source: str, state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    prefix = AUTOENCODER if any(key.startswith(AUTOENCODER) for key in state) else ""
    inert = (UNET, CONDITION, EMA, SCALE_FACTOR)
    part = part_of(state, prefix, inert=inert)
    # An autoencoder published with its average in the place of the weights keeps the counters.
    part = {key: value for key, value in part.items() if not key.startswith(LOSS) and key not in COUNTERS}
    return _converted(source, part, network, autoencoder_table(network, COMPVIS))


def _unet(
    source: str, state: Mapping[str, Tensor], config: str | Sequence[str], *, inert: tuple[str, ...]
) -> dict[str, Tensor]:
    prefixes = (UNET, _DOTLESS_UNET)  # without "model." where the file holds nothing else
    prefix = next((name for name in prefixes if any(key.startswith(name) for key in state)), "")
    part = part_of(state, prefix, inert=inert)
    options: dict[str, Any] = {"cross_attention_dim": None, "num_classes": None}
    first, labels = part.get("input_blocks.0.0.weight"), part.get("label_emb.weight")
    if first is not None:
        options["in_channels"] = first.shape[1]
    if labels is not None:
        options["num_classes"] = labels.shape[0]
    network = _network(config, "unet", **options)
    return _converted(source, part, network, unet_table(network))


def _averaged(source: str, state: dict[str, Tensor], ema: bool | None) -> dict[str, Tensor]:
    updates = state.get(COUNTERS[1])
    try:
        state, used = with_averages(state, ema=ema)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    steps = "" if updates is None else f" over {int(updates)} steps"
    print(f"U-Net: exponential moving average{steps}" if used else "U-Net: weights of the last step, no average")
    return state


def _check_schedule(source: str, state: Mapping[str, Tensor], config: str | Sequence[str]) -> None:
    """The noise levels the weights were trained with must be those of the configuration; else masks are wrong."""
    published = state.get("alphas_cumprod")
    if published is None:
        print("noise schedule: not in the file, not checked")
        return
    parser, files = read_config(config)
    scheduler = _scheduler(parser, files)
    ours = scheduler.alphas_cumprod.double()
    if ours.shape != published.shape or (ours - published.double()).abs().max() > _SCHEDULE_TOLERANCE:
        raise ValueError(
            f"{source}: expected the noise schedule of {files[-1]} with {len(ours)} steps ending at alpha_bar "
            f"{ours[-1].item():.6f}, got {len(published)} steps ending at {published[-1].item():.6f}. "
            "Remedy: set noise_schedule to the one of the checkpoint"
        )


def _scheduler(parser: ConfigParser, files: list[str]) -> Any:
    parser["converted"] = definition(parser, "network_def#scheduler", files)
    return parser.get_parsed_content("converted")
