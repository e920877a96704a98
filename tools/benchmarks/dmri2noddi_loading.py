# SPDX-License-Identifier: Apache-2.0
"""From the files of a subject to what a training step of ``dmri2noddi`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import Dataset

from shared.transforms.diffusion_mri import load_features, load_maps
from tools.benchmarks.dmri2noddi_networks import in_words, noddi_config, random_model
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Setting, Workload, relative_difference
from tools.phantoms.dmri2noddi import make_dataset

TOLERANCE = 1e-4


def patch_loading(setting: Setting) -> Workload:
    """An epoch over patches: volumes read and features fitted for each, kept as memory maps, or encoded once."""
    share, side, stride = setting.pick((1 / 16, 8, 8), (1 / 8, 16, 9), (1.0, 32, 18))
    shape = setting.pick((32, 36, 34), (48, 56, 52), (136, 172, 136))
    folder = temporary_folder("dmri2noddi_patches")
    # With one for training and one for validation.
    make_dataset(str(folder / "data"), num_subjects=2, shape=shape, split=(0.5, 0.5, 0.0), lesions=0.0)
    changes = {"dataset_dir": str(folder / "data"), "volume_cache_dir": str(folder / "volumes"), "num_workers": 0}
    options: dict[str, Any] = {"share": share, "patch": [side] * 3, "patch_stride": [stride] * 3, **changes}

    def dataset(latents: str) -> Dataset:
        parser = noddi_config(setting, ["train"], **options, latent_cache_dir=latents)
        parser["network_def"] = parser["pretrained"] = model
        return parser.get_parsed_content("train#dataset")

    parser = noddi_config(setting, ["train"], **options)
    model, features = random_model(parser, setting), parser.get_parsed_content("features_def")
    volumes, latents = dataset(""), dataset(str(folder / "latents"))
    items = volumes.data

    def read(index: int) -> dict[str, Any]:
        item = items[index]
        start = item["patch"]
        low, high = ((slice(None), *(slice(factor * a, factor * (a + side)) for a in start)) for factor in (1, 2))
        return {
            "image": load_features(item, features).as_tensor()[low].contiguous(),
            "maps": load_maps(item).as_tensor()[high].contiguous(),
        }

    timed = min(len(items), 3)

    def equal(results: Mapping[str, list[dict[str, Any]]]) -> str:
        first, *others = results
        worst = 0.0
        for name in others:
            for key in ("latent_mean", "condition_latent"):
                pairs = zip(results[name], results[first], strict=False)
                for one, two in pairs:
                    difference = relative_difference(_encoded(one, key), _encoded(two, key))
                    if not difference <= TOLERANCE:
                        raise ValueError(f"{name}: expected {key} within {TOLERANCE:g}, got {difference:.3g}.")
                    worst = max(worst, difference)
        return f"latents of maps and features equal within {worst:.1e} (relative)"

    @torch.no_grad()
    def _encoded(item: Mapping[str, Any], key: str) -> torch.Tensor:
        if key in item:
            return item[key]
        network, source = {
            "latent_mean": (model.autoencoder.encode, "maps"),
            "condition_latent": (model.encoder, "image"),
        }[key]
        return network(torch.as_tensor(item[source], device=setting.device)[None])[0].cpu()

    baseline = "volumes read for each patch"
    return Workload(
        name="patches of an epoch",
        sizes=(
            f"{len(items)} patches of {side}^3 from one subject of {' x '.join(map(str, shape))} voxels; {timed} timed "
            f"of the first way, which repeat; {in_words(share)}"
        ),
        ways={
            baseline: lambda: [read(index) for index in range(timed)],
            "volumes as memory maps": lambda: [volumes[index] for index in range(len(items))],
            "dmri2noddi: latents as memory maps": lambda: [latents[index] for index in range(len(items))],
        },
        equal=equal,
        factors={baseline: len(items) / timed},
    )
