# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import random
import time

import pytest

from tests import commands
from tests.reliability import ROWS, Tally, as_json
from tests.soak import document, kills
from tests.soak.campaign import Campaign, Case, attempt
from tests.soak.fuzzing import complaints, damage, damage_file
from tests.soak.trainings import BUNDLES


def campaign(case, target: int = 5) -> Campaign:
    return Campaign("toys", 3, "toys thrown", share=1.0, target=target, case=case)


def test_a_campaign_ends_at_its_target_and_counts(tmp_path, capsys):
    def case(folder, rng, number):
        problems = ("broken",) if number == 1 else ()
        return Case(f"toy {number}", survived=2 - len(problems), tried=2, problems=problems, counts={"red": number})

    result = attempt(campaign(case), tmp_path, seed=8, seconds=60)
    assert str(result) == " 3 toys thrown: 6 tried, 5 survived; 3 red"
    assert result.failures == [
        {"case": "toy 1", "problems": ["broken"], "again": "python -m tests.soak --campaign toys --seed 8 --case 1"}
    ]
    assert "BAD 1 toy 1" in capsys.readouterr().out


def test_a_campaign_ends_with_its_time_after_one_case_at_least(tmp_path):
    result = attempt(campaign(lambda folder, rng, number: Case("slow")), tmp_path, seed=0, seconds=0)
    assert str(result) == " 3 toys thrown: 1 tried, 1 survived; time was over before the target of 5"


def test_a_case_that_cannot_be_tried_did_not_survive(tmp_path):
    result = attempt(campaign(lambda folder, rng, number: 1 / 0, target=1), tmp_path, seed=0, seconds=60)
    assert (result.tried, result.survived) == (1, 0)
    assert result.failures[0]["problems"] == ["ZeroDivisionError: division by zero"]


def test_seed_and_number_decide_a_case(tmp_path):
    def drawn(seed: int, only: int | None = None) -> list[float]:
        found = {}
        case = lambda folder, rng, number: Case(str(found.setdefault(number, rng.random())))  # noqa: E731
        attempt(campaign(case), tmp_path, seed=seed, seconds=60, only=only)
        return list(found.values())

    whole = drawn(1)
    assert len(set(whole)) == 5
    assert drawn(1, only=3) == [whole[3]]
    assert drawn(2) != whole


def test_kills_go_round_all_trainings():
    assert len(kills.TRAININGS) == 13
    assert {name for name, _ in kills.TRAININGS} == set(BUNDLES)
    assert kills.CAMPAIGN.target >= 30


@pytest.mark.parametrize("first", [None, 10])
def test_damage_is_new_each_time_and_repeatable(first):
    content = bytes(range(256))
    found = [damage(content, random.Random(seed), first=first) for seed in range(40)]
    assert found == [damage(content, random.Random(seed), first=first) for seed in range(40)]
    assert len({changed for changed, _ in found}) > 30
    if first:
        assert all(changed[first + 64 :] in content for changed, _ in found)


def test_what_is_in_a_zipped_volume_is_damaged_too(tmp_path):
    kinds = set()
    for seed in range(30):
        path = tmp_path / f"{seed}.nii.gz"
        path.write_bytes(gzip.compress(bytes(1000), mtime=0))
        kinds.add(damage_file(path, random.Random(seed)).endswith("of the unzipped file"))
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("code", "err", "problems"),
    [
        (0, "", 0),
        (1, "/data/a.png: broken\n", 0),
        (1, "something\n/data/a.png: broken\n", 0),
        (1, "RuntimeError: broken\n", 1),
        (1, "/elsewhere/a.png: broken\n", 1),
        (1, "Traceback (most recent call last):\n/data/a.png: broken\n", 1),
        (-11, "", 1),
    ],
)
def test_judgement_of_a_command(code, err, problems, tmp_path):
    done = commands.Finished(code, "", err.replace("/data", str(tmp_path)), 1.0)
    assert len(complaints(done, tmp_path)) == problems


def test_a_command_that_hangs_did_not_survive(tmp_path):
    done = commands.Finished(-9, "", "", 30.0, timed_out=True)
    assert complaints(done, tmp_path) == ["still running after 30 s"]


def test_document_has_all_rows_and_sums(tmp_path):
    tally = Tally(
        3, tried=60, survived=59, skipped=1, figures={"tests/test_a.py::b": "x"}, failed=["tests/test_a.py::c"]
    )
    case = Case("toy", survived=0, problems=("broken",))
    result = attempt(campaign(lambda *given: case, target=2), tmp_path, seed=0, seconds=60)
    about = {"date": time.strftime("%Y-%m-%d"), "machine": "a machine", "commit": "abc", "versions": {"torch": "2"}}
    about |= {"seed": 0, "minutes": 30, "command": "python -m tests.soak"}
    path = tmp_path / "reliability.md"
    document.write(document.merge(as_json([tally]), [result], about), path)
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [row["row"] for row in rows] == list(ROWS)
    assert (rows[2]["tried"], rows[2]["survived"], rows[2]["skipped"]) == (62, 59, 1)
    assert rows[0]["tests"] == ["test_killed_runs.py"]
    lines = path.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(ROWS)
    assert "- 3, `test_a.py::b`: x" in lines
    assert "- `tests/test_a.py::c`" in lines
    assert "- toy: broken. Again: `python -m tests.soak --campaign toys --seed 0 --case 1`" in lines


def test_every_row_has_a_target():
    assert list(document.TARGETS) == list(ROWS)
