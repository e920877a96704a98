# SPDX-License-Identifier: Apache-2.0
"""The published autoencoder: beside diffusers' network of the same architecture, and in training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # interfaces that the releases of its dependencies deprecate
    from diffusers import AutoencoderKL as DiffusersAutoencoder

from shared.checkpoint_origins import convert_by_table
from shared.checkpoints_latent_diffusion import DIFFUSERS, autoencoder_table
from shared.engines import AutoencoderTrainer
from shared.losses import AutoencoderLoss
from shared.networks.kl_autoencoder import KLAutoencoder, KLEncoder

TINY: dict[str, Any] = {"channels": [16, 32, 32], "attention_levels": [False] * 3, "norm_num_groups": 8}


def tiny(**options: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**{**TINY, **options}).eval()


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(values * scale + (weight.ndim == 1 and "norm" in name and name.endswith("weight")))
    return network.eval()


def diffusers_network() -> nn.Module:
    return randomize(
        DiffusersAutoencoder(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        )
    )


@torch.no_grad()
def test_outputs_are_those_of_diffusers():
    """The published shape (four levels, two blocks, attention in the middle) at an eighth of the width."""
    theirs = diffusers_network()
    ours = KLAutoencoder(channels=(16, 32, 64, 64), norm_num_groups=8).eval()
    ours.load_state_dict(convert_by_table(theirs.state_dict(), ours, autoencoder_table(ours, DIFFUSERS)), strict=True)
    image = torch.rand((2, 3, 64, 48), generator=torch.Generator().manual_seed(1))
    posterior = theirs.encode(2 * image - 1).latent_dist
    decoded = (theirs.decode(posterior.mean).sample + 1) / 2
    mean, sigma = ours.encode(image)
    assert posterior.mean.std() > 0.05, "the comparison would be blind"
    assert decoded.std() > 0.05
    assert (mean - posterior.mean).abs().max() <= 1e-5
    assert (sigma - posterior.std).abs().max() <= 1e-5
    assert (ours.decode(mean) - decoded).abs().max() <= 1e-5

    # The negative control: without the last SiLU, as in MONAI's own class, the numbers are others.
    plain = copy.deepcopy(ours)
    norm = plain.encoder.blocks[-2]
    plain.encoder.blocks[-2] = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    plain.encoder.blocks[-2].load_state_dict(norm.state_dict())
    assert (plain.encode(image)[0] - mean).abs().max() > 1e-2


def test_the_published_size():
    with torch.device("meta"):
        network = KLAutoencoder()
        mean, _ = network.encode(torch.empty(1, 3, 256, 256))
        assert network.decode(mean).shape == (1, 3, 256, 256)
    assert mean.shape == (1, 4, 32, 32)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863  # 83.65 M, arXiv:2112.10752 kl-f8
    blocks = [sum(isinstance(b, AEKLResBlock) for b in side.blocks) for side in (network.encoder, network.decoder)]
    assert blocks == [4 * 2 + 2, 4 * 3 + 2]


@torch.no_grad()
def test_pictures_are_in_0_1_outside_and_in_minus_1_1_inside():
    network = tiny()
    seen: list[torch.Tensor] = []
    network.encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 16, 24)
    network.encode(image)
    assert torch.equal(seen[0], 2 * image - 1)
    last = network.decoder.blocks[-1].conv
    last.weight.zero_()
    last.bias.copy_(torch.tensor([-1.0, 0.0, 3.0]))
    decoded = network.decode(torch.randn(1, 4, 4, 6))
    assert decoded.shape == (1, 3, 16, 24)
    assert decoded.amax(dim=(0, 2, 3)).tolist() == [0.0, 0.5, 2.0]  # (y + 1) / 2, not clamped


@torch.no_grad()
def test_one_channel_is_three_equal_ones():
    network = tiny()
    grey = torch.rand(2, 1, 16, 24)
    assert torch.equal(network.encode(grey)[0], network.encode(grey.expand(-1, 3, -1, -1))[0])
    assert network(grey)[0].shape == (2, 3, 16, 24)


def test_what_does_not_fit_is_named():
    network = tiny()
    with pytest.raises(
        ValueError, match=r"^image: expected 3 channels .* divisible by 4, got \(1, 3, 16, 22\); set im"
    ):
        network.encode(torch.rand(1, 3, 16, 22))
    with pytest.raises(ValueError, match=r"^image: expected 3 channels \(or 1\) .* got \(1, 2, 16, 16\)"):
        network.encode(torch.rand(1, 2, 16, 16))
    with pytest.raises(ValueError, match="multiple of norm_num_groups"):
        tiny(norm_num_groups=5)


@pytest.mark.parametrize("flash", [True, False])
@torch.no_grad()
def test_both_kinds_of_attention_give_the_same_numbers(flash: bool):
    network = tiny(use_flash_attention=flash, attention_levels=[False, True, False])
    reference = tiny(attention_levels=[False, True, False])
    image = torch.rand((1, 3, 16, 24), generator=torch.Generator().manual_seed(1))
    assert (network.encode(image)[0] - reference.encode(image)[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_dropout_sits_before_the_second_convolution_and_changes_no_key():
    options: dict[str, Any] = {
        **TINY, "in_channels": 3, "out_channels": 8, "num_res_blocks": 2, "norm_eps": 1e-6,
    }  # fmt: skip
    with_dropout, without = KLEncoder(**options, dropout=0.2), KLEncoder(**options)
    assert list(with_dropout.state_dict()) == list(without.state_dict())
    with_dropout.load_state_dict(without.state_dict(), strict=True)
    image = torch.rand(1, 3, 16, 24)
    assert torch.equal(with_dropout.eval()(image), without.eval()(image))
    assert not torch.equal(with_dropout.train()(image), without.train()(image))
    # All dropped: of the second convolution the bias is left, so it is the only layer left out.
    block = next(b for b in KLEncoder(**options, dropout=1.0).blocks if isinstance(b, AEKLResBlock))
    x = torch.randn(1, 16, 8, 12)
    assert torch.equal(block.train()(x), x + block.conv2.conv.bias[:, None, None])
    count = sum(isinstance(module, nn.Dropout) and module.p == 0.2 for module in with_dropout.modules())
    assert count == sum(isinstance(module, AEKLResBlock) for module in with_dropout.modules())


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_it_trains_with_the_autoencoder_trainer(use_checkpoint: bool):
    network = tiny(use_checkpoint=use_checkpoint)
    before = copy.deepcopy(network.state_dict())
    batch = {"image": torch.rand((2, 3, 16, 24), generator=torch.Generator().manual_seed(1))}
    trainer = AutoencoderTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=AutoencoderLoss(kl_weight=1e-3),
        prepare_batch=lambda data, *_, **__: (data["image"], data["image"]),
    )
    torch.manual_seed(0)
    trainer.run()
    assert set(trainer.state.losses) == {"reconstruction", "kl"}
    assert all(torch.isfinite(term) for term in trainer.state.losses.values())
    # The key's bias alone may stay: one vector added to all keys does not change a softmax, so it has no gradient.
    still = [key for key, value in network.state_dict().items() if torch.equal(value, before[key])]
    assert all(key.endswith("to_k.bias") for key in still), still
