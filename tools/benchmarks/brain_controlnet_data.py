# SPDX-License-Identifier: Apache-2.0
"""Reading slices for ``brain_controlnet``, and measuring translated ones."""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import MAEMetric, MultiScaleSSIMMetric, PSNRMetric
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, Orientationd
from PIL import Image

from shared.datalist import load_datalist
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from shared.metrics.translation import slice_scores
from shared.slices import slice_items
from shared.transforms.slices import LoadSlicesd
from shared.transforms.volumes import RobustScaled
from tools.benchmarks.brain_controlnet_networks import brain_config, image_size, random_model, random_pairs
from tools.benchmarks.workload import Setting, Workload, equal_within, relative_difference
from tools.phantoms.brain_controlnet import make_dataset
from tools.prepare.brain_pairs import brain_pairs

SLICES = 5
KEYS = ["t1w", "flair"]
# Prepared volumes are kept in 16 bit, pictures in 8 bit, and convolutions add up in another order in a batch.
TOLERANCE, PICTURE_TOLERANCE, LATENT_TOLERANCE = 1e-4, 1e-2, 1e-3
SCORE_TOLERANCE = 1e-5

Pair = tuple[torch.Tensor, torch.Tensor]
"""T1w and FLAIR ``(1, H, W)``; of the cache of latents the mean of the T1w's posterior ``(3, h, w)`` and FLAIR."""


def slice_reading(setting: Setting) -> Workload:
    """Pairs of T1w and FLAIR in random order, as a training of the ControlNet asks for them."""
    depth = setting.pick(8, 40, 160)
    height, width = image_size(setting)
    count = setting.pick(2, 2, 20)
    folder = _Folder()
    raw, prepared, pictures = (folder.path / name for name in ("raw", "prepared", "pictures"))
    spacing = [224 / width, 224 / width, 160 / depth]
    first = (depth - SLICES) // 2
    make_dataset(str(raw), n=count, size=[height, width, depth], spacing=spacing, seed=setting.seed, split=(1, 0, 0))
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a report for the command line, and its bar
        brain_pairs(
            str(raw), str(prepared), slab=[first, first + SLICES], size=None, fractions=(1, 0, 0), seed=setting.seed
        )
    raw_items = slice_items(load_datalist(raw, "training"), slab=[first, first + SLICES])
    items = slice_items(load_datalist(prepared, "training"))
    number = {(item["subject"], item["slice"]): index for index, item in enumerate(items)}
    order = list(range(len(raw_items)))
    random.Random(setting.seed).shuffle(order)
    asked = [raw_items[index] for index in order]
    numbers = [number[item["subject"], item["slice"] - first] for item in asked]

    # A narrow encoder: its latents are as large, and nobody times it.
    parser = brain_config(setting, "train", setting.pick(Fraction(1, 32), Fraction(1, 8), Fraction(1)))
    model = random_model(parser, setting)
    autoencoder = model.autoencoder.eval()
    parser["dataset_dir"] = str(prepared)
    parser["latent_cache_dir"] = str(folder.path / "latents")
    parser["num_workers"] = 0
    parser["train#dataset#autoencoder"] = autoencoder
    dataset = parser.get_parsed_content("train#dataset")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about readers of DICOM, which are looked for in any case
        loaders = LoadImaged(KEYS, reader="NibabelReader"), LoadImage(reader="PILReader", reverse_indexing=False)
    prepare = [EnsureChannelFirstd(KEYS, channel_dim="no_channel"), Orientationd(KEYS, axcodes="RAS", labels=None)]
    whole, read_picture = Compose([loaders[0], *prepare, RobustScaled(KEYS)]), loaders[1]

    def whole_volumes() -> list[Pair]:
        found = []
        for item in asked:
            loaded = whole({key: item[key] for key in KEYS})
            t1w, flair = (loaded[key].as_tensor()[..., item["slice"]].clone() for key in KEYS)
            found.append((t1w, flair))
        return found

    def by_slice(wanted: list[dict[Any, Any]]) -> Callable[[], list[Pair]]:
        def run() -> list[Pair]:
            load = LoadSlicesd(KEYS, optional_keys=[])  # anew: without volumes kept from the last time
            return [(loaded["t1w"], loaded["flair"]) for loaded in (load(dict(item)) for item in wanted)]

        return run

    _write_pictures(pictures, [items[index] for index in numbers])

    def as_pictures() -> list[Pair]:
        def read(key: str, index: int) -> torch.Tensor:
            return read_picture(pictures / f"{index}_{key}.png").as_tensor()[None] / 255

        return [(read("t1w", index), read("flair", index)) for index in range(len(numbers))]

    def cached() -> list[Pair]:
        found = (dataset[index] for index in numbers)
        return [(item["latent_mean"], item["condition"]) for item in found]

    def equal(results: Mapping[str, list[Pair]]) -> str:
        baseline, *others = results
        t1w, flair = _stacked(results[baseline])
        worst: dict[str, float] = {}
        for name in others:
            first_part, found = _stacked(results[name])
            limit, kind = (PICTURE_TOLERANCE, "8 bit") if "PNG" in name else (TOLERANCE, "slices")
            pairs = [(found, flair, limit, kind)]
            if "latents" in name:
                with torch.no_grad():
                    mean = autoencoder.encode(t1w.to(setting.device))[0].cpu()
                pairs.append((first_part, mean, LATENT_TOLERANCE, "latents"))
            else:
                pairs.append((first_part, t1w, limit, kind))
            for got, expected, limit, kind in pairs:
                worst[kind] = max(worst.get(kind, 0.0), relative_difference(got, expected))
                if not worst[kind] <= limit:
                    raise ValueError(f"{name}: expected {kind} within {limit:g} of {baseline}, got {worst[kind]:.3g}.")
        return "equal to whole volumes within " + ", ".join(f"{value:.1e} ({kind})" for kind, value in worst.items())

    def keeping(way: Callable[[], list[Pair]]) -> Callable[[], list[Pair]]:
        return lambda: folder.used_by(way)

    ways = {
        "whole compressed volume for every slice": whole_volumes,
        "LoadSlicesd, compressed volumes": by_slice(asked),
        "8-bit PNG slices, the published form": as_pictures,
        "LoadSlicesd, prepared volumes": by_slice([items[index] for index in numbers]),
        "bundle: prepared volumes, latents from the cache": cached,
    }
    return Workload(
        name=f"reading {len(asked)} pairs of slices in random order",
        sizes=f"{count} phantom heads {height}x{width}x{depth}, T1w and FLAIR; without the encoder in all ways",
        ways={name: keeping(way) for name, way in ways.items()},
        equal=equal,
    )


