# SPDX-License-Identifier: Apache-2.0
"""Where patches start, and the items made of them, from headers of small files in several orientations."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from shared.patches import patch_items, patch_starts
from shared.resolution import doubled_affine

# Columns: file axes x, y, z in RAS+; P I R, as a sagittal scan is stored.
PIR = np.asarray([[0, 0, 2.0, -9], [-2.0, 0, 0, 11], [0, -2.0, 0, 7], [0, 0, 0, 1]])


def write(path: Path, shape: tuple[int, ...], affine: np.ndarray | None = None, values: Any = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(shape, dtype=np.float32) if values is None else values
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return str(path)


def test_published_arithmetic():
    starts = patch_starts((68, 86, 68), 32, 18)
    assert len(starts) == 36
    assert starts == list(itertools.product((0, 18, 36), (0, 18, 36, 54), (0, 18, 36)))
    assert all(type(n) is int for start in starts for n in start)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "expected"),
    [
        ((10, 4, 4), 4, 4, [(0, 0, 0), (4, 0, 0), (6, 0, 0)]),
        ((4, 9, 6), (4, 8, 3), (1, 8, 3), [(0, 0, 0), (0, 0, 3), (0, 1, 0), (0, 1, 3)]),
        ((3, 5, 4), 8, 8, [(0, 0, 0)]),
        ((8, 8, 9), 8, 5, [(0, 0, 0), (0, 0, 1)]),
    ],
)
def test_the_last_start_is_flush_with_the_end(shape, size, stride, expected):
    assert patch_starts(shape, size, stride) == expected


@pytest.mark.parametrize("seed", range(20))
def test_patches_cover_the_volume_and_stay_in_it(seed):
    rng = np.random.default_rng(seed)
    shape, size = rng.integers(1, 40, 3).tolist(), rng.integers(4, 13, 3).tolist()
    stride = [int(rng.integers(3, n + 1)) for n in size]
    starts = patch_starts(shape, size, stride)
    for axis in range(3):
        first = sorted({start[axis] for start in starts})
        covered = {voxel for start in first for voxel in range(start, start + size[axis])}
        assert covered >= set(range(shape[axis]))
        assert first[0] == 0
        assert first[-1] == max(shape[axis] - size[axis], 0)
        assert all(0 < b - a <= stride[axis] for a, b in itertools.pairwise(first))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(
    ("shape", "size", "stride", "message"),
    [
        ((8, 8, 8), 0, 1, "^patch_size: expected a positive integer or 3 of them, got 0"),
        ((8, 8, 8), 4.5, 1, "^patch_size: expected a positive integer or 3 of them, got 4.5"),
        ((8, 8, 8), True, 1, "^patch_size: expected a positive integer"),
        ((8, 8, 8), "16", 1, "^patch_size: expected a positive integer or 3 of them, got '16'"),
        ((8, 8, 8), [4, 4], 1, r"^patch_size: expected a positive integer or 3 of them, got \[4, 4\]"),
        ((8, 8, 8), [4, -4, 4], 1, r"^patch_size: expected a positive integer or 3 of them, got \[4, -4, 4\]"),
        ((8, 8, 8), 4, 0, "^stride: expected a positive integer or 3 of them, got 0"),
        ((8, 8, 8), 4, None, "^stride: expected a positive integer or 3 of them, got None"),
        ((8, 8, 8), 4, 5, r"^stride: expected at most the patch size \[4, 4, 4\], got \[5, 5, 5\], which leaves"),
        ((8, 8, 8), [4, 6, 4], [4, 6, 5], "^stride: expected at most the patch size"),
        ((8, 0, 8), 4, 4, r"^shape: expected at least one voxel along each axis, got \(8, 0, 8\)"),
    ],
)
def test_bad_sizes_are_refused(shape, size, stride, message):
    with pytest.raises(ValueError, match=message):
        patch_starts(shape, size, stride)


def test_one_item_per_patch_of_the_grid_in_ras_order(tmp_path):
    """The file is stored as (Y, Z, X) = (12, 8, 10): in RAS order 10 x 12 x 8."""
    items = [
        {"dwi": write(tmp_path / "a.nii.gz", (12, 8, 10, 3), PIR), "subject": "a"},
        {"dwi": write(tmp_path / "b.nii", (6, 8, 8, 2)), "subject": "b", "ndi": "b.nii"},
    ]
    patches = patch_items(items, patch_size=8, stride=4)
    assert [p["subject"] for p in patches] == ["a"] * 4 + ["b"]
    assert [p["patch"] for p in patches] == [[0, 0, 0], [0, 4, 0], [2, 0, 0], [2, 4, 0], [0, 0, 0]]
    assert all(p["patch_size"] == [8, 8, 8] for p in patches)
    assert patches[4] == {**items[1], "patch": [0, 0, 0], "patch_size": [8, 8, 8]}
    assert "patch" not in items[0]
    patches[0]["patch"][0] = 99
    assert patches[1]["patch"][0] == 0
    patches[0]["patch_size"][0] = 99
    assert patches[1]["patch_size"][0] == 8


def test_headers_alone_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz", (8, 6, 7, 3))
    whole = gzip.decompress(Path(path).read_bytes())
    Path(path).write_bytes(gzip.compress(whole[:400]))  # a header without voxels
    assert len(patch_items([{"dwi": path, "mask": "not read.nii"}], patch_size=4, stride=4)) == 2 * 2 * 2


def test_medical_servers_hand_the_series_over_as_image(tmp_path):
    path = write(tmp_path / "a.nii", (8, 6, 7, 3))
    assert len(patch_items([{"image": path}], patch_size=[8, 6, 4], stride=[8, 6, 3])) == 2


def test_each_map_may_be_an_item_of_its_own(tmp_path):
    items = [{"dwi": write(tmp_path / "a.nii", (8, 4, 6, 3))}]
    patches = patch_items(items, patch_size=4, stride=4, maps=["ndi", "odi", "fwf"])
    assert [(p["patch"], p["map_id"]) for p in patches] == [
        ([x, 0, z], m) for x in (0, 4) for z in (0, 2) for m in (0, 1, 2)
    ]
    assert all("map_id" not in p for p in patch_items(items, patch_size=4, stride=4))


def mask_for(folder: Path, affine: np.ndarray, *, doubled: bool) -> str:
    """Mask of a RAS volume 12 x 8 x 10, filled from x = 6 on, written in the order of the affine's axes."""
    mask = np.zeros((12, 8, 10), dtype=np.uint8)
    mask[6:] = 1
    if doubled:
        mask, affine = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2), doubled_affine(affine)
    axes = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.io_orientation(affine)
    )
    stored = nibabel.orientations.apply_orientation(mask, axes)
    return write(folder / f"mask_{doubled}.nii", (), affine, stored)


