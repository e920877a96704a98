# SPDX-License-Identifier: Apache-2.0
"""Sentences made from CheXpert labels (the optional "extended" text of the published chest X-ray model)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from shared.reports import split_sentences


class _Noun(NamedTuple):
    """How a label is said: its words, a verb and whether "a"/"an" precedes it; a pattern that finds it in a report."""

    words: str
    verb: str
    article: bool
    pattern: str


# The 13 label columns of mimic-cxr-2.0.0-chexpert.csv ("No Finding" has no sentence).
_NOUNS = {
    "Atelectasis": _Noun("atelectasis", "is", False, r"atelecta(?:sis|ses)"),
    "Cardiomegaly": _Noun("cardiomegaly", "is", False, r"cardiomegaly"),
    "Consolidation": _Noun("consolidation", "is", True, r"consolidations?"),
    "Edema": _Noun("edema", "is", False, r"edema"),
    "Enlarged Cardiomediastinum": _Noun(
        "enlarged cardiomediastinum", "is", True, r"enlarge(?:d|ment of the) cardiomediastinum"
    ),
    "Fracture": _Noun("fracture", "is", True, r"fractures?"),
    "Lung Lesion": _Noun("lung lesion", "is", True, r"lung lesions?"),
    "Lung Opacity": _Noun("lung opacity", "is", True, r"lung opacit(?:y|ies)"),
    "Pleural Effusion": _Noun("pleural effusion", "is", True, r"pleural effusions?"),
    "Pleural Other": _Noun("other pleural abnormality", "is", True, r"pleural (?:abnormality|thickening|scarring)"),
    "Pneumonia": _Noun("pneumonia", "is", False, r"pneumonia"),
    "Pneumothorax": _Noun("pneumothorax", "is", True, r"pneumothora(?:x|ces)"),
    "Support Devices": _Noun("support devices", "are", False, r"support devices?"),
}
CHEXPERT_LABELS = tuple(_NOUNS)
_SEVERITIES = ("mild", "moderate", "severe")
_ADJECTIVE = rf"\b({'|'.join(_SEVERITIES)})\b"
_NEGATION = re.compile(r"\b(?:no|not|without|resolved)\b[^,;]*$", re.IGNORECASE)


def find_severities(label: str, text: str) -> list[str]:
    """Which of mild, moderate, severe qualify a label in a report, in order of appearance.

    The adjective stands up to three words before the label's own words in the same sentence, without "and", "or",
    "with" or a comma between ("moderate left pleural effusion" counts, "severe scoliosis and edema" does not), and is
    not negated ("no severe edema"). Works for labels of several words and any case.

    Raises:
        ValueError: not one of the 13 labels.
    """
    if label not in _NOUNS:
        raise ValueError(f"label: expected one of {', '.join(CHEXPERT_LABELS)}, but got {label!r}")
    between = r"(?:[ ](?!(?:and|or|with|but|no)\b)[\w-]+){0,3}?"
    qualified = re.compile(rf"(?={_ADJECTIVE}{between}[ ](?:{_NOUNS[label].pattern})\b)", re.IGNORECASE)
    found: list[str] = []
    for sentence in split_sentences(text):
        for match in qualified.finditer(sentence):
            adjective = match.group(1).lower()
            if adjective not in found and not _NEGATION.search(sentence[: match.start()]):
                found.append(adjective)
    return found


def _is_positive(value: object) -> bool:
    try:
        return float(str(value)) == 1.0
    except ValueError:  # an empty cell
        return value is True


def label_sentences(labels: Mapping[str, object], text: str = "") -> list[str]:
    """Two sentences per positive label, and two more per severity that the report gives it.

    Args:
        labels: label name -> value of the CheXpert table; 1 (also 1.0, "1.0", True) is positive, everything else
            (0 negative, -1 uncertain, empty, NaN) says nothing. Other columns are passed over.
        text: the report's description, in which severities are looked for.

    Returns:
        Such as "The patient has pleural effusion.", "There is a pleural effusion.", "The patient has moderate pleural
        effusion.", "There is a moderate pleural effusion."; in the order of `CHEXPERT_LABELS`.
    """
    sentences: list[str] = []
    for label, noun in _NOUNS.items():
        if not _is_positive(labels.get(label)):
            continue
        for severity in ("", *find_severities(label, text)):
            words = f"{severity} {noun.words}".strip()
            article = ("an " if words[0] in "aeiou" else "a ") if noun.article else ""
            sentences += [f"The patient has {words}.", f"There {noun.verb} {article}{words}."]
    return sentences
