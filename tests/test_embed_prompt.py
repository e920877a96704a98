# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from shared.files import sha256_of_file
from shared.networks.constant_prompt import ConstantPrompt
from shared.networks.text_encoder import FrozenClipTextEncoder
from shared.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID
from shared.weights import load_weights
from tools.embed_prompt import PROMPT, embed_prompt, main

WIDTH = 16


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "text_encoder"
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_rows_are_the_null_prompt_and_the_published_sentence(clip_folder, tmp_path, capsys):
    out = tmp_path / "pretrained" / "prompt.pt"
    embed_prompt(text_encoder=str(clip_folder), out=str(out))
    # "t 1 - weighted image of a brain ." by open_clip's tokenizer, padded as Stable Diffusion 2 does.
    words = [339, 272, 268, 43179, 2867, 539, 320, 4812, 269]
    rows = [[BOS_TOKEN_ID, EOS_TOKEN_ID], [BOS_TOKEN_ID, *words, EOS_TOKEN_ID]]
    tokens = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    state = torch.load(out, weights_only=True)
    assert list(state) == ["embeddings"]
    assert state["embeddings"].dtype == torch.float32
    torch.testing.assert_close(state["embeddings"], FrozenClipTextEncoder(clip_folder)(tokens), rtol=0, atol=1e-6)
    printed = capsys.readouterr().out
    assert "'T1-weighted image of a brain.': 11 tokens" in printed
    assert sha256_of_file(out) in printed
    assert sha256_of_file(clip_folder / "model.safetensors") in printed


def test_a_constant_prompt_loads_it(clip_folder, tmp_path):
    embed_prompt(text_encoder=str(clip_folder), out=str(tmp_path / "prompt.pt"))
    prompt = load_weights(ConstantPrompt(77, WIDTH, learned=False), tmp_path / "prompt.pt")
    context = prompt(2, torch.tensor([True, False]))
    assert context.shape == (2, 77, WIDTH)
    assert (context[0] - context[1]).abs().max() > 0.1
    assert torch.equal(prompt(1)[0], context[1])


def test_on_the_command_line_with_another_sentence(clip_folder, tmp_path, monkeypatch):
    words = ["embed_prompt", "--text_encoder", str(clip_folder), "--out"]
    files = {}
    for prompt in (PROMPT, "T2-weighted image of a brain.", "2"):
        files[prompt] = tmp_path / f"{len(files)}.pt"
        monkeypatch.setattr("sys.argv", [*words, str(files[prompt]), "--prompt", prompt])
        main()
    states = [torch.load(file, weights_only=True)["embeddings"] for file in files.values()]
    assert all(torch.equal(state[0], states[0][0]) for state in states)
    assert not torch.equal(states[1][1], states[0][1])
    assert not torch.equal(states[2][1], states[1][1])
    monkeypatch.setattr("sys.argv", ["embed_prompt", "--text_encoder", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=rf"^{tmp_path}/none"):
        main()
    monkeypatch.setattr("sys.argv", [*words, "x.pt", "--promt", "T2"])
    with pytest.raises(SystemExit, match=r"^--promt: expected an option .* did you mean --prompt\?"):
        main()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", r"^--prompt: expected a sentence, got '  ', which is the null prompt"),
        ("brain " * 76, r"^--prompt: expected at most 77 tokens, got 78, of which the last would be cut"),
    ],
)
def test_a_prompt_that_is_none_or_would_be_cut(clip_folder, tmp_path, prompt, message):
    with pytest.raises(ValueError, match=message):
        embed_prompt(text_encoder=str(clip_folder), out=str(tmp_path / "prompt.pt"), prompt=prompt)
    assert not (tmp_path / "prompt.pt").exists()


def test_missing_vocabulary(clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none: there is no CLIP vocabulary here"):
        embed_prompt(text_encoder=str(clip_folder), out=str(tmp_path / "p.pt"), tokenizer=str(tmp_path / "none"))


def test_a_failed_write_leaves_the_previous_file(clip_folder, tmp_path, monkeypatch):
    out = tmp_path / "prompt.pt"
    out.write_bytes(b"previous")

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("gone")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="gone"):
        embed_prompt(text_encoder=str(clip_folder), out=str(out))
    assert out.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [out]
