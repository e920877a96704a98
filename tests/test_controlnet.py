# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import ControlNet, DiffusionModelUNet
from torch import nn

from shared.networks.controlnet import ControlNetModel, start_from_diffusion
from shared.weights import load_weights
from tests.tiny_networks import CONTROLNET, UNET, controlnet_model, diffusion_model, inputs

ZERO_CONVOLUTIONS = ("controlnet_down_blocks", "controlnet_mid_block")


def residuals(model: ControlNetModel, index: int, x, timesteps, condition, scale: float = 1.0):
    """What one ControlNet adds, from its parts."""
    return model.controlnets[index](
        x,
        timesteps,
        controlnet_cond=model.embed_condition(condition)[index],
        conditioning_scale=scale,
        context=model.diffusion.prompt(len(x)),
    )


def train(model: ControlNetModel, steps: int = 20, channels: int = 1) -> None:
    x, timesteps, condition = inputs(channels=channels)
    model.train()
    optimizer = torch.optim.Adam(model.trainable_parameters(), 1e-3)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        null_prompt = torch.tensor([True, False])
        nn.functional.mse_loss(model(x, timesteps, condition, null_prompt=null_prompt), target).backward()
        optimizer.step()


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class TestStart:
    @torch.no_grad()
    def test_residuals_are_zero_and_the_output_is_the_unets(self):
        model = controlnet_model(silent=True)
        x, timesteps, condition = inputs()
        down, middle = residuals(model, 0, x, timesteps, condition)
        assert len(down) == 4
        assert all(not part.any() for part in (*down, middle))
        alone = model.diffusion(x, timesteps)
        assert alone.std() > 0.05, "the comparison would be blind"
        assert torch.equal(model(x, timesteps, condition), alone)

    def test_all_but_zero_convolutions_and_embedding_are_the_unets(self):
        model = controlnet_model(silent=True)
        unet, encoder = model.diffusion.unet.state_dict(), model.controlnets[0].state_dict()
        copied = {name for name in encoder if not name.startswith(ZERO_CONVOLUTIONS)}
        assert copied == {name for name in unet if not name.startswith(("up_blocks", "out."))}
        assert all(torch.equal(encoder[name], unet[name]) for name in copied)
        assert all(not encoder[name].any() for name in set(encoder) - copied)
        assert not any(name.startswith("controlnet_cond_embedding") for name in encoder)
        # Copies: training the one must not train the other.
        assert not {p.data_ptr() for p in model.controlnets.parameters()} & {
            p.data_ptr() for p in model.diffusion.parameters()
        }

    @pytest.mark.parametrize(
        "difference",
        [
            {"channels": [8, 8]},
            {"num_res_blocks": 2},
            {"cross_attention_dim": 5},
            {"channels": [8, 16, 16], "attention_levels": [False, True, True], "num_head_channels": [0, 8, 8]},
            {"attention_levels": [True, True], "num_head_channels": [8, 8]},
        ],
        ids=str,
    )
    def test_a_controlnet_unlike_the_unet_is_named(self, difference):
        model = ControlNetModel(diffusion_model(), [ControlNet(**{**CONTROLNET, **difference})])
        with pytest.raises(ValueError, match=r"^controlnet_def: expected the channels, blocks and attention of unet_"):
            model.start_from_unet()

    @pytest.mark.parametrize(
        "difference",
        [
            {"num_head_channels": [0, 4]},
            {"channels": [8], "attention_levels": [False], "num_head_channels": [8]},
            {"attention_levels": [False, False]},
        ],
        ids=str,
    )
    def test_a_controlnet_with_less_than_the_unet_is_named(self, difference):
        model = ControlNetModel(diffusion_model(), [ControlNet(**{**CONTROLNET, **difference})])
        with pytest.raises(ValueError, match=r"^controlnet_def: expected the channels, blocks and attention of unet_"):
            model.start_from_unet()

    def test_a_controlnet_with_fewer_blocks_is_named(self):
        """All its weights have a counterpart, so that nothing of its own is left over."""
        diffusion = diffusion_model()
        diffusion.unet = DiffusionModelUNet(**{**UNET, "num_res_blocks": 2})
        model = ControlNetModel(diffusion, [ControlNet(**CONTROLNET)])
        with pytest.raises(ValueError, match=r"unet_def, but down_blocks.0.resnets.1\S+ differs; configure both alike"):
            model.start_from_unet()

    def test_from_a_file_of_stage_2(self, tmp_path):
        trained = diffusion_model(seed=3)
        torch.save(trained.state_dict(), tmp_path / "diffusion.pt")
        model = controlnet_model(silent=True)
        assert start_from_diffusion(model, tmp_path / "diffusion.pt") is model
        assert changed(trained.state_dict(), model.diffusion) == set()
        assert torch.equal(model.controlnets[0].conv_in.conv.weight, trained.unet.conv_in.conv.weight)
        assert model.scale_factor.item() == 0.5
        with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none.pt: .*Train stage 2 first"):
            start_from_diffusion(model, tmp_path / "none.pt", "Train stage 2 first.")
        torch.save(trained.unet.state_dict(), tmp_path / "unet.pt")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/unet.pt: expected the weights of this configuration"):
            start_from_diffusion(model, tmp_path / "unet.pt")


