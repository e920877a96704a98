# SPDX-License-Identifier: Apache-2.0
"""CLIP byte-pair tokenisation from local files."""

from __future__ import annotations

import gzip
import html
import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

logger = logging.getLogger(__name__)

BOS_TOKEN_ID = 49406
EOS_TOKEN_ID = 49407
VOCAB_SIZE = 49408
NUM_MERGES = 48_894
_HEADER = "#version"
# Words as CLIP cuts them: English contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean_text(text: str) -> str:
    """Text as CLIP saw it in training: repaired Unicode (ftfy), HTML entities resolved twice, white space collapsed,
    lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class ClipTokenizer:
    """Turn prompts into CLIP token ids without any network access.

    The ids equal those of OpenAI CLIP's ``SimpleTokenizer`` (Radford et al. 2021, arXiv:2103.00020): `clean_text`, then
    byte-level byte-pair encoding with the 48,894 CLIP merges, wrapped in BOS (49406) and EOS (49407). Two deliberate
    differences: text that spells a control token ("<|endoftext|>") is encoded as the characters it consists of, so no
    prompt can forge one, and the padding id is a choice. transformers' fast CLIP tokenizer skips the HTML step and all
    of ftfy but Unicode composition, which shows only in text with entities, curly quotes, ligatures or encoding
    accidents.

    The encoding itself is done by Hugging Face `tokenizers`; transformers' ``CLIPTokenizer`` is not used because its
    files, arguments and padding differ between releases and Stable Diffusion 2's are no longer on the hub.

    Args:
        vocabulary: the merges (text, or the same in gzip: ``models/tokenizer/clip_bpe_merges.txt.gz`` of the bundle, or
            CLIP's own ``bpe_simple_vocab_16e6.txt.gz``), or a Hugging Face tokenizer folder (``tokenizer.json``, or
            ``vocab.json`` with ``merges.txt``).
        max_length: number of ids per text including BOS and EOS; 77 for every CLIP model.
        pad_token_id: id after EOS. Stable Diffusion 2 pads with 0 (the token "!"), Stable Diffusion 1 with 49407.

    Raises:
        FileNotFoundError: no vocabulary there.
        ValueError: the file is not the CLIP vocabulary, or an argument is out of range.
    """

    vocab_size = VOCAB_SIZE
    bos_token_id = BOS_TOKEN_ID
    eos_token_id = EOS_TOKEN_ID

    def __init__(self, vocabulary: str | os.PathLike, *, max_length: int = 77, pad_token_id: int = 0) -> None:
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2 (BOS and EOS), got {max_length}")
        if not 0 <= pad_token_id < VOCAB_SIZE:
            raise ValueError(
                f"pad_token_id: expected 0 (Stable Diffusion 2) or {EOS_TOKEN_ID} (Stable Diffusion 1), "
                f"got {pad_token_id}"
            )
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self._tokenizer = _build(read_merges(vocabulary))
        # Per process: a worker of a data loader counts its own texts.
        self.num_texts = 0
        self.num_truncated = 0

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Encode ``texts`` to int64 ``(len(texts), max_length)``: BOS, text, EOS, padding.

        A text that is too long loses its end, keeps EOS last, and is reported through the logger of this module (the
        1st, 10th, 100th, ... time, with the running count; the text itself is never logged).
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), self.max_length), self.pad_token_id, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [BOS_TOKEN_ID, *self._encode(text), EOS_TOKEN_ID]
            self.num_texts += 1
            if len(ids) > self.max_length:
                self._report_truncation(len(ids))
                ids = [*ids[: self.max_length - 1], EOS_TOKEN_ID]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def count_tokens(self, text: str) -> int:
        """Number of ids ``text`` needs, BOS and EOS included; more than ``max_length`` means that it would be cut."""
        return len(self._encode(text)) + 2

    def null_tokens(self) -> torch.Tensor:
        """Null prompt, int64 ``(max_length,)``: the ids of "", the one form for training and sampling."""
        return self("")[0]

    def _encode(self, text: str) -> list[int]:
        # One text at a time: batch encoding starts Rust threads, which then complain about every forked data loader.
        return self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids

    def _report_truncation(self, length: int) -> None:
        self.num_truncated += 1
        if self.num_truncated == 10 ** (len(str(self.num_truncated)) - 1):
            logger.warning(
                "text cut to %d tokens: %d of its %d tokens were lost (texts cut so far: %d of %d)",
                self.max_length,
                length - self.max_length,
                length,
                self.num_truncated,
                self.num_texts,
            )


def read_merges(vocabulary: str | os.PathLike) -> list[tuple[str, str]]:
    """The 48,894 CLIP merges in order of priority, from a merges file or a Hugging Face tokenizer folder.

    Raises:
        FileNotFoundError, ValueError: see `ClipTokenizer`.
    """
    path = Path(vocabulary)
    remedy = "Use the bundle's models/tokenizer/clip_bpe_merges.txt.gz."
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no CLIP vocabulary here. {remedy}")
    try:
        if path.is_dir() and (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            rows, declared = [_pair(merge) for merge in model["merges"]], model["vocab"]
        elif path.is_dir():
            declared = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            path = path / "merges.txt"
            rows = _parse(path.read_text(encoding="utf-8"))
        else:
            content = path.read_bytes()
            # gzip's two magic bytes: the suffix says nothing about CLIP's own distribution of the file.
            rows = _parse((gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8"))
            declared = None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{vocabulary}: expected tokenizer.json, or vocab.json with merges.txt, but {error.filename} is missing. "
            f"{remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a readable CLIP vocabulary ({type(error).__name__}: {error}). {remedy}"
        ) from error
    merges = [(pair[0], pair[1]) for pair in rows[:NUM_MERGES] if len(pair) == 2]
    if len(merges) != NUM_MERGES or merges[0] != ("i", "n"):
        raise ValueError(f"{path}: expected the {NUM_MERGES} merges of CLIP, got {len(merges)} valid ones. {remedy}")
    if declared is not None and {k: v for k, v in declared.items() if v < BOS_TOKEN_ID} != _vocabulary(merges):
        raise ValueError(f"{path.parent}: the ids of this tokenizer differ from CLIP's. {remedy}")
    return merges


def _parse(text: str) -> list[tuple[str, ...]]:
    lines = text.split("\n")
    # Only the first line can be the header: "#version" never starts a merge there ("i n" does).
    return [tuple(line.split()) for line in lines[1 if _HEADER in lines[0] else 0 :]]


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    # CLIP numbers the 256 byte symbols in this order: printable bytes as themselves, then the rest as U+0100 onwards.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = symbols + [symbol + "</w>" for symbol in symbols] + [left + right for left, right in merges]
    return {word: index for index, word in enumerate(words)}


def _build(merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(merges), merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
