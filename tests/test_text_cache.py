# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from shared.networks.frozen import FrozenModule
from shared.networks.text_encoder import TransformerTextEncoder
from shared.text_cache import CachedTextEncoder


class Encoder(FrozenModule):
    """Frozen encoder (B, L) -> (B, L, 4) that counts what it is asked for."""

    def __init__(self, fingerprint="a" * 64, factor=1.0):
        torch.manual_seed(0)
        super().__init__(nn.Embedding(1000, 4))
        self.fingerprint = fingerprint
        self.factor = factor
        self.batches = []

    def forward(self, tokens):
        assert not torch.is_grad_enabled()
        self.batches.append(len(tokens))
        return self.frozen(tokens) * self.factor


@pytest.fixture
def tokens():
    return torch.arange(12).reshape(3, 4)


def entries(folder):
    return sorted(folder.glob("??/*.npy"))


def test_values_and_shape(tokens, tmp_path):
    encoder = Encoder()
    expected = encoder.frozen(tokens).detach()
    for dtype, tolerance in (("float32", 0.0), ("float16", 1e-3)):
        out = CachedTextEncoder(encoder, tmp_path, dtype=dtype)(tokens)
        assert out.shape == (3, 4, 4)
        assert out.dtype == torch.float32
        assert not out.requires_grad
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_every_distinct_row_is_encoded_once_in_one_call(tokens, tmp_path):
    encoder = Encoder()
    cached = CachedTextEncoder(encoder, tmp_path)
    first = cached(tokens[[0, 1, 0, 1, 0]])
    assert encoder.batches == [2]
    second = cached(tokens[[2, 0, 1]])
    assert encoder.batches == [2, 1]
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[2])
    assert cached.num_encoded == 3
    assert len(entries(tmp_path)) == 3


def test_second_process_reads_the_folder(tokens, tmp_path):
    first = CachedTextEncoder(Encoder(), tmp_path)(tokens)
    encoder = Encoder()
    assert torch.equal(CachedTextEncoder(encoder, tmp_path)(tokens), first)
    assert encoder.batches == []


def test_hit_and_miss_give_the_same_bits(tokens, tmp_path):
    # The value returned on the first call has gone through the stored type too.
    cached = CachedTextEncoder(Encoder(), tmp_path)
    assert torch.equal(cached(tokens), cached(tokens))


def test_other_encoder_or_dtype_meets_no_stale_entry(tokens, tmp_path):
    CachedTextEncoder(Encoder(), tmp_path)(tokens)
    other = Encoder("b" * 64, factor=2.0)
    doubled = other.frozen(tokens) * 2
    torch.testing.assert_close(CachedTextEncoder(other, tmp_path)(tokens), doubled, rtol=1e-3, atol=1e-3)
    precise = Encoder()
    assert torch.equal(CachedTextEncoder(precise, tmp_path, dtype="float32")(tokens), precise.frozen(tokens))
    assert len(entries(tmp_path)) == 9


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage"])
def test_damaged_entry_is_named_and_computed_anew(tokens, tmp_path, caplog, damage):
    expected = CachedTextEncoder(Encoder(), tmp_path)(tokens)
    path = entries(tmp_path)[0]
    content = path.read_bytes()
    flipped = bytes([*content[:-40], content[-40] ^ 1, *content[-39:]])
    path.write_bytes({"truncate": content[:-10], "flip": flipped, "empty": b"", "garbage": b"x" * 500}[damage])
    encoder = Encoder()
    with caplog.at_level(logging.WARNING, logger="shared.text_cache"):
        assert torch.equal(CachedTextEncoder(encoder, tmp_path)(tokens), expected)
    assert encoder.batches == [1]
    assert caplog.records[0].getMessage().startswith(f"{path}: damaged cache entry")
    assert path.read_bytes() == content


def test_entry_is_a_plain_npy_file(tokens, tmp_path):
    CachedTextEncoder(Encoder(), tmp_path)(tokens[:1])
    (path,) = entries(tmp_path)
    assert path.parent.name == path.name[:2]
    array = np.load(path, allow_pickle=False)
    assert array.shape == (4, 4)
    assert array.dtype == np.float16


def test_failed_write_leaves_nothing_behind(tokens, tmp_path, monkeypatch):
    cached = CachedTextEncoder(Encoder(), tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(OSError, match=r"\.npy.*Free some space"):
            cached(tokens[:1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert cached(tokens[:1]).shape == (1, 4, 4)


def test_memory_is_bounded_and_forgets_the_least_recent(tokens):
    encoder = Encoder()
    cached = CachedTextEncoder(encoder, None, memory_items=2)
    assert cached(tokens).shape == (3, 4, 4)  # more rows than fit are still returned
    assert len(cached._memory) == 2
    cached(tokens[[1]])  # row 1 is now more recent than row 2
    cached(tokens[[0]])  # drops row 2
    encoder.batches.clear()
    cached(tokens[[0, 1]])
    assert encoder.batches == []
    cached(tokens[[2]])
    assert encoder.batches == [1]


def test_stays_out_of_the_state_dict_and_shares_its_copy(tmp_path):
    parent = nn.ModuleDict({"text_encoder": CachedTextEncoder(Encoder(), tmp_path), "unet": nn.Linear(2, 2)})
    assert set(parent.state_dict()) == {"unet.weight", "unet.bias"}
    assert copy.deepcopy(parent)["text_encoder"] is parent["text_encoder"]
    assert not parent.train()["text_encoder"].encoder.training


def test_trainable_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder: TransformerTextEncoder has trainable parameters"):
        CachedTextEncoder(TransformerTextEncoder(), tmp_path)
    with pytest.raises(ValueError, match="fingerprint"):
        CachedTextEncoder(TransformerTextEncoder().requires_grad_(False), tmp_path)


def test_overflow_of_the_stored_type_is_an_error(tokens, tmp_path):
    encoder = Encoder(factor=1e6)
    with pytest.raises(ValueError, match=r'dtype: an embedding .* is not finite in float16; use dtype="float32"'):
        CachedTextEncoder(encoder, tmp_path)(tokens)
    assert entries(tmp_path) == []
    CachedTextEncoder(encoder, tmp_path, dtype="float32")(tokens)


def test_argument_errors(tmp_path):
    with pytest.raises(ValueError, match="dtype: expected one of float16, float32, got 'int8'"):
        CachedTextEncoder(Encoder(), tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="memory_items: expected at least 1"):
        CachedTextEncoder(Encoder(), tmp_path, memory_items=0)
