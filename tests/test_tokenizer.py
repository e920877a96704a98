# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import logging
import pickle
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tokenizer import ClipTokenizer, _vocabulary, read_merges

MERGES = Path(__file__).parents[1] / "bundles/cxr_ldm/models/tokenizer/clip_bpe_merges.txt.gz"


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer(MERGES)


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


def test_known_ids_of_clip(tokenizer):
    # The CLIP paper's own example prompt, ids as printed by OpenAI's notebook.
    tokens = tokenizer(["a diagram", "a dog"])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 77)
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert tokens[1, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert not tokens[:, 4:].any()
    assert tokenizer.vocab_size == 49408


def test_parity_with_open_clip_on_radiology_reports(tokenizer, reference):
    package = find_spec("torchxrayvision")
    assert package is not None
    archive = Path(package.submodule_search_locations[0]) / "data/NLMCXR_reports.tgz"
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        assert len(members) > 3900
        # Whole XML files: entities, digits, punctuation and names of every report; every fourth keeps the test short.
        reports = [tar.extractfile(member).read().decode("utf-8", "replace") for member in members[::4]]
    for report in reports:
        ids = reference.encode(report)
        assert tokenizer._encode(report) == ids
    assert torch.equal(tokenizer(reports[:50]), reference(reports[:50]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\n ",
        "Patient's LEFT lung; can't exclude 12.5 mm nodule (T7)!!",
        "No &lt; 5 mm &amp;amp; effusion",
        "the patient\u2019s \u201cground-glass\u201d opaci\ufb01cation",
        "Ko\u0308ln \u212b \u0130stanbul",
        "\u80ba\u708e \u043f\u043d\u0435\u0432\u043c\u043e\u043d\u0438\u044f \U0001fac1",
        "na\u00c3\u00afve mojibake",
        "a\x1cb\x85c\u00a0d\u200be",
        "___ year-old, 3x4cm, 50%/2 <b>bold</b>",
    ],
)
def test_parity_with_open_clip_on_odd_text(tokenizer, reference, text):
    assert tokenizer._encode(text) == reference.encode(text)


# Unassigned and very new code points (also those ftfy repairs control characters to) are left out: the two
# regular-expression engines know different Unicode versions.
@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cs", "Cn", "Cc"]), max_size=60))
def test_parity_with_open_clip_on_random_text(tokenizer, reference, text):
    assert tokenizer._encode(text) == reference.encode(text)


def test_padding_id_is_a_choice_and_null_prompt_is_the_empty_text(tokenizer):
    assert tokenizer.null_tokens().tolist() == [49406, 49407] + [0] * 75
    assert torch.equal(tokenizer.null_tokens(), tokenizer([""])[0])
    assert torch.equal(tokenizer.null_tokens(), tokenizer(" \n")[0])
    assert ClipTokenizer(MERGES, pad_token_id=49407).null_tokens().tolist() == [49406] + [49407] * 76


def test_text_cannot_forge_control_tokens(tokenizer):
    tokens = tokenizer("<|endoftext|> <|startoftext|> <start_of_text> effusion")[0]
    assert (tokens == 49407).sum() == 1
    assert (tokens == 49406).sum() == 1


def test_truncation_keeps_eos_and_is_logged_at_1_10_100(tokenizer, caplog):
    tokenizer = ClipTokenizer(MERGES)
    text = "lung " * 80
    assert tokenizer.count_tokens(text) == 82
    assert tokenizer.count_tokens("lung") == 3
    with caplog.at_level(logging.WARNING, logger="shared.tokenizer"):
        tokens = tokenizer(text)[0]
        assert [record.getMessage() for record in caplog.records] == [
            "text cut to 77 tokens: 5 of its 82 tokens were lost (texts cut so far: 1 of 1)"
        ]
        tokenizer([text] * 120)
    assert tokens[-1] == 49407
    assert (tokens == 49407).sum() == 1
    assert len(caplog.records) == 3
    assert "100 of 100" in caplog.text
    assert "lung" not in caplog.text
    assert tokenizer.num_truncated == 121


def test_fitting_text_is_not_reported(tokenizer, caplog):
    ClipTokenizer(MERGES)("lung " * 75)
    assert not caplog.records


def test_pickle_for_workers(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy("no acute findings"), tokenizer("no acute findings"))


def test_every_form_of_vocabulary_gives_the_same_ids(tokenizer, tmp_path):
    merges = read_merges(MERGES)
    vocabulary = {**_vocabulary(merges), "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    lines = [" ".join(merge) for merge in merges]
    for name in ("slow", "fast", "fast_pairs"):
        (tmp_path / name).mkdir()
    (tmp_path / "slow/vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "slow/merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    for name, rows in (("fast", lines), ("fast_pairs", merges)):
        content = json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": rows}})
        (tmp_path / name / "tokenizer.json").write_text(content, encoding="utf-8")
    (tmp_path / "plain.txt").write_text("\n".join(lines), encoding="utf-8")
    # CLIP's own file has a header and far more merges than CLIP uses.
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(["x#version: 0.2", *lines, "z z"]).encode(), 1))
    text = "Small right-sided pleural effusion."
    for name in ("slow", "fast", "fast_pairs", "plain.txt", "bpe.txt.gz"):
        assert torch.equal(ClipTokenizer(tmp_path / name)(text), tokenizer(text)), name


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent: there is no CLIP vocabulary here.*clip_bpe_merges"):
        ClipTokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json is missing"):
        ClipTokenizer(tmp_path)
    truncated = tmp_path / "truncated.gz"
    truncated.write_bytes(MERGES.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"truncated\.gz: not a readable CLIP vocabulary"):
        ClipTokenizer(truncated)
    (tmp_path / "short.txt").write_text("i n\nt h\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"short\.txt: expected the 48894 merges of CLIP, got 2"):
        ClipTokenizer(tmp_path / "short.txt")
    merges = read_merges(MERGES)
    vocabulary = _vocabulary(merges)
    vocabulary["dog</w>"], vocabulary["cat</w>"] = vocabulary["cat</w>"], vocabulary["dog</w>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    with pytest.raises(ValueError, match="ids of this tokenizer differ from CLIP's"):
        ClipTokenizer(tmp_path)


def test_argument_ranges():
    with pytest.raises(ValueError, match="max_length: expected at least 2"):
        ClipTokenizer(MERGES, max_length=1)
    with pytest.raises(ValueError, match="pad_token_id: expected 0"):
        ClipTokenizer(MERGES, pad_token_id=49408)


def test_vocabulary_travels_with_its_licence():
    notice = (MERGES.parent / "NOTICE").read_text(encoding="utf-8")
    assert "Copyright (c) 2021 OpenAI" in notice
    assert "Permission is hereby granted" in notice
