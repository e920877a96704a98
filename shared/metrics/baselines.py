# SPDX-License-Identifier: Apache-2.0
"""What a translation has to beat: the condition itself, with a matched histogram, and a plain regression.

A baseline is a callable ``condition (N, C, X, Y) in [0, 1] -> (N, 1, X, Y) in [0, 1]`` on the CPU, or None where it
cannot be had, with a ``note`` that goes into the table. None of them sees the image it is scored against.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from shared.weights import load_weights

_BINS = 4096  # of the training histogram; 16 per level of an 8-bit picture


class Baseline(Protocol):
    """Condition -> estimate, or None and a note that says why."""

    note: str

    def __call__(self, condition: torch.Tensor) -> torch.Tensor | None: ...


def _channel(condition: torch.Tensor, channel: int) -> torch.Tensor:
    """(N, C, X, Y) -> (N, 1, X, Y) in [0, 1].

    Raises:
        ValueError: another number of dimensions, or no such channel.
    """
    if condition.ndim != 4 or not 0 <= channel < condition.shape[1]:
        raise ValueError(f"condition: expected (N, C, X, Y) with C > {channel}, got {tuple(condition.shape)}")
    return condition[:, channel : channel + 1].detach().float().clamp(0, 1)


class CopyCondition:
    """The condition image as it is.

    Args:
        channel: which contrast, where the condition has several.
    """

    def __init__(self, channel: int = 0) -> None:
        self.channel = channel
        self.note = "the condition image itself"

    def __call__(self, condition: torch.Tensor) -> torch.Tensor:
        return _channel(condition, self.channel)


class HistogramMatched:
    """The condition with its grey levels mapped to the average histogram of the training targets.

    Monotone quantile mapping in NumPy: the foreground of each condition image gets the distribution of the foreground
    of all training targets together; background (values up to ``background``) stays as it is. MONAI's
    ``HistogramNormalize`` equalises to a flat histogram, and scikit-image's ``match_histograms`` wants one image as its
    template and counts the background, whose share of the picture would then decide the mapping.

    A monotone mapping cannot swap the order of tissues, which differs between FLAIR and T1w; it gains brightness only.
    The template is fitted at the first call, from training data only: the test image's own T1w is never seen.

    Args:
        training_data: map-style dataset of items with ``image_key``; read lazily.
        image_key: target image, any shape, in [0, 1].
        channel: which contrast of the condition.
        background: values up to this are background, in both contrasts; air is near 0 after robust scaling, not at it.
        max_images: the most training images read, spread evenly over the dataset; None reads all.

    Raises:
        ValueError: (first call) when no training image has foreground.
    """

    def __init__(
        self,
        training_data: Any,
        *,
        image_key: str = "t1w",
        channel: int = 0,
        background: float = 0.05,
        max_images: int | None = 1000,
    ) -> None:
        self.training_data: Any = training_data
        self.image_key, self.channel, self.background, self.max_images = image_key, channel, background, max_images
        self._levels: np.ndarray | None = None
        self._cumulative: np.ndarray | None = None
        self.note = "condition mapped to the foreground histogram of the training targets"

    def fit(self) -> HistogramMatched:
        """Read the training targets and keep their cumulative histogram."""
        count = len(self.training_data)
        used = count if self.max_images is None else min(count, self.max_images)
        counts = np.zeros(_BINS)
        for row in np.linspace(0, max(count - 1, 0), used).round().astype(int):
            image = torch.as_tensor(self.training_data[int(row)][self.image_key]).detach().cpu().numpy().reshape(-1)
            counts += np.histogram(image[image > self.background], bins=_BINS, range=(0.0, 1.0))[0]
        if counts.sum() == 0:
            raise ValueError(
                f"{self.image_key}: expected foreground (values above {self.background:g}) in the training data of "
                f"HistogramMatched, got none in {used} images; scale them to [0, 1] or lower `background`"
            )
        # The value at the centre of a bin has half of the bin's voxels below it.
        self._levels = (np.arange(_BINS) + 0.5) / _BINS
        self._cumulative = (np.cumsum(counts) - counts / 2) / counts.sum()
        occupied = counts > 0
        self._levels, self._cumulative = self._levels[occupied], self._cumulative[occupied]
        self.note = f"condition mapped to the foreground histogram of {used} training targets"
        return self

    def __call__(self, condition: torch.Tensor) -> torch.Tensor:
        if self._levels is None or self._cumulative is None:
            self.fit()
        assert self._levels is not None
        assert self._cumulative is not None
        result = _channel(condition, self.channel).clone().cpu()
        for image in result:
            inside = image > self.background
            if not inside.any():
                continue
            _, inverse, counts = np.unique(image[inside].numpy(), return_inverse=True, return_counts=True)
            # Equal grey levels stay equal: each gets the middle of the quantiles that it covers.
            quantiles = (np.cumsum(counts) - counts / 2) / counts.sum()
            mapped = np.interp(quantiles, self._cumulative, self._levels)
            image[inside] = torch.from_numpy(mapped[inverse.reshape(-1)]).float()
        return result


class LateWeights:
    """Weights of a network that are read at the first use, or may be absent.

    Args:
        network: what is loaded, moved to ``device`` and set to evaluation.
        path: its state dict.
        what: whose weights, for the message.
        device: where the network runs.
        required: True: missing weights are an error, at once. False: :meth:`loaded` says that there are none.
        remedy: how to get the weights.

    Raises:
        FileNotFoundError: ``required`` and no such file.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | os.PathLike[str],
        *,
        what: str,
        device: torch.device | str = "cpu",
        required: bool = True,
        remedy: str = "",
    ) -> None:
        self.network, self.path, self.what = network, Path(path), what
        self.device, self.required, self.remedy = torch.device(device), required, remedy
        if required and not self.path.is_file():
            raise self._missing()
        self._loaded = False

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(f"{self.path}: expected weights of {self.what}, found no file. {self.remedy}")

    @property
    def absence(self) -> str:
        """Words for a table whose row stays empty."""
        return f"not trained: {self.path.name} was not found. {self.remedy}"

    def loaded(self) -> bool:
        """Load the weights unless that is done; whether there are any.

        Raises:
            FileNotFoundError: ``required`` and no such file.
            ValueError: the file holds other weights.
        """
        if not self._loaded:
            if not self.path.is_file():
                if self.required:
                    raise self._missing()
                return False
            load_weights(self.network, self.path, self.remedy)
            self.network.to(self.device).eval()
            self._loaded = True
        return True


