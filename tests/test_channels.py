# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor

from shared.transforms.channels import ThreeChannelsd

SIZE = (5, 7)


def test_one_channel_is_repeated():
    grey = torch.rand(1, *SIZE)
    item = {"image": grey, "other": grey}
    result = ThreeChannelsd("image")(item)
    assert result["image"].shape == (3, *SIZE)
    assert all(torch.equal(channel, grey[0]) for channel in result["image"])
    assert result["other"] is grey
    assert item["image"] is grey


def test_three_channels_stay():
    colour = torch.rand(3, *SIZE)
    assert ThreeChannelsd("image")({"image": colour})["image"] is colour


def test_the_three_slices_of_a_volume_are_no_channels():
    volume = torch.rand(1, *SIZE, 3)
    result = ThreeChannelsd("image")({"image": volume})["image"]
    assert result.shape == (3, *SIZE, 3)
    assert torch.equal(result[2], volume[0])


def test_meta_data_survive():
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    image = MetaTensor(torch.rand(1, *SIZE), affine=affine, meta={"filename_or_obj": "a.png"})
    result = ThreeChannelsd("image")({"image": image})["image"]
    assert isinstance(result, MetaTensor)
    assert torch.equal(result.affine, affine.to(result.affine))
    assert result.meta["filename_or_obj"] == "a.png"


def test_grey_and_colour_pictures_share_a_batch():
    items = [{"image": torch.rand(channels, *SIZE)} for channels in (1, 3, 1)]
    (batch,) = DataLoader(Dataset(items, ThreeChannelsd("image")), batch_size=3)
    assert batch["image"].shape == (3, 3, *SIZE)
    assert torch.equal(batch["image"][2], items[2]["image"].expand(3, -1, -1))
    # What follows may write in place: a repeated view would show it in all channels.
    batch["image"][0, 0] = 2.0
    assert batch["image"][0, 1].max() <= 1


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_are_refused(channels):
    with pytest.raises(ValueError, match=rf"^image: expected 1 or 3 channels, got {channels}; load it as a picture"):
        ThreeChannelsd(["image"])({"image": torch.zeros(channels, *SIZE)})


def test_missing_keys():
    with pytest.raises(KeyError, match="image"):
        ThreeChannelsd("image")({"label": 1})
    assert ThreeChannelsd("image", allow_missing_keys=True)({"label": 1}) == {"label": 1}
