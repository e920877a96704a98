# SPDX-License-Identifier: Apache-2.0
"""`shared.transforms.in_plane`: resizing, upright axes and flips, and their inversion back to the file."""

from __future__ import annotations

import pickle

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, Orientation, Resize
from PIL import Image

from shared.transforms.in_plane import FlipByItemd, ResizeInPlane, ResizeInPlaned, UprightVolumed, resize_in_plane
from shared.transforms.segmentation_images import LoadPictured

AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def affine_of(codes, spacing=(0.8, 1.2, 2.5)):
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world, sign = AXES[code]
        affine[world, axis] = sign * spacing[axis]
    affine[:3, 3] = (7, -5, 3)
    return affine


def smooth(*shape):
    """A ramp along both in-plane axes, steeper along the first."""
    rows = torch.linspace(0, 1, shape[-2 if len(shape) == 3 else 1])
    columns = torch.linspace(0, 0.5, shape[-1 if len(shape) == 3 else 2])
    plane = rows[:, None] + columns[None]
    image = plane if len(shape) == 3 else plane[..., None]
    return (image / 1.5).expand(*shape).clone()


@pytest.mark.parametrize("size", [(20, 31), (64, 96), (9, 100)])
def test_bilinear_equals_pil(size):
    image = torch.rand(1, 40, 60, generator=torch.Generator().manual_seed(0))
    reference = Image.fromarray(image[0].numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resize_in_plane(image, size)[0].numpy(), np.asarray(reference), atol=1e-5)


def test_thin_lines_are_averaged_not_dropped():
    image = torch.zeros(1, 64, 48)
    image[:, ::8] = 1
    resized = resize_in_plane(image, (8, 48))
    assert resized.mean().item() == pytest.approx(1 / 8, abs=0.01)
    assert resized.max() < 0.3


