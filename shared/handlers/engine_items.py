# SPDX-License-Identifier: Apache-2.0
"""What an engine's iteration left, item by item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.data import decollate_batch


def engine_items(content: Any) -> list[Mapping[str, Any]]:
    """``engine.state.output`` or ``engine.state.batch``: a decollated list as it is, a batch dictionary taken apart."""
    if isinstance(content, Mapping):
        return decollate_batch(dict(content))
    return list(content)


def plain_value(key: str, value: Any, *, remedy: str) -> Any:
    """Text, number or None of an item; collated numbers are tensors of one element.

    Raises:
        ValueError: it is something else; the message starts with the key and ends with ``remedy``.
    """
    if isinstance(value, torch.Tensor | np.generic) and np.prod(value.shape) == 1:
        value = value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{key}: expected text or a number, got {type(value).__name__}; {remedy}")
