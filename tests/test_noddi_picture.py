# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from shared.noddi_picture import centre_of, map_panels, tri_planar

SHAPE = (120, 100, 80)
CAPTION = 22  # rows of the captions and the gap below them


def marked(where: str) -> torch.Tensor:
    """A volume in RAS that is bright in one half."""
    volume = torch.zeros(SHAPE)
    x, y, z = (n // 2 for n in SHAPE)
    half = {
        "right": (slice(x, None), slice(None), slice(None)),
        "anterior": (slice(None), slice(y, None), slice(None)),
        "superior": (slice(None), slice(None), slice(z, None)),
    }
    volume[half[where]] = 1
    return volume


def planes(picture: torch.Tensor, column: int = 1, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    """Axial, coronal and sagittal picture of a column, without captions."""
    x, y, z = shape
    width = max(x, y)
    left = column * (width + 2)
    parts, top = [], CAPTION
    for height, across in ((y, x), (z, x), (z, y)):
        margin = (width - across) // 2
        parts.append(picture[0, top : top + height, left + margin : left + margin + across])
        top += height + 2
    assert top - 2 == picture.shape[1]
    return parts


def brightness(part: torch.Tensor) -> tuple[float, float]:
    """Of the left half and of the upper half."""
    h, w = part.shape
    return float(part[:, : w // 2].mean()), float(part[: h // 2].mean())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("right", ((1, 0.5), (1, 0.5), None)),  # of the patient, on the left of the picture: radiological
        ("anterior", ((0.5, 1), None, (1, 0.5))),
        ("superior", (None, (0.5, 1), (0.5, 1))),
    ],
)
def test_orientation(where, expected):
    picture = tri_planar({"a": torch.zeros(SHAPE), "b": marked(where)}, tuple(n // 2 for n in SHAPE))
    assert picture.shape == (1, CAPTION + 100 + 80 + 80 + 4, 2 * 120 + 2)
    for part, wanted in zip(planes(picture), expected, strict=True):
        if wanted is None:  # the plane lies within the bright half
            assert float(part.min()) == 1
        else:
            assert brightness(part) == wanted


def test_slices_go_through_the_centre():
    volume = torch.zeros(SHAPE)
    volume[30], volume[:, 40], volume[:, :, 50] = 0.25, 0.5, 0.75
    axial, coronal, sagittal = planes(tri_planar({"a": volume, "b": volume}, (30, 40, 50)))
    # At its own index a plane has its own value.
    assert float(axial[0, 0]) == pytest.approx(0.75)
    assert float(coronal[0, 0]) == pytest.approx(0.5)
    assert float(sagittal[0, 0]) == pytest.approx(0.25)
    off = planes(tri_planar({"a": volume, "b": volume}, (0, 0, 0)))
    assert [float(part.mean()) < 0.1 for part in off] == [True] * 3


def test_letters_and_captions_stand_at_the_first_column():
    black = torch.zeros(SHAPE)
    picture = tri_planar({"first": black, "second": black}, (60, 50, 40))
    for top, height in ((CAPTION, 100), (CAPTION + 102, 80), (CAPTION + 184, 80)):
        row = picture[0, top : top + height]
        assert float(row[:, 122:].max()) == 0, "no letters in the other columns"
        for side in (row[:, :15], row[:, 105:120]):
            assert float(side[height // 2 - 8 : height // 2 + 8].max()) > 0.9
            assert float(side[: height // 2 - 12].max()) == 0
    captions = picture[0, :20]
    assert float(captions[:, :120].min()) < 0.3
    assert float(captions[:, 122:].min()) < 0.3


def test_anisotropic_and_small_volumes():
    """20 x 24 x 10 voxels of 1 x 1 x 2 mm: square pixels, enlarged five times."""
    volume = torch.rand(20, 24, 10)
    picture = tri_planar({"a": volume, "b": volume}, (10, 12, 5), spacing=(1, 1, 2))
    assert picture.shape == (1, CAPTION + 5 * (24 + 20 + 20) + 4, 2 * 120 + 2)
    axial = planes(picture, shape=(100, 120, 100))[0]
    assert torch.equal(axial[::5, ::5], volume[..., 5].T.flip(0, 1))


def test_panels():
    true, own = torch.full((4, 5, 6), 0.4), torch.full((4, 5, 6), 0.45)
    panels = map_panels(true, {"cubic": true + 0.1}, ("mean of 4", own), torch.full_like(true, 0.02))
    assert list(panels) == ["true", "cubic", "mean of 4", "|error| x 4", "sd x 4"]
    assert torch.allclose(panels["|error| x 4"], torch.tensor(0.2))
    assert torch.allclose(panels["sd x 4"], torch.tensor(0.08))
    assert list(map_panels(true, {}, ("diffusion", own))) == ["true", "diffusion", "|error| x 4"]


def test_centre():
    mask = torch.zeros(10, 12, 14)
    mask[2:5, 6:9, 10:13] = 1
    assert centre_of(mask) == (3, 7, 11)
    assert centre_of(torch.zeros(9, 11, 13)) == (4, 5, 6)


def test_volumes_of_several_sizes_are_named():
    with pytest.raises(ValueError, match=r"panels: expected volumes \(X, Y, Z\) of one size"):
        tri_planar({"a": torch.zeros(4, 5, 6), "b": torch.zeros(4, 5, 7)}, (2, 2, 2))
    with pytest.raises(ValueError, match="panels: expected volumes"):
        tri_planar({}, (2, 2, 2))
