# SPDX-License-Identifier: Apache-2.0
"""`shared.reports`: the published sectioning rules, its corrected defects, sentences."""

from __future__ import annotations

import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import reports
from shared.reports import (
    best_text,
    normalize_section_name,
    parse_sections,
    remove_enumerators,
    report_sentences,
    section_report,
    split_sentences,
)

# "~" stands for the blank at a line's end, which editors strip
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
~
 INDICATION:  ___ year old woman with cough // pneumonia?
~
 TECHNIQUE:  Chest PA and lateral
~
 COMPARISON:  ___
~
 FINDINGS:~
~
 There is a 2.5 cm nodule
 in the left lung.  The heart, as noted by Dr. ___, is
 normal.
~
 IMPRESSION:~
~
 1. Left nodule, 2.5 cm.
 2. No pneumonia.
""".replace("~", " ")


def test_a_mimic_report():
    sections = section_report(REPORT)
    assert list(sections) == [
        "preamble", "examination", "indication", "technique", "comparison", "findings", "impression",
    ]  # fmt: skip
    assert sections["preamble"] == "FINAL REPORT"
    assert sections["examination"] == "CHEST (PA AND LAT)"
    assert sections["impression"].startswith("1. Left nodule")
    assert best_text(REPORT) == sections["impression"]
    assert report_sentences(REPORT) == [
        "There is a 2.5 cm nodule in the left lung.",
        "The heart, as noted by Dr. ___, is normal.",
        "Left nodule, 2.5 cm.",
        "No pneumonia.",
    ]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("IMPRESSION", "impression"), ("IMPRSSION", "impression"), ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"), ("FINDINGS/ IMPRESSION", "impression"),
        ("FINAL IMPRESSION (PRELIMINARY)", "impression"), ("FINIDNGS", "findings"), ("CHEST, TWO VIEWS", "findings"),
        ("CHEST FINDINGS", "findings"), ("PORTABLE UPRIGHT", "findings"), ("LEFT RIBS", "findings"),
        ("CHEST COMPARISON", "comparison"), ("COMPARRISON", "comparison"), ("REFERENCE EXAM", "comparison"),
        ("REASON FOR EXAM", "indication"), ("IDICATION", "indication"), ("PFI", "history"),
        ("SOCIAL HISTORY", "history"),
        ("TYPE OF EXAMINATION", "examination"), ("RECOMMENDATION(S)", "recommendations"), ("WETREAD", "wet read"),
        ("NOTE", "note"), ("ABDOMEN", "abdomen"),
    ],
)  # fmt: skip
def test_header_names(header, name):
    assert normalize_section_name(header) == name


def test_ndication_is_an_indication():
    # the published map sends "NDICATION" to impression, so the question became the trained text
    text = "x\n NDICATION: Rule out pneumonia.\n\n FINDINGS: Clear lungs.\n"
    assert section_report(text) == {"preamble": "x", "indication": "Rule out pneumonia.", "findings": "Clear lungs."}
    assert best_text(text) == "Clear lungs."


def test_last_of_each_name_counts_and_empty_ones_are_dropped():
    text = "\n IMPRESSION: Old.\n more\n IMPRESSION: New.\n more\n IMPRESSION: \n \n"
    assert section_report(text)["impression"] == "New.\n more"


def test_header_pattern_is_strict():
    for text in ("FINDINGS: a", "\nFINDINGS: a", "\n Findings: a", "\n FINDINGS a", "\n FINDINGS:a", ""):
        assert [s.name for s in parse_sections(text)] == ["full report"]
    # the rest of a header's line is not searched, the following line is
    assert [s.name for s in parse_sections("\n FINDINGS: a\n COMMENT: b")] == ["preamble", "findings", "comment"]


def test_last_paragraph():
    text = "\n INDICATION: Cough.\n \n The lungs are clear.\n \n Heart normal."
    assert section_report(text) == {"indication": "Cough.", "last_paragraph": "The lungs are clear.\n \n Heart normal."}
    assert best_text(text) == "The lungs are clear.\n \n Heart normal."
    assert report_sentences(text) == []
    assert report_sentences(text, use_last_paragraph=True) == ["The lungs are clear.", "Heart normal."]
    assert best_text("\n COMPARISON: None.") == "None."
    assert best_text("\n TECHNIQUE: PA.") == ""


def test_there_are_54_hand_ruled_studies():
    assert len(reports._HAND_NAMED) == 23
    assert len(reports._HAND_RANGED) == 31
    assert sum(end == 0 for _, end in reports._HAND_RANGED.values()) == 8
    assert not set(reports._HAND_NAMED) & set(reports._HAND_RANGED)


@pytest.mark.parametrize("study", ["s50913680", "50913680", 50913680])
def test_hand_named_studies_reach_the_sentences(study):
    # published defect: these studies were skipped and trained with the empty prompt
    text = "\n INDICATION: Cough.\n x\n RECOMMENDATIONS: Small effusion. Clear lungs.\n x\n IMPRESSION: See above.\n"
    assert section_report(text, study) == {"hand_ruled": "Small effusion. Clear lungs.\n x"}
    assert report_sentences(text, study) == ["Small effusion.", "Clear lungs. x"]
    assert report_sentences(text) == ["See above."]
    assert best_text("\n IMPRESSION: Other edition.", study) == "Other edition."


def test_hand_ranged_studies():
    text = "".join(chr(ord("a") + i % 26) for i in range(500))
    assert section_report(text, "s51410602") == {"hand_ruled": text[47:320]}
    assert report_sentences(text, "s51410602") == [text[47:320]]
    assert section_report(REPORT, "s58235663") == {}
    assert (best_text(REPORT, "s58235663"), report_sentences(REPORT, "s58235663")) == ("", [])
    assert section_report("short", "s56412866") == {}


def test_no_study_receives_the_text_of_another():
    # published defect 7: the dictionary of the previous study could be written
    assert report_sentences(REPORT, 1)
    assert report_sentences("", 2) == []
    assert report_sentences(REPORT, 1) == report_sentences(REPORT, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart normal. Lungs clear.", ["Heart normal.", "Lungs clear."]),
        ("A 2.5 cm nodule.", ["A 2.5 cm nodule."]),
        ("Told Dr. Smith. Dr. J. Doe agreed.", ["Told Dr. Smith.", "Dr. J. Doe agreed."]),
        ("Opacity, e.g. Pneumonia, vs. Atelectasis.", ["Opacity, e.g. Pneumonia, vs. Atelectasis."]),
        ("1. No change. 2. Clear.", ["1. No change.", "2. Clear."]),
        ("Pneumonia? None! (Prior film.) Stable.", ["Pneumonia?", "None!", "(Prior film.)", "Stable."]),
        ("Stable.No effusion.", ["Stable.", "No effusion."]),
        ("Lungs are clear. heart is normal.", ["Lungs are clear.", "heart is normal."]),
        ("Seen at 3 p.m. on Monday.", ["Seen at 3 p.m. on Monday."]),
        ("Compared to ___. ___ is unchanged.", ["Compared to ___.", "___ is unchanged."]),
        ("At T12. The rest is normal", ["At T12.", "The rest is normal"]),
        ("No full stop\n \n Next paragraph", ["No full stop", "Next paragraph"]),
        (" line\n break,   blanks. ", ["line break, blanks."]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. No change. 2. Clear.", "No change. Clear."),
        ("1. One\n 2. Two\n 3. Three", "One\n Two\n Three"),
        ("(1) One. 2) Two.", "One. Two."),
        ("1.Lucency. 2. Clear.", "Lucency. Clear."),
        ("Nodule of 2.5 cm.", "Nodule of 2.5 cm."),
        ("Fracture of rib\n 5. Clear.", "Fracture of rib\n 5. Clear."),
        ("Seen in 2012. Stable.", "Seen in 2012. Stable."),
    ],
)
def test_enumerators(text, expected):
    assert " ".join(remove_enumerators(text).split()) == " ".join(expected.split())


ALPHABET = st.sampled_from(
    [
        "\n",
        " ",
        "\n ",
        "\n \n",
        "FINDINGS",
        "IMPRESSION",
        "CHEST",
        ":",
        ": ",
        ".",
        "1.",
        "2.5",
        "Dr.",
        "clear",
        "é",
        "A",
    ]
)
ANY_REPORT = st.one_of(st.text(max_size=300), st.lists(ALPHABET, max_size=60).map("".join))
ANY_STUDY = st.sampled_from([None, 7, "", "x", *reports._HAND_NAMED, *reports._HAND_RANGED])


@settings(deadline=None, max_examples=300)
@given(ANY_REPORT, ANY_STUDY)
def test_any_text_is_sectioned_into_parts_of_itself(text, study):
    spans = parse_sections(text)
    assert all(text[s.start : s.end] == s.text for s in spans)
    assert all(content and content in text for content in section_report(text, study).values())
    assert best_text(text, study) in text
    assert all(len(sentence) > 2 for sentence in report_sentences(text, study, use_last_paragraph=True))


@settings(deadline=None, max_examples=300)
@given(ANY_REPORT)
def test_splitting_loses_no_character(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def open_i_reports():
    spec = find_spec("torchxrayvision")
    archive = Path(spec.submodule_search_locations[0]) / "data" / "NLMCXR_reports.tgz" if spec else Path("none")
    if not archive.is_file():
        pytest.skip("torchxrayvision's copy of the Open-i reports is not installed")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                parts = ElementTree.parse(tar.extractfile(member)).getroot().iter("AbstractText")
                yield "".join(f"\n {part.get('Label')}: {part.text or ''}\n" for part in parts)


def test_real_reports():
    found: Counter[str] = Counter()
    double = 0
    for text in open_i_reports():
        sentences = report_sentences(text)
        found.update(reports=1, **dict.fromkeys(section_report(text), 1), with_sentences=bool(sentences))
        found.update(sentences=len(sentences))
        double += sum(". " in sentence.replace("Dr. ", "") for sentence in sentences)
    assert (found["reports"], found["findings"], found["impression"]) == (3955, 3425, 3921)
    assert found["with_sentences"] == 3927
    assert found["sentences"] > 22000
    assert double < 0.001 * found["sentences"]
