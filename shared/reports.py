# SPDX-License-Identifier: Apache-2.0
"""Free-text chest X-ray reports: sections and sentences. Pure text in, text out.

The rules of sectioning are those of MIT-LCP's mimic-cxr (`section_parser.py`, `create_section_files.py`), on which the
published model was trained, with these corrections: the header "NDICATION" is an indication, not an impression; the 54
hand-ruled studies reach the training text (in the published pipeline they were skipped, so that they trained with an
empty prompt).
"""

from __future__ import annotations

import re
from typing import NamedTuple

# A header stands on a line of its own start: newline, one blank, capitals, colon, a white-space character or line end.
_HEADER = re.compile(r"\n ([A-Z ()/,-]+):(?:\r\n|\s)")

_BLANK_LINE = re.compile(r"\n \r?\n")

_SPELLINGS = {
    "impression": """impression|impressions|conclusion|findings and impression|findings/impression|findings/ impression
        |impresson|imprression|imoression|impressoin|imprssion|impresion|imperssion|mpression|impession""",
    "findings": """findings|chest, two views|finding|findins|findindgs|findgings|findngs|findnings|finidngs
        |reference findings""",
    "comparison": """comparison|comparisons|reference exam|comparison exam|comparison film|comparision|comparsion
        |comparrison|comparisions""",
    "indication": "indication|reason for examination|reason for exam|clinical indication|idication|ndication",
    "history": "history|clinical history|clinical information|patient history|pfi",
    "examination": "examination|exam|type of examination",
    "recommendations": "recommendations|recommendation|recommendation(s)",
    "technique": "technique",
    "notification": "notification",
    "addendum": "addendum",
    "date": "date",
    "comment": "comment",
    "wet read": "wet read|wetread",
    "preamble": "preamble",
}
_NAMES = {
    spelling.strip(): name for name, spellings in _SPELLINGS.items() for spelling in spellings.split("|")
}  # fmt: skip
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")  # asked in this order
# A header that describes the whole study ("CHEST, PA AND LATERAL") opens its findings.
_STUDY_DESCRIPTIONS = (
    "chest", "portable", "pa and lateral", "lateral and pa", "ap and lateral", "lateral and ap", "frontal and",
    "two views", "frontal view", "pa view", "ap view", "one view", "lateral view", "bone window", "frontal upright",
    "frontal semi-upright", "ribs", "pa and lat",
)  # fmt: skip

# Studies for which the authors of the rules read the report and named the section that holds the description.
_HAND_NAMED = {
    study: name
    for name, studies in {
        "recommendations": "50913680 59768032 59067458 59087630 58157373 56482935 58375018",
        "examination": "59363654 53356173 50743547 59215320 55157853",
        "technique": "59279892 53202765 50808053",
        "indication": "57936451 50058765 51966317 55124749 54365831 54654948",
        "note": "56451190",
        "history": "51491012",
    }.items()
    for study in studies.split()
}
# ... or gave the characters of the file; an empty range means that the report describes nothing.
_HAND_RANGED = {
    "50525523": (201, 349), "57564132": (233, 554), "59982525": (313, 717), "53488209": (149, 475),
    "54875119": (234, 988), "50196495": (59, 399), "56579911": (59, 218), "52648681": (292, 631),
    "59889364": (172, 453), "53514462": (73, 377), "59505494": (59, 450), "53182247": (59, 412),
    "51410602": (47, 320), "56412866": (522, 822), "54986978": (59, 306), "59003148": (262, 505),
    "57150433": (61, 394), "56760320": (219, 457), "59562049": (158, 348), "52674888": (145, 296),
    "55258338": (192, 568), "59330497": (140, 655), "52119491": (179, 454),
    "58235663": (0, 0), "50798377": (0, 0), "54168089": (0, 0), "53071062": (0, 0), "56724958": (0, 0),
    "54231141": (0, 0), "53607029": (0, 0), "52035334": (0, 0),
}  # fmt: skip
HAND_RULED = "hand_ruled"  # name under which a hand-ruled study's description is returned


