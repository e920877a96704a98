# SPDX-License-Identifier: Apache-2.0
"""Key tables of published latent diffusion: CompVis (arXiv:2112.10752), SDSeg (arXiv:2406.18361), diffusers.

The tables follow from the networks given, part by part, so they hold for every width and depth. Keys and shapes say
nothing about `num_heads` (beyond the order of rows), `norm_num_groups` and dropout: build the network with the
published options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from monai.networks.nets.autoencoderkl import Decoder, Encoder
from torch import Tensor, nn

from shared.checkpoint_origins import Origin
from shared.networks.film_unet import FiLMUNet
from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.vision_encoder import VisionEncoder


@dataclass(frozen=True)
class Layout:
    """How a program names the parts of the autoencoder.

    Attributes:
        resblock, attention, resample: with `{side}` "down" or "up", `{level}` counted from the finest, `{depth}` in the
            order of computation and `{index}` within the level.
        middle: the three blocks in the middle.
        norm_out: the last normalisation.
        shortcut: the 1x1 convolution of a residual block.
        attention_layers: normalisation, query, key, value, output projection.
    """

    resblock: str
    attention: str
    resample: str
    middle: tuple[str, str, str]
    norm_out: str
    shortcut: str
    attention_layers: tuple[str, str, str, str, str]

    @property
    def layers(self) -> dict[str, str]:
        """Module inside one of MONAI's blocks -> its name inside the published block."""
        ours = ("norm", "attn.to_q", "attn.to_k", "attn.to_v", "attn.out_proj")
        return {
            "": "", "conv": "", "conv.conv": "", "postconv.conv": "",
            "norm1": "norm1", "conv1.conv": "conv1", "norm2": "norm2", "conv2.conv": "conv2",
            "nin_shortcut.conv": self.shortcut, **dict(zip(ours, self.attention_layers, strict=True)),
        }  # fmt: skip


COMPVIS = Layout(
    resblock="{side}.{level}.block.{index}",
    attention="{side}.{level}.attn.{index}",
    resample="{side}.{level}.{side}sample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    shortcut="nin_shortcut",
    attention_layers=("norm", "q", "k", "v", "proj_out"),
)
DIFFUSERS = Layout(
    resblock="{side}_blocks.{depth}.resnets.{index}",
    attention="{side}_blocks.{depth}.attentions.{index}",
    resample="{side}_blocks.{depth}.{side}samplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    attention_layers=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
)
OLD_DIFFUSERS = Layout(
    **{**DIFFUSERS.__dict__, "attention_layers": ("group_norm", "query", "key", "value", "proj_attn")}
)
"""Of diffusers before 0.12 (January 2023), in which most files on hubs were written."""


def autoencoder_table(network: KLAutoencoder, layout: Layout = COMPVIS) -> dict[str, Origin]:
    """Published autoencoder (keys `encoder.`, `decoder.`, `quant_conv.`, `post_quant_conv.`) to `KLAutoencoder`."""
    table = _side("encoder", network.encoder, layout) | _side("decoder", network.decoder, layout)
    for leaf in ("weight", "bias"):
        for part, name in enumerate(("quant_conv_mu", "quant_conv_log_sigma")):
            table[f"{name}.conv.{leaf}"] = Origin(f"quant_conv.{leaf}", part=part, parts=2)
        table[f"post_quant_conv.conv.{leaf}"] = Origin(f"post_quant_conv.{leaf}")
    return table


def vision_encoder_table(network: VisionEncoder) -> dict[str, Origin]:
    """SDSeg's condition encoder (keys `encoder.`, `out.`) to `VisionEncoder`."""
    head = {f"head.{leaf}": Origin(f"out.{leaf}") for leaf in ("weight", "bias")}
    return _side("encoder", network.encoder, COMPVIS) | head


def unet_table(network: FiLMUNet) -> dict[str, Origin]:
    """CompVis U-Net (keys `input_blocks.`, `middle_block.`, `output_blocks.`, ...) to `FiLMUNet`.

    Label embedding only if `network` has one.
    """
    table = {
        **_leaves("time_embed", network.time_embed, {"0": "time_embed.0", "2": "time_embed.2"}),
        **_leaves("conv_in", network.conv_in, {"": "input_blocks.0.0"}),
        **_leaves("norm_out", network.norm_out, {"": "out.0"}),
        **_leaves("conv_out", network.conv_out, {"": "out.2"}),
    }
    if network.class_embedding is not None:
        table["class_embedding.weight"] = Origin("label_emb.weight")
    stages = [(f"down.{n}", [f"input_blocks.{n + 1}.{i}" for i in range(2)]) for n in range(len(network.down))]
    # The middle is one sequence of block, attention, block with the published program.
    stages += [("middle.0", ["middle_block.0", "middle_block.1"]), ("middle.1", ["middle_block.2"])]
    stages += [(f"up.{n}", [f"output_blocks.{n}.{i}" for i in range(3)]) for n in range(len(network.up))]
    for ours, theirs in stages:
        table |= _stage(ours, network.get_submodule(ours), theirs, network.num_heads)
    return table


_RESBLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}


