# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, PersistentDataset
from monai.transforms import Compose, Randomizable

from shared.tokenizer import ClipTokenizer
from shared.transforms.text import LoadReportd, RandDropTextd, RandomSentencesd, Tokenized

MERGES = Path(__file__).parents[1] / "bundles/cxr_ldm/models/tokenizer/clip_bpe_merges.txt.gz"
SENTENCES = [f"Sentence number {word}." for word in ("one", "two", "three", "four", "five", "six", "seven")]


def report(count):
    return " ".join(SENTENCES[:count])


def draws(transform, text, count=400, seed=0):
    transform.set_random_state(seed)
    return [transform({"text": text})["text"] for _ in range(count)]


def sentences_of(text):
    return [sentence + "." for sentence in text.rstrip(".").split(". ")]


class TestLoadReport:
    def test_text_wins_over_file_and_other_keys_stay(self, tmp_path):
        item = {"text": "No effusion.", "report": str(tmp_path / "absent.txt"), "subject": "s1"}
        assert LoadReportd("text")(item) == item

    def test_reads_utf8_with_and_without_mark(self, tmp_path):
        path = tmp_path / "r.txt"
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_text("Köln: no\neffusion.", encoding=encoding)
            data = {"report": str(path)}
            assert LoadReportd("text")(data)["text"] == "Köln: no\neffusion."
            assert data == {"report": str(path)}

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (None, FileNotFoundError, "this report does not exist"),
            (b"", ValueError, "the report is empty.*allow_empty"),
            (b" \n\t", ValueError, "the report is empty"),
            (b"K\xf6ln", ValueError, r"expected UTF-8 text, got the byte 0xf6 at offset 1.*iconv"),
            ("no effusion".encode("utf-16"), ValueError, r"expected UTF-8 text"),
            ("no effusion".encode("utf-16-le"), ValueError, r"got NUL bytes"),
            (b"a" * 1_000_001, ValueError, "expected a report of at most 1000000 bytes, got 1000001"),
        ],
        ids=["missing", "empty", "blank", "latin1", "utf16", "utf16-unmarked", "huge"],
    )
    def test_broken_file_is_named(self, tmp_path, content, error, message):
        path = tmp_path / "broken.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            LoadReportd("text")({"report": str(path)})
        assert str(caught.value).startswith(f"{path}: ")

    def test_broken_item_is_named_by_its_image(self):
        with pytest.raises(ValueError, match=r"^a/b\.png: expected 'text' .* or 'report' .*got only \['image'\]"):
            LoadReportd("text")({"image": "a/b.png"})
        with pytest.raises(ValueError, match=r"^a/b\.png: the text under 'text' is empty"):
            LoadReportd("text")({"image": "a/b.png", "text": "  "})
        with pytest.raises(ValueError, match=r"^datalist\.json: expected a string under 'text', got float"):
            LoadReportd("text")({"text": float("nan")})

    def test_allow_empty(self, tmp_path):
        path = tmp_path / "empty.txt"
        path.write_bytes(b"")
        load = LoadReportd("text", allow_empty=True)
        assert load({"report": str(path)})["text"] == ""
        assert load({"text": ""})["text"] == ""


class TestRandomSentences:
    @pytest.mark.parametrize("available", [1, 2, 5, 7])
    def test_number_of_sentences_is_uniform_up_to_the_limit_inclusive(self, available):
        counts = np.bincount([len(sentences_of(t)) for t in draws(RandomSentencesd("text"), report(available), 1000)])
        limit = min(available, 5)
        assert len(counts) == limit + 1
        assert counts[0] == 0
        # 1000 draws: five standard deviations around the expectation.
        expected = 1000 / limit
        assert np.abs(counts[1:] - expected).max() <= 5 * np.sqrt(expected)

    def test_sentences_are_distinct_whole_and_in_random_order(self):
        texts = draws(RandomSentencesd("text"), report(7))
        firsts = {sentences_of(text)[0] for text in texts}
        assert firsts == set(SENTENCES)
        for text in texts:
            parts = sentences_of(text)
            assert len(set(parts)) == len(parts)
            assert set(parts) <= set(SENTENCES)
            assert " ".join(parts) == text
        assert any(sorted(p, key=SENTENCES.index) != p for p in map(sentences_of, texts))

    def test_seeded_by_monai_and_not_by_numpy(self):
        transform = RandomSentencesd("text")
        first = draws(transform, report(7), 20, seed=3)
        np.random.seed(0)
        before = np.random.get_state()[1].copy()
        assert draws(transform, report(7), 20, seed=3) == first
        assert draws(transform, report(7), 20, seed=4) != first
        assert np.array_equal(np.random.get_state()[1], before)
        assert isinstance(transform, Randomizable)

    @pytest.mark.parametrize("text", ["", "  \n"])
    def test_empty_text_stays_empty(self, text):
        assert RandomSentencesd("text")({"text": text})["text"] == ""
        assert RandomSentencesd("text", num_excerpts=3)({"text": text})["text"] == ""

    def test_finite_number_of_excerpts(self):
        transform = RandomSentencesd("text", num_excerpts=4)
        seen = set(draws(transform, report(7)))
        assert seen == {transform.excerpt(report(7), variant) for variant in range(4)}
        assert 2 <= len(seen) <= 4
        # Fixed by the text alone: another seed and another object know the same excerpts.
        assert set(draws(RandomSentencesd("text", num_excerpts=4), report(7), seed=9)) == seen
        assert set(draws(transform, report(6))) != seen

    def test_excerpts_follow_the_same_distribution(self):
        transform = RandomSentencesd("text", num_excerpts=1000)
        counts = np.bincount([len(sentences_of(transform.excerpt(report(7), v))) for v in range(1000)], minlength=6)
        assert np.abs(counts[1:] - 200).max() <= 5 * np.sqrt(200)

    def test_argument_errors(self):
        with pytest.raises(ValueError, match="max_sentences: expected at least 1, got 0"):
            RandomSentencesd("text", max_sentences=0)
        with pytest.raises(ValueError, match="num_excerpts: expected at least 1"):
            RandomSentencesd("text", num_excerpts=0)


