# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG elements for the report: texts are escaped, pictures are inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

Element = ElementTree.Element

_PICTURE_PIXELS = 1600
_ACRONYMS = {
    "assd",
    "ci",
    "cxr",
    "fid",
    "flair",
    "kid",
    "kl",
    "l1",
    "ldm",
    "mae",
    "mmd",
    "mr",
    "ms",
    "mse",
    "psnr",
    "ssim",
}
_SPELLED = {"controlnet": "ControlNet", "hd95": "HD95", "iou": "IoU", "sdseg": "SDSeg", "t1w": "T1w", "unet": "U-Net"}


def element(tag: str, *children: str | Element, **attributes: Any) -> Element:
    """An HTML or SVG element; texts and attributes are escaped when it is written.

    `class_="x"` gives the attribute `class`, `text_anchor` gives `text-anchor`; None leaves an attribute out.
    """
    named = {key.rstrip("_").replace("_", "-"): str(v) for key, v in attributes.items() if v is not None}
    node = ElementTree.Element(tag, named)
    for child in children:
        if not isinstance(child, str):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + child
        else:
            node.text = (node.text or "") + child
    return node


def number(value: float) -> str:
    """Four significant digits, without needless zeros: 0.02317, 1.2e-05, 263.6."""
    return f"{value:.4g}"


def words(name: str) -> str:
    """A name from a file as words: `ms_ssim_reconstruction` -> `MS-SSIM reconstruction`."""
    parts = [
        part.upper() if part in _ACRONYMS else _SPELLED.get(part, part) for part in name.replace("_", " ").split(" ")
    ]
    text = " ".join(parts).replace("MS SSIM", "MS-SSIM")
    return text[:1].upper() + text[1:]


def missing(text: str) -> Element:
    """A plain statement that something is not there."""
    return element("p", text, class_="missing")


def table(names: Sequence[str], rows: Sequence[Element], *, numeric: set[str]) -> Element:
    """A table with these column names; the columns in `numeric` are aligned to the right."""
    head = [element("th", name, scope="col", class_="num" if name in numeric else None) for name in names]
    return element(
        "div", element("table", element("thead", element("tr", *head)), element("tbody", *rows)), class_="scroll"
    )


def figure(path: Path, caption: str, *, alt: str, pixels: int = _PICTURE_PIXELS) -> Element:
    """A picture inside the page, at most `pixels` wide, with its caption below.

    Raises:
        ValueError: the file is no readable picture; the message starts with its path.
    """
    data, width, height = _inline(path, pixels)
    image = element("img", src=data, alt=alt, width=width, height=height)
    return element("figure", image, element("figcaption", caption))


def _inline(path: Path, pixels: int) -> tuple[str, int, int]:
    """The picture as a data URI, at most `pixels` wide; written anew, so that no metadata comes along."""
    try:
        with Image.open(path) as opened:
            picture: Image.Image
            if opened.mode.startswith("I"):  # 16 bits
                picture = Image.fromarray((np.asarray(opened, dtype=np.float64) / 257).round().astype(np.uint8))
            else:
                picture = opened.convert("L" if opened.mode == "L" else "RGB")
            picture.thumbnail((pixels, 4 * pixels), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a PNG picture, got a file that does not decode ({error})") from error
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", picture.width, picture.height
