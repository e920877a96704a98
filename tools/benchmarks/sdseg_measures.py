# SPDX-License-Identifier: Apache-2.0
"""Measures of masks, and the way of pictures and masks from their files to a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.data import DataLoader
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDistanceMetric

from shared.metrics.segmentation import foreground_names, mask_scores
from tools.benchmarks.bundle_config import bundle_config
from tools.benchmarks.sdseg_programs import model_changes, phantoms, read_mask, save_model
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Setting, Workload, equal_within, relative_difference


def mask_measures(setting: Setting) -> Workload:
    """Dice, IoU and surface distances of a test set, picture by picture."""
    size, count = setting.pick((72, 96), (288, 384), (576, 768)), setting.pick(3, 24, 100)
    items = phantoms(temporary_folder("sdseg_measures"), count, size=size, seed=setting.seed)
    truths = [read_mask(item["label"]) for item in items]
    # As a network that is near the truth would draw them.
    predictions = [torch.roll(truth, shifts=(3, -2), dims=(0, 1)) for truth in truths]
    names = foreground_names(1, None)

    def separate() -> torch.Tensor:
        measures: dict[str, Any] = {
            "dice": DiceMetric(),
            "iou": MeanIoU(),
            "hd95": HausdorffDistanceMetric(percentile=95, include_background=True),
            "assd": SurfaceDistanceMetric(symmetric=True, include_background=True),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI 1.6 warns of an argument that it passes to itself
            for prediction, truth in zip(predictions, truths, strict=True):
                for measure in measures.values():
                    measure(prediction[None, None].float(), truth[None, None].float())
        return torch.cat([measure.get_buffer().double() for measure in measures.values()], dim=1)

    def together() -> torch.Tensor:
        pairs = zip(predictions, truths, strict=True)
        scores = [mask_scores(prediction.byte(), truth.byte(), names)[0] for prediction, truth in pairs]
        return torch.tensor([[s.dice, s.iou, s.hd95, s.assd] for s in scores], dtype=torch.float64)

    return Workload(
        name="Dice, IoU, HD95 and ASSD of a set of masks",
        sizes=f"{count} pairs of masks of {size[0]} x {size[1]}",
        ways={"MONAI's four metrics, pair by pair": separate, "sdseg": together},
        equal=equal_within(1e-6, "scores"),
    )


def pictures_and_masks(setting: Setting) -> Workload:
    """An epoch of pictures and masks, from their files to what a step takes."""
    count = setting.pick(4, 24, 200)
    folder = temporary_folder("sdseg_data")
    items = phantoms(folder / "data", count, size=(288, 384), seed=setting.seed)
    changes = {**model_changes(setting), "amp": False, "dataset_dir": str(folder)}
    save_model(bundle_config("sdseg", ["inference"], changes), folder / "models", setting.seed)

    def epoch(cache: str, *, encoded: bool = False) -> Callable[[], dict[str, torch.Tensor]]:
        values = {
            **model_changes(setting), "ckpt_dir": str(folder / "models"), "latent_cache_dir": cache, "flips": "none",
            "num_workers": 0, "train#dataset#data": items,
        }  # fmt: skip
        parser = bundle_config("sdseg", ["train"], values)
        dataset = parser.get_parsed_content("train#dataset")
        autoencoder = parser.get_parsed_content("pretrained").autoencoder

        def run() -> dict[str, torch.Tensor]:
            parts: dict[str, list[torch.Tensor]] = {"image": [], "latent_mean": []}
            for batch in DataLoader(dataset, batch_size=4, num_workers=0):
                parts["image"].append(batch["image"].as_tensor())
                if "latent_mean" in batch:
                    parts["latent_mean"].append(batch["latent_mean"])
                elif encoded:
                    with torch.no_grad():
                        mean, _ = autoencoder.encode(batch["target"].as_tensor().to(setting.device))
                    parts["latent_mean"].append(mean.cpu())
            return {key: torch.cat(values) for key, values in parts.items() if values}

        return run

    def equal(results: Mapping[str, dict[str, torch.Tensor]]) -> str:
        first, *others = results
        worst = {"image": 0.0, "latent_mean": 0.0}
        for name in others:
            for key, limit in (("image", 0.0), ("latent_mean", 1e-4)):
                if key not in results[name]:
                    continue  # the way that does not encode
                worst[key] = max(worst[key], relative_difference(results[name][key], results[first][key]))
                if worst[key] > limit:
                    raise ValueError(f"{name}: expected {key} within {limit:g} of {first}, got {worst[key]:.2g}.")
        return f"images equal, latents of masks within {worst['latent_mean']:.0e} (relative)"

    return Workload(
        name="pictures and masks of an epoch",
        sizes=f"{count} pictures of 288 x 384, to {' x '.join(map(str, model_changes(setting)['image_size']))}",
        ways={
            "both through their transforms, masks encoded": epoch("", encoded=True),
            "both through their transforms, not encoded": epoch(""),
            "sdseg: pictures through their transforms, latents of masks cached": epoch(str(folder / "latents")),
        },
        equal=equal,
    )
