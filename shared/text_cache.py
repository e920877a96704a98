# SPDX-License-Identifier: Apache-2.0
"""Context embeddings computed once per distinct prompt."""

from __future__ import annotations

import collections
import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.files import atomic_path

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_DIGEST_BYTES = 32


class CachedTextEncoder(nn.Module):
    """Wraps a frozen text encoder; every distinct row of token ids is encoded once and then read from memory or disk.

    The published training ran the text encoder, and even kept its graph, in every step (spec cxr_ldm 1.9, 14).
    With `shared.transforms.text.RandomSentencesd(num_excerpts=V)` the number of distinct prompts is finite.

    A row's key is the SHA-256 of the encoder's fingerprint, the stored dtype and the token ids, so another encoder,
    dtype or tokenizer never meets stale entries, and several processes may share a folder (writes are atomic). Keys
    reveal no text. Entries are ``ab/<key>.npy`` (77 x 1024 in float16: 158 kB) followed by a checksum; a damaged one is
    logged and computed anew.

    Args:
        encoder: (B, L) -> (B, L, D), frozen, with a ``fingerprint``, like `text_encoder.FrozenClipTextEncoder`.
        cache_dir: folder of the entries, made if needed; None keeps them in memory only.
        dtype: stored type, "float16" (relative error 5e-4) or "float32". The output is float32 in any case.
        memory_items: rows kept in memory, the least recently used one leaves first; 2048 rows of SD-2.1 take 0.3 GB.

    Raises:
        ValueError: the encoder has trainable parameters or no fingerprint, or an argument is out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        cache_dir: str | os.PathLike | None = None,
        *,
        dtype: str = "float16",
        memory_items: int = 2048,
    ) -> None:
        super().__init__()
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError(
                f"encoder: {type(encoder).__name__} has trainable parameters, whose embeddings change with every step "
                "and must not be cached; freeze it (requires_grad_(False)) or use it without a cache"
            )
        if not isinstance(getattr(encoder, "fingerprint", None), str):
            raise ValueError(
                f"encoder: expected an attribute `fingerprint` (sha256 of its weights), {type(encoder).__name__} has "
                "none; use FrozenClipTextEncoder, or use the encoder without a cache"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        if memory_items < 1:
            raise ValueError(f"memory_items: expected at least 1, got {memory_items}")
        self.encoder = encoder.eval()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.dtype = dtype
        self.memory_items = memory_items
        self._memory: collections.OrderedDict[str, torch.Tensor] = collections.OrderedDict()
        # Number of rows the encoder has computed; a filled cache leaves it alone.
        self.num_encoded = 0

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed int64 ``tokens (B, L)`` as float32 ``(B, L, D)`` on the device of ``tokens``, without a graph.

        Raises:
            ValueError: an embedding does not fit into ``dtype``.
            OSError: an entry cannot be written; the message starts with its path.
        """
        rows = tokens.detach().to("cpu", torch.int64).contiguous()
        # Asked every time: `.half()` on the model changes what the encoder returns, and with it the fingerprint.
        prefix = f"{self.encoder.fingerprint} {self.dtype} ".encode()
        keys = [hashlib.sha256(prefix + row.numpy().tobytes()).hexdigest() for row in rows]
        found = {key: entry for key in dict.fromkeys(keys) if (entry := self._find(key)) is not None}
        first_row = {key: index for index, key in reversed(list(enumerate(keys))) if key not in found}
        if first_row:
            missing = sorted(first_row.values())
            embeddings = self.encoder(tokens[missing]).to("cpu", torch.float32)
            self.num_encoded += len(missing)
            for index, embedding in zip(missing, embeddings, strict=True):
                found[keys[index]] = self._store(keys[index], embedding)
        for key, entry in found.items():
            self._remember(key, entry)
        return torch.stack([found[key] for key in keys]).to(tokens.device, torch.float32)

    def train(self, mode: bool = True) -> CachedTextEncoder:
        """Keep the encoder in eval mode: dropout would be cached."""
        super().train(mode)
        self.encoder.eval()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTextEncoder:
        # Frozen, hence the same for a moving average of the model; a copy would double the rows in memory.
        return self

    def _path(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / key[:2] / f"{key}.npy"

    def _find(self, key: str) -> torch.Tensor | None:
        if key in self._memory:
            return self._memory[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        content = path.read_bytes()
        body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            logger.warning("%s: damaged cache entry (%d bytes), computed anew", path, len(content))
            return None
        return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))

    def _store(self, key: str, embedding: torch.Tensor) -> torch.Tensor:
        # A copy: a row that is a view would keep its whole batch in memory.
        entry = embedding.to(_DTYPES[self.dtype], copy=True)
        if not torch.isfinite(entry).all():
            raise ValueError(
                f"dtype: an embedding with values up to {embedding.abs().max():.3g} is not finite in {self.dtype}; "
                'use dtype="float32", and check the weights of the text encoder if that fails too'
            )
        path = self._path(key)
        if path is not None:
            buffer = io.BytesIO()
            np.save(buffer, entry.numpy(), allow_pickle=False)
            body = buffer.getvalue()
            with atomic_path(path) as temporary:
                temporary.write_bytes(body + hashlib.sha256(body).digest())
        return entry

    def _remember(self, key: str, entry: torch.Tensor) -> None:
        self._memory[key] = entry
        self._memory.move_to_end(key)
        while len(self._memory) > self.memory_items:
            self._memory.popitem(last=False)