class TestDropText:
    def test_rate(self):
        dropped = sum(text == "" for text in draws(RandDropTextd("text", prob=0.1), "No effusion.", 4000))
        assert abs(dropped - 400) < 5 * np.sqrt(4000 * 0.1 * 0.9)

    def test_extremes(self):
        assert set(draws(RandDropTextd("text", prob=0.0), "x", 50)) == {"x"}
        assert set(draws(RandDropTextd("text", prob=1.0), "x", 50)) == {""}

    def test_keys_are_dropped_together(self):
        transform = RandDropTextd(["text", "other"], prob=0.5)
        transform.set_random_state(0)
        results = [transform({"text": "a", "other": "b"}) for _ in range(50)]
        assert {(r["text"], r["other"]) for r in results} == {("a", "b"), ("", "")}


class TestTokenized:
    def test_tokens(self):
        tokenizer = ClipTokenizer(MERGES)
        data = Tokenized("text", tokenizer=tokenizer)({"text": "a dog", "subject": "s"})
        assert data["tokens"].dtype == torch.int64
        assert data["tokens"].shape == (77,)
        assert data["tokens"][:4].tolist() == [49406, 320, 1929, 49407]
        assert data["text"] == "a dog"

    def test_output_keys(self):
        def tokenizer(texts):
            return torch.tensor([[len(text)] for text in texts])

        data = Tokenized(["a", "b"], tokenizer=tokenizer, output_key=["x", "y"])({"a": "1", "b": "22"})
        assert (data["x"].item(), data["y"].item()) == (1, 2)
        with pytest.raises(ValueError, match="output_key: expected a different name"):
            Tokenized(["a", "b"], tokenizer=tokenizer)


def chain():
    return Compose(
        [
            LoadReportd("text"),
            RandomSentencesd("text"),
            RandDropTextd("text", prob=0.5),
            Tokenized("text", tokenizer=ClipTokenizer(MERGES)),
        ]
    )


def test_dropped_prompt_is_the_sampling_null_prompt():
    transform = chain().set_random_state(0)
    null = ClipTokenizer(MERGES).null_tokens()
    results = [transform({"text": report(5)}) for _ in range(30)]
    dropped = [result for result in results if result["text"] == ""]
    assert 0 < len(dropped) < 30
    assert all(torch.equal(result["tokens"], null) for result in dropped)


def test_workers_draw_differently_and_reproducibly():
    def epoch():
        dataset = Dataset([{"text": report(7)}] * 16, chain().set_random_state(0))
        torch.manual_seed(0)
        return torch.cat([batch["tokens"] for batch in DataLoader(dataset, batch_size=4, num_workers=2)])

    first, second = epoch(), epoch()
    assert first.shape == (16, 77)
    assert torch.equal(first, second)
    assert len(torch.unique(first, dim=0)) > 4


def test_persistent_dataset_caches_the_report_and_not_the_draw(tmp_path):
    path = tmp_path / "r.txt"
    path.write_text(report(7))
    dataset = PersistentDataset([{"report": str(path)}], chain(), cache_dir=tmp_path / "cache")
    first = dataset[0]["text"]
    path.unlink()
    assert len({first, *(dataset[0]["text"] for _ in range(20))}) > 2
