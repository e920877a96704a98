# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in `datalist.json`: a list of items, or a ValueError that begins with the file."""

from __future__ import annotations

import json
import math
import os
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.datalist import (
    FILE_NAME,
    PATH_KEYS,
    SECTIONS,
    find_leaks,
    load_datalist,
    read_datalist,
    read_description,
    split_by_subject,
    write_datalist,
)
from tests.properties import error_of, examples

KEYS = st.sampled_from([*SECTIONS, *PATH_KEYS, "subject", "text", "num_slices", "name", "", "é", "\x00", "\ud800"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "images/1.png", "/etc/passwd", "../x", "a\\b", "\x00", "a\x00b", "\ud800", ".", "x" * 300]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
# Nearly right, so that the checks behind the first are reached.
NEARLY = st.dictionaries(
    st.sampled_from(SECTIONS),
    st.one_of(JSON, st.lists(st.one_of(JSON, st.dictionaries(KEYS, JSON, max_size=3), SCALARS), max_size=4)),
    min_size=1,
    max_size=3,
)
REQUIRED = st.sampled_from([(), "image", ("image", "text|report"), ("subject",)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(b"")
    return folder


def expect_list_or_message(folder: Path, required=(), *, check_files: bool) -> None:
    file = folder / FILE_NAME
    for section in SECTIONS:
        items: list[dict] = []
        error = error_of(
            lambda section=section, items=items: items.extend(
                load_datalist(folder, section, required=required, check_files=check_files)
            ),
            *(ValueError, FileNotFoundError),
        )
        if isinstance(error, FileNotFoundError):
            assert check_files
            assert f" of {file}: {section}[" in str(error)
        elif error is not None:
            assert type(error) is ValueError
            assert str(error).startswith(f"{file}: ")
        assert bool(items) == (error is None)
        for item in items:
            found = [key for key in PATH_KEYS if key in item]
            assert found
            for key in found:
                paths = item[key] if isinstance(item[key], list) else [item[key]]
                assert paths
                assert all(os.path.isabs(path) and path == os.path.normpath(path) for path in paths)


@examples(200)
@given(content=st.one_of(JSON, NEARLY, NEARLY), required=REQUIRED, check_files=st.booleans())
@example(content={"training": [{"image": "a\x00b"}]}, required=(), check_files=True)
@example(content={"training": [{"image": "\ud800.png"}]}, required=(), check_files=True)
def test_any_json_is_a_list_or_an_error_that_begins_with_the_file(folder, content, required, check_files):
    (folder / FILE_NAME).write_text(json.dumps(content), encoding="utf-8")
    expect_list_or_message(folder, required, check_files=check_files)
    error = error_of(lambda: find_leaks(read_datalist(folder)) and read_description(folder))
    assert error is None or str(error).startswith(f"{folder / FILE_NAME}: ")


@examples(150)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))))
@example(content=b"[" * 100_000)
@example(content=b'{"training": [' * 50_000)
@example(content=b'{"training": ' + b"9" * 5_000 + b"}")
@example(content=b'{"training": [{"image": 1' + b"0" * 5_000 + b"}]}")
@example(content=b"\xef\xbb\xbf{}")
@example(content=b"NaN")
def test_any_bytes_are_an_error_that_begins_with_the_file(folder, content):
    (folder / FILE_NAME).write_bytes(content)
    expect_list_or_message(folder, check_files=False)


SUBJECTS = st.one_of(st.integers(0, 30), st.text(min_size=1, max_size=3))
ITEMS = st.lists(
    st.fixed_dictionaries({"subject": SUBJECTS, "image": st.text(alphabet=string.ascii_lowercase, min_size=1)}),
    max_size=40,
)
FRACTIONS = st.one_of(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.one_of(st.floats(), st.sampled_from([0, 1, 1e-300, 1e300, 5e-324])), max_size=4),
)


@examples(300)
@given(items=ITEMS, fractions=FRACTIONS, seed=st.integers(0, 5))
@example(items=[{"subject": 1, "image": "a"}] * 3, fractions=[math.inf, 1, 1], seed=0)
@example(items=[{"subject": n, "image": "a"} for n in range(9)], fractions=[math.nan, 1, 1], seed=0)
@example(items=[{"subject": n, "image": "a"} for n in range(9)], fractions=[1e308, 1e308, 1e308], seed=0)
@example(items=[{"subject": n, "image": "a"} for n in range(3)], fractions=[1.0, 1e-9, 1e-9], seed=0)
def test_a_split_is_complete_disjoint_by_subject_and_leaves_no_wanted_part_empty(items, fractions, seed):
    error = error_of(lambda: split_by_subject(items, fractions, seed))
    if error is not None:
        few = len({str(item["subject"]) for item in items}) < sum(f > 0 for f in fractions)
        assert few or len(fractions) != 3 or min(fractions) < 0 or not 0 < sum(fractions) < math.inf
        assert str(error).startswith("fractions: expected ")
        return
    split = split_by_subject(items, fractions, seed)
    assert list(split) == list(SECTIONS)
    assert sorted(map(str, items)) == sorted(str(item) for part in split.values() for item in part)
    subjects = [{str(item["subject"]) for item in part} for part in split.values()]
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    assert find_leaks(split) == {}
    assert [bool(part) for part in subjects] == [f > 0 for f in fractions]
    total = sum(map(len, subjects))
    for part, fraction in zip(subjects, fractions, strict=True):
        assert abs(len(part) - fraction / sum(fractions) * total) <= len(SECTIONS)


@examples(100)
@given(items=ITEMS, order=st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_items(items, order):
    if len({str(item["subject"]) for item in items}) < 3:
        return
    shuffled = list(items)
    order.shuffle(shuffled)
    assert_same = [sorted(map(str, part)) for part in split_by_subject(items).values()]
    assert [sorted(map(str, part)) for part in split_by_subject(shuffled).values()] == assert_same


NAMES = st.text(alphabet=string.ascii_letters + string.digits + " _-.éß中", min_size=1, max_size=8).filter(
    lambda name: name.strip(".") and not name.startswith("..")
)


@examples(100)
@given(data=st.data())
def test_what_is_written_is_loaded_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("written")
    path = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
    item = st.fixed_dictionaries(
        {"image": st.one_of(path, st.lists(path, min_size=1, max_size=3), path.map(f"{folder}/{{}}".format))},
        optional={"text": st.text(max_size=5), "age": st.one_of(st.none(), st.floats(allow_nan=False), st.booleans())},
    )
    sections = data.draw(st.dictionaries(st.sampled_from(SECTIONS), st.lists(item, min_size=1, max_size=3), min_size=1))
    write_datalist(folder, sections, name="x")
    for section, items in sections.items():
        loaded = load_datalist(folder, section, check_files=False)
        for one, other in zip(items, loaded, strict=True):
            paths = one["image"] if isinstance(one["image"], list) else [one["image"]]
            absolute = [os.path.normpath(os.path.join(folder, path)) for path in paths]
            assert other == {**one, "image": absolute if isinstance(one["image"], list) else absolute[0]}
    # Where the folder lies is not written.
    assert str(folder) not in (folder / FILE_NAME).read_text(encoding="utf-8")
    assert set(read_description(folder)) == {"name"}