class Section(NamedTuple):
    """A part of a report: `text == report[start:end]`."""

    name: str
    start: int
    end: int
    text: str


def normalize_section_name(header: str) -> str:
    """Header words -> section name, such as "REASON FOR EXAM" -> "indication"; unknown ones are lower-cased."""
    name = header.lower().strip()
    if name in _NAMES:
        return _NAMES[name]
    for contained in _CONTAINED:
        if contained in name:
            return contained
    return "findings" if any(words in name for words in _STUDY_DESCRIPTIONS) else name


def parse_sections(text: str) -> list[Section]:
    """Cut a report at its headers, in order of appearance; a name may occur several times.

    Text before the first header is "preamble"; without any header the whole is "full report". Empty findings and
    impressions are dropped. Where neither is left and the last section has a blank line, what follows that
    line becomes "last_paragraph".
    """
    sections: list[Section] = []
    match = _HEADER.search(text)
    if match is None:
        sections.append(Section("full report", 0, len(text), text))
    else:
        sections.append(Section("preamble", 0, match.start(1), text[: match.start(1)]))
    while match is not None:
        start = match.end()
        # the line of the header is skipped, since it may hold words that look like one more header
        following = _HEADER.search(text, max(text.find("\n", start), start))
        end = len(text) if following is None else following.start()
        sections.append(Section(normalize_section_name(match.group(1)), start, end, text[start:end]))
        match = following
    described = ("impression", "findings")
    sections = [s for s in sections if s.name not in described or s.text.strip()]
    blank = None if any(s.name in described for s in sections) else _BLANK_LINE.search(sections[-1].text)
    if blank is not None:
        last = sections.pop()
        cut, after = last.start + blank.start(), last.start + blank.end()
        sections.append(Section(last.name, last.start, cut, text[last.start : cut]))
        sections.append(Section("last_paragraph", after, last.end, text[after : last.end]))
    return sections


def section_report(text: str, study: str | int | None = None) -> dict[str, str]:
    """Section name -> stripped text, the last of each name; empty sections are left out.

    Args:
        text: the report as in its file (the hand-given character ranges count from its first character).
        study: MIMIC-CXR study number (`"s50913680"`, `"50913680"` or 50913680), for the 54 hand-ruled studies.

    Returns:
        Each value is a part of `text`. A hand-ruled study has the ruled description, and nothing else, under
        `"hand_ruled"`, or no section at all where the ruling is that it describes nothing. If the named section is
        not in the text (another edition of the report), the ordinary rules hold.
    """
    number = "" if study is None else str(study).strip().removeprefix("s")
    if number in _HAND_RANGED:
        start, end = _HAND_RANGED[number]
        ruled = text[start:end].strip()
        return {HAND_RULED: ruled} if ruled else {}
    sections = {s.name: s.text.strip() for s in parse_sections(text)}
    sections = {name: content for name, content in sections.items() if content}
    if number in _HAND_NAMED and _HAND_NAMED[number] in sections:
        return {HAND_RULED: sections[_HAND_NAMED[number]]}
    return sections


def best_text(text: str, study: str | int | None = None) -> str:
    """The description of the study in one piece: hand-ruled, else impression, findings, last paragraph, comparison."""
    sections = section_report(text, study)
    for name in (HAND_RULED, "impression", "findings", "last_paragraph", "comparison"):
        if name in sections:
            return sections[name]
    return ""


_ENUMERATOR = re.compile(r"(?:^|(?<=[\s:;.]))\(?(\d{1,2})[.)](?=\s|[A-Za-z]{2})", re.MULTILINE)

_LONE_DOTS = re.compile(r"(?<=[.!?])(?:\s+\.)+(?=\s|$)")  # "No acute disease. ."


