# SPDX-License-Identifier: Apache-2.0
"""Report text of the chest phantom: a small grammar in the manner of radiology reports.

Each report has one or two sentences about the finding (side, size and zone in words) and normal sentences about OTHER
structures only, so that the text never contradicts the picture. Sentences end in a full stop and hold no other one:
splitting at full stops gives the sentences back. All wordings are our own.
"""

from __future__ import annotations

import numpy as np

from tools.phantoms.chest_anatomy import SIDES, ZONES, Finding

MAX_SENTENCES = 5

# words for the two severities; {size} in the wordings below
SIZES = {
    "pleural_effusion": {"small": ("small", "mild"), "large": ("large", "big")},
    "opacity": {"small": ("small", "focal"), "large": ("large", "extensive")},
    "pneumothorax": {"small": ("small", "tiny"), "large": ("large", "big")},
}

# {a} is the article that fits the size word
WORDINGS: dict[str, tuple[str, ...]] = {
    "no_finding": (
        "No acute cardiopulmonary abnormality.",
        "No acute cardiopulmonary process.",
        "Normal chest radiograph.",
        "There is no acute cardiopulmonary disease.",
        "Unremarkable chest radiograph.",
    ),
    "pleural_effusion": (
        "There is {a} {size} {side} pleural effusion.",
        "There is {a} {size} {side}-sided pleural effusion.",
        "{Size} {side} pleural effusion.",
        "{Size} {side}-sided pleural effusion is seen.",
        "{A} {size} pleural effusion is present on the {side}.",
    ),
    "opacity": (
        "There is {a} {size} opacity in the {side} {zone} lung zone.",
        "{Size} {side} {zone} zone opacity.",
        "{A} {size} consolidation is seen in the {side} {zone} lung.",
        "{Size} airspace opacity in the {side} {zone} lung.",
        "{A} {size} opacity projects over the {side} {zone} zone.",
    ),
    "pneumothorax": (
        "There is {a} {size} {side} pneumothorax.",
        "{Size} {side} pneumothorax.",
        "{A} {size} {side}-sided pneumothorax is present.",
        "{Size} {side} apical and lateral pneumothorax.",
        "{A} {size} pneumothorax is seen on the {side}.",
    ),
    "cardiomegaly_small": (
        "The heart is mildly enlarged.",
        "Mild cardiomegaly.",
        "There is mild cardiomegaly.",
        "The cardiac silhouette is slightly enlarged.",
    ),
    "cardiomegaly_large": (
        "The heart is markedly enlarged, consistent with cardiomegaly.",
        "Severe cardiomegaly.",
        "There is marked cardiomegaly.",
        "The cardiac silhouette is severely enlarged.",
    ),
}

# an optional second sentence about the finding
DETAILS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("The cardiothoracic ratio is increased.", "The cardiac contour is widened."),
    "pleural_effusion_small": (
        "The {side} costophrenic angle is blunted.",
        "There is blunting of the {side} costophrenic angle.",
    ),
    "pleural_effusion_large": (
        "Fluid reaches the {side} mid lung.",
        "The {side} hemidiaphragm is obscured.",
    ),
    "opacity": ("This may represent pneumonia.", "Findings are concerning for pneumonia in the {side} lung."),
    "pneumothorax": ("A {side} pleural line is visible.", "The {side} lung is partly collapsed."),
}

