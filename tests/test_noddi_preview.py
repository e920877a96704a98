# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from shared.handlers.noddi_preview import NoddiPreview, VolumeReconstructionPreview
from shared.handlers.previews import PreviewGrid
from shared.resolution import block_average
from shared.transforms.volumes import for_display

LOW = (6, 8, 5)
HIGH = (12, 16, 10)


class Patches:
    """Features that say which item it is; random maps."""

    def __init__(self, length: int, **changes: Any) -> None:
        self.length, self.changes = length, changes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        maps = torch.rand(3, *HIGH, generator=torch.Generator().manual_seed(index))
        item = {"image": torch.full((4, *LOW), index / 100), "maps": MetaTensor(maps)}
        if "map_id" in self.changes:
            item["maps"] = item["maps"][self.changes["map_id"]][None]
        return {**item, **self.changes}


class Sampler:
    """Maps of 0.5, 0.6, 0.7 and standard deviations; records how it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, features, network, seeds):
        self.calls.append((features, network.training, seeds))
        levels = torch.tensor([0.5, 0.6, 0.7, 0.1, 0.1, 0.1]).reshape(1, 6, 1, 1, 1)
        return MetaTensor(levels.expand(1, 6, *HIGH).clone())


def test_rows_low_generated_true_difference():
    network, sampler = nn.Linear(1, 1).train(), Sampler()
    rows = NoddiPreview(network, sampler, Patches(9), n=3, seed=7)()
    assert [round(float(call[0].mean()) * 100) for call in sampler.calls] == [1, 4, 7]
    assert [call[2] for call in sampler.calls] == [[7], [8], [9]]
    assert all(type(call[0]) is torch.Tensor and call[0].shape == (1, 4, *LOW) for call in sampler.calls)
    assert not any(call[1] for call in sampler.calls)
    assert network.training
    assert type(rows) is torch.Tensor
    assert rows.shape == (3 * 3 * 4, 1, 16, 12)
    maps = torch.as_tensor(Patches(9)[4]["maps"]).as_subclass(torch.Tensor)
    low, generated, true, difference = rows[16:20, 0]  # second item, ODI
    assert torch.equal(true, for_display(maps[1, :, :, 5]))
    assert torch.equal(low[::2, ::2], for_display(block_average(maps)[1, :, :, 2]))
    assert torch.equal(low[::2, ::2], low[1::2, 1::2])
    assert torch.all(generated == generated.new_tensor(0.6))
    assert torch.allclose(difference, (4 * (generated - true).abs()).clamp(max=1))


def test_one_map_of_a_model_of_all():
    rows = NoddiPreview(nn.Identity(), Sampler(), Patches(2, map_id=2), n=2)()
    assert rows.shape == (2 * 4, 1, 16, 12)
    assert torch.allclose(rows[1], torch.tensor(0.7))


class Autoencoder(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        return 0.5 * x, torch.zeros(())


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions(channels):
    autoencoder = Autoencoder().train()
    dataset = Patches(5) if channels == 3 else Patches(5, map_id=0)
    rows = VolumeReconstructionPreview(autoencoder, dataset, n=2)()
    assert autoencoder.training
    assert rows.shape == (2 * channels * 3, 1, 16, 12)
    true, reconstruction, difference = rows[:3]
    assert torch.allclose(reconstruction, 0.5 * true)
    assert torch.allclose(difference, (2 * true).clamp(max=1))


def test_it_is_for_a_preview_grid(tmp_path):
    preview = NoddiPreview(nn.Identity(), Sampler(), Patches(3), n=1)
    engine = Engine(lambda engine, batch: None)
    engine.state.rank = 0
    PreviewGrid(preview, tmp_path, name="maps", columns=4).attach(engine)
    engine.run([0], max_epochs=1)
    with Image.open(tmp_path / "epoch_0001_maps.png") as picture:
        assert picture.size == (4 * (12 + 2) - 2, 3 * (16 + 2) - 2)


def test_an_empty_dataset_is_named():
    with pytest.raises(ValueError, match="dataset: expected at least one item to show"):
        NoddiPreview(nn.Identity(), Sampler(), Patches(0))()
    with pytest.raises(ValueError, match="dataset: expected at least one item to show"):
        VolumeReconstructionPreview(Autoencoder(), Patches(0))()
