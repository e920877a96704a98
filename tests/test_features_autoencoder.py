# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AutoencoderKL

from shared.metrics.features_autoencoder import AutoencoderFeatures

IMAGES = torch.rand(3, 1, 64, 96, generator=torch.Generator().manual_seed(0))


def _autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8, 12), latent_channels=3, num_res_blocks=1,
        norm_num_groups=4, attention_levels=(False,) * 3, with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )  # fmt: skip


def test_autoencoder_features_are_moments_of_the_encoding() -> None:
    autoencoder = _autoencoder()
    features = AutoencoderFeatures(autoencoder, layer="posterior_mean", device="cpu", batch_size=2)(IMAGES)
    with torch.no_grad():
        mean = autoencoder.encode(IMAGES)[0]
    torch.testing.assert_close(features[:, :3], mean.mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[:, 3:], mean.flatten(2).std(2, correction=0), rtol=1e-4, atol=1e-5)
    extractor = AutoencoderFeatures(autoencoder, name="own")
    deep = extractor(IMAGES)
    assert deep.shape == (3, 24)
    seen: list[torch.Tensor] = []
    autoencoder.encoder.blocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        autoencoder.encode(IMAGES)
    torch.testing.assert_close(deep[:, :12], seen[0].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert extractor.name == "own"
    assert autoencoder.training  # the mode of an autoencoder in use is restored


def test_autoencoder_features_use_the_weights_of_the_moment() -> None:
    """The bundle loads its weights after the extractor is made."""
    autoencoder = _autoencoder()
    extractor = AutoencoderFeatures(autoencoder)
    before = extractor(IMAGES)
    with torch.no_grad():
        autoencoder.encoder.blocks[0].conv.weight.mul_(2)
    assert not torch.allclose(extractor(IMAGES), before)
    with pytest.raises(ValueError, match="layer: expected feature_map or posterior_mean, got 'last'"):
        AutoencoderFeatures(autoencoder, layer="last")
