# SPDX-License-Identifier: Apache-2.0
"""What the report shows of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from tools.report_chart import SMOOTH_FROM, WINDOW, Series, line_chart
from tools.report_data import Run, Sample, Translation
from tools.report_evaluation import evaluation_of
from tools.report_html import Element, element, figure, missing, number, words
from tools.report_masks import Mask
from tools.report_samples import masks_of, prompts_of, translations_of

_MAX_PREVIEWS = 6
_LAST_CURVES = ("learning_rate", "gradient_norm")
# Options that name input files, also by relative paths.
_INPUTS = ("dataset_dir", "reference")


def section_of(run: Run, *, anchor: str) -> Element:
    """Everything one run left, in the order in which it was made, and what is missing."""
    section = element("section", element("h2", title_of(run)), id=anchor)
    section.extend(_made_by(run))
    section.extend(_curves(run))
    section.extend(_previews(run))
    if run.evaluation is not None or run.evaluation_pictures:
        section.extend(evaluation_of(run))
    if run.samples:
        section.extend(prompts_of(run.samples))
    if run.translations:
        section.extend(translations_of(run.translations))
    if run.masks:
        section.extend(masks_of(run.masks))
    if run.config is not None:
        text = json.dumps(_without_paths(run.config), indent=2, ensure_ascii=False)
        section.append(element("details", element("summary", "Configuration"), element("pre", element("code", text))))
    elif run.is_training:
        section.append(missing("The configuration was not recorded (no config.json)."))
    return section


def _without_paths(config: Any) -> Any:
    """A configuration as a page shows it that is passed on: folders and files of somebody's data can name patients."""
    if isinstance(config, dict):
        hidden = {key for key in _INPUTS if isinstance(config.get(key), str | list)}
        return {key: "(path left out)" if key in hidden else _without_paths(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_without_paths(value) for value in config]
    absolute = isinstance(config, str) and (
        PurePosixPath(config).is_absolute() or PureWindowsPath(config).is_absolute()
    )
    return "(path left out)" if absolute else config


def _made_by(run: Run) -> list[Element]:
    if run.manifest is not None:
        facts = _facts(run.manifest)
    elif run.samples or run.translations or run.masks:
        facts = _flat(_common_origin([*run.samples, *run.translations, *run.masks]))
    else:
        facts = {}
    if not facts:
        return [missing("What made this was not recorded (no manifest.json).")]
    pairs = []
    for name, value in facts.items():
        if name.endswith("_sha256"):
            name, value = f"{name.removesuffix('_sha256')}, SHA-256", f"{str(value)[:16]}…" if value else None
        pairs.append((words(name), "not recorded" if value is None else str(value)))
    return [element("dl", *[element("div", element("dt", name), element("dd", value)) for name, value in pairs])]


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a reader asks first comes first; None means: not recorded."""
    facts = {"device": manifest.get("device"), **_flat(manifest.get("settings"))}
    commit = manifest.get("git_commit")
    facts["commit"] = f"{commit[:12]}{' with changes' if '+' in commit else ''}" if isinstance(commit, str) else None
    software = manifest.get("software")
    versions = software.items() if isinstance(software, dict) else ()
    facts["software"] = ", ".join(f"{name} {version}" for name, version in versions) or None
    shown = {"task", "started", "device", "settings", "git_commit", "software"}
    return facts | _flat({key: value for key, value in manifest.items() if key not in shown})


def _common_origin(samples: Sequence[Sample | Translation | Mask]) -> dict[str, Any]:
    """What all pictures say made them; a value on which they differ is left out."""
    first = samples[0].origin
    return {key: value for key, value in first.items() if all(one.origin.get(key) == value for one in samples)}


def _curves(run: Run) -> list[Element]:
    if not run.curves:
        return [missing("No curves were recorded (no metrics.csv).")] if run.is_training else []
    names = sorted(run.curves, key=lambda name: (name in _LAST_CURVES, name != "loss"))
    charts, constant = [], []
    for name in names:
        phases = run.curves[name]
        values = {value for points in phases.values() for _, value in points}
        if len(values) == 1 and run.epochs > 1:
            constant.append(f"{words(name)} was {number(values.pop())} throughout.")
            continue
        order = sorted(phases, key=lambda phase: phase != "train")
        series = [Series(phase, "train" if phase == "train" else "validation", phases[phase]) for phase in order]
        last = [element("span", f"{s.label} {number(s.points[-1][1])}", class_=f"key {s.style}") for s in series]
        spoken = f"{words(name)} over epochs; last value: " + ", ".join(
            f"{s.label} {number(s.points[-1][1])}" for s in series
        )
        caption = element("figcaption", element("strong", words(name)), element("span", *last))
        charts.append(element("figure", caption, line_chart(series, label=spoken), class_="card"))
    note = "The number beside each name is the last value."
    if any(len(points) >= SMOOTH_FROM for phases in run.curves.values() for points in phases.values()):
        note += f" Strong training lines are moving averages over {WINDOW} points, faint ones the values."
    note = " ".join([note, *constant])
    parts = [
        element("h3", "Curves"),
        element("div", *charts, class_="charts"),
        element("p", note, class_="quiet small"),
    ]
    if run.not_finite:
        parts.append(missing(f"{run.not_finite} recorded values were not finite (NaN or infinite) and are not drawn."))
    return parts


def _previews(run: Run) -> list[Element]:
    if not run.previews:
        return [missing("No previews were saved during training (no previews/).")] if run.is_training else []
    parts = []
    for name, pictures in run.previews.items():
        parts.append(element("h3", f"{words(name)} over epochs"))
        shown = _spread(pictures, _MAX_PREVIEWS)
        figures = [
            figure(path, f"Epoch {epoch}", alt=f"{words(name)} preview after epoch {epoch}") for epoch, path in shown
        ]
        parts.append(element("div", figures[-1], class_="pictures wide"))
        if figures[:-1]:
            parts.append(element("div", *figures[:-1], class_="pictures"))
        if len(shown) < len(pictures):
            parts.append(element("p", f"{len(shown)} of {len(pictures)} previews are shown.", class_="quiet small"))
    return parts


def title_of(run: Run) -> str:
    """The stage from the manifest, else the folder."""
    task = (run.manifest or {}).get("task")
    return words(str(task) if task else run.name)


def _flat(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        return {}
    return {key: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v for key, v in values.items()}


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
