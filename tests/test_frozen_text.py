# SPDX-License-Identifier: Apache-2.0
"""The published arrangement at small size: a local CLIP text encoder, frozen, cached on disk, outside the weights."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.test_cxr_bundle import CXR, STAGES, UNET
from tools.phantoms.cxr_ldm import make_dataset


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "text_encoder"
    config = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.mark.reliability(8)
def test_training_and_sampling_with_a_frozen_encoder(clip_folder, tmp_path, caplog):
    data = tmp_path / "data"
    make_dataset(str(data), n=28, size=128, split=(0.35, 0.2, 0.45))
    CXR.execute("train_autoencoder", data, **CXR.folders(tmp_path, "train_autoencoder"), max_epochs=1)
    train = CXR.config("train")
    text = {
        "text_encoder_def": train["text_encoder_def"],
        "text_encoder_dir": str(clip_folder),
        "unet_def": {**UNET, "cross_attention_dim": 16},
    }
    cache = tmp_path / "text"
    options = {**text, "context_encoder": train["context_encoder"], "text_cache_dir": str(cache), "num_excerpts": 2}
    workflow = CXR.execute("train", data, **CXR.folders(tmp_path, "train"), **options)

    model = workflow.parser.get_parsed_content("network_def")
    state = torch.load(tmp_path / "models/model.pt", weights_only=True)
    assert not any(name.startswith("text_encoder") for name in state)
    assert state.keys() == model.state_dict().keys()
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    assert trained == sum(parameter.numel() for parameter in model.unet.parameters())
    stored = sum(path.is_file() for path in cache.rglob("*.npy"))
    # Two excerpts of each of 9 training texts, the null prompt, and the whole validation texts.
    assert 0 < stored <= 2 * 9 + 1 + 6

    caplog.set_level(logging.INFO)
    samples = tmp_path / "samples"
    options = {**STAGES["inference"], **text, "ckpt_dir": str(tmp_path / "models"), "output_dir": str(samples)}
    CXR.execute("inference", data, **{name: value for name, value in options.items() if name != "device"})
    assert len(list(samples.glob("*.png"))) == 1