class Regression:
    """A network that maps the condition straight to the target, trained on the same data.

    Args:
        network: (B, C, X, Y) -> (B, 1, X, Y); the output is clamped to [0, 1].
        weights_path: its state dict, read at the first call.
        device: where it runs.
        batch_size: images per forward pass.
        required: True: missing weights are an error, at once. False: they are a row without a value that says so.
        remedy: how to get the weights.

    Raises:
        FileNotFoundError: ``required`` and no such file.
        ValueError: (first call) the file holds other weights.
    """

    def __init__(
        self,
        network: nn.Module,
        weights_path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        required: bool = True,
        remedy: str = "Train it with configs/train_regression.json.",
    ) -> None:
        self.network, self.device, self.batch_size = network, torch.device(device), batch_size
        self.weights = LateWeights(
            network, weights_path, what="the regression baseline", device=device, required=required, remedy=remedy
        )
        self.note = "direct regression trained on the same data"

    @torch.no_grad()
    def __call__(self, condition: torch.Tensor) -> torch.Tensor | None:
        if not self.weights.loaded():
            self.note = self.weights.absence
            return None
        parts = [
            self.network(part.to(self.device)).float().clamp(0, 1).cpu() for part in condition.split(self.batch_size)
        ]
        return torch.cat(parts)