@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 2, 1]), PIR], ids=["RAS", "PIR"])
@pytest.mark.parametrize("doubled", [False, True])
def test_patches_with_little_foreground_are_left_out(tmp_path, affine, doubled):
    """The mask begins at x = 6: patches of 4 that start at 0, 2, 4, 6 and 8 lie in it by 0, 0, 0.5, 1 and 1."""
    shape = (12, 8, 10) if affine[0, 0] else (8, 10, 12)
    item = {"dwi": write(tmp_path / "a.nii", (*shape, 2), affine), "mask": mask_for(tmp_path, affine, doubled=doubled)}

    def starts(share: float) -> list[int]:
        patches = patch_items([item], patch_size=[4, 8, 10], stride=[2, 8, 10], min_foreground=share)
        return [p["patch"][0] for p in patches]

    assert starts(0.0) == [0, 2, 4, 6, 8]
    assert starts(1e-6) == [4, 6, 8]
    assert starts(0.5) == [4, 6, 8]
    assert starts(0.51) == [6, 8]
    assert starts(1.0) == [6, 8]


def test_padding_is_no_foreground(tmp_path):
    item = {
        "dwi": write(tmp_path / "a.nii", (6, 8, 8, 2)),
        "mask": write(tmp_path / "m.nii", (), None, np.ones((6, 8, 8))),
    }
    assert len(patch_items([item], patch_size=8, stride=8, min_foreground=0.75)) == 1
    with pytest.raises(
        ValueError, match=r"m\.nii: expected a patch of which at least 0.76 lies in the mask, got none of 1"
    ):
        patch_items([item], patch_size=8, stride=8, min_foreground=0.76)


def test_without_a_mask_all_patches_are_kept(tmp_path):
    item = {"dwi": write(tmp_path / "a.nii", (8, 8, 8, 2))}
    assert len(patch_items([item], patch_size=4, stride=4, min_foreground=0.9)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_foreground": -0.1}, r"^min_foreground: expected a share in \[0, 1\], got -0.1"),
        ({"min_foreground": float("nan")}, r"^min_foreground: expected a share in \[0, 1\], got nan"),
        ({"min_foreground": 50}, r"^min_foreground: expected a share in \[0, 1\], got 50"),
        ({"maps": []}, "^maps: expected at least one name, got an empty list"),
        ({"stride": 9}, "^stride: expected at most the patch size"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, message):
    item = {"dwi": write(tmp_path / "a.nii", (8, 8, 8, 2))}
    with pytest.raises(ValueError, match=message):
        patch_items([item], **{"patch_size": 4, "stride": 4, **options})


def test_bad_items_are_named(tmp_path):
    options = {"patch_size": 4, "stride": 4}
    with pytest.raises(FileNotFoundError, match=r"no\.nii"):
        patch_items([{"dwi": str(tmp_path / "no.nii")}], **options)
    with pytest.raises(ValueError, match=r"flat\.nii: expected a 4-D diffusion-weighted series"):
        patch_items([{"dwi": write(tmp_path / "flat.nii", (8, 8, 8))}], **options)
    with pytest.raises(ValueError, match=r"^dwi: expected the path of a series in every item, got \['ndi'\]"):
        patch_items([{"ndi": "a.nii"}], **options)
