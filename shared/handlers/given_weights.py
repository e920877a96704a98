# SPDX-License-Identifier: Apache-2.0
"""Whether somebody put weights into a network after its training was built."""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.distributed import unwrapped


class GivenWeights:
    """Notices weights that are loaded into a network from outside.

    Federated clients (``monai.fl.client.MonaiAlgo``) and MONAI Label build a training and put weights into its network
    before they run it; a federated client does so before every round. What a handler does when a training starts must
    then leave these weights alone. Nobody tells the handlers, so ``load_state_dict`` does.

    Args:
        parts: networks or parts of them; those that are no ``nn.Module`` are passed over.

    Attributes:
        given: whether weights were loaded into one of the parts, or a network around it, since :meth:`watch`.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = [part for part in map(unwrapped, parts) if isinstance(part, nn.Module)]
        self.given = False

    def watch(self) -> None:
        """Begin. To be called where handlers are attached: what the configuration itself loads is loaded by then."""
        for part in self.parts:
            # A container is made for a checkpoint; the network around its content does not know it.
            for module in part.children() if isinstance(part, nn.ModuleDict) else (part,):
                module.register_load_state_dict_post_hook(self._notice)

    def _notice(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.given = True
