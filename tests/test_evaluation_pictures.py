# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared.handlers.evaluation_pictures import DIFFERENCE_GAIN, write_pictures

X, Y = 12, 20


def _images(n: int, channels: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, pred = 0.9 * torch.rand(2, n, 1, X, Y, generator=generator)
    return {"image": image, "pred": pred, "condition": torch.rand(n, channels, X, Y, generator=generator)}


def _grid(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=np.float32) / 255


def _cell(path: Path, row: int, column: int, size: tuple[int, int] = (X, Y)) -> np.ndarray:
    grid = _grid(path)
    top, left = row * (size[0] + 2), column * (size[1] + 2)
    return grid[top : top + size[0], left : left + size[1]]


def _strip(images: dict[str, torch.Tensor], row: int) -> list[torch.Tensor]:
    difference = (DIFFERENCE_GAIN * (images["pred"] - images["image"]).abs()).clamp(0, 1)
    return [*images["condition"][row], images["pred"][row, 0], images["image"][row, 0], difference[row, 0]]


def test_translations_are_condition_generated_true_difference(tmp_path: Path) -> None:
    images = _images(9)
    write_pictures(tmp_path, images, {}, columns=8, grid_images=12)
    path = tmp_path / "translation.png"
    for line, row in enumerate((0, 4, 8)):  # 3 lines of 4, spread over the set
        for column, expected in enumerate(_strip(images, row)):
            np.testing.assert_allclose(_cell(path, line, column), expected, atol=1 / 255)
    assert _grid(path).shape == (3 * (X + 2) - 2, 4 * (Y + 2) - 2)


def test_failures_are_the_translations_of_lowest_psnr(tmp_path: Path) -> None:
    images = _images(9)
    psnr = [30.0, 12.0, 31.0, None, 11.0, 33.0, 10.0, 35.0, 36.0]
    write_pictures(tmp_path, images, {"psnr": psnr}, columns=8)
    path = tmp_path / "failures.png"
    for place, row in enumerate((6, 4, 1, 0, 2, 5, 7, 8)):  # two to a line of 8
        for column, expected in enumerate(_strip(images, row)):
            found = _cell(path, place // 2, 4 * (place % 2) + column)
            np.testing.assert_allclose(found, expected, atol=1 / 255)
    write_pictures(tmp_path, images, {"psnr": psnr}, columns=3)  # a line is wider than a row of other pictures
    assert _grid(path).shape == (3 * (X + 2) - 2, 4 * (Y + 2) - 2)
    np.testing.assert_allclose(_cell(path, 2, 2), images["image"][1, 0], atol=1 / 255)


def test_failures_of_both_kinds_share_a_grid(tmp_path: Path) -> None:
    images = _images(5, channels=2)
    images["reconstruction"] = images["image"] / 2
    measured = {"psnr": [5.0, 4.0, 3.0, 2.0, 1.0], "reconstruction_ms_ssim": [0.9, 0.1, 0.8, 0.7, 0.6]}
    write_pictures(tmp_path, images, measured, columns=6)
    path = tmp_path / "failures.png"
    np.testing.assert_allclose(_cell(path, 0, 0), images["image"][1, 0], atol=1 / 255)
    np.testing.assert_allclose(_cell(path, 1, 0), images["reconstruction"][1, 0], atol=1 / 255)
    for column, expected in enumerate(_strip(images, 4)):
        np.testing.assert_allclose(_cell(path, 2, column), expected, atol=1 / 255)
    assert (_cell(path, 2, 5) == 1).all()  # a line of 5 in a row of 6


def test_pictures_are_turned_for_people(tmp_path: Path) -> None:
    images = _images(3)
    write_pictures(tmp_path, images, {}, display=lambda pictures: pictures.transpose(-1, -2).flip((-2, -1)))
    turned = images["pred"][1, 0].T.flip((0, 1))
    np.testing.assert_allclose(_cell(tmp_path / "samples.png", 0, 1, (Y, X)), turned, atol=1 / 255)
    np.testing.assert_allclose(_cell(tmp_path / "translation.png", 1, 1, (Y, X)), turned, atol=1 / 255)


def test_a_picture_of_an_earlier_evaluation_goes(tmp_path: Path) -> None:
    write_pictures(tmp_path, _images(2), {"psnr": [1.0, 2.0]})
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "translation.png", "failures.png"}
    write_pictures(tmp_path, {"pred": _images(2)["pred"]}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png"}
