# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from shared.handlers.previews import PreviewGrid
from shared.handlers.segmentation_preview import SegmentationPreview
from shared.segmentation_picture import comparison_row


class Pictures:
    """Pictures (C, 12, 18) whose grey level says which they are, with a mask in the upper left."""

    def __init__(self, length: int, channels: int = 3, **changes) -> None:
        self.length, self.channels, self.changes = length, channels, changes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        label = torch.zeros(1, 12, 18)
        label[0, 1:4, 2:9] = 1
        image = MetaTensor(torch.full((self.channels, 12, 18), index / 100))
        return {"image": image, "label": label, **self.changes}


class Sampler:
    """Foreground in the lower right; records how it was called."""

    def __init__(self, num_classes: int = 1, agreement: bool = False) -> None:
        self.num_classes, self.agreement, self.calls = num_classes, agreement, []

    def __call__(self, images, network, seeds):
        self.calls.append((images, network.training, list(seeds)))
        found = torch.full((len(images), 1, 12, 18), 0.1)
        found[:, :, 8:, 10:] = 0.9
        classes = [found] if self.num_classes == 1 else [1 - found, found * 0.2, found * 0.8]
        return torch.cat([*classes, torch.ones_like(found)] if self.agreement else classes, dim=1)


@pytest.mark.parametrize(
    ("length", "shown"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (24, list(range(1, 24, 3)))]
)
def test_rows_of_any_number_of_items(length, shown):
    network, sampler = nn.Linear(1, 1).train(), Sampler()
    rows = SegmentationPreview(Pictures(length), network, sampler, seed=5)()
    ((images, was_training, seeds),) = sampler.calls
    assert images[:, 0, 0, 0].tolist() == pytest.approx([index / 100 for index in shown])
    assert type(images) is torch.Tensor
    assert seeds == [5 + index for index in range(len(shown))]
    assert not was_training
    assert network.training
    assert len(rows) == len(shown)
    item = Pictures(length)[shown[-1]]
    torch.testing.assert_close(
        rows[-1], comparison_row(item["image"], item["label"], sampler(images, network, [0])[-1])
    )


def test_several_samples_add_their_agreement():
    item = Pictures(1, channels=1)[0]
    sampler = Sampler(agreement=True)
    (row,) = SegmentationPreview(Pictures(1, channels=1), nn.Linear(1, 1), sampler)()
    probability, agreement = sampler(item["image"][None], nn.Linear(1, 1), [0])[0]
    torch.testing.assert_close(
        row, comparison_row(item["image"], item["label"], probability[None], agreement=agreement)
    )


@pytest.mark.parametrize("agreement", [False, True])
def test_several_classes_and_the_one_of_an_item(agreement):
    sampler = Sampler(num_classes=3, agreement=agreement)
    result = sampler(torch.zeros(1, 3, 12, 18), nn.Linear(1, 1), [0])[0]
    extra = {"agreement": result[3]} if agreement else {}
    for changes, probability in (
        ({}, result[:3]),
        ({"class_id": 2}, result[2:3]),
        ({"class_id": torch.tensor(0)}, 1 - result[:1]),
    ):
        dataset = Pictures(2, **changes)
        rows = SegmentationPreview(dataset, nn.Linear(1, 1), sampler, 2, 3)()
        item = dataset[1]
        torch.testing.assert_close(rows[1], comparison_row(item["image"], item["label"], probability, **extra))


def test_the_grid_handler_writes_colours(tmp_path):
    render = SegmentationPreview(Pictures(2), nn.Linear(1, 1), Sampler())
    engine = Engine(lambda engine, batch: None)
    PreviewGrid(render, tmp_path, name="masks", columns=1).attach(engine)
    engine.state.rank = 0
    engine.run([0], max_epochs=1)
    with Image.open(tmp_path / "epoch_0001_masks.png") as picture:
        pixels = np.asarray(picture)
    expected = (render() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height = expected.shape[1]
    assert pixels.shape == (2 * height + 2, expected.shape[2], 3)
    np.testing.assert_array_equal(pixels[:height], expected[0])
    np.testing.assert_array_equal(pixels[height + 2 :], expected[1])


def test_nothing_to_show_and_nothing_asked_for():
    with pytest.raises(ValueError, match="^num_images: expected a whole number of at least 1, got 0"):
        SegmentationPreview(Pictures(1), nn.Linear(1, 1), Sampler(), 0)
    with pytest.raises(ValueError, match="^dataset: expected at least one item"):
        SegmentationPreview(Pictures(0), nn.Linear(1, 1), Sampler())()

    def fail(*args, **kwargs):
        raise ValueError("seed: broken")

    network = nn.Linear(1, 1).train()
    with pytest.raises(ValueError, match="seed: broken"):
        SegmentationPreview(Pictures(1), network, fail)()
    assert network.training
