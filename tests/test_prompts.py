# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from shared.transforms.prompts import PromptToTokensd, prompt_items


class WordTokenizer:
    """One id a word, with the interface of ClipTokenizer."""

    max_length = 77

    def count_tokens(self, text: str) -> int:
        return len(text.split()) + 2

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens = torch.zeros(len(texts), 77, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [sum(word.encode()) for word in text.split()][:75]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return tokens


def transform(**options) -> PromptToTokensd:
    return PromptToTokensd(tokenizer=WordTokenizer(), **options)


def test_items_count_seeds_over_all_prompts():
    items = prompt_items(["a", "b"], "no", num_samples=2, seed=10)
    assert [item["seed"] for item in items] == [10, 11, 12, 13]
    assert items[2] == {"prompt": "b", "negative_prompt": "no", "seed": 12, "prompt_index": 1, "sample_index": 0}


def test_prompts_are_taken_as_they_are():
    assert prompt_items("no_finding, small  effusion")[0]["prompt"] == "no_finding, small  effusion"
    assert prompt_items("")[0]["prompt"] == ""
    # What fire makes of `--prompt cardiomegaly,edema` and of `--prompt 5`.
    assert prompt_items(("cardiomegaly", "edema"))[0]["prompt"] == "cardiomegaly, edema"
    assert prompt_items(5)[0]["prompt"] == "5"


def test_prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufefffirst_one\n\n  second\n", encoding="utf-8")
    assert [item["prompt"] for item in prompt_items(str(path))] == ["first_one", "second"]
    path.write_bytes("Erguß".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{path}: expected UTF-8"):
        prompt_items(str(path))
    path.write_text(" \n")
    with pytest.raises(ValueError, match=rf"^{path}: expected at least one prompt"):
        prompt_items(str(path))
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/absent.txt: .*no file"):
        prompt_items(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "^prompt: .*empty list"),
        ({"prompt": None}, "^prompt: expected a text, got NoneType"),
        ({"prompt": {"a": 1}}, "^prompt: expected a text, got dict"),
        ({"prompt": "a", "num_samples": 0}, "^num_samples: expected a whole number of at least 1, got 0"),
        ({"prompt": "a", "seed": "3"}, "^seed: expected a whole number of at least 0, got '3'"),
    ],
)
def test_bad_arguments_name_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_items(**arguments)


def test_tokens_of_an_item():
    data = transform()(prompt_items("small effusion", "blurred")[0])
    assert data["image"].dtype == torch.int64
    assert data["image"].shape == (2, 77)
    assert not isinstance(data["image"], MetaTensor)
    assert torch.equal(data["image"], WordTokenizer()(["small effusion", "blurred"]))
    assert "result_extension" not in data


def test_an_empty_prompt_of_an_item_is_not_replaced():
    data = transform(default_prompt="default")(prompt_items("")[0])
    assert data["image"].count_nonzero() == 0


def test_long_prompts_end_in_one_line_or_are_cut():
    item = prompt_items("word " * 400)[0]
    with pytest.raises(ValueError, match=r"^prompt: expected at most 75 tokens, got 400: ") as caught:
        transform()(item)
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value)
    assert transform(truncate=True)(item)["image"][0].count_nonzero() == 75
    transform()(prompt_items("word " * 75)[0])
    with pytest.raises(ValueError, match=r"^negative_prompt: expected at most 75 tokens, got 76"):
        transform()(prompt_items("a", "word " * 76)[0])


def request(**data):
    return {"model": "cxr_ldm", "device": "cpu", "image": "", "image_path": "", **data}


def test_request_precedence(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("from\nfile")
    read = transform(default_prompt="default", default_negative_prompt="bad")
    assert read(request())["prompt"] == "default"
    assert read(request(prompt=""))["prompt"] == "default"
    assert read(request(prompt="mine"))["prompt"] == "mine"
    # MONAI Label sends the default of displayable_configs with every request.
    assert read(request(prompt="default", image=str(path)))["prompt"] == "from file"
    assert read(request(prompt="mine", image=str(path)))["prompt"] == "mine"
    assert read(request(prompt=["first", "second"]))["prompt"] == "first"
    assert read(request(image="/studies/scan.nii.gz"))["prompt"] == "default"
    data = read(request(prompt="mine"))
    assert data["result_extension"] == ".png"
    assert data["negative_prompt"] == "bad"
    assert torch.equal(data["image"], WordTokenizer()(["mine", "bad"]))


def test_plain_options_pass():
    transform()(request(seed="3", scheduler=["dpm", "ddim"], guidance_scale=7.0, prompt="costs $5"))
