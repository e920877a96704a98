# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from skimage.color import rgb2lab

from shared.segmentation_picture import PALETTE, comparison_row, heat_map, mosaic, overlay

COLOURS = torch.tensor(PALETTE) / 255
# Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113), complete loss of a kind of cones, linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def foot(height: int = 20, width: int = 30) -> torch.Tensor:
    """An L in the upper left: no flip and no transpose looks the same."""
    mask = torch.zeros(height, width, dtype=torch.long)
    mask[3:14, 4:9] = 1
    mask[10:14, 4:16] = 1
    return mask


def test_contour_is_solid_inside_translucent_outside_untouched():
    image = torch.rand(3, 20, 30)
    shown = overlay(image, foot(), opacity=0.25)
    mask = foot().bool()
    inner = torch.zeros_like(mask)
    inner[4:13, 5:8] = True
    inner[11:13, 5:15] = True
    assert shown.shape == (3, 20, 30)
    torch.testing.assert_close(shown[:, ~mask], image[:, ~mask])
    edge = shown[:, mask & ~inner]
    torch.testing.assert_close(edge, COLOURS[0][:, None].expand_as(edge))
    expected = 0.75 * image[:, inner] + 0.25 * COLOURS[0][:, None]
    torch.testing.assert_close(shown[:, inner], expected)


def test_contour_lies_inside_and_widens_with_the_picture():
    for width in (1, 2, 3):
        shown = overlay(torch.zeros(1, 20, 30), foot(), opacity=0, width=width)
        inner = binary_erosion(foot().numpy(), np.ones((2 * width + 1,) * 2))
        np.testing.assert_array_equal(shown[1].numpy() > 0, (foot().numpy() > 0) & ~inner)
    large = overlay(torch.zeros(1, 512, 600), torch.nn.functional.pad(foot(), (0, 570, 0, 492)), opacity=0)
    assert torch.equal(large[:, :20, :30], overlay(torch.zeros(1, 20, 30), foot(), opacity=0, width=2))


def test_border_of_the_image_is_no_contour_but_of_a_neighbour_is():
    mask = torch.ones(6, 9, dtype=torch.uint8)
    mask[:, 5:] = 2
    shown = overlay(torch.zeros(1, 6, 9), mask, opacity=0)
    assert shown[:, :, [0, 1, 2, 3, 6, 7, 8]].abs().max() == 0
    torch.testing.assert_close(shown[:, :, 4], COLOURS[0][:, None].expand(3, 6))
    torch.testing.assert_close(shown[:, :, 5], COLOURS[1][:, None].expand(3, 6))


def test_grey_is_repeated_and_values_are_clamped():
    shown = overlay(torch.tensor([[[-1.0, 0.5, 2.0]]]), torch.zeros(1, 3))
    assert shown.tolist() == [[[0.0, 0.5, 1.0]]] * 3


def test_unfit_masks_are_named():
    with pytest.raises(ValueError, match=r"^mask: expected \(H, W\) = \(4, 6\) as the image, got \(6, 4\)"):
        overlay(torch.zeros(1, 4, 6), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="^mask: expected class indices 0 to 14, got 0 to 255"):
        overlay(torch.zeros(1, 4, 6), torch.eye(6)[:4] * 255)
    with pytest.raises(ValueError, match=r"^image: expected \(1 or 3, H, W\), got \(2, 4, 6\)"):
        overlay(torch.zeros(2, 4, 6), torch.zeros(4, 6))


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_differ_for_colour_blind_eyes(kind):
    """In CIE L*a*b* 2.3 is just noticeable; a wrong digit in a colour brings two of them nearer."""
    seen = (np.array(PALETTE) / 255) ** 2.2 @ np.array(BLINDNESS[kind]).T
    lab = rgb2lab(seen.clip(0, 1) ** (1 / 2.2))
    assert len(PALETTE) == 14
    for first, expected in ((8, 15), (14, 9)):
        nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab[:first], 2))
        assert nearest > expected


def test_heat_map_grows_brighter_from_0_to_1():
    shown = heat_map(torch.linspace(-0.2, 1.2, 57)[None])
    torch.testing.assert_close(shown[:, 0, 0], shown[:, 0, 8])
    torch.testing.assert_close(shown[:, 0, -1], shown[:, 0, -9])
    lightness = rgb2lab(shown[:, 0, 8:49].T.numpy())[:, 0]
    assert (np.diff(lightness) > 0).all()
    assert lightness[0] < 20 < 90 < lightness[-1]
    maps = pytest.importorskip("matplotlib").colormaps
    values = np.linspace(0, 1, 33)
    np.testing.assert_allclose(
        heat_map(torch.from_numpy(values)[None])[:, 0].T, maps["viridis"](values)[:, :3], atol=0.07
    )


