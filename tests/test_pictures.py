# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from shared.pictures import made_with, picture_marks, save_grid, save_marked_png


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_marks_travel_inside_the_picture(tmp_path, dtype):
    grey = (np.arange(15).reshape(3, 5) * (np.iinfo(dtype).max // 15)).astype(dtype)
    description = {"synthetic": True, "seed": None, "panels": ["FLAIR", "erzeugt ü"]}
    save_marked_png(grey, tmp_path / "p.png", picture_marks(description, software="brain_controlnet"))
    with Image.open(tmp_path / "p.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), grey)
        assert picture.text["Comment"].startswith("Synthetic image")
        assert picture.text["Software"] == "brain_controlnet"
        assert {name: json.loads(picture.text[name]) for name in description} == description


def test_grid_says_that_it_contains_synthetic_images_unless_told_more(tmp_path):
    images = torch.rand(2, 1, 4, 6)
    for marks, expected in ((None, "contains synthetic images"), ({"Comment": "mine"}, "mine")):
        save_grid(images, tmp_path / "g.png", marks=marks)
        with Image.open(tmp_path / "g.png") as picture:
            assert picture.text["Comment"].startswith(expected)


def test_origin_names_weights_and_versions(tmp_path):
    assert made_with(None)["weights_sha256"] is None
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/w.pt: expected the weights"):
        made_with(tmp_path / "w.pt")
