# SPDX-License-Identifier: Apache-2.0
"""The networks of monai-generative, with which conversions are compared."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    # The frozen package uses interfaces that newer releases of its dependencies deprecate.
    warnings.simplefilter("ignore")
    old = pytest.importorskip("generative.networks.nets")


def old_names(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a class of MONAI core as monai-generative calls them."""
    return {"num_channels" if key == "channels" else key: value for key, value in options.items()}


def old_network(kind: str, options: dict[str, Any], seed: int = 0) -> nn.Module:
    """Every weight random: layers that start at zero would hide errors behind them.

    The mean is zero: with wide layers any other adds up to activations beside which nothing else counts.
    """
    network = getattr(old, kind)(**old_names(options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
                values = torch.randn(tensor.shape, generator=generator) * fan_in**-0.5
                tensor.copy_(values.abs() if key.endswith("running_var") else values)
    return network.eval()
