# SPDX-License-Identifier: Apache-2.0
"""From the file of a chest film to what a training step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, PersistentDataset
from PIL import Image

from shared.latent_cache import LatentDataset
from tools.benchmarks.bundle_config import bundle_config
from tools.benchmarks.published_chest import film_transforms
from tools.benchmarks.published_networks import spread_zeros
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Setting, Workload, relative_difference

BASELINE = "published transforms, later epochs (PersistentDataset)"
FILES = "published transforms, from files"
TRANSFORMS = "cxr_ldm without a cache of latents"
BUNDLE = "cxr_ldm"
TOLERANCE = 1e-4


def film_loading(setting: Setting) -> Workload:
    """One epoch over films: from a cache of transformed films as published, from their files, and from latents."""
    count = setting.pick(3, 24, 64)
    size = setting.pick((64, 96), (512, 512), (512, 512))
    folder = temporary_folder("cxr_ldm_films")
    items = []
    generator = np.random.default_rng(setting.seed)
    for index in range(count):
        path = folder / f"{index}.png"
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8))
        # The shorter side has its length already, as the published preparation leaves it.
        coarse.resize((max(size) + setting.pick(6, 108, 108), max(size)), Image.Resampling.BICUBIC).save(path)
        items.append({"image": str(path)})
    channels = setting.pick([4, 4, 8, 8], [4, 4, 8, 8], [64, 128, 128, 128])
    changes = {
        "device": f"$torch.device('{setting.device}')",
        "image_size": list(size),
        "latent_shape": [3, size[0] // 8, size[1] // 8],
        "autoencoder_def#channels": channels,
        "autoencoder_def#norm_num_groups": min(channels),
    }
    parser = bundle_config("cxr_ldm", ["train"], changes)
    preprocessing = parser.get_parsed_content("image_preprocessing")
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        autoencoder: Any = spread_zeros(parser.get_parsed_content("autoencoder_def"), setting.seed)
    cached = LatentDataset(
        items,
        image_transform=preprocessing,
        autoencoder=autoencoder,
        cache_dir=folder / "latents",
        device=setting.device,
    )
    datasets: dict[str, Any] = {
        BASELINE: PersistentDataset(items, film_transforms(size), cache_dir=folder / "films"),
        FILES: Dataset(items, film_transforms(size)),
        TRANSFORMS: Dataset(items, preprocessing),
        BUNDLE: cached,
    }

    def epoch(name: str) -> list[dict[str, Any]]:
        transform = datasets[name].transform
        if name in (BASELINE, FILES):
            transform.set_random_state(setting.seed)
        return [datasets[name][index] for index in range(count)]

    def latent_of(item: Mapping[str, Any]) -> torch.Tensor:
        if "latent_mean" in item:
            return item["latent_mean"]
        with torch.no_grad():
            image = torch.as_tensor(item["image"].as_tensor(), device=setting.device)
            return autoencoder.encode(image[None])[0][0].cpu()

    def equal(results: Mapping[str, list[dict[str, Any]]]) -> str:
        unmoved = [index for index, item in enumerate(results[BASELINE]) if not _is_moved(item["image"])][:4]
        worst = 0.0
        for name, found in results.items():
            for index in unmoved:
                if _is_moved(found[index].get("image")):
                    continue
                difference = relative_difference(latent_of(found[index]), latent_of(results[BASELINE][index]))
                if not difference <= TOLERANCE:
                    raise ValueError(
                        f"{name}: expected latents within {TOLERANCE:g} of {BASELINE}, got {difference:.2g} for film "
                        f"{index}."
                    )
                worst = max(worst, difference)
        return f"mean latents of {len(unmoved)} films that were not moved at random equal within {worst:.0e}"

    return Workload(
        name="loading a film in training",
        sizes=(
            f"{count} films of {size[0]} x {size[1]}, 8 bit, without their texts, in one process. The published "
            "program moves every tenth film a little; a cache of latents cannot"
        ),
        ways={name: lambda name=name: epoch(name) for name in datasets},  # type: ignore[misc]
        equal=equal,
    )


def _is_moved(image: Any) -> bool:
    operations = getattr(image, "applied_operations", [])
    return any(step["class"] == "RandAffined" and step["do_transforms"] for step in operations)