def panels_of(row: torch.Tensor, count: int, *, top: int = 0) -> list[torch.Tensor]:
    width = (row.shape[2] + 2) // count - 2
    assert row.shape[2] == count * (width + 2) - 2
    return [row[:, top:, index * (width + 2) : index * (width + 2) + width] for index in range(count)]


def test_row_shows_image_truth_prediction_probability_agreement():
    image, label = torch.rand(1, 20, 30), foot()
    probability = foot().flip(0)[None] * 0.8
    agreement = torch.full((20, 30), 0.75)
    row = comparison_row(image, label[None], probability, agreement=agreement, captions=False)
    shown, truth, prediction, heat, agreed = panels_of(row, 5)
    torch.testing.assert_close(shown, image.expand(3, -1, -1))
    torch.testing.assert_close(truth, overlay(image, label, opacity=0))
    torch.testing.assert_close(prediction, overlay(image, label.flip(0), opacity=0))
    torch.testing.assert_close(heat, heat_map(probability[0]))
    torch.testing.assert_close(agreed, heat_map(torch.full((20, 30), 0.5)))
    assert len(panels_of(comparison_row(image, None, probability, captions=False), 3)) == 3
    # a threshold above all probabilities leaves nothing
    row = comparison_row(image, label, probability, threshold=0.9, captions=False)
    torch.testing.assert_close(panels_of(row, 4)[2], image.expand(3, -1, -1))


def test_row_of_several_classes_shows_the_most_probable():
    probability = torch.stack((1 - foot() * 0.7, foot() * 0.1, foot() * 0.6))
    row = comparison_row(torch.zeros(3, 20, 30), foot() * 2, probability, captions=False)
    _, truth, prediction, heat = panels_of(row, 4)
    assert torch.equal(truth, prediction)
    torch.testing.assert_close(truth[:, 3, 4], COLOURS[1])
    torch.testing.assert_close(heat, heat_map(torch.where(foot() > 0, 0.6, 1.0)))


@pytest.mark.parametrize("width", [34, 96, 300])
def test_captions_stand_above_and_inside_their_panels(width):
    image, label = torch.ones(1, 20, width), torch.zeros(20, width)
    row = comparison_row(image, label, torch.zeros(1, 20, width), agreement=torch.ones(20, width))
    assert row.shape == (3, 40, 5 * (width + 2) - 2)
    for panel in panels_of(row[:, :20], 5):
        dark = (panel[0] < 0.6).any(dim=0).nonzero().flatten()
        assert len(dark) > 5, "a word"
        assert 0 < dark.min() <= dark.max() < width - 1
    torch.testing.assert_close(row[:, 20:, :width], torch.ones(3, 20, width))


def test_mosaic_shows_the_slices_with_mask_upright():
    volume, mask = torch.zeros(1, 20, 30, 12), torch.zeros(20, 30, 12, dtype=torch.uint8)
    volume += torch.arange(12) / 20
    for index in (2, 5, 6, 9, 11):
        mask[..., index] = foot()
    shown = mosaic(volume, mask, columns=3)
    assert shown.shape == (3, 2 * 22 - 2, 3 * 32 - 2)
    for place, index in enumerate((2, 5, 6, 9, 11)):
        top, left = place // 3 * 22, place % 3 * 32
        part = shown[:, top : top + 20, left : left + 30]
        torch.testing.assert_close(part, overlay(volume[..., index], foot()))
    few = mosaic(volume, mask, max_slices=2)
    assert few.shape == (3, 20, 62)
    assert few[0, 0, 0] == pytest.approx(5 / 20)
    assert few[0, 0, 32] == pytest.approx(9 / 20)
    # nothing found: slices of the whole volume
    empty = mosaic(volume, mask * 0, max_slices=4)
    assert empty[0, 0, ::32].tolist() == pytest.approx([1 / 20, 4 / 20, 7 / 20, 10 / 20])
    assert mosaic(volume[..., :1], mask[..., :1] * 0).shape == (3, 20, 30)


def test_mosaic_has_square_pixels():
    volume, mask = torch.rand(1, 20, 30, 2), foot()[..., None].repeat(1, 1, 2)
    assert mosaic(volume, mask, spacing=(1.5, 0.5)).shape == (3, 60, 62)
    assert mosaic(volume, mask, spacing=(0.7, 1.4)).shape == (3, 20, 122)
