# SPDX-License-Identifier: Apache-2.0
"""`shared.prepare_batch.PromptBatch`: what a sampler gets from a batch of reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset

from shared.prepare_batch import PromptBatch
from shared.tokenizer import ClipTokenizer
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    vocabulary = ROOT / "bundles/cxr_ldm/models/tokenizer/clip_bpe_merges.txt.gz"
    return ClipTokenizer(vocabulary=str(vocabulary), max_length=77, pad_token_id=0)


@pytest.fixture(scope="module")
def items(tokenizer: ClipTokenizer) -> list[dict[str, Any]]:
    texts = ["Clear lungs.", "", "Large left effusion.", "Cardiomegaly.", "Pneumothorax."]
    tokens = tokenizer(texts)
    return [{"image": torch.full((1, 8, 6), i / 5), "tokens": tokens[i], "item_id": str(i)} for i in range(len(texts))]


def test_prompt_null_prompt_seeds_and_images(tokenizer: ClipTokenizer, items: list[dict[str, Any]]) -> None:
    prepare = PromptBatch(tokenizer, seed=40)
    batches = [prepare(batch, CPU) for batch in DataLoader(Dataset(items), batch_size=2)]
    pairs = torch.cat([batch[0] for batch in batches])
    images = torch.cat([batch[1] for batch in batches])
    assert pairs.shape == (5, 2, 77)
    assert pairs.dtype == torch.int64
    assert torch.equal(pairs[:, 0], torch.stack([item["tokens"] for item in items]))
    assert all(torch.equal(null, tokenizer([""])[0]) for null in pairs[:, 1])
    assert torch.equal(pairs[1, 0], pairs[1, 1]), "an empty report is the null prompt"
    assert torch.equal(images, torch.stack([item["image"] for item in items]))
    assert [batch[2] for batch in batches] == [(), (), ()]
    assert [batch[3] for batch in batches] == [{"seeds": [40, 41]}, {"seeds": [42, 43]}, {"seeds": [44]}]


def test_seed_follows_the_item_and_not_its_place(tokenizer: ClipTokenizer, items: list[dict[str, Any]]) -> None:
    prepare = PromptBatch(tokenizer, seed=7)
    (batch,) = DataLoader(Dataset([items[3], items[0]]), batch_size=2)
    assert prepare(batch, CPU)[3] == {"seeds": [10, 7]}
    assert PromptBatch(tokenizer)(batch, CPU)[3] == {"seeds": [3, 0]}
