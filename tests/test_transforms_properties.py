# SPDX-License-Identifier: Apache-2.0
"""Pictures and patches of any size, type and range: what goes there and back is the same, and nothing leaves [0, 1]."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.data import MetaTensor
from PIL import Image

from shared.intensity import is_scaled, robust_range, scale_intensity, unscale_intensity
from shared.networks.segmentation import SegmentationModel, probabilities
from shared.noddi_sampler import NoddiSampler
from shared.patches import patch_starts
from shared.schedulers import DDIMScheduler
from shared.segmentation_probability import chosen_probability, mask_of, split_agreement
from shared.shares import BatchShares
from shared.sizes import check_sizes, size_divisor
from shared.transforms.images import ResizeShorterSide, read_radiograph
from shared.transforms.in_plane import FlipByItemd, ResizeInPlane, resize_in_plane
from shared.transforms.mask_levels import binary_mask, class_indices, read_levels
from shared.transforms.masks import load_mask
from shared.transforms.patches import _patch
from shared.transforms.pixels import read_pixels
from shared.transforms.saving import write_secondary_capture
from tests.properties import error_of, examples

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def levels_of(kind: type, low: int = 0, high: int | None = None) -> st.SearchStrategy[np.ndarray]:
    top = np.iinfo(kind).max if high is None else high
    elements = st.integers(low, top)
    return arrays.arrays(kind, arrays.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=elements)


# Pictures


@examples(80)
@given(levels=st.one_of(levels_of(np.uint8), levels_of(np.uint16)), suffix=st.sampled_from([".png", ".tif"]))
def test_grey_pictures_are_read_as_their_levels(folder, levels, suffix):
    file = folder / f"grey{suffix}"
    Image.fromarray(levels).save(file)
    expected = levels.astype(np.float32) / np.float32(np.iinfo(levels.dtype).max)
    if levels.min() == levels.max():
        assert str(error_of(lambda: read_radiograph(file))).startswith(f"{file}: expected ")
        return
    image = read_radiograph(file)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(read_pixels(file, colour=True), np.repeat(expected[..., None], 3, 2))


@examples(80)
@given(seed=SEEDS, height=SIDES, width=SIDES, mode=st.sampled_from(["RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"]),
       suffix=st.sampled_from([".png", ".tif", ".bmp", ".jpg"]))  # fmt: skip
def test_pictures_of_any_mode_lie_in_range_in_their_shape(folder, seed, height, width, mode, suffix):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    file = folder / f"any{suffix}"
    assume(error_of(lambda: Image.fromarray(pixels).convert(mode).save(file), OSError, ValueError, KeyError) is None)
    found: list[np.ndarray] = []
    error = error_of(lambda: found.append(read_radiograph(file)))
    if error is not None:  # black, say
        assert str(error).startswith(f"{file}: expected ")
        return
    assert found[0].shape == (height, width)
    assert np.isfinite(found[0]).all()
    assert 0 <= found[0].min() < found[0].max() <= 1


@examples(100)
@given(
    content=st.binary(max_size=200),
    beginning=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"\0" * 128 + b"DICM"]),
    suffix=st.sampled_from([".png", ".jpg", ".tif", ".bmp", ".dcm"]),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow and pydicom about damaged headers
def test_any_bytes_are_a_picture_or_an_error_that_begins_with_the_file(folder, content, beginning, suffix):
    file = folder / f"damaged{suffix}"
    file.write_bytes(beginning + content)
    error = error_of(lambda: read_radiograph(file))
    assert error is None or str(error).startswith(f"{file}: expected ")


@examples(40)
@given(grey=st.one_of(levels_of(np.uint8), levels_of(np.uint16)))
def test_a_written_dicom_file_is_read_as_it_was(folder, grey):
    assume(grey.min() < grey.max())
    file = folder / "written.dcm"
    write_secondary_capture(grey, file, study_uid="1.2.3")
    expected = grey / np.float64(np.iinfo(grey.dtype).max)
    np.testing.assert_allclose(read_radiograph(file), expected, atol=1e-7)


@examples(80)
@given(seed=SEEDS, shape=st.tuples(st.sampled_from([1, 3]), SIDES, SIDES), size=st.integers(1, 30))
def test_resizing_keeps_range_and_shorter_side(seed, shape, size):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3 - 1
    resized = ResizeShorterSide(size)(image)
    assert resized.isfinite().all()
    assert min(resized.shape[1:]) == size
    assert (resized.shape[1] <= resized.shape[2]) or shape[1] >= shape[2]
    assert image.min() - 1e-5 <= resized.min() <= resized.max() <= image.max() + 1e-5


@examples(80)
@given(
    seed=SEEDS,
    shape=st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.integers(1, 3))),
    size=st.tuples(SIDES, SIDES),
    mode=st.sampled_from(["bilinear", "nearest"]),
    kind=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool]),
)
def test_resizing_in_plane_keeps_range_comes_back_to_the_size_and_is_nothing_at_the_same_size(
    seed, shape, size, mode, kind
):  # fmt: skip
    values = torch.randint(
        0, 2 if kind is torch.bool else 9, (2, *shape), generator=torch.Generator().manual_seed(seed)
    )
    image = MetaTensor(values.to(kind), affine=torch.eye(4, dtype=torch.float64))
    transform = ResizeInPlane(size, mode)
    resized = transform(image)
    assert tuple(resized.shape) == (2, *size, *shape[2:])
    assert resized.as_tensor().isfinite().all()
    assert values.min() - 1e-4 <= float(resized.min()) <= float(resized.max()) <= values.max() + 1e-4
    if mode == "nearest":
        assert resized.dtype == kind
        assert set(resized.flatten().tolist()) <= set(image.flatten().tolist())
    back = transform.inverse(resized)
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, image.affine)
    torch.testing.assert_close(resize_in_plane(image, shape[:2], mode).as_tensor().double(), values.double())
    flat = resize_in_plane(torch.ones_like(image.as_tensor()), size, mode)
    torch.testing.assert_close(flat.double(), torch.ones_like(flat, dtype=torch.float64), atol=1e-6, rtol=0)


@examples(80)
@given(seed=SEEDS, shape=arrays.array_shapes(min_dims=2, max_dims=3, max_side=6), flip=st.integers(0, 3))
def test_two_flips_are_none(seed, shape, flip):
    generator = torch.Generator().manual_seed(seed)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3] += torch.rand((3, 4), generator=generator, dtype=torch.float64)
    image = MetaTensor(torch.randn((1, *shape), generator=generator), affine=affine)
    once = FlipByItemd("image")({"image": image, "flip": flip})
    twice = FlipByItemd("image")(once)["image"]
    assert torch.equal(twice.as_tensor(), image.as_tensor())
    torch.testing.assert_close(twice.affine, image.affine)
    moved = once["image"].as_tensor()
    assert torch.equal(moved.flatten().sort().values, image.as_tensor().flatten().sort().values)
    # Each pixel is where the affine says.
    corner = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    value, place = moved[0][(0,) * len(shape)], once["image"].affine @ corner
    there = torch.linalg.solve(image.affine, place).round().long()[: len(shape)].tolist()
    assert image.as_tensor()[0][tuple(there)] == value


# Masks


@examples(60)
@given(classes=st.integers(2, 255), data=st.data(), suffix=st.sampled_from([".png", ".tif", ".bmp"]))
def test_class_indices_come_back_for_any_number_of_classes(folder, classes, data, suffix):
    indices = data.draw(levels_of(np.uint8, high=classes - 1))
    file = folder / f"mask{suffix}"
    Image.fromarray(indices).save(file)
    np.testing.assert_array_equal(load_mask(str(file), num_classes=classes).numpy()[0], indices)
    # The classes as pictures, and back from them.
    label = torch.from_numpy(indices.astype(np.int64))
    one_hot = torch.nn.functional.one_hot(label, classes).movedim(-1, 0).float()
    assert torch.equal(mask_of(one_hot).long(), label)
    assert torch.equal(chosen_probability(one_hot), torch.ones(label.shape))
    # As the network is trained: class 0 is all that is foreground, and its score is negated.
    pictures = one_hot.clone()
    pictures[0] = (label > 0).float()
    scores = SegmentationModel.scores(
        SimpleNamespace(num_classes=classes),
        pictures[:, None].expand(-1, 3, -1, -1),
        1,  # type: ignore[arg-type]
    )
    assert torch.equal(mask_of(probabilities(scores)[0]).long(), label)


@examples(80)
@given(
    mask=levels_of(np.uint8, high=1), level=st.integers(1, 255), mode=st.sampled_from(["L", "1", "P", "RGB", "I;16"])
)
def test_a_binary_mask_comes_back_from_any_coding(folder, mask, level, mode):
    file = folder / "binary.png"
    if mode == "I;16":
        Image.fromarray(mask.astype(np.uint16) * 257 * level).save(file)
    elif mode == "P":
        picture = Image.fromarray(mask, mode="L").convert("P")
        picture.putdata((mask * min(level, 20)).ravel().tolist())
        picture.save(file)
    else:
        Image.fromarray(mask * np.uint8(255 if mode == "1" else level)).convert(mode).save(file)
    np.testing.assert_array_equal(load_mask(str(file)).numpy()[0], mask)


@examples(100)
@given(levels=st.one_of(levels_of(np.uint8), arrays.arrays(np.int64, (3, 4), elements=st.integers(-3, 70_000))),
       classes=st.integers(2, 255), label_map=st.booleans())  # fmt: skip
def test_any_levels_become_a_mask_or_an_error_that_begins_with_the_name(levels, classes, label_map):
    mask: list[np.ndarray] = []
    error = error_of(lambda: mask.append(binary_mask(levels, name="name", label_map=label_map)))
    assert str(error).startswith("name: expected ") if error else set(np.unique(mask[0])) <= {0, 1}
    error = error_of(lambda: mask.append(class_indices(levels, classes, name="name")))
    assert (error is None) == (levels.min() >= 0 and levels.max() < classes)
    assert str(error).startswith("name: expected ") if error else np.array_equal(mask[-1], levels)
    assert all(one.shape == levels.shape and one.dtype == np.uint8 for one in mask)


@examples(40)
@given(levels=levels_of(np.uint8))
def test_levels_are_read_as_stored(folder, levels):
    file = folder / "levels.png"
    Image.fromarray(levels).save(file)
    read, palette = read_levels(file)
    np.testing.assert_array_equal(read, levels)
    assert not palette


@examples(40)
@given(classes=st.integers(1, 5), samples=st.integers(1, 4), size=st.tuples(SIDES, SIDES))
def test_what_a_sampler_returns_is_taken_apart(classes, samples, size):
    count = classes + (samples > 1)
    pred = torch.rand((count, *size))
    probability, agreement = split_agreement(pred, num_classes=classes, num_samples=samples)
    assert torch.equal(probability, pred[:classes])
    assert (agreement is None) == (samples == 1)
    wrong = torch.rand((count + 1, *size))
    error = error_of(lambda: split_agreement(wrong, num_classes=classes, num_samples=samples))
    assert str(error).startswith(f"pred: expected {count} channels")


# Intensities


FLOATS = st.floats(-1e6, 1e6, width=32)
VALUES = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=6), elements=FLOATS)


@examples(150)
@given(values=VALUES, low=FLOATS, width=st.floats(1e-2, 1e6))
def test_scaling_is_bounded_monotone_and_undone_inside(values, low, width):
    high = low + width
    scaled = scale_intensity(values, low, high)
    assert scaled.dtype == np.float32
    assert scaled.shape == values.shape
    assert 0 <= scaled.min() <= scaled.max() <= 1
    order = np.argsort(values, axis=None, kind="stable")
    assert (np.diff(scaled.ravel()[order]) >= 0).all()
    inside = (values >= low) & (values <= high)
    rounding = 4 * np.finfo(np.float32).eps * max(abs(low), abs(high))
    np.testing.assert_allclose(unscale_intensity(scaled, low, high)[inside], values[inside], atol=rounding)
    assert (scaled[values <= low] == 0).all()


@examples(200)
@given(values=arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, min_side=0, max_side=6),
                            elements=st.floats(width=32)))  # fmt: skip
@example(values=np.array([-3.4e38, 3.4e38, 0, 0], np.float32))
@example(values=np.array([1e-45, 0, 0, 0], np.float32))
def test_the_range_of_any_voxels_lies_among_them_or_the_error_begins_with_the_name(values):
    error = error_of(lambda: robust_range(values, name="name"))
    if error is not None:
        assert str(error).startswith("name: expected ")
        return
    low, high = robust_range(values)
    assert values.min() <= low < high <= values.max()
    scaled = scale_intensity(values, low, high)
    assert np.isfinite(scaled).all()
    assert is_scaled(scaled)


# Patches and shares

SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))


@examples(100)
@given(shape=SHAPES, size=st.tuples(*[st.integers(1, 9)] * 3), data=st.data())
def test_patches_cut_and_put_together_are_the_volume(shape, size, data):
    stride = tuple(data.draw(st.integers(1, side)) for side in size)
    volume = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    total, count = np.zeros((2, *np.add(shape, size))), np.zeros(np.add(shape, size))
    starts = patch_starts(shape, size, stride)
    assert len(set(starts)) == len(starts)
    assert starts == sorted(starts)
    for start in starts:
        patch = _patch(volume, {"patch": start, "patch_size": size}).numpy()
        assert patch.shape == (2, *size)
        where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        total[:, where[0], where[1], where[2]] += patch
        count[where] += 1
    inside = tuple(slice(n) for n in shape)
    assert (count[inside] >= 1).all()
    np.testing.assert_allclose(total[:, inside[0], inside[1], inside[2]] / count[inside], volume, rtol=1e-6)
    # Beyond the volume there is nothing but zeros.
    total[:, inside[0], inside[1], inside[2]] = 0
    assert (total == 0).all()


@examples(15)
@given(
    shape=st.tuples(*[st.integers(4, 11)] * 3),
    overlap=st.floats(0, 0.6),
    blend=st.sampled_from(["gaussian", "constant"]),
    doubled=st.booleans(),
)
def test_blended_patches_of_ones_are_ones_and_of_a_volume_the_volume(shape, overlap, blend, doubled):
    sampler = NoddiSampler(scheduler=DDIMScheduler(), patch_size=4, overlap=overlap, blend=blend)

    def model(window: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.interpolate(window, scale_factor=2) if doubled else window.clone()
        )  # MONAI weights in place

    volume = torch.rand((1, 2, *shape), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler._windows(torch.ones_like(volume), model), model(torch.ones_like(volume)))
    torch.testing.assert_close(sampler._windows(volume, model), model(volume), atol=1e-5, rtol=1e-5)


@examples(100)
@given(count=st.integers(0, 40), batch_size=st.integers(1, 9), processes=st.integers(1, 12))
def test_every_item_is_dealt_once_whatever_the_number_of_processes(count, batch_size, processes):
    shares = [BatchShares(range(count), batch_size, rank=rank, processes=processes) for rank in range(processes)]
    dealt = [list(share) for share in shares]
    assert sorted(place for share in dealt for place in share) == list(range(count))
    assert [len(share) for share in shares] == [len(share) for share in dealt]
    for rank, share in enumerate(dealt):
        assert share == sorted(share)
        assert all((place // batch_size) % processes == rank for place in share)


@examples(100)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), levels=st.integers(1, 5), below=st.integers(0, 3))
def test_sizes_pass_exactly_if_every_level_halves_them(size, levels, below):
    options = {"autoencoder_channels": [8] * levels, "unet_channels": [8] * below}
    step = size_divisor(**options)
    assert step == 2 ** (levels - 1 + max(below - 1, 0))
    error = error_of(lambda: check_sizes(size, **options))
    assert (error is None) == all(side % step == 0 for side in size)
    if error is not None:
        nearest = [int(n) for n in str(error).split("nearest is [")[1].split("]")[0].split(",")]
        assert error_of(lambda: check_sizes(nearest, **options)) is None
        assert all(abs(a - b) <= max(step / 2, step - b) for a, b in zip(nearest, size, strict=True))
