# SPDX-License-Identifier: Apache-2.0
"""`shared.datalist`: what is loaded, how it is split, and what the errors say."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from shared.datalist import find_leaks, load_datalist, read_datalist, split_by_subject, write_datalist


def dataset(folder, sections, files=("a.png",)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


def test_paths_become_absolute_and_other_values_stay(tmp_path, monkeypatch):
    # a subject and a text that are also names of things in the folder must not become paths
    items = [{"image": "images/a.png", "subject": "images", "text": "a.png", "label": ["a.png", "images/a.png"]}]
    folder = dataset(tmp_path / "set", {"name": "demo", "training": items}, ("a.png", "images/a.png"))
    monkeypatch.chdir(tmp_path)
    for where in (folder, "set"):
        (item,) = load_datalist(where)
        assert item["image"] == str(folder / "images" / "a.png")
        assert item["label"] == [str(folder / "a.png"), str(folder / "images" / "a.png")]
        assert (item["subject"], item["text"]) == ("images", "a.png")


def test_limit_takes_the_first_items_and_looks_at_no_others(tmp_path):
    items = [{"image": "a.png"}, {"image": "a.png", "subject": "2"}, {"image": "gone.png"}]
    dataset(tmp_path, {"test": items})
    assert [item.get("subject") for item in load_datalist(tmp_path, "test", limit=2)] == [None, "2"]
    assert len(load_datalist(tmp_path, "test", limit=9, check_files=False)) == 3
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_datalist(tmp_path, "test", limit=3)
    for wrong in (0, -1, "3"):
        with pytest.raises(ValueError, match=f"^limit: expected a number of items of at least 1.*got {wrong!r}"):
            load_datalist(tmp_path, "test", limit=wrong)


def test_bare_paths_of_a_test_section(tmp_path):
    folder = dataset(tmp_path, {"test": ["a.png"]})
    assert load_datalist(folder, "test") == [{"image": str(folder / "a.png")}]


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^.*nowhere: expected a dataset folder"):
        load_datalist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^.*datalist\.json: expected this file.*tools\.prepare"):
        load_datalist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object with the lists training"),
        ('{"train": []}', r"got \['train'\]"),
        ('{"training": {}}', "expected a list under 'training', but got dict"),
        ('{"training": [3]}', r"expected an object at training\[0\], but got int"),
        ('{"training": []}', "expected items in section 'training', but the list is empty"),
        ('{"test": ["a.png"]}', "expected a section 'training', but the file has test"),
        ('{"training": [{"text": "x"}]}', r"training\[0\]: expected at least one file key"),
        ('{"training": [{"image": 3, "text": "x"}]}', "expected a path or a list of paths under 'image', but got 3"),
        ('{"training": [{"image": "a.png", "text": " "}, {"image": "a.png"}]}', r"\[1\]: expected 'text' or 'report'"),
        ('{"training": [{"image": "a.png", "text": ""}]}', "expected 'text' or 'report', but got the keys"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_datalist(tmp_path, required=["image", "text|report"])
    assert str(error.value).startswith(str(tmp_path / "datalist.json"))


@pytest.mark.parametrize(
    ("path", "hint"), [("b.png", "correct the path"), ("/far/b.png", "path is absolute"), ("x\\b.png", "backslashes")]
)
def test_missing_files_are_named_first_with_a_hint(tmp_path, path, hint):
    dataset(tmp_path, {"training": [{"image": "a.png"}, {"image": path}]})
    with pytest.raises(FileNotFoundError, match=hint) as error:
        load_datalist(tmp_path)
    assert str(error.value).split(":")[0].endswith(path)
    assert "training[1]" in str(error.value)
    assert len(load_datalist(tmp_path, check_files=False)) == 2


def many(subjects=100, images=3):
    return [{"image": f"{s}/{i}.png", "subject": f"p{s}"} for s in range(subjects) for i in range(images)]


def test_split_is_by_subject_complete_and_follows_the_fractions():
    items = many()
    split = split_by_subject(items, (0.8, 0.1, 0.1), seed=1)
    assert {name: len({i["subject"] for i in part}) for name, part in split.items()} == {
        "training": 80,
        "validation": 10,
        "test": 10,
    }
    assert find_leaks(split) == {}
    assert Counter(i["image"] for part in split.values() for i in part) == Counter(i["image"] for i in items)


def test_split_ignores_the_order_of_items_but_not_the_seed():
    items = many()
    shuffled = random.Random(0).sample(items, len(items))
    assert split_by_subject(items, seed=1) == split_by_subject(shuffled, seed=1)
    assert split_by_subject(items, seed=1) != split_by_subject(items, seed=2)


def test_split_is_stable_over_time_and_machines():
    # a fixed expectation: another library version or hash seed must not move patients between train and test
    split = split_by_subject(many(10, 1), (0.5, 0.3, 0.2), seed=42)
    assert [[i["subject"] for i in split[s]] for s in ("training", "validation", "test")] == [
        ["p1", "p2", "p5", "p7", "p9"],
        ["p4", "p6", "p8"],
        ["p0", "p3"],
    ]


@pytest.mark.parametrize("subjects", range(3, 25))
def test_no_wanted_section_is_empty(subjects):
    split = split_by_subject(many(subjects, 1), (0.9, 0.05, 0.05))
    assert all(split.values())
    assert sum(map(len, split.values())) == subjects


def test_split_errors():
    assert split_by_subject(many(2), (1, 0, 0))["test"] == []
    with pytest.raises(ValueError, match=r"^fractions: expected at least 3 subjects.*got 2"):
        split_by_subject(many(2))
    with pytest.raises(ValueError, match=r"^fractions: expected 3 numbers >= 0"):
        split_by_subject(many(), (0.5, -0.5, 1))
    with pytest.raises(ValueError, match=r"^subject: expected one per item.*item 1 has none"):
        split_by_subject([{"subject": "a"}, {"image": "b"}])


def test_leaks_are_found_across_types():
    leaks = find_leaks({"training": [{"subject": 7}], "test": [{"subject": "7"}, {"subject": "8"}, {"subject": ""}]})
    assert leaks == {"7": ["training", "test"]}


def test_write_then_load(tmp_path):
    folder = dataset(tmp_path / "set", {})
    sections = {"training": [{"image": str(folder / "a.png"), "text": "Größe", "subject": "1"}], "test": []}
    write_datalist(folder, sections, name="demo")
    assert json.loads((folder / "datalist.json").read_text())["name"] == "demo"
    assert read_datalist(folder)["training"][0]["image"] == "a.png"
    assert load_datalist(folder)[0] == sections["training"][0]
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []


def test_write_refuses_leaks_and_outside_paths(tmp_path):
    with pytest.raises(
        ValueError, match=r"datalist\.json: expected each subject in one section.*'1' in training, test"
    ):
        write_datalist(tmp_path, {"training": [{"subject": "1"}], "test": [{"subject": "1"}]})
    with pytest.raises(ValueError, match="expected paths inside the dataset folder"):
        write_datalist(tmp_path, {"training": [{"image": "../x.png"}]})
    with pytest.raises(ValueError, match=r"got \['train'\]"):
        write_datalist(tmp_path, {"train": []})
