# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from shared.networks.constant_prompt import ConstantPrompt


def test_row_1_is_the_prompt_and_row_0_the_null_prompt():
    prompt = ConstantPrompt(length=4, embedding_size=3)
    null, sentence = prompt.embeddings
    assert torch.equal(prompt(5), sentence.expand(5, 4, 3))
    mixed = prompt(3, torch.tensor([True, False, True]))
    assert torch.equal(mixed, torch.stack((null, sentence, null)))
    assert not torch.equal(null, sentence)


def test_published_size_by_default():
    assert ConstantPrompt()(1).shape == (1, 77, 1024)


def test_it_starts_as_token_embeddings_do():
    torch.manual_seed(0)
    embeddings = ConstantPrompt().embeddings
    assert abs(embeddings.std().item() - 0.02) < 1e-3
    assert abs(embeddings.mean().item()) < 1e-3


def test_only_the_used_row_learns():
    prompt = ConstantPrompt(length=4, embedding_size=3)
    prompt(2).sum().backward()
    assert prompt.embeddings.grad[0].eq(0).all()
    assert prompt.embeddings.grad[1].eq(2).all()


def test_a_loaded_embedding_takes_no_gradient_and_has_the_same_state():
    learned, fixed = ConstantPrompt(4, 3), ConstantPrompt(4, 3, learned=False)
    assert learned.embeddings.requires_grad
    assert not fixed.embeddings.requires_grad
    fixed.load_state_dict(learned.state_dict(), strict=True)
    assert torch.equal(fixed(2), learned(2))
    assert list(learned.state_dict()) == ["embeddings"]
    assert not fixed.embeddings.requires_grad
