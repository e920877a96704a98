# SPDX-License-Identifier: Apache-2.0
"""From a report to the token ids of one training step. MONAI core has no text transforms."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple_rep

from shared.reports import split_sentences

# The longest MIMIC-CXR report has about 10 kB; a larger file is a mistake (an image, an archive), not a report.
MAX_REPORT_BYTES = 1_000_000


def read_report(path: str | os.PathLike, *, allow_empty: bool = False) -> str:
    """Text of a UTF-8 report file (with or without byte-order mark).

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty (unless ``allow_empty``), not UTF-8 text, or larger than 1 MB. Messages start with the path
            and never quote the report.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: this report does not exist; correct the path in datalist.json or add the file"
        )
    size = path.stat().st_size
    if size > MAX_REPORT_BYTES:
        raise ValueError(
            f"{path}: expected a report of at most {MAX_REPORT_BYTES} bytes, got {size}; is it a text file?"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got the byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert the file (for example: iconv -f LATIN1 -t UTF-8)"
        ) from error
    # UTF-16 without a mark decodes as UTF-8 with a NUL after every letter.
    if "\0" in text:
        raise ValueError(f"{path}: expected UTF-8 text, got NUL bytes; convert the file (for example from UTF-16)")
    if not text.strip() and not allow_empty:
        raise ValueError(
            f"{path}: the report is empty; remove the item, or set allow_empty to train it without a prompt"
        )
    return text


def check_text(text: Any, *, key: Hashable, where: str, allow_empty: bool = False) -> str:
    """The text that an item holds under a key; a ValueError that starts with ``where`` and never quotes the text.

    Refused: another type, a text without a letter (unless ``allow_empty``), and half of a surrogate pair, which is no
    Unicode text although JSON lets it through.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a string under {key!r}, got {type(text).__name__}; correct datalist.json")
    if not text.strip() and not allow_empty:
        raise ValueError(
            f"{where}: the text under {key!r} is empty; remove the item, or set allow_empty to train it without a "
            "prompt"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected Unicode text under {key!r}, got half of a surrogate pair at character {error.start}; "
            "correct datalist.json"
        ) from error
    return text


class LoadReportd(MapTransform):
    """Put the report of an item into ``data[key]``.

    The item holds the text itself under ``key`` (it wins), or the path of a UTF-8 text file under ``report_key``.

    Args:
        keys: where the text is, or goes ("text").
        report_key: where the path of the report file is.
        allow_empty: accept texts without a letter; such an item trains the null prompt, as the published code did
            silently.

    Raises:
        FileNotFoundError, ValueError: see `read_report`; or ValueError for an item with neither key.
    """

    def __init__(self, keys: KeysCollection, *, report_key: str = "report", allow_empty: bool = False) -> None:
        super().__init__(keys)
        self.report_key = report_key
        self.allow_empty = allow_empty

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.keys:
            if key not in result:
                if self.report_key not in result:
                    raise ValueError(
                        f"{_name(result)}: expected {key!r} (the text) or {self.report_key!r} (path of a text file) in "
                        f"the item, got only {sorted(map(str, result))}; add one of them to datalist.json"
                    )
                result[key] = read_report(result[self.report_key], allow_empty=self.allow_empty)
            else:
                check_text(result[key], key=key, where=_name(result), allow_empty=self.allow_empty)
        return result


class RandomSentencesd(RandomizableTransform, MapTransform):
    """Replace a report by some of its sentences in random order (spec cxr_ldm 1.1).

    The number of sentences is uniform in 1..min(n, ``max_sentences``), both ends included; the published code excluded
    the upper end, so that it never used 5 sentences and always 1 of 2. Sentences are joined by single blanks.

    Args:
        keys: texts to shorten.
        max_sentences: most sentences of an excerpt.
        num_excerpts: None draws freely. A number V restricts every text to V excerpts, fixed by the text alone, so that
            an embedding cache fills after V epochs' worth of texts instead of growing for ever.
    """

    def __init__(self, keys: KeysCollection, *, max_sentences: int = 5, num_excerpts: int | None = None) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if max_sentences < 1:
            raise ValueError(f"max_sentences: expected at least 1, got {max_sentences}")
        if num_excerpts is not None and num_excerpts < 1:
            raise ValueError(f"num_excerpts: expected at least 1, or None for free draws, got {num_excerpts}")
        self.max_sentences = max_sentences
        self.num_excerpts = num_excerpts

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.keys:
            text = result[key]
            if self.num_excerpts is None:
                result[key] = self._excerpt(text, self.R)
            else:
                result[key] = self.excerpt(text, int(self.R.randint(self.num_excerpts)))
        return result

    def excerpt(self, text: str, variant: int) -> str:
        """Excerpt number ``variant`` (from 0) of ``text``: the same on every machine, in every epoch and worker."""
        digest = hashlib.sha256(f"{variant}:{text}".encode()).digest()
        return self._excerpt(text, np.random.RandomState(int.from_bytes(digest[:4], "big")))

    def _excerpt(self, text: str, random: np.random.RandomState) -> str:
        sentences = split_sentences(text)
        if not sentences:
            return ""
        size = int(random.randint(1, min(len(sentences), self.max_sentences) + 1))
        return " ".join(sentences[index] for index in random.permutation(len(sentences))[:size])


class RandDropTextd(RandomizableTransform, MapTransform):
    """With probability ``prob`` replace the text by "", the null prompt of classifier-free guidance (arXiv:2207.12598).

    The published training dropped the prompt in 10 % of the items. All keys are dropped together.
    """

    def __init__(self, keys: KeysCollection, *, prob: float = 0.1) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            result.update(dict.fromkeys(self.keys, ""))
        return result


class Tokenized(MapTransform):
    """Encode texts as token ids: ``data[output_key]`` is int64 ``(max_length,)``, (77,) for CLIP.

    Args:
        keys: texts.
        tokenizer: callable list[str] -> int64 (B, max_length), such as `shared.tokenizer.ClipTokenizer`.
        output_key: one name, or one per key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        tokenizer: Callable[[list[str]], torch.Tensor],
        output_key: str | Sequence[str] = "tokens",
    ) -> None:
        super().__init__(keys)
        self.tokenizer = tokenizer
        self.output_keys = ensure_tuple_rep(output_key, len(self.keys))
        if len(set(self.output_keys)) != len(self.keys):
            raise ValueError(f"output_key: expected a different name for each of {self.keys}, got {self.output_keys}")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in zip(self.keys, self.output_keys, strict=True):
            result[output_key] = self.tokenizer([result[key]])[0]
        return result


def _name(data: Mapping[Hashable, Any]) -> str:
    # The image's path tells the user which item it is; loaded images carry it in their meta data.
    image = data.get("image")
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return str(getattr(image, "meta", {}).get("filename_or_obj", "datalist.json"))
