# SPDX-License-Identifier: Apache-2.0
"""`shared.label_sentences`: which labels speak, their grammar, and the severities found in the report."""

from __future__ import annotations

import pytest

from shared.label_sentences import CHEXPERT_LABELS, find_severities, label_sentences


def test_label_sentences_and_their_articles():
    positive = dict.fromkeys(CHEXPERT_LABELS, 1.0)
    sentences = label_sentences(positive)
    assert len(CHEXPERT_LABELS) == 13
    assert len(sentences) == 26
    for expected in (
        "There is a pleural effusion.", "There is an enlarged cardiomediastinum.", "There is edema.",
        "There are support devices.", "The patient has pneumothorax.", "There is a lung opacity.",
    ):  # fmt: skip
        assert expected in sentences


def test_only_positive_labels_speak():
    values = {"Edema": "1.0", "Fracture": "0.0", "Pneumonia": -1.0, "Pneumothorax": float("nan"), "Lung Lesion": ""}
    assert label_sentences(values | {"subject_id": 1, "No Finding": 1}) == ["The patient has edema.", "There is edema."]


def test_severity_of_labels_of_several_words():
    # published defect 8: compared one lower-case word with the capitalised label, and wrote "an moderate"
    text = "There is a moderate left Pleural Effusion. Mild cardiomegaly."
    assert label_sentences({"Pleural Effusion": 1, "Cardiomegaly": 1}, text) == [
        "The patient has cardiomegaly.", "There is cardiomegaly.",
        "The patient has mild cardiomegaly.", "There is mild cardiomegaly.",
        "The patient has pleural effusion.", "There is a pleural effusion.",
        "The patient has moderate pleural effusion.", "There is a moderate pleural effusion.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "text", "expected"),
    [
        ("Pleural Effusion", "Moderate to severe pleural effusions.", ["moderate", "severe"]),
        ("Edema", "Severe scoliosis and edema.", []),
        ("Edema", "No severe edema.", []),
        ("Edema", "No effusion, mild pulmonary edema.", ["mild"]),
        ("Edema", "Mild.  Edema.", []),
        ("Lung Opacity", "mild lung opacities", ["mild"]),
        ("Enlarged Cardiomediastinum", "A moderate enlarged cardiomediastinum.", ["moderate"]),
    ],
)
def test_severities(label, text, expected):
    assert find_severities(label, text) == expected


def test_unknown_label():
    with pytest.raises(ValueError, match="^label: expected one of Atelectasis.*but got 'Cough'"):
        find_severities("Cough", "")
