# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shared.files import sha256_of_file
from shared.networks.text_encoder import FrozenClipTextEncoder, TransformerTextEncoder

EOS = 49407


def prompt(*ids, pad=0, length=77):
    return torch.tensor([[49406, *ids, EOS] + [pad] * (length - len(ids) - 2)])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TransformerTextEncoder(embed_dim=64, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "text_encoder"
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


class TestTransformerTextEncoder:
    def test_shape_and_size(self, encoder):
        out = encoder(prompt(320, 1929).expand(3, -1))
        assert out.shape == (3, 77, 64)
        assert out.dtype == torch.float32
        # The demo weights must stay a few megabytes.
        assert sum(p.numel() for p in encoder.parameters()) * 4 < 4e6

    def test_padding_content_is_irrelevant(self, encoder):
        tokens = prompt(320, 1929)
        other = tokens.clone()
        other[:, 4:] = torch.randint(0, 49408, (73,))
        for mode in (True, False):
            encoder.train(mode)
            with torch.no_grad():
                assert torch.equal(encoder(tokens), encoder(other))
                # Both published null prompts, padded with 0 and with 49407, mean the same here.
                assert torch.equal(encoder(prompt()), encoder(prompt(pad=EOS)))

    def test_words_and_their_order_matter(self, encoder):
        with torch.no_grad():
            left, right, swapped = encoder(prompt(320, 1929)), encoder(prompt(320, 2368)), encoder(prompt(1929, 320))
        assert (left - right).abs().max() > 0.1
        assert (left - swapped).abs().max() > 0.1

    def test_padded_positions_read_the_text_but_words_do_not_read_padding(self, encoder):
        long, short = prompt(320, 1929), prompt(320, 1929, length=20)
        with torch.no_grad():
            torch.testing.assert_close(encoder(long)[:, :20], encoder(short))
            assert (encoder(prompt(320, 1929))[:, 50] - encoder(prompt(320, 2368))[:, 50]).abs().max() > 1e-2

    def test_words_read_the_end_of_the_text(self, encoder):
        """The first EOS belongs to the text; what follows does not."""
        with torch.no_grad():
            before = encoder(prompt(320, 1929))
            encoder.token_embedding.weight[EOS] += 3.0
            after = encoder(prompt(320, 1929))
        assert (before - after)[:, :3].abs().max() > 1e-2

    def test_train_and_eval_agree_without_dropout(self, encoder):
        tokens = prompt(320, 1929)
        trained = encoder(tokens)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(tokens), trained, rtol=1e-4, atol=1e-5)

    def test_dropout_acts_in_training_only(self):
        encoder, tokens = TransformerTextEncoder(dropout=0.5), prompt(320)
        assert not torch.equal(encoder(tokens), encoder(tokens))
        encoder.eval()
        assert torch.equal(encoder(tokens), encoder(tokens))

    def test_every_parameter_is_trained(self, encoder):
        encoder(prompt(320, 1929)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())

    def test_learns_to_tell_two_prompts_apart(self, encoder):
        tokens = torch.cat([prompt(320, 1929), prompt(320, 2368)])
        head = nn.Linear(64, 1)
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 1e-3)
        target = torch.tensor([0.0, 1.0])
        for _ in range(30):
            loss = nn.functional.binary_cross_entropy_with_logits(head(encoder(tokens).mean(1))[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05

    def test_full_embedding_table(self):
        encoder = TransformerTextEncoder(vocab_size=100, embed_dim=8, num_heads=2, embedding_size=None, eos_token_id=99)
        assert encoder.token_embedding.weight.shape == (100, 8)
        assert encoder(torch.tensor([[1, 2, 99]])).shape == (1, 3, 8)

    def test_errors(self, encoder):
        with pytest.raises(ValueError, match=r"tokens: expected \(B, L\) with L of at most 77, got \(1, 78\)"):
            encoder(torch.zeros(1, 78, dtype=torch.int64))
        with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim 64, got 5"):
            TransformerTextEncoder(embed_dim=64, num_heads=5)
        with pytest.raises(ValueError, match="eos_token_id"):
            TransformerTextEncoder(vocab_size=100)


class TestFrozenClipTextEncoder:
    def test_equals_the_last_hidden_state(self, clip_folder):
        from transformers import CLIPTextModel

        encoder = FrozenClipTextEncoder(clip_folder)
        reference = CLIPTextModel.from_pretrained(clip_folder).eval()
        tokens = torch.cat([prompt(320, 1929), prompt()])
        with torch.no_grad():
            expected = reference(input_ids=tokens)[0]
        out = encoder(tokens)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert out.shape == (2, 77, 16)
        assert not out.requires_grad
        assert encoder.embed_dim == 16

    def test_belongs_to_no_checkpoint_and_no_optimizer(self, clip_folder):
        parent = nn.ModuleDict({"text_encoder": FrozenClipTextEncoder(clip_folder), "unet": nn.Linear(2, 2)})
        assert set(parent.state_dict()) == {"unet.weight", "unet.bias"}
        assert len(list(parent.parameters())) == 2
        parent.train()
        network = parent["text_encoder"].frozen
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        parent.load_state_dict(parent.state_dict(), strict=True)

    def test_moves_with_its_parent(self, clip_folder):
        parent = nn.Sequential(FrozenClipTextEncoder(clip_folder)).to(torch.bfloat16)
        assert next(parent[0].frozen.parameters()).dtype == torch.bfloat16
        assert parent[0](prompt(320)).dtype == torch.float32
        parent.to("meta")
        assert parent[0].device.type == "meta"

    def test_deep_copy_shares_the_weights(self, clip_folder):
        parent = nn.Sequential(FrozenClipTextEncoder(clip_folder), nn.Linear(2, 2))
        twin = copy.deepcopy(parent)
        assert twin[0].frozen is parent[0].frozen
        assert twin[1].weight is not parent[1].weight

    def test_mixed_precision_does_not_change_the_output(self, clip_folder):
        encoder = FrozenClipTextEncoder(clip_folder)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = encoder(prompt(320))
        assert torch.equal(mixed, encoder(prompt(320)))

    def test_fingerprint_follows_weights_configuration_and_dtype(self, clip_folder, tmp_path):
        encoder = FrozenClipTextEncoder(clip_folder)
        weights = clip_folder / "model.safetensors"
        assert encoder.weights_sha256 == sha256_of_file(weights)
        assert FrozenClipTextEncoder(clip_folder, sha256=encoder.weights_sha256).fingerprint == encoder.fingerprint
        half = FrozenClipTextEncoder(clip_folder, dtype="float16")
        assert half.fingerprint != encoder.fingerprint
        assert half(prompt(320)).dtype == torch.float32
        config = json.loads((clip_folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
        shallow = FrozenClipTextEncoder(tmp_path)
        assert shallow.weights_sha256 == encoder.weights_sha256
        assert shallow.fingerprint != encoder.fingerprint

    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    def test_reads_the_layout_of_older_releases(self, clip_folder, tmp_path, file):
        # Stable Diffusion's own folder carries a prefix and a buffer that current transformers no longer have.
        state = load_file(clip_folder / "model.safetensors")
        state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        if file.endswith("safetensors"):
            save_file(state, tmp_path / file, metadata={"format": "pt"})
        else:
            torch.save(state, tmp_path / file)
        (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
        tokens = prompt(320, 1929)
        assert torch.equal(FrozenClipTextEncoder(tmp_path)(tokens), FrozenClipTextEncoder(clip_folder)(tokens))

    def test_missing_folder_says_what_why_where_how(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            FrozenClipTextEncoder(tmp_path / "absent")
        message = str(caught.value)
        assert message.startswith(str(tmp_path / "absent"))
        for words in ("turns prompts into", "expected config.json", "TransformerTextEncoder", "sha256", "copy"):
            assert words in message

    def test_damaged_or_incomplete_weights_are_refused(self, clip_folder, tmp_path):
        with pytest.raises(ValueError, match=r"model\.safetensors: expected sha256 0000"):
            FrozenClipTextEncoder(clip_folder, sha256="0" * 64)
        (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
        state = load_file(clip_folder / "model.safetensors")
        dropped = next(key for key in state if key.endswith("token_embedding.weight"))
        del state[dropped]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"weights do not fit config\.json: 1 missing.*token_embedding"):
            FrozenClipTextEncoder(tmp_path)
        (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:1000])
        with pytest.raises(ValueError, match="not a readable CLIP text model"):
            FrozenClipTextEncoder(tmp_path)

    def test_unknown_dtype(self, clip_folder):
        for dtype in ("float17", "int8"):
            with pytest.raises(ValueError, match=f"dtype: expected a floating-point type .* got '{dtype}'"):
                FrozenClipTextEncoder(clip_folder, dtype=dtype)

    def test_is_not_pickled_code(self, clip_folder, tmp_path):
        class Planted:
            def __reduce__(self):
                return (print, ("executed",))

        (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
        buffer = io.BytesIO()
        torch.save({"text_model.embeddings.token_embedding.weight": Planted()}, buffer)
        (tmp_path / "pytorch_model.bin").write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match="not a readable CLIP text model"):
            FrozenClipTextEncoder(tmp_path)
