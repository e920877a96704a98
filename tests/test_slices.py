# SPDX-License-Identifier: Apache-2.0
"""`shared.slices` and `shared.transforms.slices`: axial slices of volumes, read lazily where the file allows it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, Orientationd, RandAffined, RandFlipd
from PIL import Image

from shared.slices import slice_items
from shared.transforms import slices as module
from shared.transforms.slices import LoadSlicesd
from shared.transforms.volumes import LoadVolumed, RobustScaled, VolumeFile
from tests.conftest import HANDBOOK

REAL = HANDBOOK / "data" / "brain_controlnet"
RAS = np.array([[1.0, 0, 0, -30], [0, 1.2, 0, 20], [0, 0, 2, -10], [0, 0, 0, 1]])
LPS = np.array([[-1.0, 0, 0, 30], [0, -1.2, 0, 20], [0, 0, 2, -10], [0, 0, 0, 1]])
# File axes: superior, left, anterior; turned by some degrees.
OBLIQUE = np.array([[0, -0.9, -0.2, 5], [0.3, -0.2, 1.1, -7], [3, 0, -0.1, 2], [0, 0, 0, 1.0]])
SHAPE = (7, 9, 5)
START = 352  # first voxel in a .nii


def voxels(shape=SHAPE, *, seed=0, top=900):
    values = np.random.default_rng(seed).integers(1, top, size=shape)
    values[0] = 0
    return values


def write(path, values, affine=RAS, dtype=np.int16):
    nibabel.save(nibabel.Nifti1Image(np.asarray(values).astype(dtype), affine), path)
    return str(path)


def write_prepared(path, values, affine=RAS):
    """As the contract has it: uint16 of slope 1/65535. `values` in [0, 1]."""
    image = nibabel.Nifti1Image(np.zeros(values.shape, np.uint16), affine)
    image.header.set_slope_inter(1 / 65535, 0)
    nibabel.save(image, path)
    stored = np.round(np.asarray(values) * 65535).astype("<u2")
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([1 / 65535, 0], "<f4").tobytes()
    content[START:] = stored.tobytes(order="F")
    path.write_bytes(bytes(content))
    np.testing.assert_allclose(nibabel.load(path).get_fdata(), values, atol=1e-5)
    return str(path)


@pytest.fixture
def reads(monkeypatch):
    """Paths of all whole volumes read during a test."""
    found = []
    read = VolumeFile.read

    def counted(self, **options):
        found.append(self.path)
        return read(self, **options)

    monkeypatch.setattr(VolumeFile, "read", counted)
    return found


def whole(path, index):
    """Slice of the volume loaded, reoriented and scaled as inference does it."""
    steps = Compose([LoadVolumed("t1w"), Orientationd("t1w", axcodes="RAS", labels=None), RobustScaled("t1w")])
    return steps({"t1w": path})["t1w"].as_tensor()[..., index]


KINDS = {
    "prepared": lambda f: write_prepared(f / "a.nii", voxels() / 1000),
    "raw RAS": lambda f: write(f / "a.nii", voxels()),
    "raw unsigned RAS": lambda f: write(f / "a.nii", voxels(), dtype=np.uint16),
    "scaled float RAS": lambda f: write(f / "a.nii", voxels() / 1000, dtype=np.float32),
    "gzip": lambda f: write(f / "a.nii.gz", voxels()),
    "LPS": lambda f: write(f / "a.nii", voxels(), LPS),
    "oblique": lambda f: write(f / "a.nii", voxels(), OBLIQUE),
    "oblique gzip": lambda f: write(f / "a.nii.gz", voxels(), OBLIQUE),
    "big-endian": lambda f: write(f / "a.nii", voxels(), dtype=">i2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_slice_equals_that_of_the_volume_loaded_whole(tmp_path, kind):
    path = KINDS[kind](tmp_path)
    items = slice_items([{"t1w": path, "subject": "a"}])
    depth = {"oblique": 7, "oblique gzip": 7}.get(kind, 5)
    assert [item["slice"] for item in items] == list(range(depth))
    load = LoadSlicesd("t1w", optional_keys=())
    for item in items:
        result = load(item)
        assert type(result["t1w"]) is torch.Tensor
        assert result["t1w"].dtype == torch.float32
        assert result["t1w"].shape == ((1, 9, 5) if depth == 7 else (1, 7, 9))
        torch.testing.assert_close(result["t1w"], whole(path, item["slice"]), rtol=0, atol=1e-7)
        assert result["subject"] == "a"
        assert result["slice"] == item["slice"]


def test_prepared_volume_is_read_by_slice_only(tmp_path, reads):
    values = voxels() / 1000
    path = Path(write_prepared(tmp_path / "a.nii", values))
    size = 2 * 7 * 9
    load = LoadSlicesd("t1w")
    load({"t1w": str(path), "slice": 0})  # the header is known, as of now
    path.write_bytes(path.read_bytes()[: START + 3 * size])  # the file ends after slice 2
    for index in (2, 0, 1):
        result = load({"t1w": str(path), "slice": index})["t1w"]
        np.testing.assert_allclose(result[0].numpy(), values[..., index], atol=1e-5)
    with pytest.raises(ValueError, match=r"^\S*a\.nii: expected a readable file, but got"):
        load({"t1w": str(path), "slice": 3})
    assert reads == []


def test_raw_volume_is_read_whole_once_for_its_range(tmp_path, reads):
    path = write(tmp_path / "a.nii", voxels())
    load = LoadSlicesd("t1w")
    for index in (4, 1, 4, 0):
        load({"t1w": path, "slice": index})
    assert reads == [path]
    assert not load._volumes, "only the range is kept"


def test_range_is_that_of_the_whole_volume_not_of_the_slice(tmp_path):
    values = voxels()
    values[..., 1] = values[..., 1] // 10
    path = write(tmp_path / "a.nii", values)
    assert LoadSlicesd("t1w")({"t1w": path, "slice": 1})["t1w"].max() < 0.15


def test_least_recently_used_volume_makes_room(tmp_path, reads):
    paths = [write(tmp_path / f"{n}.nii.gz", voxels(seed=n)) for n in range(3)]
    load = LoadSlicesd("t1w", cache_volumes=2)
    for number in (0, 1, 0, 2, 0, 1):  # 2 drops 1; 1 then drops 2
        load({"t1w": paths[number], "slice": 2})
        assert len(load._volumes) <= 2
    assert reads == [paths[n] for n in (0, 1, 2, 1)]


def test_cache_holds_one_item_however_many_files_it_has(tmp_path, reads):
    paths = [write(tmp_path / f"{n}.nii.gz", voxels(seed=n)) for n in range(3)]
    load = LoadSlicesd("flair", cache_volumes=1)
    for index in range(5):
        load({"flair": paths, "slice": index})
    assert reads == paths


def test_cache_is_not_pickled_to_workers(tmp_path):
    big = write(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 900, size=(40, 50, 30)))
    load = LoadSlicesd(["t1w"], cache_volumes=3)
    before = load({"t1w": big, "slice": 7})["t1w"]
    content = pickle.dumps(load)
    assert len(content) < 2000
    copy = pickle.loads(content)
    assert copy.cache_volumes == 3
    assert not copy._volumes
    assert torch.equal(copy({"t1w": big, "slice": 7})["t1w"], before)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_with_workers_and_random_transforms(tmp_path, context):
    items = slice_items(
        [
            {
                "t1w": write_prepared(tmp_path / f"{n}_t1.nii", voxels(seed=n) / 1000),
                "flair": write(tmp_path / f"{n}_fl.nii.gz", voxels(seed=n + 5)),
                "subject": str(n),
            }
            for n in range(2)
        ]
    )
    load = LoadSlicesd(["t1w", "flair"])
    load(items[0])  # caches are full when the workers start
    steps = Compose(
        [
            load,
            RandFlipd(["t1w", "flair", "mask"], prob=1.0, spatial_axis=0),
            RandAffined(["t1w", "flair"], prob=1.0, translate_range=2, padding_mode="zeros"),
        ]
    )
    loader = DataLoader(Dataset(items, steps), batch_size=5, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert len(batches) == 2
    assert batches[0]["t1w"].shape == batches[0]["flair"].shape == batches[0]["mask"].shape == (5, 1, 7, 9)
    assert batches[1]["subject"] == ["1"] * 5
    assert batches[1]["slice"].tolist() == [0, 1, 2, 3, 4]


def test_lists_become_channels_and_masks_become_binary(tmp_path):
    mask = np.zeros(SHAPE)
    mask[2:4, 3, 1] = 3
    item = {
        "t1w": write_prepared(tmp_path / "t1.nii", voxels() / 1000),
        "flair": [write(tmp_path / "a.nii", voxels(seed=1)), write(tmp_path / "b.nii.gz", voxels(seed=2))],
        "mask": write(tmp_path / "m.nii.gz", mask, dtype=np.uint8),
        "slice": 1,
    }
    result = LoadSlicesd(["t1w", "flair"])(item)
    assert result["flair"].shape == (2, 7, 9)
    torch.testing.assert_close(result["flair"][1:], whole(item["flair"][1], 1))
    np.testing.assert_array_equal(result["mask"][0].numpy(), mask[..., 1] > 0)
    assert result["mask"].dtype == torch.float32
    lazy = LoadSlicesd("t1w")({**item, "mask": write(tmp_path / "m.nii", mask * 85, dtype=np.uint8)})
    assert torch.equal(lazy["mask"], result["mask"])
    empty = LoadSlicesd("t1w")({**item, "mask": write(tmp_path / "e.nii.gz", mask * 0, dtype=np.uint8)})
    assert empty["mask"].sum() == 0, "an empty mask is no fault"


@pytest.mark.parametrize("absent", [{}, {"mask": None}, {"mask": ""}, {"mask": []}])
def test_absent_mask_becomes_zeros(tmp_path, absent):
    result = LoadSlicesd("t1w")({"t1w": write(tmp_path / "a.nii", voxels()), "slice": 0, **absent})
    assert torch.equal(result["mask"], torch.zeros(1, 7, 9))


def test_another_optional_key_is_an_image(tmp_path):
    item = {"flair": write(tmp_path / "a.nii", voxels()), "t1w": write(tmp_path / "b.nii", voxels(seed=1)), "slice": 3}
    result = LoadSlicesd("flair", optional_keys=("t1w", "mask"))(item)
    torch.testing.assert_close(result["t1w"], whole(item["t1w"], 3))


def test_pair_in_different_file_orientations_on_one_grid_is_fine(tmp_path):
    values = voxels(seed=4)
    flipped = nibabel.Nifti1Image(values.astype(np.int16), RAS).as_reoriented([[0, -1], [1, -1], [2, 1]])
    nibabel.save(flipped, tmp_path / "b.nii")
    assert nibabel.aff2axcodes(nibabel.load(tmp_path / "b.nii").affine) == ("L", "P", "S")
    item = {"t1w": write(tmp_path / "a.nii", values), "flair": str(tmp_path / "b.nii"), "slice": 2}
    result = LoadSlicesd(["t1w", "flair"])(item)
    torch.testing.assert_close(result["t1w"], result["flair"])


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((7, 9, 4), RAS, r"expected the grid of \S*a\.nii \(7, 9, 5\), but got \(7, 9, 4\)"),
        (SHAPE, LPS, r"expected the orientation RAS of \S*a\.nii, but got LPS"),
        (SHAPE, RAS + np.outer([0, 1, 0, 0], [0, 0, 0, 3]), "expected the origin"),
        (SHAPE, RAS * [1.1, 1, 1, 1], "expected the voxel size"),
    ],
)
def test_pair_on_different_grids_is_named(tmp_path, shape, affine, message):
    other = write(tmp_path / "b.nii", voxels(shape), affine)
    item = {"t1w": write(tmp_path / "a.nii", voxels()), "flair": other, "slice": 0}
    with pytest.raises(ValueError, match=message) as caught:
        LoadSlicesd(["t1w", "flair"])(item)
    assert str(caught.value).startswith(f"{other}: ")


def test_grids_are_compared_once_per_combination_of_files(tmp_path, monkeypatch):
    calls = []
    check = module.check_same_grid
    monkeypatch.setattr(module, "check_same_grid", lambda *a, **k: (calls.append(a[0]), check(*a, **k)))
    item = {"t1w": write(tmp_path / "a.nii", voxels()), "flair": write(tmp_path / "b.nii", voxels(seed=1))}
    load = LoadSlicesd(["t1w", "flair"])
    for index in range(4):
        load({**item, "slice": index})
    assert calls == [item["flair"]]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nan_is_named(tmp_path, name):
    values = voxels().astype(np.float32)
    values[3, 3, 2] = np.nan
    path = write(tmp_path / name, values, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"^{path}: expected finite voxels, but 1 are NaN"):
        LoadSlicesd("t1w")({"t1w": path, "slice": 2})
    with pytest.raises(ValueError, match=rf"^{path}: expected finite voxels, but 1 are NaN"):
        LoadSlicesd("flair")({"flair": write(tmp_path / "f.nii", voxels()), "mask": path, "slice": 2})


def test_faults_of_an_item_are_named(tmp_path):
    path = write(tmp_path / "a.nii", voxels())
    load = LoadSlicesd(["t1w", "flair"])
    with pytest.raises(ValueError, match="^flair: expected the path of a volume, but the item has the keys"):
        load({"t1w": path, "slice": 0})
    with pytest.raises(FileNotFoundError, match=r"^\S*gone\.nii: expected a NIfTI or PNG file"):
        load({"t1w": path, "flair": str(tmp_path / "gone.nii"), "slice": 0})
    for index in (5, -1):
        with pytest.raises(ValueError, match=rf"^{path}: expected a slice of 0\.\.4, but got {index}"):
            load({"t1w": path, "flair": path, "slice": index})
    for index in (None, "1", 1.0, True):
        with pytest.raises(ValueError, match="^slice: expected the number of a slice"):
            load({"t1w": path, "flair": path, "slice": index})
    with pytest.raises(ValueError, match="^cache_volumes: expected at least 1"):
        LoadSlicesd("t1w", cache_volumes=0)


def test_png_pairs(tmp_path):
    levels = [np.random.default_rng(n).integers(0, 256, size=(16, 22)).astype(np.uint8) for n in range(2)]
    mask = np.zeros((16, 22), np.uint8)
    mask[3:5, 7] = 1
    for name, picture in (("t", levels[0]), ("f", levels[1]), ("m", mask), ("e", mask * 0)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    item = {"t1w": str(tmp_path / "t.png"), "flair": str(tmp_path / "f.png"), "mask": str(tmp_path / "m.png")}
    items = slice_items([item], slab=(0, 1))
    assert items == [{**item, "session": "", "slice": 0}]
    result = LoadSlicesd(["t1w", "flair"])(items[0])
    np.testing.assert_allclose(result["flair"][0].numpy(), levels[1] / 255, rtol=1e-6)
    np.testing.assert_array_equal(result["mask"][0].numpy(), mask)
    assert LoadSlicesd("t1w")({**items[0], "mask": str(tmp_path / "e.png")})["mask"].sum() == 0


def test_2d_nifti(tmp_path):
    path = write(tmp_path / "a.nii", voxels((6, 8)))
    (item,) = slice_items([{"t1w": path}])
    torch.testing.assert_close(LoadSlicesd("t1w")(item)["t1w"], whole(path, 0))


# slice_items


def test_num_slices_saves_reading_the_header(tmp_path):
    items = slice_items([{"t1w": "not/there.nii", "num_slices": 3, "subject": "x"}])
    assert [item["slice"] for item in items] == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"^not/there\.nii"):
        slice_items([{"t1w": "not/there.nii"}])


def test_slab_and_other_key():
    data = [{"flair": ["a.nii", "b.nii"], "num_slices": 9}, {"flair": "c.nii", "num_slices": 7}]
    items = slice_items(data, key="flair", slab=[2, 5])
    assert [item["slice"] for item in items] == [2, 3, 4] * 2
    assert items[0]["flair"] == ["a.nii", "b.nii"]
    assert len(slice_items(data, key="flair", slab=[2, None])) == 7 + 5
    assert "slice" not in data[0]


def test_a_volume_too_small_for_the_slab_is_refused():
    data = [{"t1w": "a.nii", "num_slices": 171}, {"t1w": "b.nii", "num_slices": 170}]
    with pytest.raises(ValueError, match=r"^b\.nii: expected the slices 166\.\.170 of `slab`, but the last one is 169"):
        slice_items(data, slab=(166, 171))
    with pytest.raises(ValueError, match=r"^a\.nii: expected the slices"):
        slice_items(data, slab=(200, None))


@pytest.mark.parametrize("slab", [(3, 3), (5, 2), (-1, 4), (1,), (1, 2, 3), (0.5, 3), ("a", 3)])
def test_a_wrong_slab_is_named(slab):
    with pytest.raises(ValueError, match=r"^slab: expected \[start, stop\]"):
        slice_items([{"t1w": "a.nii", "num_slices": 9}], slab=slab)


def test_faults_of_the_list_are_named():
    with pytest.raises(ValueError, match="^t1w: expected a volume in every item, but item 1 has the keys"):
        slice_items([{"t1w": "a.nii", "num_slices": 1}, {"flair": "a.nii", "t1w": ""}])
    for count in (0, -2, 1.5, "3", True):
        with pytest.raises(ValueError, match=r"^a\.nii: expected `num_slices` to be an integer above 0"):
            slice_items([{"t1w": "a.nii", "num_slices": count}])


@pytest.mark.skipif(not REAL.is_dir(), reason="no real brain volumes on this machine")
@pytest.mark.parametrize("kind", ["ms_native", "lgg_slices"])
def test_real_pairs(kind):
    row = next(row for row in json.loads((REAL / "datalist.json").read_text()) if row["kind"] == kind)
    item = {key: str(REAL / row[key]) if row.get(key) else "" for key in ("t1w", "flair", "mask")}
    items = slice_items([{**item, "subject": row["subject"]}])
    assert len(items) == row["shape"][2]
    load = LoadSlicesd(["t1w", "flair"])
    middle = len(items) // 2
    result = load(items[middle])
    assert result["t1w"].shape == (1, *row["shape"][:2])
    torch.testing.assert_close(result["t1w"], whole(item["t1w"], middle))
    both = torch.stack([result["t1w"].flatten(), result["flair"].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.5


def test_grid_key_is_compared_and_not_read(tmp_path, reads):
    path = write(tmp_path / "t.nii.gz", voxels())
    item = {"t1w": path, "flair": write(tmp_path / "f.nii.gz", voxels(seed=1)), "slice": 1}
    result = LoadSlicesd("flair", optional_keys=(), grid_key="t1w")(item)
    assert result["t1w"] == path
    assert reads == [item["flair"]]
    item["flair"] = write(tmp_path / "moved.nii.gz", voxels(seed=1), RAS + np.outer([0, 1, 0, 0], [0, 0, 0, 3]))
    with pytest.raises(ValueError, match="moved.nii.gz: expected the origin"):
        LoadSlicesd("flair", optional_keys=(), grid_key="t1w")(item)
    with pytest.raises(ValueError, match="t1w: expected"):
        LoadSlicesd("flair", optional_keys=(), grid_key="t1w")({"flair": path, "slice": 1})
