# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from shared.metrics.noddi_baselines import EncoderOnly, PatchwiseReconstruction, UpsampledMaps, UpsamplingBaseline

LOW = (10, 14, 12)
HIGH = tuple(2 * n for n in LOW)


def ramp(axis: int = 0) -> torch.Tensor:
    """(3, 2X, 2Y, 2Z) rising along one axis, in [0.2, 0.8]."""
    line = torch.linspace(0.2, 0.8, HIGH[axis])
    shape = [1, 1, 1, 1]
    shape[axis + 1] = -1
    return line.reshape(shape).expand(3, *HIGH).clone()


@pytest.mark.parametrize("mode", ["trilinear", "cubic"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_upsampled_maps_are_in_place(mode, axis):
    """A shift by half a voxel would show: a ramp comes back as itself, away from the held edge."""
    baseline = UpsampledMaps(mode)
    maps = ramp(axis)
    found = baseline({"maps": MetaTensor(maps)})
    assert type(found) is torch.Tensor
    assert found.shape == maps.shape
    inner: list[Any] = [slice(None)] * 4
    inner[axis + 1] = slice(6, -6)
    assert torch.allclose(found[tuple(inner)], maps[tuple(inner)], atol=2e-3)
    assert "noise-free low-resolution maps that no user has" in baseline.note
    assert mode in baseline.note


def test_cubic_is_sharper_and_stays_in_range():
    maps = torch.zeros(3, *HIGH)
    maps[:, 8:14] = 1
    found = {mode: UpsampledMaps(mode)({"maps": maps}) for mode in ("trilinear", "cubic")}
    errors = {mode: float((value - maps).square().mean()) for mode, value in found.items()}
    assert errors["cubic"] < errors["trilinear"]
    assert all(float(value.min()) >= 0 and float(value.max()) <= 1 for value in found.values())
    with pytest.raises(ValueError, match="mode: expected trilinear or cubic, got 'nearest'"):
        UpsampledMaps("nearest")


def test_encoder_only_asks_the_sampler():
    network, calls = nn.Linear(1, 1).train(), []

    def sampler(features: torch.Tensor, model: Any) -> torch.Tensor:
        calls.append((features, model, model.training, torch.is_grad_enabled()))
        return MetaTensor(torch.full((1, 3, *HIGH), 1.2))

    found = EncoderOnly(network, sampler)({"image": MetaTensor(torch.zeros(5, *LOW))})
    ((features, model, training, gradients),) = calls
    assert type(features) is torch.Tensor
    assert features.shape == (1, 5, *LOW)
    assert model is network
    assert not training
    assert not gradients
    assert network.training
    assert type(found) is torch.Tensor
    assert torch.equal(found, torch.ones(3, *HIGH))


class Doubling(nn.Module):
    """Three channels, each voxel repeated: exact at every place, whatever the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.shapes: list[torch.Size] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(x.shape)
        return nn.functional.interpolate(self.gain * x[:, :3], scale_factor=2, mode="nearest")


def saved(folder: Path, gain: float = 0.5) -> Path:
    network = Doubling()
    nn.init.constant_(network.gain, gain)
    torch.save(network.state_dict(), folder / "baseline.pt")
    return folder / "baseline.pt"


@pytest.mark.parametrize("patch", [8, (16, 8, 6), (16, 20, 18)])
def test_u_net_in_patches_of_one_grid_blended_on_the_other(tmp_path, patch):
    """Volumes larger than the patch along some axes and smaller along others."""
    image = torch.rand(4, *LOW)
    network = Doubling()
    baseline = UpsamplingBaseline(network, saved(tmp_path), patch_size=patch, overlap=0.4, batch_size=3)
    found = baseline({"image": MetaTensor(image)})
    sides = (patch,) * 3 if isinstance(patch, int) else patch
    assert {tuple(shape[2:]) for shape in network.shapes} == {sides}
    expected = 0.5 * image[:3].repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert found.shape == (3, *HIGH)
    assert torch.allclose(found, expected, atol=1e-6)
    assert "trained on the same data" in baseline.note


def test_u_net_is_clamped_and_its_weights_may_be_absent(tmp_path):
    image = torch.ones(3, *LOW)
    assert float(UpsamplingBaseline(Doubling(), saved(tmp_path, 3.0), patch_size=8)({"image": image}).max()) == 1
    absent = UpsamplingBaseline(Doubling(), tmp_path / "none.pt", remedy="Train it.")
    assert absent({"image": image}) is None
    assert absent.note == "not trained: none.pt was not found. Train it."
    with pytest.raises(FileNotFoundError, match=r"none.pt: expected weights of the U-Net baseline"):
        UpsamplingBaseline(Doubling(), tmp_path / "none.pt", required=True)


def test_a_u_net_of_another_scale_is_named(tmp_path):
    class Same(Doubling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x[:, :3]

    baseline = UpsamplingBaseline(Same(), saved(tmp_path), patch_size=8)
    with pytest.raises(ValueError, match=r"network: expected maps \(1, 3, 20, 28, 24\) .* got \(1, 3, 10, 14, 12\)"):
        baseline({"image": torch.zeros(3, *LOW)})
    with pytest.raises(ValueError, match="patch_size: expected one side or three"):
        UpsamplingBaseline(Same(), saved(tmp_path), patch_size=(8, 8))


class Autoencoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.shapes = channels, []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert not self.training
        assert x.shape[1] == self.channels
        self.shapes.append(tuple(x.shape))
        return 2 * x, torch.zeros(()), torch.zeros(())


@pytest.mark.parametrize("patch", [None, (8, 16, 6)])
@pytest.mark.parametrize("one_map", [False, True])
def test_reconstruction_in_patches_and_map_by_map(patch, one_map):
    maps = torch.rand(1, 3, *HIGH)
    autoencoder = Autoencoder(1 if one_map else 3).train()
    found = PatchwiseReconstruction(autoencoder, patch_size=patch, one_map=one_map)(maps)
    assert torch.allclose(found, (2 * maps).clamp(0, 1), atol=1e-5)
    assert autoencoder.training
    assert {shape[2:] for shape in autoencoder.shapes} == {HIGH if patch is None else (16, 32, 12)}
