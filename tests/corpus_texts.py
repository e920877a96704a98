# SPDX-License-Identifier: Apache-2.0
"""Bad texts: reports of ``cxr_ldm``, data lists of both bundles of pictures, and prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus import COMMANDS, DATALIST, BadInput, edit_list

SECTIONS = ("training", "validation", "test")
# Images are drawn from text alone: no data list is read.
OF_LISTS = {"cxr_ldm": COMMANDS[:3], "sdseg": COMMANDS}


def _report(name: str, content: bytes, words: str = "", **options: Any) -> BadInput:
    """A report in a file of its own."""

    def make(folder: Path) -> Path:
        path = folder / f"bad_{name}.txt"
        path.write_bytes(content)
        # The text itself would win.
        edit_list(folder, lambda content: [content[section][0].pop("text", None) for section in SECTIONS])
        return path

    options = {"commands": COMMANDS[:3], **options}
    return BadInput(f"cxr_ldm-report-{name}", "cxr_ldm", "report", make, key="report", words=words, **options)


def _item(
    name: str, change: Callable[[dict[str, Any]], Any], words: str, *, bundle: str = "cxr_ldm", **options: Any
) -> BadInput:
    """The first item of each section of the data list, changed."""

    def make(folder: Path) -> Path:
        return edit_list(folder, lambda content: [change(content[section][0]) for section in SECTIONS])

    options = {"commands": OF_LISTS[bundle], **options}
    return BadInput(f"{bundle}-{name}", bundle, "item", make, key=None, words=words, **options)


def _path(name: str, key: str, value: str, words: str = "does not exist") -> BadInput:
    """The path of a file that is not there."""

    def make(folder: Path) -> Path:
        edit_list(folder, lambda content: [content[section][0].update({key: value}) for section in SECTIONS])
        return Path(os.path.normpath(folder / value))

    return BadInput(f"sdseg-{name}", "sdseg", "item", make, key=None, words=words)


def _list(
    name: str, content: bytes | Callable[[dict[str, Any]], Any], words: str, *, bundle: str = "sdseg", **options: Any
) -> BadInput:
    """Another data list: its bytes, or a change of what it holds."""

    def make(folder: Path) -> Path:
        if callable(content):
            return edit_list(folder, content)
        (folder / DATALIST).write_bytes(content)
        return folder / DATALIST

    options = {"commands": OF_LISTS[bundle], **options}
    return BadInput(f"{bundle}-list-{name}", bundle, "data list", make, key=None, words=words, **options)


def _prompt(name: str, words: str, *, value: str = "", content: bytes | None = None, key: str = "prompt") -> BadInput:
    """A value of the command line, or a file of prompts."""

    def make(folder: Path) -> Path:
        path = folder / f"bad_{name}.txt"
        if content is not None:
            path.write_bytes(content)
        return path

    options: dict[str, Any] = {"commands": COMMANDS[3:], "value": (key, value) if value else None}
    return BadInput(f"cxr_ldm-prompt-{name}", "cxr_ldm", "prompt", make, key="prompt", words=words, **options)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda item: item.update({key: value})


def _same_subject(content: dict[str, Any]) -> None:
    content["test"][0]["subject"] = content["training"][0]["subject"]


def _same_image(content: dict[str, Any]) -> None:
    for section in SECTIONS:
        content[section].append(dict(content[section][0]))


REPORTS = (
    _report("empty", b"", "empty"),
    _report("blank", b" \r\n\t\n", "empty"),
    _report("latin1", "Herzgr\xf6\xdfe normal.".encode("latin1"), "UTF-8"),
    _report("utf16", "Clear lungs.".encode("utf-16"), "UTF-8"),
    _report("utf16-without-mark", "Clear lungs.".encode("utf-16-le"), "NUL"),
    _report("binary", bytes(range(256)) * 4, "UTF-8"),
    _report("too-large", b"Clear lungs. " * 100_000, "at most 1000000 bytes"),
    _report("control-characters", b"Clear\x07 lungs.\x1b[31m No\x08 effusion.\x7f", "", accepted="they are tokens"),
    _report("100-kB", b"Clear lungs. " * 7_700, accepted="a few sentences are drawn from it"),
    _report("one-word-of-100-kB", b"a" * 100_000, accepted="it is cut at 77 tokens, as the tokenizer logs"),
    _item("text-number", _set("text", 7), "expected a string under 'text'"),
    _item("text-list", _set("text", ["Clear lungs."]), "expected a string under 'text'"),
    _item("text-null", _set("text", None), "'text'"),
    _item("text-blank", _set("text", " "), "text"),
    _item("text-surrogate", _set("text", "Clear \ud800 lungs."), "text"),
    _item("text-missing", lambda item: item.pop("text", None), "text"),
)

LISTS = (
    _list("empty", b"", "expected JSON"),
    _list("cut", b'{"training": [{"image": "a.png"', "expected JSON"),
    _list("latin1", '{"training": ["\xe4.png"]}'.encode("latin1"), "expected JSON in UTF-8"),
    _list("utf16", '{"training": ["a.png"]}'.encode("utf-16"), "expected JSON in UTF-8"),
    _list("nested", b"[" * 100_000, "expected JSON"),
    _list("array", b"[]", "expected an object"),
    _list("other-names", b'{"train": [], "val": []}', "expected an object with the lists"),
    _list("section-is-text", lambda content: content.update(dict.fromkeys(SECTIONS, "a.png")), "expected a list"),
    _list("section-empty", lambda content: content.update({name: [] for name in SECTIONS}), "empty"),
    _list("item-number", lambda content: content.update({name: [7] for name in SECTIONS}), "expected an object"),
    _list("same-subject", _same_subject, "expected each subject in one section", commands=("check_data",)),
    _list("same-image", _same_image, "expected each image once", bundle="sdseg", commands=("evaluation", "inference")),
    _item("image-number", _set("image", 7), "expected a path", bundle="sdseg"),
    _item("image-object", _set("image", {"path": "a.png"}), "expected a path", bundle="sdseg"),
    _item("image-blank", _set("image", ""), "'image'", bundle="sdseg"),
    _item("image-absent", lambda item: item.pop("image", None), "image", bundle="sdseg"),
    _path("image-nul", "image", "images/\0.png"),
    _path("image-surrogate", "image", "images/\ud800.png"),
    _path("image-of-5000-letters", "image", "a" * 5000 + ".png"),
    _path("image-of-other-machine", "image", "/data/a.png", "the path is absolute"),
    _path("image-outside", "image", "../outside.png"),
    _path("label-missing", "label", "masks/none.png"),
    _item("label-absent", lambda item: item.pop("label", None), "label", bundle="sdseg", commands=COMMANDS[:3]),
)

PROMPTS = (
    _prompt("no-such-file", "expected a text file with one prompt a line"),
    _prompt("empty-file", "at least one prompt", content=b" \n"),
    _prompt("latin1", "UTF-8", content="gro\xdf".encode("latin1")),
    _prompt("too-large", "bytes", content=b"Effusion. \n" * 200_000),
    _prompt("too-long", "tokens", value="effusion " * 200),
    _prompt("object", "expected a text", value="{'a': 1}"),
    _prompt("number-of-samples", "at least 1", key="num_samples", value="0"),
    _prompt("seed", "at least 0", key="seed", value="-1"),
)

TEXTS = REPORTS + LISTS + PROMPTS
