# SPDX-License-Identifier: Apache-2.0
"""Identifiers that no real data hold, and the search for them in every byte of what a program left behind."""

from __future__ import annotations

import base64
import io
import json
import re
import sqlite3
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

# By the kind of place where they are planted; each string is looked for without regard to capitals.
PLANTED: dict[str, dict[str, str]] = {
    "header": {
        "PatientName": "Quartermaine^Zebedee",
        "PatientID": "MRN-7734901X",
        "PatientBirthDate": "19031117",
        "AccessionNumber": "ACC-55190-Q",
        "InstitutionName": "Eligius-of-Xanadu",
        "ReferringPhysicianName": "Þorgerður",
        "StudyInstanceUID": "1.2.826.0.1.9988776655.44332",
        "private": "private-zyxwv-1",
    },
    "name": {"subject and file": "kowalczyk"},
    "text": {"report": "Vandersloot"},
    "prompt": {"prompt": "Przybylski"},
    "typed": {"folder of the input": "wojtkowiak"},
}
# Parts of a name are identifiers, too.
NEEDLES: dict[str, tuple[str, ...]] = {
    kind: tuple(part for value in values.values() for part in value.split("^")) for kind, values in PLANTED.items()
}
_DEEPEST = 6


def _forms(text: str) -> set[bytes]:
    """A string as files hold it: encodings, and the escapes of JSON, HTML and URLs, in lower case and as it is."""
    written = {text, json.dumps(text)[1:-1], urllib.parse.quote(text, safe="^ "), "".join(map(_entity, text))}
    # UTF-16 and UTF-32 are Latin-1 without their zeros.
    return {form.encode(code) for one in written for form in (one, one.lower()) for code in ("utf-8", "latin-1")}


def _entity(letter: str) -> str:
    return letter if letter.isascii() else f"&#{ord(letter)};"


_FORMS = {kind: [form for needle in needles for form in sorted(_forms(needle))] for kind, needles in NEEDLES.items()}


def kinds_in(data: bytes) -> set[str]:
    """Kinds of identifiers in some bytes, and in whatever is packed into them."""
    return {kind for part in unpacked(data) for kind in _kinds(part)}


def kinds_in_file(path: Path) -> set[str]:
    found = kinds_in(path.read_bytes())
    return found | (_kinds_in_database(path) if path.read_bytes()[:15] == b"SQLite format 3" else set())


def _kinds(data: bytes) -> Iterator[str]:
    # bytes.lower() changes ASCII letters alone.
    lower = data.replace(b"\0", b"").lower()
    return (kind for kind, forms in _FORMS.items() if any(form in lower for form in forms))


def _kinds_in_database(path: Path) -> set[str]:
    """A value may be split between pages of the file, hence row by row."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        rows = "\n".join(database.iterdump())
    database.close()
    return kinds_in(rows.encode())


def unpacked(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """The bytes themselves, then what zip archives (``.pt``, ``.npz`` too), gzip, PNG and data URIs in them hold."""
    yield data
    if depth == _DEEPEST:
        return
    for inner in _inside(data):
        yield from unpacked(inner, depth + 1)


def _inside(data: bytes) -> Iterator[bytes]:
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                yield member.filename.encode() + b"\n" + member.comment
                yield archive.read(member)
    elif data[:2] == b"\x1f\x8b":
        yield _gunzipped(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from _png_texts(data)
    for match in re.finditer(rb"data:[\w/+.;=-]*base64,([A-Za-z0-9+/=]+)", data):
        yield base64.b64decode(match.group(1))


def _gunzipped(data: bytes) -> bytes:
    """All members, the last one as far as it goes where a file is cut off."""
    result = b""
    while data[:2] == b"\x1f\x8b":
        member = zlib.decompressobj(31)
        result += member.decompress(data)
        data = member.unused_data
    return result


def _png_texts(data: bytes) -> Iterator[bytes]:
    """Compressed text chunks; plain ones are bytes of the file."""
    place = 8
    while place + 8 <= len(data):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place + 8 : place + 8 + length]
        place += length + 12
        if name in (b"zTXt", b"iTXt", b"iCCP"):
            for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", chunk)):
                try:
                    yield zlib.decompressobj().decompress(chunk[start:])
                except zlib.error:
                    continue


def search(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Every file below a folder -> kinds of identifiers in it, and in its name: its path below ``root``."""
    result = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            place = path.relative_to(root).as_posix()
            result[place] = kinds_in_file(path), kinds_in(place.encode())
    return result