# normal sentences by structure; NORMAL_OF names the structures that a finding leaves alone
NORMAL: dict[str, tuple[str, ...]] = {
    "heart": ("The heart size is normal.", "Heart size is within normal limits.", "The cardiac silhouette is normal."),
    "mediastinum": (
        "The mediastinal contours are unremarkable.",
        "The hilar contours are normal.",
        "The mediastinum is midline.",
    ),
    "bones": ("No acute osseous abnormality.", "The bony thorax is intact.", "No rib fracture is seen."),
    "lungs": ("The lungs are clear.", "No focal consolidation.", "The lungs are well expanded and clear."),
    "consolidation": ("No focal consolidation.", "There is no lobar consolidation."),
    "pleura": ("No pleural effusion.", "There is no pleural effusion.", "Both costophrenic angles are sharp."),
    "air": ("No pneumothorax.", "There is no pneumothorax.", "No pneumothorax is seen."),
    "other_lung": ("The {other} lung is clear.", "No focal opacity in the {other} lung."),
    "other_pleura": ("The {other} costophrenic angle is sharp.", "No effusion on the {other}."),
}
NORMAL_OF: dict[str, tuple[str, ...]] = {
    "no_finding": ("heart", "mediastinum", "bones", "lungs", "pleura", "air"),
    "cardiomegaly": ("mediastinum", "bones", "lungs", "pleura", "air"),
    "pleural_effusion": ("heart", "mediastinum", "bones", "other_lung", "other_pleura", "air"),
    "opacity": ("heart", "mediastinum", "bones", "other_lung", "pleura", "air"),
    "pneumothorax": ("heart", "mediastinum", "bones", "consolidation", "pleura", "other_lung"),
}


def write_report(finding: Finding, *, rng: np.random.Generator) -> str:
    """Write the report of one study: 2 to 5 sentences, the finding always among them.

    Args:
        finding: what the picture shows.
        rng: chooses wordings, the number and the order of sentences.

    Returns:
        Sentences separated by one blank, each ending in a full stop.
    """
    kind = _kind(finding.name)
    about = [_fill(_pick(_wordings(finding), rng), finding, rng)]
    details = DETAILS.get(f"{kind}_{finding.severity}", DETAILS.get(kind))
    if details and rng.random() < 0.35:
        about.append(_fill(_pick(details, rng), finding, rng))
    structures = list(NORMAL_OF[kind])
    count = int(rng.integers(max(1, 2 - len(about)), MAX_SENTENCES - len(about) + 1))
    normal = [_fill(_pick(NORMAL[structures[i]], rng), finding, rng) for i in rng.permutation(len(structures))[:count]]
    at = 0 if rng.random() < 0.6 else int(rng.integers(len(normal) + 1))
    return " ".join([*normal[:at], *about, *normal[at:]])


def finding_prompt(finding: str, *, severity: str = "large", side: str = "right", zone: str = "mid") -> str:
    """Canonical prompt of a finding, in words that the reports use.

    Args:
        finding: one of `FINDINGS`.
        severity: "small" or "large"; ignored for no_finding.
        side: patient's side of a pneumothorax; the other findings carry theirs in the name.
        zone: "upper", "mid" or "lower" lung zone of an opacity.

    Returns:
        One sentence, such as "There is a large left pleural effusion."

    Raises:
        ValueError: unknown finding, severity, side or zone.
    """
    for key, value, legal in (("side", side, SIDES), ("zone", zone, ZONES)):
        if value not in legal:
            raise ValueError(f"{key}: expected {' or '.join(legal)}, got {value!r}")
    named = finding.split("_")[0]
    what = Finding(
        finding,
        "none" if finding == "no_finding" else severity,
        named if named in SIDES else side if finding == "pneumothorax" else None,
        zone if finding.endswith("opacity") else None,
    )
    return _fill(_wordings(what)[0], what, None)


def _kind(name: str) -> str:
    return name.removeprefix("left_").removeprefix("right_")


def _wordings(finding: Finding) -> tuple[str, ...]:
    if finding.name == "cardiomegaly":
        return WORDINGS[f"cardiomegaly_{finding.severity}"]
    return WORDINGS[_kind(finding.name)]


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _fill(wording: str, finding: Finding, rng: np.random.Generator | None) -> str:
    """Put side, size and zone into a wording; without a generator the first size word is taken."""
    words = {"side": finding.side or "", "zone": finding.zone or ""}
    words["other"] = {"left": "right", "right": "left"}.get(words["side"], "")
    if "ize}" in wording:
        sizes = SIZES[_kind(finding.name)][finding.severity]
        size = sizes[0] if rng is None else _pick(sizes, rng)
        article = "an" if size[0] in "aeiou" else "a"
        words.update(size=size, Size=size.capitalize(), a=article, A=article.capitalize())
    return wording.format(**words)