class TestTraining:
    def test_only_the_controlnet_changes(self):
        model = controlnet_model(silent=True)
        before = copy.deepcopy(model.state_dict())
        train(model)
        moved = changed(before, model)
        assert not any(name.startswith("diffusion.") for name in moved)
        # Zero convolutions learn first; what lies behind them follows because they are no longer zero.
        zero = {name for name in before if name.startswith(tuple(f"controlnets.0.{n}" for n in ZERO_CONVOLUTIONS))}
        assert zero <= moved
        assert {"embeddings.0.conv_in.conv.weight", "embeddings.0.conv_out.conv.weight"} <= moved
        assert {"controlnets.0.conv_in.conv.weight", "controlnets.0.time_embed.0.weight"} <= moved

    def test_an_unlocked_unet_changes_but_neither_prompt_nor_autoencoder(self):
        model = controlnet_model(silent=True, unlock_unet=True)
        before = copy.deepcopy(model.state_dict())
        train(model)
        frozen = {name for name in changed(before, model) if name.startswith("diffusion.")}
        assert {"diffusion.unet.conv_in.conv.weight", "diffusion.unet.out.2.conv.weight"} <= frozen
        assert all(name.startswith("diffusion.unet.") for name in frozen)

    @pytest.mark.parametrize("unlock", [False, True])
    def test_frozen_parts_stay_in_evaluation_mode(self, unlock):
        model = controlnet_model(unlock_unet=unlock)
        assert not any(module.training for module in model.diffusion.autoencoder.modules())
        model.train()
        assert model.training
        assert all(module.training for part in (model.controlnets, model.embeddings) for module in part.modules())
        assert all(module.training is unlock for module in model.diffusion.unet.modules())
        for part in (model.diffusion.autoencoder, model.diffusion.prompt):
            assert not any(module.training for module in part.modules())
        assert not any(module.training for module in model.eval().modules())

    @pytest.mark.parametrize("unlock", [False, True])
    def test_trained_holds_what_takes_gradients(self, unlock):
        model = controlnet_model(unlock_unet=unlock)
        assert {id(p) for p in model.trained.parameters()} == {id(p) for p in model.trainable_parameters()}
        assert set(model.trained) == (
            {"controlnets", "embeddings", "unet"} if unlock else {"controlnets", "embeddings"}
        )
        twin = controlnet_model(seed=7, unlock_unet=unlock)
        twin.trained.load_state_dict(model.trained.state_dict())
        twin.diffusion.load_state_dict(model.diffusion.state_dict())
        x, timesteps, condition = inputs()
        with torch.no_grad():
            assert torch.equal(twin(x, timesteps, condition), model(x, timesteps, condition))

    def test_training_learns_to_follow_the_condition(self):
        """Two conditions, two targets, equal noisy latents: only the condition can tell them apart."""
        model = controlnet_model(silent=True)
        x, timesteps, condition = inputs()
        x, timesteps = x[:1].expand(2, -1, -1, -1), timesteps[:1].expand(2)
        condition = torch.stack((condition[0], torch.zeros_like(condition[0])))
        # The best prediction without the condition is 0, with a loss of 1.
        target = torch.ones_like(x) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        optimizer = torch.optim.Adam(model.train().trainable_parameters(), 3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x, timesteps, condition), target)
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5