def remove_enumerators(text: str) -> str:
    """Delete the numbers of a list ("1. No effusion. 2. Clear lungs."), never a number that belongs to a sentence.

    A number with a dot is an enumerator where a line or sentence begins and it fits the count (1, or up to the one
    before plus 1). The published rule deleted any digits before a dot ("2.5 cm" became "5 cm").
    """
    kept, position, count = [], 0, 0
    for match in _ENUMERATOR.finditer(text):
        before = match.start()
        while before and text[before - 1] in " \t":
            before -= 1
        begins = before == 0 or text[before - 1] in "\n\r.:;?!"
        number = int(match.group(1))
        if begins and 1 <= number <= count + 1:
            kept.append(text[position : match.start()])
            position, count = match.end(), number
    return "".join([*kept, text[position:]])


# Abbreviations after which a sentence goes on even if a capital or a number follows.
_ABBREVIATIONS = frozenset(
    ["dr", "drs", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "ca", "approx", "fig", "dept", "incl"]
)
_BOUNDARY = re.compile(
    # only the first of several marks begins a match: thousands of dots would take minutes
    r"""(?P<end>(?<![.!?])[.!?]+[)\]"']*) # the end of a sentence, closing marks included
        (?:\s+(?=["'(\[]*[A-Z0-9_])       # then white space and something that can begin one ("___": removed names)
        |(?<=[a-z]{4}\.)\s+(?=[a-z]{2})   # or a small letter after a whole word: "clear. heart is normal"
        |(?<=[a-z]\.)(?=[A-Z][a-z]))      # or a forgotten blank: "clear.No effusion"
    """,
    re.VERBOSE,
)


def split_sentences(text: str) -> list[str]:
    """Split English report text into sentences, white space squeezed to single blanks; no word is lost or changed.

    A sentence ends at ". ! ?" before white space and a capital, digit or "___" (after a word of four letters also
    before a small letter, for reports typed without capitals), and at a blank line. It does not end after an
    abbreviation ("Dr.", "e.g.", "vs."), an initial ("J. Smith"), an enumerator ("1."), or inside a decimal.

    These are rules of ours because the published pipeline's spaCy model (`en_core_web_sm`) is a separate download that
    cannot be had offline, and spaCy's rule-based `sentencizer` splits after every dot ("Dr.", "e.g.", "1.").
    """
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        squeezed = " ".join(paragraph.split())
        start = 0
        for match in _BOUNDARY.finditer(squeezed):
            blank = squeezed.rfind(" ", start, match.start())
            last = squeezed[max(blank + 1, start) : match.start()]
            word = last.lower().lstrip("(['\"")
            initial = len(word) == 1 and word.isalpha() and last.isupper() and match["end"] == "."
            enumerator = blank < 0 and word.isdigit()
            if match["end"][0] == "." and (word in _ABBREVIATIONS or initial or enumerator):
                continue
            sentences.append(squeezed[start : match.end("end")])
            start = match.end()
        sentences.append(squeezed[start:])
    return [sentence for sentence in sentences if sentence]


def report_sentences(text: str, study: str | int | None = None, *, use_last_paragraph: bool = False) -> list[str]:
    """The sentences a text encoder is trained on: those of the findings, then those of the impression.

    Enumerators are removed; sentences of up to 2 characters are dropped. A hand-ruled study gives the sentences of its
    ruled text. Nothing is remembered between calls, so one study can never receive another's text.

    Args:
        text: the report as in its file.
        study: MIMIC-CXR study number, see `section_report`.
        use_last_paragraph: where a report has neither findings nor impression, take its last paragraph. The published
            pipeline did not, so such studies had no text.

    Returns:
        Sentences, possibly none.
    """
    sections = section_report(text, study)
    names = [name for name in (HAND_RULED, "findings", "impression") if name in sections]
    if not names and use_last_paragraph and "last_paragraph" in sections:
        names = ["last_paragraph"]
    cleaned = [_LONE_DOTS.sub("", remove_enumerators(sections[name])) for name in names]
    sentences = [s for section in cleaned for s in split_sentences(section)]
    return [sentence for sentence in sentences if len(sentence) > 2]
