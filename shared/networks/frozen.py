# SPDX-License-Identifier: Apache-2.0
"""A pretrained network that is used but belongs to no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class FrozenModule(nn.Module):
    """Holds a network whose weights are fixed: in eval mode, without gradients for its parameters, moved with its
    parent, but absent from ``parameters()`` and ``state_dict()``.

    Frozen parts are saved once and referenced by hash, so a checkpoint must not carry a copy of them (the text encoder
    alone would add 1.4 GB to each). `monai.networks.utils.freeze_layers` keeps them in the state dict. A deep copy,
    such as an exponential moving average makes, is the same object: there is nothing in it that could differ.

    Subclasses call ``super().__init__(network)``, read ``self.frozen`` and override ``forward``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # Inside a tuple nn.Module does not see, hence not register, the network.
        self._frozen = (network.eval().requires_grad_(False),)

    @property
    def frozen(self) -> nn.Module:
        """The network itself."""
        return self._frozen[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are; ``next(parameters())`` would find none."""
        return next(self.frozen.parameters()).device

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenModule:
        super()._apply(fn, recurse)
        self.frozen._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModule:
        return self