def _stage(ours: str, stage: nn.Module, places: list[str], heads: int) -> dict[str, Origin]:
    """One place in the published sequence for each part that there is, in this order."""
    table: dict[str, Origin] = {}
    places = list(places)
    for part in ("resblock", "attention", "upsample"):
        module = getattr(stage, part)
        if module is None:
            continue
        place = places.pop(0)
        if part != "attention":
            names = {layer: f"{place}.{name}" for layer, name in _RESBLOCK.items()}
            table |= _leaves(f"{ours}.{part}", module, names)
            continue
        names = {"norm": f"{place}.norm", "attn.out_proj": f"{place}.proj_out"}
        table |= _leaves(f"{ours}.{part}", module, names)
        for index, letter in enumerate("qkv"):
            for leaf in ("weight", "bias"):
                origin = Origin(f"{place}.qkv.{leaf}", part=index, parts=3, heads=heads)
                table[f"{ours}.{part}.attn.to_{letter}.{leaf}"] = origin
    return table


def _side(name: str, side: nn.Module, layout: Layout) -> dict[str, Origin]:
    assert isinstance(side, (Encoder, Decoder))
    names = list(_block_names(side, layout))
    if len(names) != len(side.blocks):
        raise ValueError(
            f"with_{name}_nonlocal_attn: expected true, as in every published autoencoder, got a network without"
        )
    table: dict[str, Origin] = {}
    for index, (block, theirs) in enumerate(zip(side.blocks, names, strict=True)):
        inside = {ours: f"{name}.{theirs}" + (f".{layer}" if layer else "") for ours, layer in layout.layers.items()}
        table |= _leaves(f"{name}.blocks.{index}", block, inside)
    return table


def _block_names(side: Encoder | Decoder, layout: Layout) -> Iterator[str]:
    """The published name of each block, in MONAI's order."""
    levels = range(len(side.channels))
    down = isinstance(side, Encoder)
    yield "conv_in"
    if not down:
        yield from layout.middle
    for depth in levels:
        level = depth if down else len(levels) - 1 - depth
        place = {"side": "down" if down else "up", "level": level, "depth": depth}
        for index in range(side.num_res_blocks[level]):
            yield layout.resblock.format(**place, index=index)
            if side.attention_levels[level]:
                yield layout.attention.format(**place, index=index)
        if depth < len(levels) - 1:
            yield layout.resample.format(**place)
    if down:
        yield from layout.middle
    yield layout.norm_out
    yield "conv_out"


def _leaves(ours: str, module: nn.Module, names: Mapping[str, str]) -> dict[str, Origin]:
    """Origins of all weights of `module`, by the published name of each of its layers.

    A layer without a published name is left out, for `convert_by_table` to name.
    """
    table = {}
    for key in module.state_dict():
        layer, _, leaf = key.rpartition(".")
        if layer in names:
            table[f"{ours}.{key}"] = Origin(f"{names[layer]}.{leaf}")
    return table


# ----------------------------------------------------------------------------------------------------------------------
# whole checkpoints
# ----------------------------------------------------------------------------------------------------------------------
AUTOENCODER, CONDITION, UNET, EMA = "first_stage_model.", "cond_stage_model.", "model.diffusion_model.", "model_ema."
COUNTERS = ("model_ema.decay", "model_ema.num_updates")
SCALE_FACTOR = "scale_factor"
LOSS = "loss."
"""Perceptual network and discriminator, which the training of the autoencoder saves with it."""
SCHEDULE = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
})  # fmt: skip
"""Of the noise schedule, which our configuration holds; `logvar` is a weight of the loss, 0 in all published runs."""


def part_of(state: Mapping[str, Tensor], prefix: str, *, inert: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors under `prefix`, without it, to be converted strictly.

    Args:
        state: a whole checkpoint.
        prefix: of one network; "" takes all.
        inert: beginnings of the keys that are known to hold nothing of this network, beyond the noise schedule. What
            is neither these nor under `prefix` stays, marked, so that a strict conversion names it.
    """
    part = {}
    for key, value in state.items():
        if key.startswith(prefix):
            part[key.removeprefix(prefix)] = value
        elif key not in SCHEDULE and not key.startswith(inert):
            part[f"{key} (not under {prefix})"] = value
    return part


def with_averages(state: Mapping[str, Tensor], *, ema: bool | None = None) -> tuple[dict[str, Tensor], bool]:
    """Put the exponential moving average of the U-Net in the place of its weights of the last step.

    The published program averages the U-Net alone (SDSeg's vision encoder has no average) and keeps the averages under
    the names of the weights without their dots.

    Args:
        state: a whole checkpoint.
        ema: true requires averages, false leaves them out, None takes them if there are any.

    Returns:
        The checkpoint without the averages' own keys, and whether they were used.

    Raises:
        ValueError: no averages though required, a weight without average, or an average without weight.
    """
    averages = {key: value for key, value in state.items() if key.startswith(EMA) and key not in COUNTERS}
    result = {key: value for key, value in state.items() if not key.startswith(EMA)}
    if ema is False or not averages:
        if ema:
            raise ValueError(f"{EMA}: expected averages of the U-Net, found none; --ema False takes the last weights")
        return result, False
    names = {key: EMA + key.removeprefix("model.").replace(".", "") for key in result if key.startswith(UNET)}
    alone = sorted(set(names.values()) ^ set(averages))
    if alone or len(set(names.values())) != len(names):
        raise ValueError(
            f"{EMA}: expected one average for each weight of the U-Net, but {alone[0] if alone else 'two share one'} "
            "stands alone. Remedy: --ema False takes the weights of the last step"
        )
    return {**result, **{key: averages[name] for key, name in names.items()}}, True
