# SPDX-License-Identifier: Apache-2.0
"""Weights published for monai-generative 0.2.3, brought into the networks of MONAI core 1.6.

A conversion is a table of key rules, a strict check that nothing is left over on either side, and (in
`tests/test_checkpoints.py`) a number: both networks fed the same input differ by at most 1e-5.

Why not MONAI core's `load_old_state_dict`: in 1.6.1 it is silently wrong for attention without conditioning. It copies
`proj_attn` into `out_proj`, but the forward pass of monai-generative 0.2.3 never applies `proj_attn`. It also leaves
unmatched target keys at their random initial values.

Key shapes and values say nothing about `num_head_channels`, `norm_num_groups`, `norm_eps` or `prediction_type`: the
network given here must have been built with the published options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

REMEDY = "build the network with the options the weights were trained with"


@dataclass(frozen=True)
class Unapplied:
    """The rule for an output projection that the old network stored but never applied: its values are left out.

    Attributes:
        key: pattern of the layer that the new network has (and applies) in its place, if built with `include_fc=True`.
            It is made to do nothing: an identity matrix as weight, zeros as bias.
    """

    key: str


Rules = Mapping[str, "str | Unapplied"]
"""Old pattern -> new pattern. `{}` stands for one dotted part (`blocks.{}` matches `blocks.3`); the parts found on the
left fill the right in order. The first matching rule wins; a key without a rule keeps its name."""


def _attention(block: str) -> dict[str, str | Unapplied]:
    """Self-attention of `AttentionBlock`, which moved into `.attn`."""
    return {
        f"{block}.to_q.{{}}": f"{block}.attn.to_q.{{}}",
        f"{block}.to_k.{{}}": f"{block}.attn.to_k.{{}}",
        f"{block}.to_v.{{}}": f"{block}.attn.to_v.{{}}",
        f"{block}.proj_attn.{{}}": Unapplied(f"{block}.attn.out_proj.{{}}"),
    }


def _transformer(block: str) -> dict[str, str | Unapplied]:
    """Blocks of `SpatialTransformer`: `to_out` was (linear, dropout), `out_proj` is the linear layer alone."""
    layer = f"{block}.transformer_blocks.{{}}.{{}}"
    return {f"{layer}.to_out.0.{{}}": f"{layer}.out_proj.{{}}"}


_LEVEL = "{}.{}.attentions.{}"  # down_blocks.1.attentions.0
_MIDDLE = "middle_block.attention"
_UNET = {**_attention(_LEVEL), **_attention(_MIDDLE), **_transformer(_LEVEL), **_transformer(_MIDDLE)}

KEYS: dict[str, Rules] = {
    "AutoencoderKL": {
        **_attention("{}.blocks.{}"),
        "decoder.blocks.{}.conv.conv.{}": "decoder.blocks.{}.postconv.conv.{}",
    },
    "DiffusionModelUNet": {
        **_UNET,
        "up_blocks.{}.upsampler.conv.conv.{}": "up_blocks.{}.upsampler.postconv.conv.{}",
    },
    "ControlNet": _UNET,
    "VQVAE": {},
    "PatchDiscriminator": {},
    "MultiScalePatchDiscriminator": {},
}
"""monai-generative 0.2.3 -> MONAI core 1.6, by class name (the same in both). Empty: the keys did not change."""


def convert_state_dict(
    source: Mapping[str, Tensor], network: nn.Module, *, rules: Rules | None = None
) -> dict[str, Tensor]:
    """Rename the keys of a monai-generative 0.2.3 state dict to those of a MONAI core network, strictly.

    Weights already in core form pass through unchanged. Query, key and value are joined where `network` was built with
    `use_combined_linear=True`.

    Args:
        source: state dict of the old network (see `shared.checkpoint_files.read_published`); it is not changed.
        network: the new network, built with the published options. Only names, shapes and data types of its state dict
            are read, so it may live on `torch.device("meta")`.
        rules: the key rules; None looks them up in `KEYS` by the class name of `network`.

    Returns:
        A state dict for `network.load_state_dict(..., strict=True)`: same keys and order as `network.state_dict()`,
        in the data type of the network, on the device of `source`.

    Raises:
        ValueError: no rules for this class, a source key that fits nowhere, a network key left without value, or a
            shape that differs; the message names the first keys.
    """
    kind = type(network).__name__
    if rules is None:
        if kind not in KEYS:
            raise ValueError(f"{kind}: there are no key rules for this class, only for {', '.join(KEYS)}")
        rules = KEYS[kind]
    target = network.state_dict()

    found: dict[str, Tensor] = {}
    for key, value in source.items():
        new_key, applied = _apply(rules, key)
        if not applied:
            if new_key not in target:
                continue
            value = torch.eye(value.shape[0]) if value.ndim == 2 else torch.zeros(value.shape)
        if new_key in found:
            raise ValueError(f"{kind}: two source keys become {new_key}, the second is {key}")
        found[new_key] = value
    _join_query_key_value(found, target)
    check_fit(kind, found, target, _remedy)
    return {key: found[key].detach().to(like.dtype) for key, like in target.items()}


def check_fit(
    kind: str,
    found: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    remedy: Callable[[list[str], list[str]], str] = lambda missing, unused: REMEDY,
) -> None:
    """Every key used, every key filled, every shape equal; otherwise say which and what to look at.

    Args:
        kind: what the message starts with.
        found: what the source has.
        target: what the network wants.
        remedy: from the missing and the unused keys to what the user can do.

    Raises:
        ValueError: the message names the first keys of each kind that do not fit.
    """
    missing = [key for key in target if key not in found]
    unused = [key for key in found if key not in target]
    shapes = [
        f"{key} {tuple(found[key].shape)} against {tuple(like.shape)}"
        for key, like in target.items()
        if key in found and found[key].shape != like.shape
    ]
    if not (missing or unused or shapes):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of its {len(target)} keys are not in the source: {_first(missing)}")
    if unused:
        parts.append(f"{len(unused)} source keys fit nowhere: {_first(unused)}")
    if shapes:
        parts.append(f"{len(shapes)} shapes differ (source against network): {_first(shapes)}")
    raise ValueError(f"{kind}: the weights do not fit. {'; '.join(parts)}. Remedy: {remedy(missing, unused)}.")


def _remedy(missing: list[str], unused: list[str]) -> str:
    if any(".deconv." in key for key in missing):
        return "use_convtranspose=True cannot be converted: monai-generative used 3x3 kernels there, MONAI core 2x2"
    if any(key.endswith(".out_proj.weight") and "transformer_blocks" in key for key in unused):
        return "build the network with include_fc=True: its transformer blocks need their output projection"
    return REMEDY


def _join_query_key_value(found: dict[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """`use_combined_linear=True` keeps query, key and value as rows of one matrix, in this order."""
    for key in target:
        block, _, leaf = key.rpartition(".qkv.")
        parts = [f"{block}.to_{x}.{leaf}" for x in "qkv"]
        if block and all(part in found for part in parts):
            found[key] = torch.cat([found.pop(part) for part in parts])


def _match(pattern: str, key: str) -> tuple[str, ...] | None:
    expression = r"([^.]+)".join(re.escape(part) for part in pattern.split("{}"))
    match = re.fullmatch(expression, key)
    return match.groups() if match else None


def _apply(rules: Rules, key: str) -> tuple[str, bool]:
    """The new key, and whether the old network applied the layer."""
    for old, new in rules.items():
        parts = _match(old, key)
        if parts is not None:
            return (new.key.format(*parts), False) if isinstance(new, Unapplied) else (new.format(*parts), True)
    return key, True


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
