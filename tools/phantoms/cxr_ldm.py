# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data of the `cxr_ldm` bundle: chest phantoms with reports, as a ready dataset folder.

    python -m tools.phantoms cxr_ldm --out DIR --n 200 [--size 128] [--seed 0] [--split 0.7,0.15,0.15]

Shapes and wordings are made up; no patient, picture or report stands behind them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.phantoms.chest_anatomy import FINDINGS, SEVERITIES, Anatomy, Finding, draw_finding, draw_patient
from tools.phantoms.chest_render import render
from tools.phantoms.chest_reports import finding_prompt, write_report
from tools.phantoms.dataset_folder import empty_folder

__all__ = [
    "FINDINGS",
    "SEVERITIES",
    "Anatomy",
    "Finding",
    "draw_finding",
    "draw_patient",
    "finding_prompt",
    "make_dataset",
    "render",
    "write_report",
]

TEXTS = ("report", "prompt")
SECTIONS = ("training", "validation", "test")
MAX_STUDIES = 4
# last words of the seed sequence: independent streams for patients, items and the order of findings
_PATIENT, _ITEM, _ORDER = 1, 2, 3


def make_dataset(
    out: str,
    n: int = 200,
    size: int = 128,
    seed: int = 0,
    split: Sequence[float] | str = (0.7, 0.15, 0.15),
    text: str = "report",
    overwrite: bool = False,
) -> str:
    """Write a dataset folder: `images/*.png` (8-bit grey) and `datalist.json` (Decathlon form, relative paths).

    Findings come in shuffled blocks of 7, severities balanced over two of them, patients with 1-4 studies one after
    another, and a section is a run of whole patients: sections are disjoint in patients and all balanced. Item i is
    the same for every n (only its section moves). The same arguments give the same bytes.

    Args:
        out: folder to write; made if absent.
        n: number of images.
        size: side of the images in pixels, at least 32.
        seed: seed of everything, >= 0.
        split: shares of training, validation and test, summing to 1; a section of share 0 stays empty. A string
            such as "0.7,0.15,0.15" is accepted.
        text: `report` writes varied reports of several sentences, `prompt` the one canonical sentence of the finding.
        overwrite: replace a dataset that this function wrote into `out` before.

    Returns:
        Path of `datalist.json`.

    Raises:
        ValueError: illegal `split`, `n`, `size`, `text` or `seed`.
        FileExistsError: `out` is not empty and `overwrite` is false.
    """
    shares = _check_split(split)
    wanted = sum(share > 0 for share in shares)
    if n < wanted:
        raise ValueError(f"n: expected at least {wanted} images for {wanted} sections with a share, got {n}; raise n")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if size < 32:
        raise ValueError(f"size: expected at least 32 pixels, got {size}; the ribs vanish below that")
    if text not in TEXTS:
        raise ValueError(f"text: expected {' or '.join(TEXTS)}, got {text!r}")
    patients = _patients(n, seed)
    bounds = _cut([studies for _, studies in patients], shares)
    folder = empty_folder(Path(out), overwrite=overwrite, made=("datalist.json", "images/p?????_s?.png"))
    (folder / "images").mkdir(exist_ok=True)

    items: list[dict[str, Any]] = []
    first = [0]
    for number, (anatomy, studies) in enumerate(patients):
        for study in range(studies):
            options: dict[str, Any] = {"index": len(items), "size": size, "seed": seed, "canonical": text == "prompt"}
            items.append(_write_item(folder, anatomy, number, study, **options))
        first.append(len(items))
    datalist: dict[str, Any] = {
        "name": "cxr_ldm phantoms",
        "description": f"Synthetic chest films with reports: n={n}, size={size}, seed={seed}, split={shares}",
    }
    for section, (begin, end) in zip(SECTIONS, bounds, strict=True):
        datalist[section] = items[first[begin] : first[end]]
    # written last and renamed into place: a folder with a datalist is complete
    path, unfinished = folder / "datalist.json", folder / "datalist.json.tmp"
    unfinished.write_text(json.dumps(datalist, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return str(path)


def _check_split(split: Sequence[float] | str) -> list[float]:
    parts = split.split(",") if isinstance(split, str) else split
    try:
        shares = [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"split: expected three numbers such as 0.7,0.15,0.15, got {split!r}") from error
    if len(shares) != len(SECTIONS) or min(shares) < 0:
        raise ValueError(f"split: expected three shares >= 0 ({', '.join(SECTIONS)}), got {split!r}")
    if abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(f"split: expected shares that sum to 1, got {split!r} with sum {sum(shares):g}")
    return shares


def _patients(n: int, seed: int) -> list[tuple[Anatomy, int]]:
    """Patients with their number of studies, n studies in all; the last patient may be cut short."""
    patients: list[tuple[Anatomy, int]] = []
    left = n
    while left > 0:
        rng = np.random.default_rng([seed, len(patients), _PATIENT])
        studies = min(int(rng.integers(1, MAX_STUDIES + 1)), left)
        patients.append((draw_patient(rng), studies))
        left -= studies
    return patients


def _cut(studies: list[int], shares: list[float]) -> list[tuple[int, int]]:
    """Ranges of patients, one per section, whose image counts come closest to the shares; at least one patient each."""
    wanted = sum(share > 0 for share in shares)
    if len(studies) < wanted:
        raise ValueError(
            f"n: expected images of at least {wanted} patients, one per section, got {len(studies)} from n="
            f"{sum(studies)} (1-{MAX_STUDIES} images per patient); raise n to {wanted * MAX_STUDIES}"
        )
    images = np.concatenate([[0], np.cumsum(studies)])
    bounds, begin = [], 0
    for position, share in enumerate(shares):
        rest = sum(later > 0 for later in shares[position + 1 :])
        end = begin
        if share > 0:
            target = sum(shares[: position + 1]) * images[-1]
            legal = np.arange(begin + 1, len(studies) - rest + 1)
            end = int(legal[np.argmin(np.abs(images[legal] - target))]) if rest else len(studies)
        bounds.append((begin, end))
        begin = end
    return bounds


def _finding_of_item(index: int, seed: int) -> tuple[str, str]:
    """Finding and severity of item `index`: every run of 7 holds each finding, every pair of runs each severity."""
    block, position = divmod(index, 2 * len(FINDINGS))
    half, position = divmod(position, len(FINDINGS))
    rng = np.random.default_rng([seed, block, _ORDER])
    orders = [rng.permutation(len(FINDINGS)) for _ in SEVERITIES]
    first = rng.integers(2, size=len(FINDINGS))  # severity of each finding in the first half
    finding = orders[half][position]
    return FINDINGS[finding], SEVERITIES[(first[finding] + half) % 2]


def _canonical_prompt(finding: Finding) -> str:
    named = {
        name: value for name in ("severity", "side", "zone") if (value := getattr(finding, name)) not in (None, "none")
    }
    return finding_prompt(finding.name, **named)


def _write_item(
    folder: Path, anatomy: Anatomy, patient: int, study: int, *, index: int, size: int, seed: int, canonical: bool
) -> dict[str, Any]:
    # text and picture have their own streams, so that the text of an item does not depend on the size
    what_rng, text_rng, image_rng = np.random.default_rng([seed, index, _ITEM]).spawn(3)
    name, severity = _finding_of_item(index, seed)
    finding = draw_finding(name, severity=severity, rng=what_rng)
    text = _canonical_prompt(finding) if canonical else write_report(finding, rng=text_rng)
    image = render(anatomy, finding, size=size, rng=image_rng)
    subject = f"p{patient + 1:05d}"
    relative = f"images/{subject}_s{study + 1}.png"
    Image.fromarray(np.rint(image * 255.0).astype(np.uint8)).save(folder / relative)
    return {
        "image": relative,
        "text": text,
        "subject": subject,
        "study": f"{subject}_s{study + 1}",
        "view": "PA",
        "labels": {"finding": finding.name, "severity": finding.severity, "sentences": text.count(".")},
    }