def test_nearest_keeps_class_indices_and_type_and_is_centred():
    mask = torch.arange(4 * 6).reshape(1, 4, 6).to(torch.uint8)
    doubled = resize_in_plane(mask, (8, 12), "nearest")
    assert doubled.dtype == torch.uint8
    assert torch.equal(doubled, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))
    # a third: the middle of three pixels, where PyTorch's "nearest" would take the first
    assert torch.equal(resize_in_plane(doubled, (4, 4), "nearest")[0, 0], doubled[0, 1, 1::3])
    assert torch.equal(resize_in_plane(mask.long(), (4, 6), "nearest"), mask.long())


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_slices_of_a_volume_stay_apart(mode):
    volume = torch.rand(2, 20, 30, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_in_plane(volume, (12, 40), mode)
    assert resized.shape == (2, 12, 40, 5)
    for index in range(5):
        assert torch.equal(resized[..., index], resize_in_plane(volume[..., index], (12, 40), mode))


def test_bilinear_of_half_precision_and_integers_is_computed_in_float32():
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    low = resize_in_plane(image.bfloat16(), (10, 12))
    assert low.dtype == torch.float32
    assert torch.equal(low, resize_in_plane(image.bfloat16().float(), (10, 12)))
    assert resize_in_plane(torch.ones(1, 4, 4, dtype=torch.uint8), (4, 4)).dtype == torch.float32


@pytest.mark.parametrize("codes", ["LAS", "PIR", "RAS"])
def test_affine_is_that_of_monai(codes):
    affine = torch.from_numpy(affine_of(codes))
    volume = MetaTensor(torch.rand(1, 12, 20, 6), affine=affine, meta={"filename_or_obj": "a.nii"})
    resized = resize_in_plane(volume, (30, 16))
    reference = Resize((30, 16, 6), mode="trilinear", align_corners=False)(volume)
    np.testing.assert_allclose(resized.affine.numpy(), reference.affine.numpy(), atol=1e-9)
    assert resized.meta["filename_or_obj"] == "a.nii"
    assert torch.equal(volume.affine, affine)  # the input keeps its own
    # the outer borders, half a voxel beyond the centres, stay where they are
    corner, moved = (t.affine.numpy() @ [-0.5, -0.5, 0, 1] for t in (volume, resized))
    np.testing.assert_allclose(corner, moved, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize_in_plane(torch.zeros(4, 4), (2, 2)), r"^image: expected \(C, H, W\) or"),
        (lambda: resize_in_plane(torch.zeros(1, 4, 4), (2, 2), "cubic"), "^mode: expected one of bilinear, nearest"),
        (lambda: resize_in_plane(torch.zeros(1, 4, 4), (2, 2, 2)), "^spatial_size: expected"),
        (lambda: resize_in_plane(torch.zeros(1, 4, 4), (0, 2)), "^spatial_size: expected"),
        (lambda: UprightVolumed("x")({"x": torch.zeros(1, 4, 4, 4)}), "^x: expected a volume with its affine"),
        (lambda: FlipByItemd("x")({"x": torch.zeros(1, 4, 4), "flip": 4}), r"^flip: expected 0 \(none\)"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pictures_are_not_turned_and_slices_neither():
    for channels in (1, 3):
        image = MetaTensor(torch.rand(channels, 5, 7), affine=torch.from_numpy(affine_of("PIR")))
        turned = UprightVolumed("image")({"image": image})["image"]
        assert turned is image
        assert UprightVolumed("image").inverse({"image": turned})["image"] is image


@pytest.mark.parametrize("codes", ["LAS", "PIR", "RAS", "ILA"])
def test_upright_rows_go_back_columns_left_slices_up(codes):
    affine = affine_of(codes)
    shape = (4, 5, 6)
    world = nibabel.affines.apply_affine(affine, np.stack(np.indices(shape), axis=-1))
    volume = MetaTensor(torch.from_numpy(world.transpose(3, 0, 1, 2).copy()), affine=torch.from_numpy(affine))
    right, anterior, superior = UprightVolumed("image")({"image": volume})["image"]
    assert (anterior.diff(dim=0) < 0).all()
    assert (right.diff(dim=1) < 0).all()
    assert (superior.diff(dim=2) > 0).all()


def steps(size):
    return Compose([LoadPictured("image"), UprightVolumed("image"), ResizeInPlaned("image", size)])


def inverted(loaded, pred, transform, **kwargs):
    invert = Invertd("pred", transform, orig_keys="image", nearest_interp=False, to_tensor=True, **kwargs)
    return invert({**loaded, "pred": MetaTensor(pred)})["pred"]  # Invertd leaves plain tensors as they are


@pytest.mark.parametrize("codes", ["LAS", "PIR", "RAS", "SRP"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_predicted_on_a_volume_comes_back_to_the_grid_of_the_file(tmp_path, codes, suffix):
    shape, affine = (21, 18, 15), affine_of(codes)
    position = nibabel.affines.apply_affine(affine, np.stack(np.indices(shape), axis=-1)).sum(-1)
    values = (position - position.min()) / np.ptp(position)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), tmp_path / f"a{suffix}")
    transform = steps((40, 56))
    loaded = transform({"image": str(tmp_path / f"a{suffix}")})
    assert loaded["image"].shape[:3] == (1, 40, 56)
    # as a sampler has it, with channels of its own: here the image and its negative
    pred = torch.cat([loaded["image"].as_tensor(), 1 - loaded["image"].as_tensor()])
    back = inverted(loaded, pred, transform)
    assert back.shape == (2, *shape)
    np.testing.assert_allclose(back.affine.numpy(), affine, atol=1e-9)
    np.testing.assert_allclose(back[0].numpy(), values, atol=0.02)  # linear, so only the borders differ
    np.testing.assert_allclose(back[1].numpy(), 1 - values, atol=0.02)
    assert loaded["image"].shape[:3] == (1, 40, 56)  # the image itself stays at the working size
    assert Orientation(axcodes="RAS", labels=None)(back).affine.diagonal()[:3].min() > 0


def test_what_is_predicted_on_a_picture_comes_back_at_its_size(tmp_path):
    pixels = (smooth(1, 37, 52)[0] * 255).round().numpy().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    transform = steps((64, 64))
    loaded = transform({"image": str(tmp_path / "a.png")})
    assert loaded["image"].shape == (3, 64, 64)
    back = inverted(loaded, loaded["image"].as_tensor()[:1].repeat(5, 1, 1), transform)
    assert back.shape == (5, 37, 52)
    np.testing.assert_allclose(back[4].numpy(), pixels / 255, atol=0.02)


def test_inversion_after_a_loader_with_workers(tmp_path):
    pixels = (smooth(1, 30, 22)[0] * 255).round().numpy().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    transform = steps((16, 24))
    data = [{"image": str(tmp_path / "a.png")}] * 2
    (batch,) = DataLoader(Dataset(data, transform), batch_size=2, num_workers=1)
    batch["pred"] = batch["image"][:, :1] * 0.5
    for item in decollate_batch(batch):
        assert inverted({"image": item["image"]}, item["pred"], transform).shape == (1, 30, 22)


def test_inverse_is_bilinear_unless_nearest_is_asked_for():
    image = MetaTensor(torch.rand(1, 8, 8))
    transform = Compose([ResizeInPlaned("image", (4, 4))])
    loaded = transform({"image": image})
    pred = torch.tensor([[0.0, 1, 0, 1]]).expand(1, 4, 4)
    soft = inverted(loaded, pred, transform)
    assert len(soft.unique()) > 2
    hard = Invertd("pred", transform, orig_keys="image", nearest_interp=True)({**loaded, "pred": MetaTensor(pred)})[
        "pred"
    ]
    assert sorted(hard.unique().tolist()) == [0, 1]


def test_transforms_survive_pickling():
    image = MetaTensor(torch.rand(1, 8, 6))
    for transform in (ResizeInPlaned("x", (4, 5)), UprightVolumed("x"), FlipByItemd("x")):
        again = pickle.loads(pickle.dumps(transform))
        assert torch.equal(again({"x": image, "flip": 1})["x"], transform({"x": image, "flip": 1})["x"])
    assert ResizeInPlane((4, 5))(torch.rand(2, 8, 6)).shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("flip", "expected"), [(0, [[1, 2, 3], [4, 5, 6]]), (1, [[3, 2, 1], [6, 5, 4]]), (2, [[4, 5, 6], [1, 2, 3]]),
                           (3, [[6, 5, 4], [3, 2, 1]])],
)  # fmt: skip
def test_flip_bits(flip, expected):
    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    item = FlipByItemd(["image", "label"])({"image": image, "label": MetaTensor(image), "flip": flip})
    assert item["image"][0].tolist() == item["label"][0].tolist() == expected
    assert torch.equal(FlipByItemd("image")({"image": image})["image"], image)


def test_flip_says_in_the_affine_where_the_pixels_are():
    affine = torch.from_numpy(affine_of("PIR"))
    image = MetaTensor(torch.rand(1, 4, 6), affine=affine.clone())
    flipped = FlipByItemd("x")({"x": image, "flip": 3})["x"]
    same = (
        flipped.affine @ torch.tensor([1.0, 4, 0, 1], dtype=torch.float64),
        affine @ torch.tensor([2.0, 1, 0, 1]).double(),
    )
    assert torch.allclose(*same)
    assert flipped[0, 1, 4] == image[0, 2, 1]
