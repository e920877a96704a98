# SPDX-License-Identifier: Apache-2.0
"""Keys and values of cross-attention, computed once for a context that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from monai.networks.blocks import CrossAttentionBlock
from torch import nn


class _LastProjection:
    """A linear layer's ``forward`` that remembers its last result, and returns it while its input stays the same.

    The same means the same numbers in the same memory. That the input is kept, so that its memory cannot be given to
    another tensor, and that torch counts writes, makes this certain without comparing any numbers: a view that is
    expanded anew in every step is recognised, a changed, another or a differently shaped context is not.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.plain = layer.forward
        self.last: tuple[tuple[Any, ...], torch.Tensor, torch.Tensor] | None = None

    def __call__(self, context: torch.Tensor) -> torch.Tensor:
        # Tensors of inference mode have no count of writes.
        if torch.is_grad_enabled() or context.is_inference() or self.layer.weight.is_inference():
            return self.plain(context)
        key = self._key(context)
        last = self.last  # read once: another thread may write it
        if last is None or last[0] != key:
            last = key, context, self.plain(context)
            self.last = last
        return last[2]

    def _key(self, context: torch.Tensor) -> tuple[Any, ...]:
        kind = context.device.type
        weights = [
            (part.data_ptr(), part._version) for part in (self.layer.weight, self.layer.bias) if part is not None
        ]
        return (
            *(context.data_ptr(), context._version, context.dtype, context.shape, context.stride()),
            *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *weights),
        )


@contextmanager
def fixed_context(*networks: nn.Module) -> Iterator[None]:
    """While open, cross-attention computes the keys and values of a context once, not in every call of the network.

    The steps of a sampler see one context. The results are the same bits. Every block remembers the last context
    alone, and computes anew for another one: nothing needs to be told when it changes, and an open block holds no more
    than one set of keys and values.

    Nothing is remembered where gradients are on, in inference mode, and in networks that are compiled, which compute
    as without it. Weights and state dicts stay as they are. It may be opened again inside itself, and by several
    threads for one network.

    Args:
        networks: modules whose ``monai.networks.blocks.CrossAttentionBlock`` remember, however deep they lie:
            U-Nets of MONAI, ControlNets, ``shared.networks.film_unet.FiLMUNet``, or models that hold them.
    """
    with ExitStack() as stack:
        for network in networks:
            for layer in _context_layers(network):
                _replace_forward(stack, layer, _LastProjection(layer))
        yield


def _context_layers(module: nn.Module) -> Iterator[nn.Linear]:
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:  # Module.compile, torch.compile
        return
    if isinstance(module, CrossAttentionBlock):
        yield from (layer for layer in (module.to_k, module.to_v) if not _remembers(layer))
    for child in module.children():
        yield from _context_layers(child)


def _remembers(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), _LastProjection)


def _replace_forward(stack: ExitStack, layer: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    before = layer.__dict__.get("forward")
    layer.forward = forward

    def restore() -> None:
        if before is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.forward = before

    stack.callback(restore)
