# SPDX-License-Identifier: Apache-2.0
"""Volumes in each of the 48 orientations: turned and turned back they are the same, bit for bit, as are files."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.transforms import Compose, DivisiblePadd, Invertd, Orientationd, ResizeWithPadOrCropd
from scipy.spatial.transform import Rotation

from shared.diffusion_series import open_series
from shared.nifti_files import grid_image, save_image, write_nifti
from shared.slices import slice_items
from shared.transforms.in_plane import UprightVolumed
from shared.transforms.noddi_saving import _as_in_file
from shared.transforms.slices import open_in_ras
from shared.transforms.upright import UPRIGHT, open_upright
from shared.transforms.volumes import LoadVolumed, for_display, open_volume
from tests.properties import error_of, examples

ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(["RL", "AP", "SI"]) for codes in itertools.product(*axes)
]
SEEDS = st.integers(0, 2**32 - 1)


def affine_of(codes: str, seed: int, *, oblique: float = 0.0) -> np.ndarray:
    """Voxels of three sizes in the orientation, turned by up to `oblique` degrees, somewhere in space."""
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[:3, axis] = 0
        affine[world, axis] = rng.uniform(0.4, 4) * (1 if code in "RAS" else -1)
    turn = Rotation.from_rotvec(np.deg2rad(oblique) * rng.uniform(-0.5, 0.5, 3)).as_matrix()
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def voxels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(values, None)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("volumes")


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize(("shape", "oblique"), [((3, 4, 5), 0.0), ((5, 2, 3), 30.0)])
def test_every_orientation_is_turned_upright_and_back_bit_for_bit(tmp_path, codes, shape, oblique):
    affine = affine_of(codes, 7, oblique=oblique)
    values = voxels(shape, 3)
    path = write(tmp_path / "x.nii", values, affine)
    assert nibabel.aff2axcodes(affine) == tuple(codes)

    # Read from the file, slice by slice and as a whole.
    source = open_upright(path)
    upright = source.turn(source.file.read())
    assert upright.shape == source.shape
    assert nibabel.aff2axcodes(source.affine) == tuple(UPRIGHT)
    np.testing.assert_array_equal(source.turn_back(upright), values)
    for index in range(upright.shape[2]):
        np.testing.assert_array_equal(source.plane(index), upright[..., index])
    # Each voxel is where both affines say.
    corner = np.linalg.solve(affine, source.affine @ [0, 0, 0, 1])[:3].round().astype(int)
    assert upright[0, 0, 0] == values[tuple(corner)]

    # The same as a transform, and other orientations as MONAI turns them.
    item = LoadVolumed("image")({"image": str(path)})
    np.testing.assert_allclose(item["image"].affine.numpy(), affine, rtol=1e-6)
    for transform in (UprightVolumed("image"), Orientationd("image", axcodes="RAS", labels=None)):
        turned = transform(item)
        if isinstance(transform, UprightVolumed):
            np.testing.assert_array_equal(turned["image"].numpy()[0], upright)
            np.testing.assert_allclose(turned["image"].affine.numpy(), source.affine, rtol=1e-5, atol=1e-4)
        back = transform.inverse(turned)["image"]
        assert torch.equal(back.as_tensor(), item["image"].as_tensor())
        np.testing.assert_allclose(back.affine.numpy(), affine, rtol=1e-5, atol=1e-4)

    # Right, anterior, superior: axial slices from below.
    ras = open_in_ras(path)
    assert slice_items([{"t1w": str(path)}])[-1]["slice"] == ras.shape[2] - 1


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_of_a_series_and_of_doubled_maps(tmp_path, codes):
    affine = affine_of(codes, 11)
    values = voxels((3, 4, 5, 2), 5)
    path = write(tmp_path / "dwi.nii.gz", values, affine)
    series = open_series(str(path))
    ras = series.read()
    assert ras.shape == (*series.ras_shape, 2)
    assert nibabel.aff2axcodes(series.ras_affine) == ("R", "A", "S")
    turned = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_array_equal(ras, np.asarray(turned.dataobj))
    np.testing.assert_allclose(series.ras_affine, turned.affine, atol=1e-4)
    # Maps on the doubled grid go back to the axes of the file: each voxel becomes 2 x 2 x 2.
    maps = np.repeat(np.repeat(np.repeat(ras[None, ..., 0], 2, 1), 2, 2), 2, 3)
    doubled = series.ras_affine @ np.diag([0.5, 0.5, 0.5, 1])
    doubled[:3, 3] -= series.ras_affine[:3, :3].sum(1) / 4
    in_file, wanted = _as_in_file(maps, doubled, series.file.affine, path=str(path))
    np.testing.assert_array_equal(in_file[0][::2, ::2, ::2], values[..., 0])
    np.testing.assert_array_equal(in_file[0][1::2, 1::2, 1::2], values[..., 0])
    assert nibabel.aff2axcodes(wanted) == tuple(codes)


KINDS = [np.uint8, np.int16, np.float32]
SHAPES = st.one_of(st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(2, 6)] * 2))


@examples(60)
@given(codes=st.sampled_from(ORIENTATIONS), seed=SEEDS, oblique=st.floats(0, 80), shape=SHAPES,
       kind=st.sampled_from(KINDS), code=st.integers(0, 4))  # fmt: skip
def test_what_is_saved_is_read_again(folder, codes, seed, oblique, shape, kind, code):
    affine = affine_of(codes, seed, oblique=oblique)
    values = np.random.default_rng(seed).integers(0, 200, shape).astype(kind)
    path = folder / "saved.nii.gz"
    save_image(grid_image(values, affine, code=code, description="x" * 79), path)
    file = open_volume(path)
    assert file.shape == (*shape, 1)[:3]
    np.testing.assert_array_equal(file.read(mask=True), values.reshape(file.shape))
    np.testing.assert_allclose(file.affine, affine, rtol=1e-5, atol=1e-3)
    # With the geometry of another file, bit for bit.
    copy = folder / "copy.nii.gz"
    write_nifti(values, copy, like=path, dtype=kind)
    one, other = nibabel.load(path), nibabel.load(copy)
    assert one.affine.tobytes() == other.affine.tobytes()
    assert other.get_data_dtype() == np.dtype(kind)
    np.testing.assert_array_equal(np.asarray(other.dataobj), values)
    # The same bytes each time: no time, no name.
    before = copy.read_bytes()
    write_nifti(values, copy, like=path, dtype=kind)
    assert copy.read_bytes() == before


@examples(60)
@given(seed=SEEDS, shape=st.tuples(*[st.integers(1, 9)] * 3), codes=st.sampled_from(ORIENTATIONS),
       multiple=st.integers(1, 5), larger=st.tuples(*[st.integers(0, 4)] * 3))  # fmt: skip
def test_padded_and_cut_back_is_the_same(folder, seed, shape, codes, multiple, larger):
    affine = affine_of(codes, seed)
    values = voxels(shape, seed)
    assume(values.size > 1)
    path = write(folder / "padded.nii", values, affine)
    size = [side + more for side, more in zip(shape, larger, strict=True)]
    forward = Compose([
        LoadVolumed("image"), UprightVolumed("image"), ResizeWithPadOrCropd("image", [max(size)] * 3),
        DivisiblePadd("image", multiple),
    ])  # fmt: skip
    item = forward({"image": str(path)})
    assert all(side % multiple == 0 for side in item["image"].shape[1:])
    item["pred"] = item["image"].clone()
    back = Invertd("pred", forward, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert torch.equal(back.as_tensor(), torch.from_numpy(values)[None])
    np.testing.assert_allclose(back.affine.numpy(), affine, rtol=1e-5, atol=1e-3)


@examples(40)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), seed=SEEDS)
def test_display_turns_and_loses_nothing(shape, seed):
    image = torch.from_numpy(voxels(shape, seed))
    shown = for_display(image)
    assert shown.shape == (shape[0], shape[2], shape[1])
    assert torch.equal(shown.flip((-2, -1)).transpose(-1, -2), image)
    assert shown[0, 0, 0] == image[0, -1, -1], "the corner at the patient's right and front"


@examples(100)
@given(content=st.binary(max_size=400), head=st.booleans(), suffix=st.sampled_from([".nii", ".nii.gz"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_bytes_are_a_volume_or_an_error_that_begins_with_the_file(folder, content, head, suffix):
    path = folder / f"damaged{suffix}"
    if head:  # a header with some bytes changed, and few voxels
        write(folder / "whole.nii", np.ones((2, 3, 4), np.float32), np.eye(4))
        whole = bytearray((folder / "whole.nii").read_bytes())
        for place, byte in zip(content[::2], content[1::2], strict=False):
            whole[place + 40] = byte
        content = bytes(whole)
    path.write_bytes(content)
    for call in (
        lambda: LoadVolumed("x")({"x": str(path)}),
        lambda: open_upright(path),
        lambda: open_series(str(path)),
    ):
        error = error_of(call)
        assert error is None or str(error).startswith(f"{path}: expected ")


@examples(40)
@given(values=arrays.arrays(np.float64, (2, 3, 4), elements=st.floats(width=64)))
def test_any_voxels_are_finite_after_loading_or_named(folder, values):
    path = folder / "wild.nii"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    loaded: list = []
    error = error_of(lambda: loaded.append(LoadVolumed("x")({"x": str(path)})["x"]))
    assert str(error).startswith(f"{path}: expected ") if error else loaded[0].isfinite().all()
