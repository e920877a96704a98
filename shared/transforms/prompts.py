# SPDX-License-Identifier: Apache-2.0
"""From what a user types to the tokens that a text-to-image sampler reads."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform

from shared.transforms.label_answers import is_monai_label_request

MAX_PROMPT_FILE_BYTES = 1 << 20


def _read_prompt_file(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file: one a line, empty lines left out."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a text file with one prompt a line, found no file. Write it, or give the prompt itself "
            "(a prompt may not end in .txt)."
        )
    if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_PROMPT_FILE_BYTES} bytes, got {path.stat().st_size}.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes ({error.reason}); save it as UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, got an empty file.")
    return prompts


def _is_prompt_file(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and str(value).endswith(".txt") and "\n" not in str(value)


def _as_text(key: str, value: Any) -> str:
    """One prompt. Fire, which reads the command line, turns `a, b` into a tuple and `1` into a number."""
    if isinstance(value, tuple):
        return ", ".join(_as_text(key, part) for part in value)
    if value is None or isinstance(value, list | Mapping):
        raise ValueError(
            f"{key}: expected a text, got {type(value).__name__}; on a command line quote it twice: '\"...\"'."
        )
    return str(value).strip()


def prompt_items(
    prompt: str | Sequence[str], negative_prompt: str = "", num_samples: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Items of the inference dataset, one per image to draw.

    Args:
        prompt: a text, a list of texts, or the path of a UTF-8 file with one prompt a line (recognised by ``.txt``).
            A text is taken as it is: underscores stay. ``""`` asks for an image without a text.
        negative_prompt: text that guidance leads away from; ``""`` is the null prompt of training.
        num_samples: images per prompt.
        seed: seed of the first item; it counts up over all items, so no two images share their noise (images of one
            noise would look alike and bias every measure of diversity).

    Returns:
        Dictionaries ``prompt, negative_prompt, seed, prompt_index, sample_index``, prompt by prompt.

    Raises:
        FileNotFoundError: when the path of a prompt file does not exist.
        ValueError: when there is no prompt, or a number is out of range; the message starts with the key or the path.
    """
    if _is_prompt_file(prompt):
        prompts = _read_prompt_file(Path(str(prompt)))
    elif isinstance(prompt, list):
        prompts = [_as_text("prompt", text) for text in prompt]
    else:
        prompts = [_as_text("prompt", prompt)]
    if not prompts:
        raise ValueError("prompt: expected a text, a list of texts or the path of a .txt file, got an empty list.")
    for key, value, low in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{key}: expected a whole number of at least {low}, got {value!r}.")
    negative = _as_text("negative_prompt", negative_prompt)
    return [
        {
            "prompt": text,
            "negative_prompt": negative,
            "seed": seed + prompt_index * num_samples + sample_index,
            "prompt_index": prompt_index,
            "sample_index": sample_index,
        }
        for prompt_index, text in enumerate(prompts)
        for sample_index in range(num_samples)
    ]


class PromptToTokensd(Transform):
    """Put the token ids of prompt and negative prompt into ``data["image"]``, the key that MONAI Label hands over.

    ``data`` is an item of ``prompt_items`` or a MONAI Label request. The text of a request is ``prompt`` when that is
    neither empty nor the default, else the text of ``image`` when that is a ``.txt`` file, else the default. The texts
    used are written back to ``prompt`` and ``negative_prompt``, and the answer becomes a PNG.

    The ids are a plain tensor: with meta data MONAI Label would resize the picture to the "input's" shape.

    Args:
        tokenizer: ``shared.tokenizer.ClipTokenizer``: texts to ids ``(B, L)``; has ``count_tokens``, ``max_length``.
        default_prompt: for requests without a prompt.
        default_negative_prompt: for requests without a negative prompt; ``""`` is the null prompt of training.
        truncate: cut a prompt that is too long (the tokenizer logs it) instead of raising.

    Raises:
        ValueError: for a prompt of more than ``max_length - 2`` tokens.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        default_prompt: str | Sequence[str] = "",
        default_negative_prompt: str = "",
        truncate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.default_prompt = default_prompt
        self.default_negative_prompt = default_negative_prompt
        self.truncate = truncate

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Returns ``data`` with ``image``: int64 ``(2, L)``, row 0 the prompt, row 1 the negative prompt."""
        d = dict(data)
        if is_monai_label_request(d):
            d["prompt"] = self._requested_prompt(d)
            d["negative_prompt"] = _text_option(d.get("negative_prompt")) or self.default_negative_prompt
            d["result_extension"] = ".png"
        texts = [_as_text(key, d.get(key, "")) for key in ("prompt", "negative_prompt")]
        for key, text in zip(("prompt", "negative_prompt"), texts, strict=True):
            self._check_length(key, text)
        tokens: torch.Tensor = self.tokenizer(texts)
        d["image"] = tokens
        return d

    def _requested_prompt(self, data: Mapping[Hashable, Any]) -> str:
        default = _text_option(self.default_prompt)
        prompt, image = _text_option(data.get("prompt")), data.get("image")
        if prompt and prompt != default:
            return prompt
        if _is_prompt_file(image):
            return " ".join(_read_prompt_file(Path(str(image))))
        return default

    def _check_length(self, key: str, text: str) -> None:
        limit, count = self.tokenizer.max_length, self.tokenizer.count_tokens(text)
        if count > limit and not self.truncate:
            raise ValueError(
                f"{key}: expected at most {limit - 2} tokens, got {count - 2}: the model would not read the end. "
                "Shorten the text, or give --truncate_prompt True to cut it."
            )


def _text_option(value: Any) -> str:
    """A text option of a client; of a list of choices the first is the chosen one."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return "" if value is None or isinstance(value, list | tuple | Mapping) else str(value).strip()
