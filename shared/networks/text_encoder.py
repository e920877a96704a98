# SPDX-License-Identifier: Apache-2.0
"""Text encoders: token ids (B, L) -> context (B, L, D) for cross-attention."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.assets import missing_asset, verify_file
from shared.networks.frozen import FrozenModule

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class TransformerTextEncoder(nn.Module):
    """Small trainable text encoder, for a run without pretrained text weights.

    Token and position embeddings, a pre-norm Transformer encoder (arXiv:1706.03762, arXiv:2002.04745) and a final
    LayerNorm. Words attend in both directions. MONAI core has none: ``DecoderOnlyTransformer`` is causal and returns
    logits, ``Transchex`` classifies image and text together.

    Everything after the first EOS is padding: its ids are replaced by ``pad_token_id`` and no position attends to it,
    so the output does not depend on what a tokenizer wrote there. Padded positions still read the text and give 77
    outputs, as CLIP's do; cross-attention, which has no mask, finds a summary in them instead of noise.

    The embedding is factorised (ALBERT, arXiv:1909.11942): ``embedding_size`` numbers per token, then a projection to
    ``embed_dim``. With 49,408 tokens a full table of 64 columns is 12.6 MB and mostly never trained; 16 columns are
    3.2 MB. Hashing ids into buckets would be smaller still, but two words in one bucket ("left", "right") could
    never be told apart.

    Args:
        vocab_size: number of token ids.
        max_length: longest sequence L.
        embed_dim: D, the cross-attention dimension of the U-Net.
        num_layers: Transformer layers.
        num_heads: attention heads; divides ``embed_dim``.
        embedding_size: columns of the token table; None for ``embed_dim`` without a projection.
        pad_token_id: id that stands for padding.
        eos_token_id: id that ends the text.
        dropout: rate inside the Transformer layers, active in training only.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 49408,
        max_length: int = 77,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        embedding_size: int | None = 16,
        pad_token_id: int = 0,
        eos_token_id: int = 49407,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
        for name, token_id in (("pad_token_id", pad_token_id), ("eos_token_id", eos_token_id)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{name}: expected 0 to vocab_size - 1 = {vocab_size - 1}, got {token_id}")
        self.max_length = max_length
        self.embed_dim = embed_dim
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        size = embedding_size or embed_dim
        self.token_embedding = nn.Embedding(vocab_size, size)
        self.projection = nn.Linear(size, embed_dim, bias=False) if size != embed_dim else nn.Identity()
        self.position_embedding = nn.Parameter(torch.empty(max_length, embed_dim))
        # nn.Embedding starts at standard deviation 1, and the projection keeps about 1/sqrt(3) of it: a word is heard
        # well above its position from the first step.
        nn.init.normal_(self.position_embedding, std=0.1)
        layer = nn.TransformerEncoderLayer(
            embed_dim, num_heads, 4 * embed_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(embed_dim), enable_nested_tensor=False
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode int64 ``tokens (B, L)``, L <= ``max_length``, to float ``(B, L, embed_dim)``.

        Raises:
            ValueError: ``tokens`` has another rank or is too long.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"tokens: expected (B, L) with L of at most {self.max_length}, got {tuple(tokens.shape)}; "
                "use the tokenizer with the same max_length"
            )
        is_eos = (tokens == self.eos_token_id).long()
        padding = is_eos.cumsum(dim=1) - is_eos > 0
        x = self.projection(self.token_embedding(tokens.masked_fill(padding, self.pad_token_id)))
        return self.encoder(x + self.position_embedding[: tokens.shape[1]], src_key_padding_mask=padding)


class FrozenClipTextEncoder(FrozenModule):
    """CLIP text model from a local Hugging Face folder; the last hidden state is the context.

    For the published model that is the text encoder of Stable Diffusion 2.1: (B, 77, 1024), OpenCLIP ViT-H/14 without
    its last layer (arXiv:2112.10752, spec cxr_ldm 1.2). No attention mask is given, as published: CLIP is causal, so
    padding never reaches the words, but the outputs at padded positions do depend on the padding id.

    Always in eval mode and under ``no_grad``, never in mixed precision (its output must not depend on the trainer's
    ``amp``, or a cache would mix both), and in nobody's state dict: see `FrozenModule`.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``, read with ``weights_only``).
        sha256: expected checksum of the weight file; None skips the check.
        dtype: type the weights are kept and run in ("float16" halves memory); None for float32. The output is float32.

    Raises:
        FileNotFoundError: folder, configuration or weights are missing.
        ValueError: checksum differs, the files cannot be read, weights do not fit the configuration, or unknown dtype.
    """

    def __init__(
        self, folder: str | os.PathLike, *, sha256: str | None = None, dtype: str | torch.dtype | None = None
    ) -> None:
        folder = Path(folder)
        weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if weights is None or not (folder / "config.json").is_file():
            raise missing_asset("sd21-text-encoder", folder, expected=f"config.json and {' or '.join(WEIGHT_FILES)}")
        weights_sha256 = verify_file(weights, sha256)
        resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
        if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point type such as 'float16' or 'float32', got {dtype!r}")
        super().__init__(_load_clip(folder).to(resolved))
        self.folder = folder
        self.weights_sha256 = weights_sha256
        self._config_sha256 = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()

    @property
    def embed_dim(self) -> int:
        """D of the context."""
        return int(self.frozen.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the output: weight file, configuration, dtype."""
        dtype = next(self.frozen.parameters()).dtype
        return hashlib.sha256(f"{self.weights_sha256} {self._config_sha256} {dtype}".encode()).hexdigest()

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode int64 ``tokens (B, L)`` to float32 ``(B, L, D)`` on the device of the weights."""
        with torch.autocast(self.device.type, enabled=False):
            return self.frozen(input_ids=tokens.to(self.device)).last_hidden_state.float()


def _load_clip(folder: Path) -> nn.Module:
    # Imported here: transformers costs seconds and only runs with pretrained text weights need it.
    from transformers import CLIPTextModel
    from transformers.utils import logging

    bar_was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = CLIPTextModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise ValueError(
            f"{folder}: not a readable CLIP text model ({type(error).__name__}: {error}); "
            "copy the folder anew and check its sha256"
        ) from error
    finally:
        if bar_was_enabled:
            logging.enable_progress_bar()
    model, info = loaded
    # transformers fills what it does not find with random numbers and only logs it.
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise ValueError(
            f"{folder}: the weights do not fit config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(mismatched)} of another shape {mismatched[:3]}; use both files from the same text_encoder folder"
        )
    return model
