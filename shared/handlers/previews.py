# SPDX-License-Identifier: Apache-2.0
"""Pictures while training runs.

Brain slices are tensors with the left-right axis first; ``for_display`` turns them as radiologists look at them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from shared.pictures import save_grid, spread_indices
from shared.transforms.volumes import for_display


class PreviewGrid:
    """Save a PNG grid every few epochs and hand it to the experiment tracker.

    ``monai.handlers.TensorBoardImageHandler`` does not fit: it shows what passed through the engine, while a preview
    shows the same few samples every time. The random state is left as it was.

    Args:
        render: returns images ``(N, 1 or 3, H, W)`` in [0, 1].
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
        dataset: gives items with an image ``(1, H, W)``.
        key: key of the image.
        columns: pictures in a row.
        n: number of images.
        spread: take images evenly spaced over the dataset instead of its first; neighbouring slices look alike.
        display: turns the pictures ``(N, 1, H, W)`` as people look at them, e.g. ``for_display``; ``None`` leaves them.
        device: where the network is.
    """

    def __init__(
        self,
        autoencoder: Any,
        dataset: Any,
        *,
        key: str = "image",
        columns: int = 8,
        n: int = 8,
        spread: bool = False,
        display: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.autoencoder, self.dataset, self.columns, self.device = autoencoder, dataset, columns, device
        self.key, self.n, self.spread, self.display = key, n, spread, display

    def __call__(self) -> torch.Tensor:
        indices = spread_indices(len(self.dataset), self.n) if self.spread else range(min(self.n, len(self.dataset)))
        images = torch.stack([torch.as_tensor(self.dataset[i][self.key]) for i in indices]).to(self.device)
        with evaluating(self.autoencoder):
            mean, _ = self.autoencoder.encode(images)
            reconstructions = self.autoencoder.decode(mean)
        if self.display is not None:
            images, reconstructions = self.display(images), self.display(reconstructions)
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
        with evaluating(self.network):
            return self.sampler(self.tokens.to(self.device), self.network, seeds=self.seeds)


class TranslationPreview:
    """Rows of condition | generated | true | difference of the same few dataset items, with the same seeds.

    The difference is ``|generated - true|``, times two and clipped. Of several condition channels the first is shown.
    Items stand in the middle of ``n`` equal parts of the dataset: with ``n`` volumes of all their slices, the middle
    slice of each. Use four columns.

    Args:
        network: network to sample from, e.g. the moving average.
        sampler: ``sampler(condition, network, seeds=...)``, condition ``(n, K, X, Y)`` in [0, 1], returns
            ``(n, 1, X, Y)``, or ``(n, 2, X, Y)`` whose first channel is the mean of several samples.
        dataset: gives items with condition ``(K, X, Y)`` and target ``(1, X, Y)``, both in [0, 1].
        condition_key: key of the condition.
        target_key: key of the true image.
        n: number of items.
        seed: seed of the first item; the next ones count up.
        device: where the network is.
    """

    def __init__(
        self,
        network: nn.Module,
        sampler: Callable[..., torch.Tensor],
        dataset: Any,
        *,
        condition_key: str = "condition",
        target_key: str = "image",
        n: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.sampler, self.dataset = network, sampler, dataset
        self.condition_key, self.target_key, self.n, self.seed, self.device = condition_key, target_key, n, seed, device

    def __call__(self) -> torch.Tensor:
        items = [self.dataset[index] for index in spread_indices(len(self.dataset), self.n)]
        condition = torch.stack([torch.as_tensor(item[self.condition_key]) for item in items]).to(self.device)
        true = torch.stack([torch.as_tensor(item[self.target_key]) for item in items]).to(self.device)
        seeds = [self.seed + index for index in range(len(items))]
        with evaluating(self.network):
            generated = self.sampler(condition, self.network, seeds=seeds)[:, :1]
        difference = (2 * (generated - true).abs()).clamp(max=1)
        rows = torch.stack((condition[:, :1], generated, true, difference), dim=1)
        return for_display(rows.flatten(0, 1))


class UnconditionalPreview:
    """Samples without a condition image, with fixed seeds.

    Args:
        network: network to sample from, e.g. the moving average; the samples are made where it is.
        sampler: with ``sample(network, seeds=...) -> (n, 1, X, Y)`` in [0, 1].
        n: number of samples.
        seed: seed of the first sample; the next ones count up.
    """

    def __init__(self, network: nn.Module, sampler: Any, *, n: int = 8, seed: int = 0) -> None:
        self.network, self.sampler = network, sampler
        self.seeds = [seed + index for index in range(n)]

    def __call__(self) -> torch.Tensor:
        with evaluating(self.network):
            return for_display(self.sampler.sample(self.network, seeds=self.seeds)[:, :1])


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch a network to evaluation mode and, whatever happens, back to the mode it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _pad_row(images: torch.Tensor, columns: int) -> torch.Tensor:
    missing = columns - len(images)
    return torch.cat((images, images.new_ones((missing, *images.shape[1:])))) if missing > 0 else images
