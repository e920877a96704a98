# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.corpus import COMMANDS
from tests.corpus_pictures import PICTURES
from tests.corpus_texts import TEXTS
from tests.corpus_volumes import VOLUMES

BUNDLES = {folder.name for folder in (ROOT / "bundles").iterdir() if folder.is_dir()}
CORPUS = PICTURES + TEXTS + VOLUMES


def test_the_corpus_is_large_and_its_names_are_unique():
    assert len([bad for bad in CORPUS if not bad.accepted]) >= 60
    assert [name for name, count in Counter(bad.name for bad in CORPUS).items() if count > 1] == []


def test_every_bundle_and_every_command_meets_bad_inputs():
    assert {bad.bundle for bad in CORPUS} == BUNDLES
    met = Counter((bad.bundle, command) for bad in CORPUS for command in bad.commands if not bad.accepted)
    assert {pair for pair in met if met[pair] >= 5} == {(bundle, command) for bundle in BUNDLES for command in COMMANDS}


@pytest.mark.parametrize("bad", CORPUS, ids=str)
def test_entries_are_complete(bad):
    assert set(bad.commands) <= set(COMMANDS)
    assert bad.commands
    assert set(bad.accepted_by) <= set(COMMANDS)
    # What begins with a value of the command line has no file to place.
    assert bad.value is None or bad.commands == ("inference",)