class _Folder:
    """A temporary folder that lives as long as a way that reads its files."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="brain_controlnet_slices_"))
        # Not TemporaryDirectory, which warns when nobody closes it.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def used_by(self, way: Callable[[], list[Pair]]) -> list[Pair]:
        return way()


def _stacked(pairs: list[Pair]) -> Pair:
    t1w, flair = zip(*pairs, strict=True)
    return torch.stack([torch.as_tensor(x) for x in t1w]), torch.stack([torch.as_tensor(x) for x in flair])


def _write_pictures(folder: Path, items: list[dict[Any, Any]]) -> None:
    folder.mkdir()
    load = LoadSlicesd(KEYS, optional_keys=[])
    for index, item in enumerate(items):
        loaded = load(item)
        for key in KEYS:
            picture = np.rint(loaded[key][0].numpy() * 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{index}_{key}.png")


def translation_scores(setting: Setting) -> Workload:
    """PSNR, MAE and MS-SSIM of translated slices, as published for each image by itself."""
    count = setting.pick(3, 64, 1000)
    kernel_size = 7
    images, noise = random_pairs(setting, count) if min(image_size(setting)) >= 112 else _larger_pairs(setting, count)
    translated = (images + 0.2 * (noise - 0.5)).clamp(0, 1)
    ssim = PairwiseMultiScaleSSIM(kernel_size=kernel_size)

    def one_by_one() -> torch.Tensor:
        metrics: list[Any] = [
            PSNRMetric(max_val=1.0),
            MAEMetric(),
            MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel_size),
        ]
        rows = []
        for index in range(count):
            made, real = translated[index : index + 1], images[index : index + 1]
            rows.append(torch.cat([metric(made, real).flatten().cpu() for metric in metrics]))
        return torch.stack(rows)

    def batched(size: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            metrics: list[Any] = [
                PSNRMetric(max_val=1.0),
                MAEMetric(),
                MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=kernel_size),
            ]
            parts = zip(translated.split(size), images.split(size), strict=True)
            return torch.cat([
                torch.cat([metric(made, real).reshape(-1, 1).cpu() for metric in metrics], dim=1)
                for made, real in parts
            ])  # fmt: skip

        return run

    def ours() -> torch.Tensor:
        scores = slice_scores(translated, images, None, ssim=ssim, device=setting.device)
        return torch.from_numpy(np.stack([scores[name] for name in ("psnr", "mae", "ms_ssim")], axis=1))

    return Workload(
        name=f"PSNR, MAE and MS-SSIM of {count} slices",
        sizes=f"{'x'.join(map(str, images.shape[2:]))}, kernel {kernel_size}; without the reading of files",
        ways={
            "MONAI core, one image at a time": one_by_one,
            "MONAI core, batches of 16": batched(16),
            "bundle": ours,
        },
        equal=equal_within(SCORE_TOLERANCE, "scores"),
    )


def _larger_pairs(setting: Setting, count: int) -> Pair:
    images, noise = random_pairs(setting, count)
    larger = torch.nn.functional.interpolate(torch.cat((images, noise)), scale_factor=4)
    return larger[:count], larger[count:]
