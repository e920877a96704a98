# SPDX-License-Identifier: Apache-2.0
"""Patches of features and maps against slices of the whole volumes, from small files stored in turned axes."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, SelectItemsd
from torch import nn

from shared.cache_keys import describe
from shared.diffusion_features import DirectionFeatures
from shared.latent_cache import LatentDataset
from shared.patches import patch_items
from shared.resolution import doubled_affine
from shared.transforms import patches as patches_module
from shared.transforms.diffusion_mri import load_features, load_maps
from shared.transforms.patches import LoadFeaturePatchd, LoadMapPatchd

# L P S in columns of 2 mm voxels, turned a little: RAS needs two flips.
LPS = np.asarray([[-1.99, 0.2, 0, 9], [-0.2, -1.99, 0, 4], [0, 0, 2, -7], [0, 0, 0, 1]])
SHAPE = (10, 12, 8)
DIRECTIONS = np.asarray([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0.6, 0.8], [0.8, 0, 0.6]])
MAPS = ("ndi", "odi", "fwf")
FEATURES = DirectionFeatures(num_directions=6)


def write_subject(folder: Path, seed: int, *, affine: np.ndarray = LPS) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    signal = 1000 * rng.uniform(0.1, 0.9, (*SHAPE, 7)).astype(np.float32)
    signal[..., 0] = 1000
    nibabel.save(nibabel.Nifti1Image(signal, affine), folder / "dwi.nii")
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE, np.uint8), affine), folder / "mask.nii")
    np.savetxt(folder / "dwi.bval", [[0] + [1000] * 6], fmt="%d")
    np.savetxt(folder / "dwi.bvec", np.vstack(([[0, 0, 0]], DIRECTIONS)).T, fmt="%.6f")
    for name in MAPS:
        values = rng.random(tuple(2 * n for n in SHAPE), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(values, doubled_affine(affine)), folder / f"{name}.nii")
    files = {"dwi": "dwi.nii", "bval": "dwi.bval", "bvec": "dwi.bvec", "mask": "mask.nii"}
    files |= {name: f"{name}.nii" for name in MAPS}
    return {**{key: str(folder / name) for key, name in files.items()}, "subject": folder.name}


@pytest.fixture
def subjects(tmp_path: Path) -> list[dict[str, Any]]:
    return [write_subject(tmp_path / "data" / name, seed) for seed, name in enumerate("ab")]


class Counting:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counting]:
    result = {"load_features": Counting(load_features), "load_maps": Counting(load_maps)}
    for name, function in result.items():
        monkeypatch.setattr(patches_module, name, function)
    return result


def cut(volume: torch.Tensor, start: Sequence[int], size: Sequence[int], factor: int = 1) -> torch.Tensor:
    return volume[(slice(None), *(slice(factor * a, factor * (a + n)) for a, n in zip(start, size, strict=True)))]


@pytest.mark.parametrize("on_disk", [True, False])
def test_patches_are_slices_of_whole_volumes(subjects, tmp_path, counts, on_disk):
    folder = tmp_path / "cache" if on_disk else ""
    transform = Compose([LoadFeaturePatchd(features=FEATURES, cache_dir=folder), LoadMapPatchd(cache_dir=folder)])
    items = patch_items(subjects, patch_size=[4, 6, 5], stride=[3, 6, 3])
    assert len(items) == 2 * 3 * 2 * 2
    whole = {s["subject"]: (load_features(s, FEATURES).as_tensor(), load_maps(s).as_tensor()) for s in subjects}
    for item in items:
        patch = transform(item)
        features, maps = whole[item["subject"]]
        assert torch.equal(patch["image"], cut(features, item["patch"], (4, 6, 5)))
        assert torch.equal(patch["maps"], cut(maps, item["patch"], (4, 6, 5), 2))
        assert patch["image"].shape == (6, 4, 6, 5)
        assert patch["maps"].shape == (3, 8, 12, 10)
        for tensor in (patch["image"], patch["maps"]):
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
        assert patch["dwi"] == item["dwi"]
    assert counts["load_features"].calls == counts["load_maps"].calls == 2
    assert 0 < whole["a"][0].min() < whole["a"][0].max() < 1


def test_patches_may_be_changed_without_changing_the_cache(subjects, tmp_path):
    for folder in ("", tmp_path / "cache"):
        load = LoadMapPatchd(cache_dir=folder)
        first = load(subjects[0])["maps"]
        kept = first.clone()
        first.zero_()
        assert torch.equal(load(subjects[0])["maps"], kept)


def test_a_patch_that_leaves_the_volume_is_zero_there(subjects, tmp_path):
    """Volume 10 x 12 x 8, patch 16 x 8 x 10: padded behind along x and z."""
    [item] = patch_items(subjects[:1], patch_size=[16, 12, 10], stride=[8, 8, 8])
    features = LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path)(item)["image"]
    maps = LoadMapPatchd(cache_dir=tmp_path)(item)["maps"]
    assert features.shape == (6, 16, 12, 10)
    assert maps.shape == (3, 32, 24, 20)
    assert torch.equal(features[:, :10, :, :8], load_features(item, FEATURES).as_tensor())
    assert torch.equal(maps[:, :20, :, :16], load_maps(item).as_tensor())
    assert features[:, 10:].abs().max() == features[..., 8:].abs().max() == 0
    assert maps[:, 20:].abs().max() == maps[..., 16:].abs().max() == 0


def test_one_map_at_a_time(subjects, tmp_path):
    whole = load_maps(subjects[0]).as_tensor()
    load = LoadMapPatchd(cache_dir=tmp_path)
    items = patch_items(subjects[:1], patch_size=[10, 6, 8], stride=[10, 6, 8], maps=list(MAPS))
    assert len(items) == 6
    for item in items:
        maps = load(item)["maps"]
        assert maps.shape == (1, 20, 12, 16)
        assert torch.equal(maps, cut(whole[[item["map_id"]]], item["patch"], (10, 6, 8), 2))
    # A batch of a data loader gives the id as a tensor.
    assert torch.equal(load({**subjects[0], "map_id": torch.tensor(2)})["maps"], whole[2:])
    assert len(list(tmp_path.glob("maps_*.npy"))) == 1


def test_without_a_patch_the_volume_is_whole(subjects, tmp_path):
    assert LoadFeaturePatchd(features=FEATURES, cache_dir="", name="features")(subjects[0])["features"].shape == (
        6,
        *SHAPE,
    )
    assert LoadMapPatchd(["fwf"], cache_dir="", name="fwf_map")(subjects[0])["fwf_map"].shape == (1, 20, 24, 16)


def test_the_order_of_the_keys_is_that_of_the_channels(subjects, tmp_path):
    forward = LoadMapPatchd(cache_dir=tmp_path)(subjects[0])["maps"]
    backward = LoadMapPatchd(("fwf", "odi", "ndi"), cache_dir=tmp_path)(subjects[0])["maps"]
    assert torch.equal(backward, forward.flip(0))


def test_gradients_beside_the_series_and_a_series_called_image(subjects, tmp_path):
    load = LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path)
    bare = {"image": subjects[0]["dwi"], "mask": subjects[0]["mask"]}
    assert torch.equal(load(bare)["image"], load(subjects[0])["image"])
    assert len(list(tmp_path.glob("features_*.npy"))) == 1


@pytest.mark.parametrize("key", ["dwi", "bval", "bvec", "mask"])
def test_features_are_made_again_when_a_file_changes(subjects, tmp_path, counts, key):
    load = LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path)
    load(subjects[0])
    os.utime(subjects[0][key], ns=(0, 1_000_000))
    LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path)(subjects[0])
    assert counts["load_features"].calls == 2
    load(subjects[0])
    assert counts["load_features"].calls == 2


@pytest.mark.parametrize("key", [*MAPS, "dwi"])
def test_maps_are_read_again_when_a_file_changes(subjects, tmp_path, counts, key):
    load = LoadMapPatchd(cache_dir=tmp_path)
    load(subjects[0])
    path = Path(subjects[0][key])
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    load(subjects[0])
    assert counts["load_maps"].calls == 2


def test_a_mask_that_is_added_counts(subjects, tmp_path, counts):
    load = LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path)
    load(subjects[0])
    load({key: value for key, value in subjects[0].items() if key != "mask"})
    assert counts["load_features"].calls == 2


def test_other_settings_of_the_features_are_other_volumes(subjects, tmp_path):
    class Scaled(DirectionFeatures):
        def __init__(self, factor: Any) -> None:
            super().__init__(num_directions=6)
            object.__setattr__(self, "factor", factor)

        def __call__(self, *args: Any) -> np.ndarray:
            return super().__call__(*args) * np.float32(np.mean(self.factor))

    images = [
        LoadFeaturePatchd(features=features, cache_dir=tmp_path)(subjects[0])["image"]
        for features in (FEATURES, Scaled(0.5), Scaled(0.25), Scaled(np.asarray([0.5, 0.0])))
    ]
    for factor, image in zip((1, 0.5, 0.25, 0.25), images, strict=True):
        torch.testing.assert_close(image, factor * images[0])
    assert len(list(tmp_path.glob("features_*.npy"))) == 4


def test_equal_names_sizes_and_times_of_two_subjects_are_told_apart(subjects, tmp_path):
    """As an archive that keeps whole seconds unpacks them."""
    for subject in subjects:
        for key in ("dwi", "bval", "bvec", "mask", *MAPS):
            os.utime(subject[key], ns=(0, 10**18))
    load = Compose([LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path), LoadMapPatchd(cache_dir=tmp_path)])
    first, second = (load(subject) for subject in subjects)
    assert not torch.equal(first["image"], second["image"])
    assert not torch.equal(first["maps"], second["maps"])


def test_errors_name_the_cause(subjects, tmp_path):
    features, maps = LoadFeaturePatchd(features=FEATURES, cache_dir=tmp_path), LoadMapPatchd(cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^dwi: expected the path of a series, got the keys \['ndi'\]"):
        features({"ndi": "x"})
    with pytest.raises(FileNotFoundError, match=r"^.*dwi\.bval: expected this file, but it does not exist"):
        features({**subjects[0], "bval": str(tmp_path / "dwi.bval")})
    with pytest.raises(ValueError, match=r"^odi: expected the path of a map"):
        maps({key: value for key, value in subjects[0].items() if key != "odi"})
    for load in (features, maps):
        with pytest.raises(ValueError, match=r"^patch: expected a start within the volume"):
            load({**subjects[0], "patch": [0, 12, 0], "patch_size": [4, 4, 4]})
    with pytest.raises(ValueError, match=r"^.*dwi\.nii: .*5"):
        LoadFeaturePatchd(features=DirectionFeatures(num_directions=5), cache_dir=tmp_path)(subjects[0])
    # Nothing of a failed volume stays.
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("on_disk", [True, False])
def test_workers_load_the_same_batches(subjects, tmp_path, on_disk):
    folder = tmp_path / "cache" if on_disk else ""
    keys = ["image", "maps", "patch"]
    transform = Compose(
        [LoadFeaturePatchd(features=FEATURES, cache_dir=folder), LoadMapPatchd(cache_dir=folder), SelectItemsd(keys)]
    )
    dataset = Dataset(patch_items(subjects, patch_size=4, stride=4), transform)
    alone, shared = (list(DataLoader(dataset, batch_size=5, num_workers=n)) for n in (0, 2))
    assert sum(len(batch["image"]) for batch in alone) == len(dataset)
    for one, other in zip(alone, shared, strict=True):
        assert not isinstance(other["image"], MetaTensor)
        assert all(torch.equal(one[key], other[key]) for key in ("image", "maps"))


def test_transforms_travel_to_workers_without_volumes(subjects, tmp_path):
    load = LoadMapPatchd(cache_dir="")
    before = describe(load)
    expected = load(subjects[0])["maps"]
    assert len(pickle.dumps(load)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(load))(subjects[0])["maps"], expected)
    assert describe(load) == before == describe(LoadMapPatchd(cache_dir=tmp_path))


class VectorEncoder(nn.Module):
    """Maps (B, C, 2X, 2Y, 2Z) to one latent (B, 4, X, Y, Z) without a draw, as a VQ-GAN gives it."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv3d(channels, 4, 2, stride=2)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)


