# SPDX-License-Identifier: Apache-2.0
"""What a data loader's workers cost and bring where latents are cached."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader
from monai.transforms import Compose
from torch import nn

from shared.latent_cache import LatentDataset
from shared.transforms.text import LoadReportd, RandDropTextd, RandomSentencesd
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.workload import Builder, Setting, Workload

EPOCHS = 2
REPORT = (
    "The heart is enlarged. The lungs are clear. There is no effusion. No pneumothorax is seen. Lines are in place."
)


class _Picture:
    """A picture that depends on the item's file, in place of reading one."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(int(Path(item["image"]).stem))
        return {**item, "image": torch.rand(1, *self.size, generator=generator)}


def _length(item: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """The text's length stands for its token ids: the tokenizer needs a vocabulary file."""
    return {**item, "text": torch.tensor(len(item["text"]))}


def _report() -> Compose:
    """Reads a report and draws from it, as stage 2 of ``cxr_ldm`` does."""
    draws = [RandomSentencesd("text", max_sentences=5, num_excerpts=8), RandDropTextd("text", prob=0.1)]
    return Compose([LoadReportd("text"), *draws, _length])


class _Pooling(nn.Module):
    """Stands for the encoder: what is cached is of its size, ``(2, 3, H / 8, W / 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = nn.functional.avg_pool2d(images, 8).expand(-1, 3, -1, -1) * self.scale
        return mean, torch.ones_like(mean)


def cached_latents(folder: Path, count: int, size: tuple[int, int]) -> LatentDataset:
    """A data set of ``count`` items as stage 2 of ``cxr_ldm`` has it, with its cache in ``folder``."""
    items = []
    for number in range(count):
        image, text = folder / f"{number}.png", folder / f"{number}.txt"
        image.write_bytes(b"")
        text.write_text(REPORT, encoding="utf-8")
        items.append({"image": str(image), "text": str(text)})
    return LatentDataset(
        items, _report(), image_transform=_Picture(size), autoencoder=_Pooling(), cache_dir=folder / "latents"
    )


def epochs_by_workers(setting: Setting) -> Workload:
    """Epochs of the loader alone, nothing trained: the workers start anew in each of them."""
    count, batch = setting.pick((12, 2), (512, 32), (4096, 32))
    size = setting.pick((64, 96), (512, 512), (512, 512))
    workers = setting.pick([0, 1, 2], [0, 1, 2, 4, 8], [0, 1, 2, 4, 8])
    dataset = cached_latents(temporary_folder("scaling"), count, size)

    def load(num_workers: int) -> dict[str, Any]:
        loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=num_workers)
        order, total, first = [], [], []
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            for _ in range(EPOCHS):
                start = time.perf_counter()
                for number, content in enumerate(loader):
                    if number == 0:
                        first.append(time.perf_counter() - start)
                    order += content["item_id"]
                    total.append(content["latent_mean"].double().sum())
        return {"order": order, "total": torch.stack(total), "first": sum(first) / EPOCHS}

    ways = {f"{n} workers" if n != 1 else "1 worker": lambda n=n: load(n) for n in workers}

    def equal(results: Mapping[str, Any]) -> str:
        expected = next(iter(results.values()))
        for name, result in results.items():
            if result["order"] != expected["order"] or not torch.equal(result["total"], expected["total"]):
                raise ValueError(
                    f"{name}: expected the same items with the same latents in the same order, got others."
                )
        first = ", ".join(f"{name} {1000 * result['first']:.0f} ms" for name, result in results.items())
        return f"order and latents equal; first batch of an epoch after {first}"

    return Workload(
        name="an epoch of cached latents by number of workers",
        sizes=f"{count} items of latents {3} x {size[0] // 8} x {size[1] // 8}, batches of {batch}, nothing trained; "
        "workers start anew in each epoch; 8 is the default of the configs",
        ways=ways,
        equal=equal,
        factors=dict.fromkeys(ways, 1 / EPOCHS),
        clock="wall",
    )


BUILDERS: tuple[Builder, ...] = (epochs_by_workers,)
