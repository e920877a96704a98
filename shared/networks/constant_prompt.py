# SPDX-License-Identifier: Apache-2.0
"""The embedding of a prompt that never changes."""

from __future__ import annotations

import torch
from torch import nn


class ConstantPrompt(nn.Module):
    """Embeddings of one constant prompt and of the null prompt, as two rows of numbers.

    The published brain model sends the same sentence through a text encoder of 340 M parameters in every step. A
    constant sentence is a constant tensor: it is embedded once (``python -m tools.embed_prompt``) or, where no text
    encoder is at hand, learned with the U-Net, which spares the file. Both kinds have the same state dict, so that
    neither the ControlNet nor inference needs to know.

    Args:
        length: tokens of the prompt, L.
        embedding_size: width of the U-Net's context, D.
        learned: the embedding takes gradients; false: it is loaded and stays as it is.
    """

    def __init__(self, length: int = 77, embedding_size: int = 1024, *, learned: bool = True) -> None:
        super().__init__()
        # Row 0 is the null prompt. The standard deviation is the usual one of token embeddings (GPT-2, CLIP).
        self.embeddings = nn.Parameter(0.02 * torch.randn(2, length, embedding_size), requires_grad=learned)

    def forward(self, batch_size: int, null: torch.Tensor | None = None) -> torch.Tensor:
        """Context ``(B, L, D)``; ``null`` are booleans ``(B,)``, true for the null prompt, ``None`` for none."""
        if null is None:
            return self.embeddings[1].expand(batch_size, -1, -1)
        return self.embeddings[1 - null.long()]