IMAGE_KEYS = ["ndi", "odi", "fwf", "dwi", "patch", "patch_size", "map_id"]
PATH_KEYS = ["ndi", "odi", "fwf", "dwi"]


def latents_of(items: list[dict[str, Any]], folder: Path, *, channels: int = 3, **options: Any) -> LatentDataset:
    keys = ["image", "latent_mean", "item_id", "map_id"]
    defaults: dict[str, Any] = {
        "transform": Compose(
            [
                LoadFeaturePatchd(features=FEATURES, cache_dir=folder / "volumes"),
                SelectItemsd(keys, allow_missing_keys=True),
            ]
        ),
        "image_transform": LoadMapPatchd(cache_dir=folder / "volumes"),
        "autoencoder": VectorEncoder(channels),
        "cache_dir": folder / "latents",
        "image_keys": IMAGE_KEYS,
        "path_keys": PATH_KEYS,
        "encoded_key": "maps",
    }
    return LatentDataset(items, **{**defaults, **options})


@pytest.mark.parametrize("maps", [None, list(MAPS)])
def test_latents_of_map_patches_beside_feature_patches(subjects, tmp_path, counts, maps):
    items = patch_items(subjects, patch_size=[4, 6, 8], stride=[4, 6, 8], maps=maps)
    channels = 3 if maps is None else 1
    dataset = latents_of(items, tmp_path, channels=channels)
    assert counts["load_maps"].calls == 2
    shutil.rmtree(tmp_path / "volumes")
    encoder = VectorEncoder(channels)
    whole = {s["subject"]: load_maps(s).as_tensor() for s in subjects}
    for index, item in enumerate(items):
        got = dataset[index]
        patch = cut(whole[item["subject"]], item["patch"], (4, 6, 8), 2)
        with torch.no_grad():
            expected = encoder.encode(patch[None] if maps is None else patch[None, [item["map_id"]]])[0]
        torch.testing.assert_close(got["latent_mean"], expected, atol=1e-5, rtol=1e-5)
        assert got["image"].shape == (6, 4, 6, 8)
        assert got["latent_mean"].shape == (4, 4, 6, 8)
        assert set(got) == {"image", "latent_mean", "item_id"} | ({"map_id"} if maps else set())
    # Maps were read for the encoding alone; afterwards only features.
    assert counts["load_maps"].calls == 2
    [batch] = DataLoader(dataset, batch_size=len(items), num_workers=2)
    assert torch.equal(
        batch["latent_mean"], torch.stack([dataset[index]["latent_mean"] for index in range(len(items))])
    )


