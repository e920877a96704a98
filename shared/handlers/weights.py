# SPDX-License-Identifier: Apache-2.0
"""Weights that are loaded when an engine starts."""

from __future__ import annotations

from pathlib import Path

from ignite.engine import Engine, Events
from torch import nn

from shared.weights import load_weights


class StrictCheckpointLoader:
    """Load the released weights strictly before the first batch.

    ``monai.handlers.CheckpointLoader`` does not fit: it wants the dictionary of names that saved the file, and
    reports a missing file or a wrong configuration by a traceback of torch. The name ends like its name for a reason:
    ``monai.fl.client.MonaiAlgo`` evaluates the server's weights, and to that end disables every handler of
    ``validate#handlers`` that has "CheckpointLoader" in its name.

    A handler and not an expression in ``initialize``: ``monai.bundle.load`` runs ``initialize``, and MONAI Label runs
    neither and loads the weights itself, so building the network must not need the file.

    Args:
        path: file with the state dict of ``network``.
        network: the network, not wrapped for several GPUs.
        remedy: what the user can do when the file is missing.

    Raises (when the engine starts):
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or belongs to another configuration; names the first key that does not fit.
    """

    def __init__(self, path: str | Path, network: nn.Module, *, remedy: str = "") -> None:
        self.path = path
        self.network = network
        self.remedy = remedy

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        load_weights(self.network, self.path, self.remedy)
