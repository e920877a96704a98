# SPDX-License-Identifier: Apache-2.0
"""Reports of any text: no exception, parts of the input and nothing else, whatever the line ends and the length."""

from __future__ import annotations

import string
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import reports
from shared.reports import (
    HAND_RULED,
    best_text,
    normalize_section_name,
    parse_sections,
    remove_enumerators,
    report_sentences,
    section_report,
    split_sentences,
)
from tests.properties import examples

HEADERS = st.one_of(
    st.sampled_from(sorted(reports._NAMES)).map(str.upper),
    st.text(alphabet=string.ascii_uppercase + " ()/,-", min_size=1, max_size=12),
)
PIECES = st.one_of(
    HEADERS.map("\n {}: ".format),
    HEADERS.map("\n {}:\n".format),
    st.sampled_from(
        ["\n \n", "\n\n", "\n ", " ", "\t", "\r\n", "\r\n \r\n", "\x0b", "\x1c", "\x85", "\u2028", "\ufeff"]
    ),
    st.sampled_from(
        [". ", ".", "? ", "!) ", '.)" ', "...", ". . ", "1. ", "(2) ", "3)", "2.5", "12. ", "Dr. ", "e.g. "]
    ),
    st.sampled_from(
        ["clear. heart", "J. Smith", "clear.No", "___", "IMPRESSION:", "é", "ß. ẞ", "\u0301", "\ud800", "٣. "]
    ),
    st.text(max_size=8),
)
REPORTS = st.one_of(st.lists(PIECES, max_size=25).map("".join), st.text(max_size=200))
STUDIES = st.sampled_from([None, 7, "", "s", "s7", " s50913680 ", *reports._HAND_NAMED, *reports._HAND_RANGED])
NAMES = {*reports._NAMES.values(), HAND_RULED, "preamble", "full report", "last_paragraph"}


@examples(300)
@given(REPORTS)
def test_sections_lie_in_the_text_in_order_and_apart(text):
    sections = parse_sections(text)
    assert sections
    end = 0
    for name, start, stop, content in sections:
        assert end <= start <= stop <= len(text)
        assert text[start:stop] == content
        assert name == normalize_section_name(name)
        end = stop


@examples(300)
@given(REPORTS, STUDIES)
def test_every_section_is_a_stripped_part_of_the_text(text, study):
    sections = section_report(text, study)
    for content in sections.values():
        assert content
        assert content == content.strip()
        assert content in text
    best = best_text(text, study)
    assert best == "" or best in sections.values()


@examples(300)
@given(REPORTS)
def test_nothing_but_headers_and_blanks_is_lost(text):
    """What lies between the sections is a header, a blank line, or a section that holds no word."""
    sections, end = parse_sections(text), 0
    for section in sections:
        between = text[end : section.start]
        if section.name == "last_paragraph":
            assert between.strip() == ""
        elif between.strip():
            assert ":" in between
            assert set(between.strip()) <= set(string.ascii_uppercase + " ()/,-:\n\r\t") | set(
                filter(str.isspace, between)
            )
        end = section.end
    assert text[end:].strip() == "" or reports._HEADER.search(text)


@examples(200)
@given(st.lists(st.tuples(st.sampled_from(["IMPRESSION", "FINDINGS", "HISTORY", "NOTE"]),
                          st.text(alphabet=string.ascii_letters + " .", max_size=20)), max_size=6))  # fmt: skip
def test_what_is_put_under_headers_is_found_there(parts):
    text = "".join(f"\n {header}: {content}\nx" for header, content in parts)
    expected = {header.lower(): f"{content}\nx".strip() for header, content in parts}
    assert section_report(text) == expected or not parts


@examples(200)
@given(REPORTS.filter(lambda text: "\r" not in text))
@example("\n FINDINGS:\n IMPRESSION: x\n")
def test_line_ends_of_other_systems_change_nothing(text):
    there = text.replace("\n", "\r\n")
    assert [section.name for section in parse_sections(there)] == [section.name for section in parse_sections(text)]
    assert {name: content.replace("\r\n", "\n") for name, content in section_report(there).items()} == section_report(
        text
    )
    assert report_sentences(there, use_last_paragraph=True) == report_sentences(text, use_last_paragraph=True)


@examples(400)
@given(REPORTS)
@example("Dr. Dr. Smith. 1. x")
@example("....A. B")
def test_sentences_hold_every_letter_and_split_no_further(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    for sentence in sentences:
        assert sentence == " ".join(sentence.split()) != ""
        assert split_sentences(sentence) == [sentence]


@examples(400)
@given(REPORTS)
def test_enumerators_are_all_that_is_removed(text):
    kept = remove_enumerators(text)
    rest = iter(text)
    assert all(letter in rest for letter in kept), "a part of the text, in its order"
    removed = len(text) - len(kept)
    assert removed <= 5 * sum(letter in ".)" for letter in text)
    if not any(letter.isdigit() for letter in text):
        assert kept == text


@examples(300)
@given(REPORTS, STUDIES, st.booleans())
def test_sentences_of_a_report_come_from_it(text, study, last):
    words = "".join(text.split())
    for sentence in report_sentences(text, study, use_last_paragraph=last):
        assert len(sentence) > 2
        assert sentence == " ".join(sentence.split())
        assert all(part in words for part in "".join(c if c.isalpha() else " " for c in sentence).split())


@examples(100)
@given(st.text(max_size=20))
def test_any_header_has_one_name(header):
    name = normalize_section_name(header)
    assert normalize_section_name(name) == name
    assert name in NAMES or name == header.lower().strip()


LONG = {
    "dots": "." * 200_000,
    "dots and marks": ".)" * 100_000,
    "abbreviations": "Dr. " * 50_000,
    "initials": "A. " * 60_000,
    "enumerators": "1. " * 60_000,
    "numbers": "12." * 60_000,
    "headers": "\n IMPRESSION: x" * 15_000,
    "capitals": "\n " + "A" * 200_000,
    "blanks": " " * 200_000 + "x",
    "blank lines": "\n \n" * 60_000,
    "lone dots": "x." + " ." * 100_000 + "x",
    "one word": "x" * 200_000,
    "brackets": "\n " + "(" * 200_000 + ":",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_texts_take_no_longer_than_their_length(text):
    """Squares of these lengths would take hours."""
    sections = section_report(text)
    assert all(content in text for content in sections.values())
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    report_sentences(text, use_last_paragraph=True)


def test_every_character_of_unicode_is_text():
    for start in range(0, sys.maxunicode + 1, 4096):
        block = "".join(map(chr, range(start, min(start + 4096, sys.maxunicode + 1))))
        assert all(content in block for content in section_report(block).values())
        assert "".join("".join(split_sentences(block)).split()) == "".join(block.split())
    decimal = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Nd"]
    for digit in decimal:
        assert remove_enumerators(f"{digit}. x").strip() in ("x", f"{digit}. x")
