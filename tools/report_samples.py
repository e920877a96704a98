# SPDX-License-Identifier: Apache-2.0
"""What the report shows of generated images: pictures drawn from prompts, translated volumes, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.report_data import Sample, Translation
from tools.report_html import Element, element, figure, missing, number
from tools.report_masks import Mask

_MAX_PROMPTS, _MAX_SEEDS, _MAX_VOLUMES, _MAX_MASKS = 16, 8, 8, 8
_SAMPLE_PIXELS = 512
_SETTING_WORDS = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "negative_prompt": "negative prompt",
    "conditioning_scale": "conditioning scale",
    "num_samples": "samples",
}


def prompts_of(samples: Sequence[Sample]) -> list[Element]:
    """The pictures of each prompt, by settings and seed."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.prompt, _setting_text(sample.settings)), []).append(sample)
    parts = [element("h3", "Prompts and generated images")]
    for (prompt, settings), members in list(groups.items())[:_MAX_PROMPTS]:
        members.sort(key=lambda sample: (str(type(sample.seed)), sample.seed if sample.seed is not None else 0))
        shown = members[:_MAX_SEEDS]
        figures = [
            figure(
                sample.path,
                f"seed {sample.seed}" if sample.seed is not None else "seed not recorded",
                alt=f"Synthetic image for the prompt “{prompt}”, seed {sample.seed}",
                pixels=_SAMPLE_PIXELS,
            )
            for sample in shown
        ]
        rest = f"{len(shown)} of {len(members)} images are shown" if len(shown) < len(members) else ""
        below = "; ".join(text for text in (settings, rest) if text)
        parts.append(
            element(
                "div",
                element("blockquote", f"“{prompt}”" if prompt else "(empty prompt)"),
                *([element("p", below, class_="quiet small")] if below else []),
                element("div", *figures, class_="seeds"),
                class_="prompt",
            )
        )
    if len(groups) > _MAX_PROMPTS:
        text = f"{_MAX_PROMPTS} of {len(groups)} prompts are shown."
        parts.append(element("p", text, class_="quiet small"))
    return parts


def translations_of(translations: Sequence[Translation]) -> list[Element]:
    """A picture of each translated volume, by settings. File names are not shown: they can be names of patients."""
    groups: dict[tuple[str, tuple[str, ...]], list[Translation]] = {}
    for one in translations:
        groups.setdefault((_setting_text(one.settings), one.panels), []).append(one)
    parts = [element("h3", "Translated volumes")]
    for (settings, panels), members in groups.items():
        shown = [(one, one.path) for one in members if one.path is not None][:_MAX_VOLUMES]
        count = f"{len(members)} {'volume' if len(members) == 1 else 'volumes'}"
        count += f", {len(shown)} shown" if len(shown) < len(members) else ""
        parts.append(element("p", "; ".join(text for text in (count, settings) if text), class_="quiet small"))
        if panels:
            parts.append(element("p", f"From left to right: {', '.join(panels)}.", class_="quiet small"))
        if not shown:
            parts.append(missing("No pictures were written."))
            continue
        figures = []
        for index, (one, path) in enumerate(shown, start=1):
            caption = "; ".join(text for text in (f"Volume {index}", _intensity(one.intensity)) if text)
            alt = f"One slice of a synthetic volume: {', '.join(panels) or 'picture'}"
            figures.append(figure(path, caption, alt=alt))
        parts.append(element("div", *figures, class_="pictures wide volumes"))
    return parts


def masks_of(masks: Sequence[Mask]) -> list[Element]:
    """The pictures of each mask in a row, by settings. File names are not shown: they can be names of patients."""
    groups: dict[str, list[Mask]] = {}
    for one in masks:
        groups.setdefault(_setting_text(one.settings), []).append(one)
    parts = [element("h3", "Masks")]
    for settings, members in groups.items():
        shown = [one for one in members if one.pictures][:_MAX_MASKS]
        count = f"{len(members)} {'mask' if len(members) == 1 else 'masks'}"
        count += f", {len(shown)} shown" if len(shown) < len(members) else ""
        parts.append(element("p", "; ".join(text for text in (count, settings) if text), class_="quiet small"))
        if not shown:
            parts.append(missing("No pictures were written."))
        rows = []
        for index, one in enumerate(shown, start=1):
            sizes = ", ".join(one.sizes)
            figures = []
            for what, path in one.pictures.items():
                first = f"Image {index}, {what}" + (f": {sizes}" if sizes else "")
                caption = first if what == "mask" else what[:1].upper() + what[1:]
                figures.append(figure(path, caption, alt=f"Image {index} with its predicted {what}"))
            # of a volume there is one picture, of many slices
            rows.append(element("div", *figures, class_="mask whole" if len(figures) == 1 else "mask"))
        parts.append(element("div", *rows, class_="masks"))
    return parts


def _setting_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{_SETTING_WORDS.get(key, key)} {value}" for key, value in settings.items())


def _intensity(intensity: dict[str, Any]) -> str:
    low, high = intensity.get("low"), intensity.get("high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return ""
    return f"values in {intensity.get('unit', 'other units')}: 0 became {number(low)}, 1 became {number(high)}"