def test_every_part_of_a_patch_item_makes_another_cache(subjects, tmp_path):
    options = {"patch_size": [4, 6, 8], "stride": [4, 6, 8]}
    items = patch_items(subjects, **options)

    def path(data: list[dict[str, Any]], **given: Any) -> Path | None:
        return latents_of(data, tmp_path, **given).cache_path

    paths = [path(items), path(patch_items(subjects, patch_size=[4, 6, 8], stride=[3, 6, 8]))]
    paths.append(path(patch_items(subjects, patch_size=[4, 6, 6], stride=[4, 6, 6])))
    single = patch_items(subjects, **options, maps=list(MAPS))
    paths.append(path(single, channels=1))
    paths.append(path([{**item, "map_id": 2 - item["map_id"]} for item in single], channels=1))
    for key in PATH_KEYS:
        os.utime(subjects[0][key], ns=(0, 1_000_000))
        paths.append(path(items))
    assert len(set(paths)) == len(paths)
    for key in ("bval", "mask"):
        os.utime(subjects[0][key], ns=(0, 1_000_000))
    assert path([{**item, "subject": "other"} for item in items]) == paths[-1]
    # Where features and maps are kept, and where the data lie, does not matter.
    other = {"image_transform": LoadMapPatchd(cache_dir="")}
    assert path(items, **other) == paths[-1]
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [
        {k: v.replace("/data/", "/moved/") if isinstance(v, str) else v for k, v in item.items()} for item in items
    ]
    assert path(moved) == paths[-1]
