# SPDX-License-Identifier: Apache-2.0
"""Pictures while training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from shared.files import atomic_path


class PreviewGrid:
    """Save a PNG grid every few epochs and hand it to the experiment tracker.

    ``monai.handlers.TensorBoardImageHandler`` does not fit: it shows what passed through the engine, while a preview
    shows the same few samples every time. The random state is left as it was.

    Args:
        render: returns images ``(N, 1, H, W)`` in [0, 1].
        output_dir: folder of the pictures.
        name: pictures are called ``epoch_<epoch>_<name>.png``.
        interval: epochs between pictures; the last epoch always makes one.
        columns: pictures in a row.
        tracker: ``ExperimentTracker`` that keeps the pictures too, or ``None``.
    """

    def __init__(
        self,
        render: Callable[[], torch.Tensor],
        output_dir: str | Path,
        *,
        name: str,
        interval: int = 1,
        columns: int = 8,
        tracker: Any = None,
    ) -> None:
        self.render = render
        self.output_dir = Path(output_dir)
        self.name = name
        self.interval = interval
        self.columns = columns
        self.tracker = tracker

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Any) -> None:
        epoch = engine.state.epoch
        if engine.state.rank != 0 or (epoch % self.interval and epoch != engine.state.max_epochs):
            return
        path = self.output_dir / f"epoch_{epoch:04d}_{self.name}.png"
        with torch.random.fork_rng(), torch.no_grad():
            save_grid(self.render(), path, columns=self.columns)
        if self.tracker is not None:
            self.tracker.log_picture(path)


class ReconstructionPreview:
    """The same images over their reconstructions: a row of ``columns`` images, a row of reconstructions, and so on.

    Args:
        autoencoder: with ``encode(x) -> (mean, sigma)`` and ``decode``.
        dataset: gives items with ``image`` ``(1, H, W)``.
        columns: pictures in a row.
        n: number of images, the first of the dataset.
        device: where the network is.
    """

    def __init__(
        self, autoencoder: Any, dataset: Any, *, columns: int = 8, n: int = 8, device: torch.device | str = "cpu"
    ) -> None:
        self.autoencoder, self.dataset, self.columns, self.n, self.device = autoencoder, dataset, columns, n, device

    def __call__(self) -> torch.Tensor:
        count = min(self.n, len(self.dataset))
        images = torch.stack([torch.as_tensor(self.dataset[i]["image"]) for i in range(count)]).to(self.device)
        was_training = self.autoencoder.training
        self.autoencoder.eval()
        mean, _ = self.autoencoder.encode(images)
        reconstructions = self.autoencoder.decode(mean)
        self.autoencoder.train(was_training)
        rows = zip(images.split(self.columns), reconstructions.split(self.columns), strict=True)
        return torch.cat([_pad_row(part, self.columns) for pair in rows for part in pair])


class SamplePreview:
    """Samples of fixed prompts with fixed seeds.

    Args:
        network: network to sample from, e.g. the moving average.
        sampler: ``inferer(tokens, network, seeds=...)`` that returns images.
        tokenizer: texts to ids ``(B, L)``.
        prompts: one text each.
        samples_per_prompt: pictures of each prompt, in a row.
        seed: seed of the first sample of each prompt; the next ones count up.
        device: where the network is.
    """

    def __init__(
        self,
        network: nn.Module,
        sampler: Callable[..., torch.Tensor],
        tokenizer: Callable[[list[str]], torch.Tensor],
        prompts: Sequence[str],
        *,
        samples_per_prompt: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.sampler, self.device = network, sampler, device
        texts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        self.seeds = [seed + index for _ in prompts for index in range(samples_per_prompt)]
        self.tokens = torch.stack((tokenizer(texts), tokenizer([""] * len(texts))), dim=1)

    def __call__(self) -> torch.Tensor:
        was_training = self.network.training
        self.network.eval()
        images = self.sampler(self.tokens.to(self.device), self.network, seeds=self.seeds)
        self.network.train(was_training)
        return images


def save_grid(images: torch.Tensor, path: str | Path, *, columns: int = 8, gap: int = 2) -> None:
    """Write images ``(N, 1, H, W)`` in [0, 1] as one 8-bit grey PNG, row by row; values outside are clamped."""
    values = images.detach().float().cpu().clamp(0, 1).numpy()[:, 0]
    count, height, width = values.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap), dtype=np.float32)
    for index, value in enumerate(values):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = value
    marker = PngInfo()
    marker.add_text("Comment", "contains synthetic images; research only, not for diagnosis")
    with atomic_path(path) as temporary:
        Image.fromarray((grid * 255).round().astype(np.uint8)).save(temporary, format="PNG", pnginfo=marker)


def _pad_row(images: torch.Tensor, columns: int) -> torch.Tensor:
    missing = columns - len(images)
    return torch.cat((images, images.new_ones((missing, *images.shape[1:])))) if missing > 0 else images
