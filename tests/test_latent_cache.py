# SPDX-License-Identifier: Apache-2.0
"""The latent cache against direct encoding, with a convolution as autoencoder and small PNG files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, list_data_collate
from monai.transforms import CenterSpatialCropd, Compose
from PIL import Image
from torch import nn

from shared.latent_cache import LatentDataset, check_augmentation, latent_statistics, measure_scale_factor
from shared.latent_store import Encoding, LatentStore, cache_key
from shared.transforms.images import LoadRadiographd, ResizeShorterSided


class ConvolutionalEncoder(nn.Module):
    """Images (B, 1, H, W) to a posterior (B, 2, H/4, W/4), counting its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(1, 4, 4, stride=4)
        self.calls: list[int] = []

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(len(x))
        mean, log_variance = self.convolution(x).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance)


def images_to(size: int = 16, crop: int = 16) -> Compose:
    return Compose(
        [
            LoadRadiographd("image"),
            ResizeShorterSided("image", size),
            CenterSpatialCropd("image", roi_size=(crop, crop)),
        ]
    )


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    result = []
    for index in range(7):
        path = tmp_path / f"images/{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8)).save(path)
        result.append({"image": str(path), "text": f"report {index}", "subject": str(index)})
    return result


def dataset_of(items: list[dict[str, Any]], folder: Path | None, encoder: nn.Module, **options: Any) -> LatentDataset:
    options = {"image_transform": images_to(), "batch_size": 3, **options}
    return LatentDataset(items, autoencoder=encoder, cache_dir=folder, **options)


def direct(items: list[dict[str, Any]], encoder: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = images_to()({"image": items[index]["image"]})["image"]
    with torch.no_grad():
        mean, sigma = encoder.encode(image[None].as_tensor())
    return mean[0], 2 * sigma[0].log()


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_latents_equal_direct_encoding(items, tmp_path, workers):
    encoder = ConvolutionalEncoder()
    dataset = dataset_of(items, tmp_path / "cache", encoder, num_workers=workers)
    assert encoder.calls == [3, 3, 1]
    for index in range(7):
        item = dataset[index]
        mean, log_variance = direct(items, encoder, index)
        torch.testing.assert_close(item["latent_mean"], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(item["latent_log_variance"], log_variance, atol=1e-5, rtol=1e-5)
        assert item["latent_mean"].dtype == torch.float32
        assert item["item_id"] == str(index)
        assert item["text"] == f"report {index}"
        assert "image" not in item
    assert json.loads(dataset.cache_path.with_suffix(".json").read_text()) == {"items": 7}


def test_transform_finds_the_path_by_which_it_can_name_the_item(items, tmp_path):
    seen = []

    def note(item: dict[str, Any]) -> dict[str, Any]:
        seen.append(item["image"])
        return item

    assert "image" not in dataset_of(items, tmp_path / "cache", ConvolutionalEncoder(), transform=note)[2]
    assert seen == [items[2]["image"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_items_with_and_without_workers(items, tmp_path, workers):
    dataset = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    expected = torch.stack([dataset[index]["latent_mean"] for index in range(7)])
    batches = list(DataLoader(dataset, batch_size=3, num_workers=workers))
    assert torch.equal(torch.cat([batch["latent_mean"] for batch in batches]), expected)
    assert [name for batch in batches for name in batch["item_id"]] == [str(index) for index in range(7)]


def test_second_use_encodes_one_item_only(items, tmp_path):
    first = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    encoder = ConvolutionalEncoder()
    second = dataset_of(items, tmp_path / "cache", encoder)
    assert encoder.calls == [1]
    assert second.cache_path == first.cache_path


def test_every_cause_of_other_latents_makes_another_cache(items, tmp_path):
    folder = tmp_path / "cache"
    paths = [dataset_of(items, folder, ConvolutionalEncoder()).cache_path]
    paths.append(dataset_of(items, folder, ConvolutionalEncoder(seed=1)).cache_path)
    paths.append(dataset_of(items, folder, ConvolutionalEncoder(), image_transform=images_to(size=20)).cache_path)
    paths.append(dataset_of(items, folder, ConvolutionalEncoder(), image_transform=images_to(20, crop=20)).cache_path)
    paths.append(dataset_of(items[:6], folder, ConvolutionalEncoder()).cache_path)
    paths.append(dataset_of(items[::-1], folder, ConvolutionalEncoder()).cache_path)
    path = Path(items[3]["image"])
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    paths.append(dataset_of(items, folder, ConvolutionalEncoder()).cache_path)
    Image.fromarray(np.arange(24 * 20, dtype=np.uint16).reshape(24, 20)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    paths.append(dataset_of(items, folder, ConvolutionalEncoder()).cache_path)
    assert len(set(paths)) == len(paths)


def test_text_and_place_of_the_data_do_not_matter(items, tmp_path):
    """A data set that is copied with its times, or whose reports change, keeps its cache."""
    first = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder()).cache_path
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = [{**item, "image": item["image"].replace("/images/", "/moved/"), "text": "other"} for item in items]
    assert dataset_of(moved, tmp_path / "cache", ConvolutionalEncoder()).cache_path == first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"no array " * 50),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        lambda path: np.save(path, np.zeros((7, 2, 2, 4, 4), dtype=np.float32)),
        lambda path: np.save(path, np.zeros((7, 2, 2, 5, 5), dtype=np.float32)),
        lambda path: np.save(path, np.zeros((6, 2, 2, 4, 4), dtype=np.float32)),
        lambda path: np.save(path, np.full((7, 2, 2, 4, 4), np.nan, dtype=np.float32)),
    ],
    ids=["empty", "header cut", "data cut", "text", "zip", "zeros", "other size", "fewer items", "NaN"],
)
def test_damaged_or_foreign_cache_is_made_again(items, tmp_path, spoil, caplog):
    path = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder()).cache_path
    good = path.read_bytes()
    spoil(path)
    dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    assert path.read_bytes() == good
    assert f"{path}: " in caplog.text


