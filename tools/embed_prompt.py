# SPDX-License-Identifier: Apache-2.0
"""Embed the constant prompt of `brain_controlnet` once, so that no run needs the text encoder.

    python -m tools.embed_prompt --text_encoder DIR --out bundles/brain_controlnet/models/pretrained/prompt.pt

DIR is the `text_encoder` folder of Stable Diffusion 2.1 (`python -m tools.assets list`). The file is what
`train_diffusion.json --prompt_weights FILE` and `tools.convert_checkpoint brain_controlnet` read.
"""

from __future__ import annotations

from pathlib import Path

import fire

from shared.files import sha256_of_file
from shared.networks.constant_prompt import ConstantPrompt
from shared.networks.text_encoder import FrozenClipTextEncoder
from shared.tokenizer import ClipTokenizer
from shared.weights import save_weights
from tools import command_line

PROMPT = "T1-weighted image of a brain."
_BUNDLES = Path(__file__).parents[1] / "bundles"
_OUT = _BUNDLES / "brain_controlnet" / "models" / "pretrained" / "prompt.pt"
_VOCABULARY = _BUNDLES / "cxr_ldm" / "models" / "tokenizer" / "clip_bpe_merges.txt.gz"


@fire.decorators.SetParseFns(text_encoder=str, out=str, prompt=str, tokenizer=str)
def embed_prompt(
    *, text_encoder: str, out: str = str(_OUT), prompt: str = PROMPT, tokenizer: str = str(_VOCABULARY)
) -> None:
    """Write the embeddings of the null prompt and of a prompt: the state dict of `ConstantPrompt`.

    The file holds `embeddings`, float32 (2, L, D): row 0 the null prompt "", row 1 the prompt, both padded with 0 to
    L = 77 tokens as Stable Diffusion 2 does; D is the width of the text encoder, 1024 for the published one.

    Args:
        text_encoder: folder of a CLIP text model (`config.json` with `model.safetensors` or `pytorch_model.bin`).
        out: the file to write; an existing one is replaced only when the new one is complete.
        prompt: the sentence; the published one by default.
        tokenizer: CLIP vocabulary, see `shared.tokenizer.ClipTokenizer`; that of the bundle cxr_ldm by default.

    Raises:
        FileNotFoundError: no text encoder or no vocabulary.
        ValueError: files that cannot be read, or a prompt that is empty or too long.
    """
    tokenize = ClipTokenizer(tokenizer, pad_token_id=0)
    count = tokenize.count_tokens(prompt)
    if count == tokenize.count_tokens(""):
        raise ValueError(
            f"--prompt: expected a sentence, got {prompt!r}, which is the null prompt. Remedy: leave it out"
        )
    if count > tokenize.max_length:
        raise ValueError(
            f"--prompt: expected at most {tokenize.max_length} tokens, got {count}, of which the last would be cut. "
            "Remedy: shorten the sentence"
        )
    encoder = FrozenClipTextEncoder(text_encoder)
    embeddings = encoder(tokenize(["", prompt]))
    module = ConstantPrompt(*embeddings.shape[1:], learned=False)
    module.embeddings.copy_(embeddings)
    save_weights(module.state_dict(), out)
    print(
        f"{prompt!r}: {count} tokens, embedded as {tuple(embeddings.shape)} with the null prompt in row 0\n"
        f"text encoder: {text_encoder}, sha256 {encoder.weights_sha256}\n"
        f"saved {out} ({Path(out).stat().st_size / 1e6:.1f} MB)\nsha256 {sha256_of_file(out)}"
    )


def main() -> None:
    """Entry point; expected errors end with their message alone."""
    command_line.run(embed_prompt, name="tools.embed_prompt")


if __name__ == "__main__":
    main()