class TestForward:
    @pytest.fixture(autouse=True)
    def no_gradients(self):
        with torch.no_grad():
            yield

    def test_two_controlnets_are_summed_with_their_weights(self):
        model = controlnet_model([1, 1])
        x, timesteps, condition = inputs()
        scales = [0.7, 0.4]
        parts = [residuals(model, index, x, timesteps, condition) for index in (0, 1)]
        down = [0.7 * a + 0.4 * b for a, b in zip(parts[0][0], parts[1][0], strict=True)]
        middle = 0.7 * parts[0][1] + 0.4 * parts[1][1]
        context = model.diffusion.prompt(2)
        expected = model.diffusion.unet(
            x, timesteps, context, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle
        )
        actual = model(x, timesteps, condition, conditioning_scale=scales)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert (actual - model(x, timesteps, condition, conditioning_scale=scales[::-1])).abs().max() > 1e-3
        one_for_all = model(x, timesteps, condition, conditioning_scale=0.7)
        assert torch.equal(one_for_all, model(x, timesteps, condition, conditioning_scale=[0.7, 0.7]))

    def test_scale_zero_leaves_a_controlnet_out(self):
        model, single = controlnet_model([1, 1]), controlnet_model()
        x, timesteps, condition = inputs()
        single.controlnets[0], single.embeddings[0] = model.controlnets[1], model.embeddings[1]
        alone = model.diffusion(x, timesteps)
        calls = []
        model.controlnets[0].register_forward_hook(lambda *args: calls.append(args))
        assert torch.equal(model(x, timesteps, condition, conditioning_scale=0), alone)
        assert torch.equal(
            model(x, timesteps, condition, conditioning_scale=[0.0, 1.0]), single(x, timesteps, condition)
        )
        assert calls == [], "a scale of 0 should cost nothing"
        assert (model(x, timesteps, condition) - alone).abs().max() > 1e-2

    def test_each_controlnet_sees_its_channels(self):
        model = controlnet_model([1, 2], condition_channels=[[2], [0, 1]])
        x, timesteps, condition = inputs(channels=3)
        hints = model.embed_condition(condition)
        assert torch.equal(hints[0], model.embeddings[0](condition[:, 2:]))
        assert torch.equal(hints[1], model.embeddings[1](condition[:, :2]))
        other = condition.clone()
        other[:, 2] = 0
        again = model.embed_condition(other)
        assert torch.equal(again[1], hints[1])
        assert not torch.equal(again[0], hints[0])
        assert (model(x, timesteps, condition) - model(x, timesteps, other)).abs().max() > 1e-3

    def test_several_contrasts_are_channels_of_one_controlnet(self):
        model = controlnet_model([2])
        x, timesteps, condition = inputs(channels=2)
        assert model(x, timesteps, condition).shape == x.shape
        swapped = model(x, timesteps, condition.flip(1))
        assert (model(x, timesteps, condition) - swapped).abs().max() > 1e-3

    def test_embedded_and_condition_give_the_same(self):
        model = controlnet_model([1, 1])
        x, timesteps, condition = inputs()
        embedded = model.embed_condition(condition)
        assert [part.shape for part in embedded] == [(2, 8, 8, 12)] * 2
        assert torch.equal(model(x, timesteps, embedded=embedded), model(x, timesteps, condition))

    def test_taking_the_embedding_out_does_not_change_the_controlnet(self):
        """MONAI's own forward, embedding included, gives the same residuals."""
        model = controlnet_model()
        x, timesteps, condition = inputs()
        down, middle = residuals(model, 0, x, timesteps, condition, scale=0.3)
        whole = copy.deepcopy(model.controlnets[0])
        whole.controlnet_cond_embedding = model.embeddings[0]
        expected = whole(x, timesteps, condition, conditioning_scale=0.3, context=model.diffusion.prompt(2))
        assert all(torch.equal(a, b) for a, b in zip((*down, middle), (*expected[0], expected[1]), strict=True))

    def test_the_null_prompt_reaches_unet_and_controlnet(self):
        model = controlnet_model()
        x, timesteps, condition = inputs()
        seen = []
        hook = {"with_kwargs": True}
        for net in (model.controlnets[0], model.diffusion.unet):
            net.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["context"]), **hook)
        mixed = model(x, timesteps, condition, null_prompt=torch.tensor([True, False]))
        assert len(seen) == 2
        for context in seen:
            assert torch.equal(context, model.diffusion.prompt.embeddings)
        plain = model(x, timesteps, condition)
        torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-5)
        assert (mixed[0] - plain[0]).abs().max() > 1e-3

    def test_items_of_a_batch_are_independent(self):
        model = controlnet_model()
        x, timesteps, condition = inputs(count=3)
        together = model(x, timesteps, condition)
        alone = torch.cat([model(x[i : i + 1], timesteps[i : i + 1], condition[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

    def test_decoding_is_the_diffusion_models(self):
        model = controlnet_model()
        latents, _, images = inputs()
        assert torch.equal(model.decode(latents), model.diffusion.autoencoder.decode(latents / 0.5))
        mean, _ = model.diffusion.autoencoder.encode(images)
        assert torch.equal(model.reconstruct(images), model.diffusion.autoencoder.decode(mean))
        assert model.autoencoder is model.diffusion.autoencoder
        assert model.scale_factor is model.diffusion.scale_factor


class TestStateDict:
    def test_round_trip(self, tmp_path):
        model, other = controlnet_model([1, 1]), controlnet_model([1, 1], seed=9)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        x, timesteps, condition = inputs()
        with torch.no_grad():
            expected = model(x, timesteps, condition)
            assert not torch.equal(other(x, timesteps, condition), expected)
            load_weights(other, tmp_path / "model.pt")
            assert torch.equal(other(x, timesteps, condition), expected)
        assert {name.split(".")[0] for name in model.state_dict()} == {"diffusion", "embeddings", "controlnets"}
        assert "diffusion.scale_factor" in model.state_dict()

    def test_a_deep_copy_is_equal_and_apart(self):
        model = controlnet_model(silent=True)
        twin = copy.deepcopy(model)
        before = copy.deepcopy(model.state_dict())
        train(twin)
        assert changed(before, model) == set()
        assert changed(before, twin)
        assert not any(p.requires_grad for p in twin.diffusion.parameters())


class TestErrors:
    def test_one_controlnet_twice(self):
        net = ControlNet(**CONTROLNET)
        with pytest.raises(ValueError, match=r"^controlnet_defs: expected 2 different ControlNets, got one of them tw"):
            ControlNetModel(diffusion_model(), [net, net])

    def test_channel_lists(self):
        with pytest.raises(ValueError, match=r"^condition_channels: expected a list for each of 2 ControlNets, got 1"):
            controlnet_model([1, 1], condition_channels=[[0]])
        x, timesteps, condition = inputs(channels=2)
        with pytest.raises(
            ValueError, match=r"^condition_channels: expected numbers from 0 to 1 for ControlNet 0, got \[2\]"
        ):
            controlnet_model(condition_channels=[[2]])(x, timesteps, condition)

    def test_condition(self):
        model = controlnet_model([1, 2])
        x, timesteps, condition = inputs()
        with pytest.raises(
            ValueError, match=r"^condition_keys: expected a condition of 2 channels for ControlNet 1, got"
        ):
            model(x, timesteps, condition)
        with pytest.raises(ValueError, match=r"^condition: expected images or their embeddings, got neither"):
            model(x, timesteps)

    def test_scales(self):
        x, timesteps, condition = inputs()
        with pytest.raises(ValueError, match=r"^conditioning_scale: expected one number, or one for each of 1 .*got 2"):
            controlnet_model()(x, timesteps, condition, conditioning_scale=[1.0, 1.0])