def test_interrupted_encoding_leaves_no_cache(items, tmp_path):
    class Failing(ConvolutionalEncoder):
        def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if len(self.calls) == 1:
                raise KeyboardInterrupt
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        dataset_of(items, tmp_path / "cache", Failing())
    assert list((tmp_path / "cache").iterdir()) == []


def test_latents_that_are_not_finite_are_refused(items, tmp_path):
    encoder = ConvolutionalEncoder()
    encoder.convolution.bias.data[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"latents_\w+\.npy: expected finite latents, got NaN or infinity for items 0 to 2"
    ):
        dataset_of(items, tmp_path / "cache", encoder)
    assert list((tmp_path / "cache").iterdir()) == []


def test_empty_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one image to encode, got an empty list"):
        dataset_of([], tmp_path / "cache", ConvolutionalEncoder())


def test_making_the_cache_changes_neither_random_state_nor_training_mode(items, tmp_path):
    encoder = ConvolutionalEncoder().train()
    torch.manual_seed(3)
    torch.rand(5)
    state = torch.get_rng_state()
    dataset_of(items, tmp_path / "cache", encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training


def test_without_a_cache_items_keep_their_image_and_latents_are_encoded_on_demand(items):
    encoder = ConvolutionalEncoder()
    dataset = dataset_of(items, None, encoder)
    assert encoder.calls == []
    item = dataset[4]
    assert item["image"].shape == (1, 16, 16)
    assert "latent_mean" not in item
    assert encoder.calls == []
    for got, expected in zip(dataset.posterior(4), direct(items, encoder, 4), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert [len(batch["item_id"]) for batch in DataLoader(dataset, batch_size=4, num_workers=2)] == [4, 3]


@pytest.mark.parametrize("cached", [True, False])
def test_scale_factor_is_the_reciprocal_standard_deviation_of_draws(items, tmp_path, cached):
    dataset = dataset_of(items, tmp_path / "cache" if cached else None, ConvolutionalEncoder())
    means, log_variances = (
        torch.stack(parts).double() for parts in zip(*map(dataset.posterior, range(7)), strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((4000, *means.shape), dtype=torch.float64, generator=generator)
    drawn = means + (0.5 * log_variances).exp() * noise
    factor = measure_scale_factor(dataset)
    assert factor == pytest.approx(1 / drawn.std().item(), rel=2e-3)
    assert factor == pytest.approx((means.var(correction=0) + log_variances.exp().mean()).item() ** -0.5, rel=1e-9)


def test_scale_factor_takes_evenly_spaced_items(items, tmp_path):
    dataset = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    asked = []
    posterior = dataset.posterior
    dataset.posterior = lambda index: (asked.append(index), posterior(index))[1]  # type: ignore[method-assign]
    measure_scale_factor(dataset, max_items=3)
    assert asked == [0, 3, 6]


def test_scale_factor_of_constant_latents_is_refused(items, tmp_path):
    dataset = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    dataset.posterior = lambda index: (torch.ones(2, 4, 4), torch.full((2, 4, 4), -torch.inf))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"latents_\w+\.npy: expected latents with a positive, finite variance, got 0"):
        measure_scale_factor(dataset)


def load_slice(item: dict[str, Any]) -> dict[str, Any]:
    """Slice ``item["slice"]`` of the volume ``item["t1w"]``; any further key would be one too many."""
    image = np.load(item["t1w"], mmap_mode="r")[..., item["slice"]]
    return {**item, "image": torch.from_numpy(np.array(image))[None]}


@pytest.fixture
def slice_items(tmp_path: Path) -> list[dict[str, Any]]:
    """Two volumes (X, Y, Z) of three slices each."""
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", rng.random((16, 24, 3), dtype=np.float32))
    return [
        {"t1w": str(tmp_path / f"{name}.npy"), "flair": f"{name}-flair", "subject": name, "slice": k}
        for name in "ab"
        for k in range(3)
    ]


def slices_of(items: list[dict[str, Any]], folder: Path | None, **options: Any) -> LatentDataset:
    options = {"image_transform": load_slice, "image_keys": ["t1w", "slice"], **options}
    return dataset_of(items, folder, ConvolutionalEncoder(), **options)


def test_slices_of_volumes_are_items_of_their_own(slice_items, tmp_path):
    dataset = slices_of(slice_items, tmp_path / "cache")
    encoder = ConvolutionalEncoder()
    means = []
    for index, item in enumerate(slice_items):
        with torch.no_grad():
            mean, _ = encoder.encode(load_slice(item)["image"][None])
        cached = dataset[index]
        torch.testing.assert_close(cached["latent_mean"], mean[0], atol=1e-5, rtol=1e-5)
        assert cached["latent_mean"].shape == (2, 4, 6)
        # The path of the image is gone, what else the item says is there.
        assert set(cached) == {"latent_mean", "latent_log_variance", "item_id", "flair", "subject", "slice"}
        assert cached["slice"] == item["slice"]
        means.append(cached["latent_mean"])
    assert (means[0] - means[1]).abs().max() > 0.01


def test_transform_sees_every_key_of_the_item_and_the_encoder_only_what_it_needs(slice_items, tmp_path):
    encoded, transformed = [], []

    def note_image(item: dict[str, Any]) -> dict[str, Any]:
        encoded.append(set(item))
        return load_slice(item)

    def note(item: dict[str, Any]) -> dict[str, Any]:
        transformed.append(set(item))
        return item

    dataset = slices_of(slice_items, tmp_path / "cache", transform=note, image_transform=note_image)
    dataset[4]
    assert all(keys == {"t1w", "slice"} for keys in encoded)
    assert {"t1w", "flair", "slice", "latent_mean", "item_id"} <= transformed[0]


def test_other_slices_make_another_cache(slice_items, tmp_path):
    folder = tmp_path / "cache"
    order = [slice_items[k] for k in (1, 0, 2, 3, 4, 5)]
    moved = [{**item, "slice": 2 - item["slice"]} for item in slice_items]
    paths = [slices_of(items, folder).cache_path for items in (slice_items, order, moved, slice_items[:5])]
    assert len(set(paths)) == 4
    others = [{**item, "flair": "another"} for item in slice_items]
    assert slices_of(others, folder).cache_path == paths[0]
    # Other data under the same name.
    np.save(slice_items[0]["t1w"], np.ones((16, 24, 3), dtype=np.float32))
    os.utime(slice_items[0]["t1w"], ns=(0, 0))
    assert slices_of(slice_items, folder).cache_path not in paths


def test_slices_without_a_cache(slice_items):
    dataset = slices_of(slice_items, None)
    item = dataset[5]
    assert torch.equal(item["image"], load_slice(slice_items[5])["image"])
    assert {"t1w", "flair", "slice", "item_id"} <= set(item)
    with torch.no_grad():
        mean, _ = ConvolutionalEncoder().encode(item["image"][None])
    torch.testing.assert_close(dataset.posterior(5)[0], mean[0], atol=1e-5, rtol=1e-5)


def test_keys_that_an_item_does_not_have_are_left_out(slice_items, tmp_path):
    """Optional ones: 2-D images beside volumes have no slice."""
    flat = tmp_path / "flat.npy"
    np.save(flat, np.load(slice_items[0]["t1w"])[..., 1])
    transform = {"image_transform": lambda item: load_slice(item) if "slice" in item else load_flat(item)}

    def load_flat(item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "image": torch.from_numpy(np.load(item["t1w"]))[None]}

    dataset = slices_of([slice_items[1], {"t1w": str(flat)}], tmp_path / "cache", **transform)
    torch.testing.assert_close(dataset[1]["latent_mean"], dataset[0]["latent_mean"], atol=1e-5, rtol=1e-5)


def test_random_changes_are_refused_with_a_cache():
    check_augmentation("", flip_probability=0.5)
    check_augmentation(None, flip_probability=0.5)
    check_augmentation("latents", flip_probability=0.0)
    with pytest.raises(
        ValueError, match='flip_probability: expected 0 with a cache .*got 0.5; .*--latent_cache_dir ""'
    ):
        check_augmentation("latents", flip_probability=0.5)


class Settings:
    """Stands for a transform; its module and name enter the key."""

    def __init__(self) -> None:
        self.size, self.mode, self.inner = (3, 4), "linear", [len]


def test_keys_of_caches_that_exist_stay_the_same(tmp_path):
    """The key as it was computed before autoencoders without a posterior could be used."""
    sources = []
    for index in range(2):
        path = tmp_path / f"{index}.png"
        path.write_bytes(bytes(100 + index))
        os.utime(path, ns=(0, 10**18 + index))
        sources.append({"image": str(path), "slice": index, "flip": None})
    network = nn.Conv2d(1, 2, 2)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)
    transform = type("T", (Settings,), {"__module__": "m"})()
    assert cache_key(sources, ("image",), transform, network) == "457c66cb3844204d"


class VectorEncoder(nn.Module):
    """Volumes (B, C, X, Y, Z) to one latent (B, 3, X/2, Y/2, Z/2) without a draw, as a VQ-GAN gives it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv3d(1, 3, 2, stride=2)
        self.calls: list[int] = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return self.convolution(x)


def load_halves(item: dict[str, Any]) -> dict[str, Any]:
    """The mean of two volumes."""
    volumes = [torch.from_numpy(np.load(item[key])) for key in ("first", "second")]
    return {**item, "volume": (0.5 * (volumes[0] + volumes[1]))[None]}


@pytest.fixture
def volume_items(tmp_path: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    result = []
    for index in range(5):
        item: dict[str, Any] = {"text": f"report {index}"}
        for key in ("first", "second"):
            item[key] = str(tmp_path / f"{key}_{index}.npy")
            np.save(item[key], rng.random((4, 6, 8), dtype=np.float32))
        result.append(item)
    return result


def volumes_of(items: list[dict[str, Any]], folder: Path | None, encoder: nn.Module, **options: Any) -> LatentDataset:
    keys = {"image_keys": ["first", "second"], "path_keys": ["first", "second"], "encoded_key": "volume"}
    return dataset_of(items, folder, encoder, **{"image_transform": load_halves, **keys, **options})


@pytest.mark.parametrize("cached", [True, False])
def test_latents_without_a_posterior_have_a_mean_alone(volume_items, tmp_path, cached):
    encoder = VectorEncoder()
    dataset = volumes_of(volume_items, tmp_path / "cache" if cached else None, encoder)
    for index, item in enumerate(volume_items):
        with torch.no_grad():
            expected = encoder.encode(load_halves(item)["volume"][None])[0]
        mean, log_variance = dataset.posterior(index)
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        assert log_variance is None
        got = dataset[index]
        if cached:
            assert set(got) == {"text", "latent_mean", "item_id"}
            assert torch.equal(got["latent_mean"], mean)
            assert got["latent_mean"].shape == (3, 2, 3, 4)
            assert got["latent_mean"].dtype == torch.float32
        else:
            assert {"volume", "item_id", "first", "second"} <= set(got)
            assert "latent_mean" not in got


def test_latents_without_a_posterior_are_stored_once(volume_items, tmp_path, caplog):
    path = volumes_of(volume_items, tmp_path / "cache", VectorEncoder()).cache_path
    encoder = VectorEncoder()
    dataset = volumes_of(volume_items, tmp_path / "cache", encoder)
    assert encoder.calls == [1]
    assert np.load(path, mmap_mode="r").shape == (5, 1, 3, 2, 3, 4)
    [batch] = DataLoader(dataset, batch_size=5, num_workers=2)
    assert torch.equal(batch["latent_mean"], torch.stack([dataset[index]["latent_mean"] for index in range(5)]))
    # A file with a variance beside it is another encoder's.
    np.save(path, np.zeros((5, 2, 3, 2, 3, 4), dtype=np.float32))
    assert volumes_of(volume_items, tmp_path / "cache", VectorEncoder())[0]["latent_mean"].abs().max() > 0
    assert f"{path}: the stored latents differ" in caplog.text


def test_every_file_of_an_item_counts(volume_items, tmp_path):
    folder = tmp_path / "cache"
    paths = [volumes_of(volume_items, folder, VectorEncoder()).cache_path]
    for key in ("first", "second"):
        os.utime(volume_items[3][key], ns=(0, 1_000_000))
        paths.append(volumes_of(volume_items, folder, VectorEncoder()).cache_path)
    assert len(set(paths)) == 3
    (tmp_path / "moved").mkdir()
    moved = [dict(item) for item in volume_items]
    for item in moved:
        for key in ("first", "second"):
            item[key] = str(Path(item[key]).rename(tmp_path / "moved" / Path(item[key]).name))
    assert volumes_of(moved, folder, VectorEncoder()).cache_path == paths[-1]


def test_paths_are_among_what_the_image_needs(volume_items):
    with pytest.raises(ValueError, match=r"^path_keys: expected keys of image_keys \['first'\], got \['second'\]"):
        volumes_of(volume_items, None, VectorEncoder(), image_keys=["first"], path_keys=["second"])


@pytest.mark.parametrize("cached", [True, False])
def test_scale_factor_of_latents_without_a_posterior(volume_items, tmp_path, cached):
    dataset = volumes_of(volume_items, tmp_path / "cache" if cached else None, VectorEncoder())
    means = torch.stack([dataset.posterior(index)[0] for index in range(5)]).double()
    assert measure_scale_factor(dataset) == pytest.approx(1 / means.std(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize("cached", [True, False])
def test_statistics_of_each_channel(volume_items, tmp_path, cached):
    dataset = volumes_of(volume_items, tmp_path / "cache" if cached else None, VectorEncoder())
    means = torch.stack([dataset.posterior(index)[0] for index in range(5)]).double().transpose(0, 1).flatten(1)
    mean, std = latent_statistics(dataset)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, means.mean(1).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std, means.std(1, correction=0).float(), rtol=1e-6, atol=1e-7)
    scaled = (means - mean[:, None]) / std[:, None]
    torch.testing.assert_close(scaled.mean(1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.std(1, correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)


def test_statistics_of_drawn_latents_hold_their_variance(items, tmp_path):
    dataset = dataset_of(items, tmp_path / "cache", ConvolutionalEncoder())
    means, log_variances = (torch.stack(p).double() for p in zip(*map(dataset.posterior, range(7)), strict=True))
    mean, std = latent_statistics(dataset)
    variance = means.var((0, 2, 3), correction=0) + log_variances.exp().mean((0, 2, 3))
    torch.testing.assert_close(mean, means.mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std, variance.sqrt().float(), rtol=1e-6, atol=1e-7)


def given_latents(volume_items: list[dict[str, Any]], *latents: torch.Tensor) -> LatentDataset:
    dataset = volumes_of(volume_items[: len(latents)], None, VectorEncoder())
    dataset.posterior = lambda index: (latents[index], None)  # type: ignore[method-assign]
    return dataset


def test_statistics_survive_a_mean_far_from_zero(volume_items):
    """Squares of 1e4 would leave float32 nothing of a deviation of 0.1, nor much of it with sums of float64."""
    generator = torch.Generator().manual_seed(0)
    latents = [1e4 + 0.1 * torch.randn((2, 4, 6, 8), generator=generator) for _ in range(5)]
    mean, std = latent_statistics(given_latents(volume_items, *latents))
    values = torch.stack(latents).double()
    torch.testing.assert_close(mean.double(), values.mean((0, 2, 3, 4)), rtol=1e-7, atol=0)
    torch.testing.assert_close(std.double(), values.std((0, 2, 3, 4), correction=0), rtol=1e-6, atol=0)


def test_statistics_take_evenly_spaced_items(volume_items):
    latents = [torch.tensor([[index, index + 1.0]]) for index in range(5)]
    mean, std = latent_statistics(given_latents(volume_items, *latents), max_items=3)
    assert mean.tolist() == [2.5]  # of the items 0, 2 and 4
    assert std.item() == pytest.approx((2 * 4 / 3 + 0.25) ** 0.5)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e6, float("nan"), float("inf")])
def test_statistics_of_a_constant_or_infinite_channel_are_refused(volume_items, value):
    latents = [torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for latent in latents:
        latent[1] = value
    with pytest.raises(
        ValueError,
        match=r"^latents: expected latents that vary, with finite values, in each of 3 channels, got the variance "
        r"\S+ in channel 1 \(1 such channels\); train the autoencoder first",
    ):
        latent_statistics(given_latents(volume_items, *latents))


# Further encodings


class Brightness:
    """The second volume, brighter; the text of the item is never read."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        assert "text" not in item or "volume" in item, "only what the encoding needs, or after the image transform"
        return {**item, "bright": self.factor * torch.from_numpy(np.load(item["second"]))[None]}


def further_of(factor: float = 2.0, weight: float = 1.0) -> tuple[VectorEncoder, dict[str, Encoding]]:
    network = VectorEncoder()
    network.convolution.weight.data.mul_(weight)
    encoding = Encoding(
        network, Brightness(factor), keys=["second", "shift"], path_keys=["second"], encoded_key="bright"
    )
    return network, {"condition": encoding}


@pytest.mark.parametrize("workers", [0, 2])
def test_further_latents_lie_in_files_of_their_own(volume_items, tmp_path, workers):
    network, further = further_of()
    folder = tmp_path / "cache"
    dataset = volumes_of(volume_items, folder, VectorEncoder(), further=further, num_workers=workers)
    assert network.calls == [3, 2]
    assert sorted(path.name.split("_")[0] for path in folder.glob("*.npy")) == ["condition", "latents"]
    # The autoencoder's are those of a data set without them.
    assert volumes_of(volume_items, folder, VectorEncoder()).cache_path == dataset.cache_path
    [batch] = DataLoader(dataset, batch_size=5, num_workers=workers)
    assert set(batch) == {"text", "latent_mean", "condition", "item_id"}
    with torch.no_grad():
        volumes = torch.stack([Brightness()({"second": item["second"]})["bright"] for item in volume_items])
        torch.testing.assert_close(batch["condition"], network.encode(volumes), atol=1e-5, rtol=1e-5)
    assert batch["condition"].dtype == torch.float32
    network, further = further_of()
    volumes_of(volume_items, folder, VectorEncoder(), further=further)
    assert network.calls == [1], "one stored item is compared"


def test_every_cause_of_other_further_latents_makes_another_file(volume_items, tmp_path):
    folder = tmp_path / "cache"

    def files(**options: Any) -> int:
        volumes_of(volume_items, folder, VectorEncoder(), further=further_of(**options)[1])
        return len(list(folder.glob("condition_*.npy")))

    assert [files(), files(), files(factor=3.0), files(weight=0.5)] == [1, 1, 2, 3]
    os.utime(volume_items[1]["second"], ns=(0, 1_000_000))
    assert files() == 4
    volume_items[1]["shift"] = 3
    assert files() == 5
    os.utime(volume_items[1]["first"], ns=(0, 1_000_000))
    assert files() == 5, "the first volume is none of its files"
    assert len(list(folder.glob("latents_*.npy"))) == 3


def test_without_a_cache_further_transforms_are_applied_instead(volume_items):
    network, further = further_of()
    item = volumes_of(volume_items, None, VectorEncoder(), further=further)[2]
    assert {"volume", "bright", "first", "second", "text"} <= set(item)
    assert "condition" not in item
    assert network.calls == []


def test_store_encodes_what_is_asked_for_or_reads_it(volume_items, tmp_path):
    network, further = further_of()
    stores = [LatentStore(volume_items, further["condition"], folder) for folder in (tmp_path, "")]
    assert [store.path is None for store in stores] == [False, True]
    assert [len(store) for store in stores] == [5, 5]
    assert network.calls == [5]
    for index in (0, 4):
        torch.testing.assert_close(*(store[index] for store in stores), atol=1e-5, rtol=1e-5)
    assert stores[0][1].shape == (1, 3, 2, 3, 4)
    encoding = further["condition"]
    inputs = list_data_collate([encoding.inputs(encoding.source(item)) for item in volume_items[:2]])
    assert encoding.encode(inputs).shape == (2, 1, 3, 2, 3, 4)


def test_workers_get_neither_networks_nor_stored_values(volume_items, tmp_path):
    dataset = volumes_of(volume_items, tmp_path / "cache", VectorEncoder(), further=further_of()[1])
    first = dataset[0]
    sent = pickle.dumps(dataset)
    assert b"convolution" not in sent
    assert b"memmap" not in sent
    copy = pickle.loads(sent)
    for key in ("latent_mean", "condition"):
        assert torch.equal(copy[0][key], first[key])
